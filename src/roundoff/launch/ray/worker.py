"""What runs inside a Ray cluster: the task that makes one run, and the desk through which driver and tasks speak.

A task is sent once; it is the driver that sends it again, with what has reached it of the run by then. A task whose
driver has died stops after its step, if Ray has not ended it before.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from roundoff.errors import message_of, warnings_as_text
from roundoff.launch.ray.sync import Outbox, Update, put
from roundoff.launch.readiness import obstacles
from roundoff.launch.request import Phase, RunRequest, execute
from roundoff.runs.directory import RunLockedError
from roundoff.runs.provenance import PACKAGES, machine, package_version

BEAT_S = 1.0
"""Seconds between two messages of a task to the desk: how long a request to stop takes to arrive."""
EXACT = ("roundoff", "torch", "transformers")
"""Packages whose versions must be those of the driver, or a run's bits would depend on the node it went to."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at one run."""

    request: RunRequest
    number: int
    """Of the job, in the order of the requests."""
    attempt: int
    directory: str
    """The driver's working directory: relative paths in the settings are meant from there."""
    versions: dict[str, str | None]
    """Of the driver's packages."""
    probe: Path | None
    """A lock file that the driver holds in the shared directory; None where nothing is shared."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    phase: Phase | Literal["held"]
    """`held`: another process is at work in the run's directory."""
    message: str = ""
    warnings: tuple[str, ...] = ()
    """What went wrong and was survived."""
    update: Update | None = None
    """The last changes, where files are sent back."""
    parcels: int = 0
    """Parcels of changes sent before."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Changes of a run directory on their way to the driver."""

    number: int
    """Of the attempt, from 0."""
    update: list[Any]
    """Ray's reference to the `Update`; in a list, or Ray would fetch it for the desk."""


@dataclass
class Desk:
    """An actor beside the driver: tasks tell it that they live, and learn from it whether to stop.

    It is started again if it dies, and then knows nothing; parcels are numbered so that a lost one is noticed.
    """

    attempts: dict[int, int] = field(default_factory=dict)
    """The attempt at each job that counts; an older one, cut off from the cluster for a while, is told to stop."""
    nodes: dict[int, str] = field(default_factory=dict)
    mail: list[tuple[int, int, Parcel]] = field(default_factory=list)
    stopping: bool = False

    def beat(self, number: int, attempt: int, node: str, parcel: Parcel | None) -> bool:
        """Note a sign of life and what came with it; whether the task is to stop."""
        if attempt < self.attempts.get(number, 0):
            return True
        self.attempts[number], self.nodes[number] = attempt, node
        if parcel is not None:
            self.mail.append((number, attempt, parcel))
        return self.stopping

    def collect(self) -> tuple[dict[int, tuple[int, str]], list[tuple[int, int, Parcel]]]:
        """Attempt and node of every job that has begun, and the parcels since the last call."""
        mail, self.mail = self.mail, []
        return {number: (self.attempts[number], node) for number, node in self.nodes.items()}, mail

    def stop(self) -> None:
        """Ask every task to stop after its step."""
        self.stopping = True


def driver_versions() -> dict[str, str | None]:
    """Versions that a node must have as well."""
    return {name: package_version(name) for name in PACKAGES}


def obstacles_on_node(requests: Sequence[RunRequest], directory: str) -> list[str]:
    """Body of a Ray task: for each request, why it could not begin on this node, or an empty text."""
    with chdir(directory if Path(directory).is_dir() else "."):
        return obstacles(requests)


def make_run(assignment: Assignment, desk: Any, before: Update | None) -> Outcome:
    """Body of a Ray task: one attempt at one run; whatever goes wrong in it is an outcome."""
    try:
        _check_versions(assignment.versions)
        if assignment.probe is not None:
            _check_shared(assignment.probe)
        with _files(assignment, before) as (request, outbox):
            post = Post(assignment, desk, outbox)
            with post.beating() as stop:
                outcome = _attempt(request, stop)
            if outbox is None:
                return outcome
            if post.trouble:
                message = f"its files cannot be sent back ({post.trouble}); it can be resumed"
                return Outcome("failed", message, outcome.warnings, parcels=post.sent)
            return replace(outcome, update=outbox.changes(), parcels=post.sent)
    except Exception as error:  # of what lies around the run; Ray would wrap it in a traceback of its own
        return Outcome("failed", message_of(error))


def _attempt(request: RunRequest, stop: Callable[[], bool]) -> Outcome:
    """Make the run, unless it is to be stopped already; its own failure is an outcome."""
    if stop():
        return Outcome("interrupted", "not begun")
    warnings: list[str] = []
    try:
        with warnings_as_text(warnings.append):
            phase, message = execute(request, stop)
        outcome = Outcome(phase, message)
    except RunLockedError:
        outcome = Outcome("held", "another process is at work in its directory")
    except Exception as error:  # the run's own failure; its files go back with it
        outcome = Outcome("failed", message_of(error))
    return replace(outcome, warnings=tuple(warnings))


def _check_versions(expected: dict[str, str | None]) -> None:
    for name in EXACT:
        found = package_version(name)
        if found != expected[name]:
            raise RuntimeError(
                f"node {platform.node()} has {name} {found}, the driver {expected[name]}: install the same everywhere"
            )


def _check_shared(probe: Path) -> None:
    """Refuse a directory that this node does not share with the driver, or where locks end at the node's border."""
    advice = "give --runs a directory on a file system that all nodes share, or use --ray-sync"
    if not probe.exists():
        raise RuntimeError(f"node {platform.node()} does not see {probe.parent} as the driver does: {advice}")
    try:
        with FileLock(probe, timeout=0):
            pass
    except Timeout:
        return
    raise RuntimeError(
        f"node {platform.node()} can take a lock in {probe.parent} that the driver holds, so two processes could write "
        f"one run: mount it with locks that reach across nodes (Lustre: -o flock), or {advice}"
    )


@contextmanager
def _files(assignment: Assignment, before: Update | None) -> Iterator[tuple[RunRequest, Outbox | None]]:
    """The request as this node makes it: in the shared directory, or in one of its own that is sent back."""
    request = assignment.request
    request = replace(
        request, provenance={**request.provenance, "machine": machine(), "ray": {"node": platform.node()}}
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    home = assignment.directory if Path(assignment.directory).is_dir() else "."
    with chdir(home):
        if before is None:
            yield request, None
            return
        scratch = Path(tempfile.mkdtemp(prefix="roundoff-"))
        try:
            request = replace(request, root=scratch)
            put(before, request.path)
            outbox = Outbox(request.path)
            outbox.changes(quiet=True)  # what came from the driver need not go back
            yield request, outbox
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class Post:
    """A task's connection to the desk: that it lives, every second, and what has changed in its directory."""

    assignment: Assignment
    desk: Any
    outbox: Outbox | None
    sent: int = 0
    """Parcels."""
    trouble: str = ""
    """Why the desk could not be reached, or changes not be sent, if so: the task then ends after its step."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def beating(self) -> Iterator[Callable[[], bool]]:
        """Beat now and every second until the end of the block; yields whether to stop."""
        self._beat(None)
        thread = threading.Thread(target=self._keep_beating, daemon=True)
        thread.start()
        try:
            yield self._stop.is_set
        finally:
            self._done.set()
            with suppress(RuntimeError):
                thread.join()

    def _beat(self, parcel: Parcel | None) -> None:
        import ray

        assignment = self.assignment
        if ray.get(self.desk.beat.remote(assignment.number, assignment.attempt, platform.node(), parcel)):
            self._stop.set()

    def _keep_beating(self) -> None:
        import ray

        while not self._done.wait(BEAT_S):
            try:
                changes = self.outbox.changes() if self.outbox is not None else None
                if changes:
                    self._beat(Parcel(self.sent, [ray.put(changes)]))
                    self.sent += 1
                else:
                    self._beat(None)
            except ray.exceptions.RayActorError:  # the driver is gone, and the desk with it
                self._stop.set()
                return
            except Exception as error:  # a full object store, an unreadable file: the driver must not miss it unsaid
                self.trouble = message_of(error)
                self._stop.set()
                return
