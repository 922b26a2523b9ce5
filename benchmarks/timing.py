"""Interleaved timing: what is compared runs alternately, so that a slow spell of the machine meets all alike.

Times are of the one thread that works (`time.thread_time`: user and system): on an idle machine the same as on the
wall, and on a shared one free of the time in which other processes ran.
"""

import statistics
import time
from collections.abc import Callable


def medians(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each work in milliseconds, after one untimed run of each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        function()
    for _ in range(repeats):
        for name, function in work.items():
            start = time.thread_time()
            function()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def per_call(function: Callable[[], object], calls: int = 2000, repeats: int = 5) -> float:
    """Time of one call in microseconds: the fastest of a few loops."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            function()
        best = min(best, time.thread_time() - start)
    return 1e6 * best / calls


def verdict(ratio: float, goal: float | None) -> str:
    """`1.07  goal <= 1.15  reached`, or by how much it is missed."""
    if goal is None:
        return f"{ratio:6.2f}"
    reached = "reached" if ratio <= goal else f"MISSED by {100 * (ratio / goal - 1):.0f} %"
    return f"{ratio:6.2f}   goal <= {goal:<5} {reached}"
