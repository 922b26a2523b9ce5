"""Ends a run whose reward hangs, and names the problem and the response.

A reward of the user's own runs in this process, where it may use anything it likes, such as a model or an open file. It
cannot be killed separately. So when one response has taken longer than the limit:

1. If the reward runs in the main thread, a signal interrupts it (in another thread nothing can). `RewardTimeoutError`
   then ends the run as any other error does, and the checkpoints are kept.
2. If it does not stop within `GRACE_SECONDS`, the message is written to standard error and the process ends. 3. If not
even that is possible, because a call into C holds Python's lock (`10**10**10`), `faulthandler`, which does not
   need the lock, writes where each thread stands and ends the process.
"""

import faulthandler
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from roundoff.errors import RoundoffError

GRACE_SECONDS = 10.0
"""Time between the signal and the end of the process (s)."""
SHOWN = 80
"""Number of characters of a response that an error shows."""
EXIT_CODE = 70
"""Exit status of the process (EX_SOFTWARE of sysexits.h)."""


class RewardTimeoutError(RoundoffError, RuntimeError):
    """The reward of one response took longer than the task's `reward_seconds`."""


class StopRewardError(BaseException):
    """Raised by the signal. It is no `Exception`, so that no reward swallows it."""


class Watchdog:
    """Watches the rewards of one batch of responses, from `__enter__` to `__exit__`."""

    def __init__(self, task: str, seconds: float) -> None:
        self._task, self._seconds = task, seconds
        self._begun = 0
        self._current = ("", "")
        self._late: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._previous: Any = None
        self._signalled = hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread()

    def begin(self, problem: str, response: str) -> None:
        """Note that the reward of this response is computed from now on; called before each reward."""
        self._current = (problem, response)
        self._begun += 1

    def __enter__(self) -> Self:
        if self._signalled:
            self._previous = signal.signal(signal.SIGUSR1, self._stop)
        self._ring_after(self._seconds + 2 * GRACE_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        if sys.__stderr__ is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._signalled:
            signal.signal(signal.SIGUSR1, self._previous if self._previous is not None else signal.SIG_DFL)
        if self._late is not None and (error is None or isinstance(error, StopRewardError)):
            raise RewardTimeoutError(self._late) from None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._late is not None and not self._done.is_set():
            raise StopRewardError
        if callable(self._previous):
            self._previous(number, frame)

    def _watch(self) -> None:
        seen, late_for = -1, 0.0
        pause = min(self._seconds / 4, 1.0)
        while not self._done.wait(pause):
            if self._begun != seen:
                seen, late_for = self._begun, 0.0
                self._ring_after(self._seconds + 2 * GRACE_SECONDS)
                continue
            late_for += pause
            if late_for >= self._seconds and self._late is None:
                self._late = self._message()
            if self._late is not None:
                self._interrupt(late_for)

    def _interrupt(self, late_for: float) -> None:
        if late_for >= self._seconds + GRACE_SECONDS or not self._signalled:
            print(self._late, "It could not be stopped, so this process ends.", file=sys.__stderr__, flush=True)
            os._exit(EXIT_CODE)
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGUSR1)

    @staticmethod
    def _ring_after(seconds: float) -> None:
        """Have `faulthandler`, which needs no lock, end the process after this time unless called again before."""
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def _message(self) -> str:
        problem, response = self._current
        return (
            f"task {self._task}: the reward of problem {problem!r} took more than {self._seconds:g} s for the response "
            f"{response[-SHOWN:]!r}: fix the reward, or set reward_seconds of the task's class (None: no limit)."
        )
