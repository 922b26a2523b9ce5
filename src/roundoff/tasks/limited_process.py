"""A child process that answers questions within hard limits of time and memory, and is replaced when it exceeds one.

A response can make computer algebra evaluate `10^{10^{10}}`. Neither a signal nor a thread can stop it inside a call
into C, and signals reach only the main thread. Ending the process is the only way that works on every platform and from
every thread. The two processes exchange JSON through pipes, one object per line.

One question is limited in processor time (by an alarm, then by `RLIMIT_CPU`) and in address space (by `RLIMIT_AS`),
where the platform has them, and on every platform in wall-clock time, after which the parent kills the child.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundoff.config import ConfigError
from roundoff.errors import RoundoffError

START_SECONDS = 120.0
"""Wall-clock limit for the child to import what it needs (s)."""
CHUNK = 1 << 16
"""Number of bytes read at a time."""
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main()"


class LimitExceededError(RoundoffError, RuntimeError):
    """A question took too much time or memory, or ended the child process; the message says which."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one question."""

    seconds: float
    """Processor time (s)."""
    clock_seconds: float
    """Wall-clock time (s)."""
    memory: int
    """Address space of the child (bytes)."""


class LimitedProcess:
    """A child process that runs `main` of a module (`tasks.limited_child`).

    It starts with the first question and is used from then on. Any thread may ask; questions are answered one after the
    other. A forked copy of this process does not use the same child, but starts its own.
    """

    def __init__(self, module: str, limits: Limits) -> None:
        self._module, self._limits = module, limits
        self._lock = threading.Lock()
        self._child: _Child | None = None
        if hasattr(os, "register_at_fork"):
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget(reference))

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The child's answer to a question.

        Raises:
            LimitExceededError: if the question exceeded a limit; the next one goes to a new child.
            ConfigError: if the child cannot start.
        """
        line = json.dumps(question).encode() + b"\n"
        with self._lock:
            try:
                answer = self._asked(line)
            except BaseException:  # also an interrupt: a late answer must not be taken for the next question's
                self._end()
                raise
        if "exceeded" in answer:
            raise LimitExceededError(str(answer["exceeded"]))
        return answer

    def close(self) -> None:
        """End the child if there is one; a later question starts another."""
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None if there is none."""
        return self._child.process.pid if self._child is not None else None

    def forget(self) -> None:
        """Leave the child to the process that this one was forked from; called in the copy, right after a fork."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            child.close()
            child.process.returncode = 0  # so that this process does not wait for it

    def _asked(self, line: bytes) -> dict[str, Any]:
        """The child's answer to a line, from a new child if the old one has ended."""
        if self._child is None or self._child.process.poll() is not None:
            self._end()
            self._child = self._started()
        try:
            self._child.write(line)
        except OSError:
            raise LimitExceededError("the process that scores it has ended") from None
        answer = self._child.read(self._limits.clock_seconds)
        if answer is None:
            raise LimitExceededError(f"it took more than {self._limits.seconds:g} s, or too much memory")
        return answer

    def _started(self) -> "_Child":
        """A new child that is ready for questions."""
        limits = json.dumps([self._limits.seconds, self._limits.memory])
        path = json.dumps([str(Path(entry).absolute()) for entry in sys.path])  # the parent may have changed it
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _BOOT.format(self._module), path, limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal reaches only the parent, which ends the child
        )
        self._child = child = _Child(process)
        ready = child.read(START_SECONDS)
        if ready is None or "failed" in ready:
            why = ready["failed"] if ready else f"it ended, or did not answer within {START_SECONDS:g} s"
            raise ConfigError(f"the process that scores responses ({self._module}) cannot start: {why}")
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.process.kill()
            child.process.wait()
            child.close()


def _forget(reference: "weakref.ref[LimitedProcess]") -> None:
    process = reference()
    if process is not None:
        process.forget()


@dataclass(slots=True)
class _Child:
    """A process with its two pipes, which are read with a time limit."""

    process: "subprocess.Popen[bytes]"
    _rest: bytearray = field(default_factory=bytearray)
    """Output that is not a whole line yet."""
    _chunks: "queue.SimpleQueue[bytes] | None" = None
    """On Windows, where one cannot wait for a pipe: the output that a thread has read from it."""

    def __post_init__(self) -> None:
        if os.name != "posix":
            self._chunks = queue.SimpleQueue()
            threading.Thread(target=self._read_on, args=(self._chunks,), daemon=True).start()

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None  # it is a pipe
        view = memoryview(line)
        while view:
            view = view[self.process.stdin.write(view) :]

    def read(self, seconds: float) -> dict[str, Any] | None:
        """The next line of JSON, or None if the child ended or is late."""
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            chunk = self._chunk(max(0.0, until - time.monotonic()))
            if not chunk:
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _chunk(self, seconds: float) -> bytes:
        """Output of the child; empty if it ended or is late."""
        assert self.process.stdout is not None
        if self._chunks is not None:
            try:
                return self._chunks.get(timeout=seconds)
            except queue.Empty:
                return b""
        poll = select.poll()  # unlike select(), it accepts descriptors above 1023
        poll.register(self.process.stdout, select.POLLIN)
        return os.read(self.process.stdout.fileno(), CHUNK) if poll.poll(seconds * 1000) else b""

    def _read_on(self, chunks: "queue.SimpleQueue[bytes]") -> None:
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), CHUNK):
            chunks.put(chunk)
        chunks.put(b"")
