"""One run on several processes (ranks): what they exchange. A single process is the same code with a count of 1.

Every rank holds the whole model, samples and rewards its share of the prompts, and differentiates its share of each
minibatch. Rollouts are exchanged, so that which groups a batch takes is decided on the same data everywhere; gradients
are summed, each divided by the *whole* minibatch beforehand, so that the number of ranks changes a result by float32
rounding alone. Random numbers have keys and global ids (`numerics.rng`), which do not know ranks either.

Processes are started by torchrun, which tells them by environment variables who they are; no other is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from roundoff.config import ConfigError
from roundoff.errors import message_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BUCKET_ELEMENTS = 1 << 25
"""Gradient elements that are summed in one message at most (128 MiB of float32)."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, and which of them this is."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Where tensors that come from other ranks are put."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run directory."""
        return self.index == 0

    def share(self, size: int) -> slice:
        """This rank's part of `size` things in a row; parts differ by one at most, and may be empty."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order, on every rank."""
        if self.count == 1:
            return [value]
        import torch

        buffer = io.BytesIO()
        torch.save(value, buffer)
        received = self._exchange(buffer.getvalue())
        return [torch.load(io.BytesIO(b), map_location=self.device, weights_only=False) for b in received]

    def first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on every rank; an error that it raises is raised on every rank."""
        if self.count == 1:
            return make()
        result: Any = None
        error: Exception | None = None
        if self.leads:
            try:
                result = make()
            except Exception as caught:  # raised again below, on every rank
                error = caught
        shown = None if error is None else _portable(error)
        result, shown = self.gather((result, shown))[0]
        if error is not None:
            raise error
        if shown is not None:
            raise shown
        return result  # type: ignore[no-any-return]

    def everywhere(self, make: Callable[[], T]) -> T:
        """What each rank makes for itself; an error of any of them ends all, so that none waits for one that is gone.

        Raises:
            ConfigError: for an error of another rank, such as a model that its machine lacks.
        """
        if self.count == 1:
            return make()
        error: Exception | None = None
        try:
            made = make()
        except Exception as caught:  # raised again below, when the others know of it
            error = caught
        said = self.gather(None if error is None else message_of(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise ConfigError(f"rank {rank}: {text}")
        return made

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(flag))

    def agree(self, what: str, value: str) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            ConfigError: on every rank, if it is not.
        """
        values = self.gather(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            rank = different[0]
            raise ConfigError(f"ranks disagree on {what}: rank 0 has {values[0]}, rank {rank} has {values[rank]}")

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of every rank, of one shape, along a new first axis [count, ...], on every rank."""
        if self.count == 1:
            return tensor[None]
        rows = tensor.new_zeros(self.count, *tensor.shape)
        rows[self.index] = tensor
        self._sum(rows)  # one exchange; `gather` pickles, and sends lengths first
        return rows

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the ranks, in place; None counts as zero, unless it is None on every rank."""
        if self.count == 1:
            return
        import torch

        trained = list(parameters)
        here = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
        self._sum(here)
        wanted = [p for p, ranks in zip(trained, here.tolist(), strict=True) if ranks]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in wanted if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self._sum(flat)
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _exchange(self, content: bytes) -> list[bytes]:
        import torch.distributed as dist

        received: list[Any] = [None] * self.count
        dist.all_gather_object(received, content)
        return received

    def _sum(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor)


ALONE = Ranks()
"""The single process."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of this launch; `device` is the kind of device (`cpu`, `cuda`, ...) that the run is on.

    `cpu` exchanges through gloo; `cuda` through NCCL, one device a rank (written after the documentation, never run).

    Raises:
        ConfigError: if this machine has fewer devices than ranks, or no backend for them.
    """
    import torch
    import torch.distributed as dist

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
    if device not in backends:
        raise ConfigError(f"several ranks need device cpu or cuda, but it is {device!r}")
    if device == "cuda":
        local, present = dist.get_node_local_rank(), torch.cuda.device_count()
        if local >= present:
            raise ConfigError(f"this machine has {present} CUDA devices, one for each of the first {present} ranks")
        torch.cuda.set_device(local)
    dist.init_process_group(backends[device])
    try:
        place = device if device == "cpu" else f"{device}:{torch.cuda.current_device()}"
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype after another, up to a bucket's elements at a time."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if full or (bucket and bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _portable(error: Exception) -> Exception:
    """The error, or one of the same words where it cannot be sent."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (its own bytes)
    except Exception:  # a class may refuse to be pickled, or to be made again, in ways of its own
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
