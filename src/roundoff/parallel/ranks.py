"""One run on several processes (ranks): what they exchange. A single process is the same code with a count of 1.

Every rank holds the whole model, samples and rewards its share of the prompts, and differentiates its share of each
minibatch. Rollouts are exchanged, so that which groups a batch takes is decided on the same data everywhere; gradients
are summed, each divided by the *whole* minibatch beforehand, so that the number of ranks changes a result by float32
rounding alone. Random numbers have keys and global ids (`numerics.rng`), which do not know ranks either.

Processes are started by torchrun, which tells them by environment variables who they are; no other is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from roundoff.config import ConfigError
from roundoff.errors import message_of
from roundoff.parallel.messages import MessageError, decode, encode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BUCKET_ELEMENTS = 1 << 25
"""Gradient elements that are summed in one message at most (128 MiB of float32)."""
PADDING = 4
"""Bytes sent for each byte of content at most, when messages of all ranks are padded to one length."""
VALUE, REFUSED = b"v", b"r"
"""First byte of a message: a value follows, or why there is none."""


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
        """The value of every rank, in their order, on every rank.

        Raises:
            MessageError: on every rank, if the value of one cannot be sent (`roundoff.parallel.messages`).
        """
        if self.count == 1:
            return [value]
        try:
            content = VALUE + encode(value)
        except MessageError as error:  # the others wait for a message, so that they are told
            content = REFUSED + f"rank {self.index}: {error}".encode()
        received = self._exchange(content)
        for message in received:
            if message.startswith(REFUSED):
                raise MessageError(message.removeprefix(REFUSED).decode())
        return [decode(message.removeprefix(VALUE), self.device) for message in received]

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
        result, shown = self.gather((result, error))[0]
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
        self._sum(rows)  # one exchange; `gather` sends lengths first
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
        """The bytes of every rank, in their order, on every rank."""
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        lengths = [int(size) for size in sizes]
        if max(lengths) * self.count <= PADDING * sum(lengths):
            padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
            received = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(received, padded)
        else:  # one rank has nearly all of it, such as a checkpoint: nobody else pads to its size
            received = [own if rank == self.index else own.new_empty(n) for rank, n in enumerate(lengths)]
            for rank, part in enumerate(received):
                dist.broadcast(part, rank)
        return [part[:length].numpy().tobytes() for part, length in zip(received, lengths, strict=True)]

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
