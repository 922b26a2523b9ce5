"""What the processes (ranks) of one run exchange. A single process runs the same code with a count of 1.

Every rank holds the whole model, samples and rewards its share of the prompts, and computes the gradient of its share
of each minibatch. The ranks exchange their rollouts, so that all of them choose the groups of a batch from the same
data. Gradients are summed, each having been divided by the size of the *whole* minibatch, so the number of ranks
changes a result by float32 rounding only. Random numbers depend on keys and global ids (`numerics.rng`), not on ranks.

torchrun starts the processes and tells each its rank through environment variables; no other variables are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Shaped

from roundoff.config import ConfigError
from roundoff.errors import message_of
from roundoff.parallel.messages import MessageError, decode, encode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BUCKET_ELEMENTS = 1 << 25
"""Largest number of gradient elements that are summed in one message (128 MiB of float32)."""
PADDING = 4
"""Messages of all ranks are padded to one length if that sends at most this many bytes for each byte of content."""
VALUE, REFUSED = b"v", b"r"
"""First byte of a message: a value follows, or the reason why there is none."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, seen from one of them."""

    index: int = 0
    """Which of them this process is."""
    count: int = 1
    """Number of processes."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run directory."""
        return self.index == 0

    def share(self, size: int) -> slice:
        """This rank's part of `size` consecutive items; parts differ by at most one item, and may be empty."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in the order of the ranks; every rank gets all of them, with tensors in host memory.

        Raises:
            MessageError: on every rank, if one rank's value cannot be sent (`roundoff.parallel.messages`).
        """
        if self.count == 1:
            return [value]
        try:
            content = VALUE + encode(value)
        except MessageError as error:  # the other ranks wait for a message, so tell them
            content = REFUSED + f"rank {self.index}: {error}".encode()
        received = self._exchange(content)
        for message in received:
            if message.startswith(REFUSED):
                raise MessageError(message.removeprefix(REFUSED).decode())
        return [decode(message.removeprefix(VALUE)) for message in received]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, the only one that calls it; its error is raised on every rank."""
        if self.count == 1:
            return make()
        result: Any = None
        error: Exception | None = None
        if self.leads:
            try:
                result = make()
            except Exception as caught:  # raised again below, on every rank
                error = caught
        result, received = self.gather((result, error))[0]
        if error is not None:
            raise error
        if received is not None:
            raise received
        return result  # type: ignore[no-any-return]

    def everywhere(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank; every rank calls it for itself.

        An error on any rank ends all of them, so that none waits for one that is gone.

        Raises:
            ConfigError: if `make` fails on another rank, for example because its machine lacks the model.
        """
        if self.count == 1:
            return make()
        error: Exception | None = None
        try:
            result = make()
        except Exception as caught:  # raised again below, once the other ranks know about it
            error = caught
        messages = self.gather(None if error is None else message_of(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ConfigError(f"rank {rank}: {message}")
        return result

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(flag))

    def agree(self, what: str, value: str) -> None:
        """Check that a value is the same on all ranks; `what` names it in the message.

        Raises:
            ConfigError: on every rank, if the values differ.
        """
        values = self.gather(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            rank = different[0]
            raise ConfigError(f"ranks disagree on {what}: rank 0 has {values[0]}, rank {rank} has {values[rank]}")

    def stack(self, tensor: Shaped[torch.Tensor, "*shape"]) -> Shaped[torch.Tensor, "ranks ..."]:
        """The tensors of all ranks, which have one shape, stacked in the order of the ranks; every rank gets them."""
        if self.count == 1:
            return tensor[None]
        rows = tensor.new_zeros(self.count, *tensor.shape)
        rows[self.index] = tensor
        self._sum(rows)  # one exchange, whereas `gather` would send lengths first
        return rows

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the ranks, in place. None counts as zero, but stays None if it is None on every rank."""
        if self.count == 1:
            return
        import torch

        trained = list(parameters)
        here = torch.tensor([float(p.grad is not None) for p in trained], device="cpu")  # by gloo, beside the device
        self._sum(here)
        summed = [p for p, ranks in zip(trained, here.tolist(), strict=True) if ranks]
        for parameter in summed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in summed if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self._sum(flat)
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _exchange(self, content: bytes) -> list[bytes]:
        """The bytes of all ranks in the order of the ranks; every rank gets all of them."""
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
        else:  # one rank sends nearly all of it, such as a checkpoint: the others do not pad to its size
            received = [own if rank == self.index else own.new_empty(n) for rank, n in enumerate(lengths)]
            for rank, part in enumerate(received):
                dist.broadcast(part, rank)
        return [part[:length].numpy().tobytes() for part, length in zip(received, lengths, strict=True)]

    def _sum(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        import torch.distributed as dist

        dist.all_reduce(tensor)


ALONE = Ranks()
"""The only process of a run."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, for as long as the context lasts.

    On `cpu` the ranks exchange data through gloo. On `cuda` they use NCCL and one device per rank; that follows the
    documentation and has never been run.

    Args:
        device: the kind of device that the run is on (`cpu` or `cuda`).

    Yields:
        The ranks of this launch.

    Raises:
        ConfigError: if this machine has fewer devices than ranks, or there is no backend for the device.
    """
    import torch
    import torch.distributed as dist

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
    if device not in backends:
        raise ConfigError(f"several ranks need device cpu or cuda, but it is {device!r}")
    if device == "cuda":
        local, present = dist.get_node_local_rank(), torch.cuda.device_count()
        if local >= present:
            raise ConfigError(
                f"each rank needs its own CUDA device, but this machine has {present} for {local + 1} or more ranks"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(backends[device])
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one dtype, in buckets of at most `BUCKET_ELEMENTS` elements or of a single tensor."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if full or (bucket and bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
