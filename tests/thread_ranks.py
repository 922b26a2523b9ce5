"""Ranks that are threads of one process: the loop under several ranks, without starting processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from roundoff.parallel.ranks import Ranks


@dataclass
class Meeting:
    """Where the threads exchange what they have; each round is met twice, so that no one runs ahead."""

    count: int
    barrier: threading.Barrier = field(init=False)
    slots: list = field(init=False)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.count, timeout=120)
        self.slots = [None] * self.count

    def exchange(self, index: int, value):
        self.slots[index] = value
        self.barrier.wait()
        result = list(self.slots)
        self.barrier.wait()
        return result


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    meeting: Meeting | None = None

    def _exchange(self, content: bytes) -> list[bytes]:
        return self.meeting.exchange(self.index, content)

    def _sum(self, tensor: torch.Tensor) -> None:
        parts = self.meeting.exchange(self.index, tensor.clone())
        tensor.copy_(torch.stack(parts).sum(0))


def on_ranks(count: int, work: Callable[[Ranks], object]) -> list:
    """What `work` returns on each rank; an exception of one breaks the meeting of all and is raised."""
    meeting = Meeting(count)

    def guarded(index: int):
        try:
            return work(ThreadRanks(index, count, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(guarded, index) for index in range(count)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [f.result() for f in futures]
