"""The child's side of `tasks.limited_process`: it reads questions and answers each within its limits."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

SPARE_SECONDS = 1
"""Processor time between the alarm, which the process survives, and the limit that ends it (s)."""

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A function that answers a question; both are JSON objects."""


class _LateError(BaseException):
    """Time is up. It is no `Exception`, so that no package swallows it."""


def serve(start: Callable[[], Answer]) -> None:
    """Answer the parent's questions until it is gone; `start` imports what is needed and returns the function."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that no text a package prints is taken for an answer
    seconds, memory = json.loads(sys.argv[2])

    def send(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        answer = start()
        _limit_memory(memory)
    except Exception as error:  # an import may raise anything, and the parent tells the user
        send({"failed": f"{type(error).__name__}: {error}"})
        return
    send({"ready": True})
    for line in sys.stdin.buffer:
        send(_within(seconds, answer, json.loads(line)))


def _within(seconds: float, answer: Answer, question: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer to a question, or the limit that it exceeded."""
    late = {"exceeded": f"it took more than {seconds:g} s"}
    try:
        try:
            _set_alarm(seconds)
            return answer(question)
        finally:
            _set_alarm(0)
    except _LateError:
        return late
    except MemoryError:
        return {"exceeded": "it took too much memory"}
    except RecursionError:
        return {"exceeded": "it is nested too deeply"}


def _set_alarm(seconds: float) -> None:
    """Set an alarm after this much processor time, and end the process a little later; 0 cancels the alarm."""
    if not hasattr(signal, "setitimer"):
        return
    import resource

    if seconds:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used + seconds) + 1 + SPARE_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
        signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _ring(number: int, frame: FrameType | None) -> None:
    raise _LateError


def _limit_memory(size: int) -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size if hard < 0 else min(size, hard), hard))
    except (ImportError, ValueError, OSError):  # on a platform without such limits, only time is limited
        return
