"""What runs inside a Ray cluster: the task that makes one run, and the desk through which driver and tasks communicate.

Ray does not retry a task. The driver sends it again, with what it has received of the run by then. A task whose driver
has died stops after its step, if Ray has not ended it before.
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
"""Seconds between two messages of a task to the desk, so also the time until a request to stop arrives."""
EXACT = ("roundoff", "torch", "transformers")
"""Packages that must have the driver's versions, or the bits of a run would depend on the node that made it."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at one run."""

    request: RunRequest
    number: int
    """Index of the job, in the order of the requests."""
    attempt: int
    """Number of the attempt, from 1."""
    directory: str
    """The driver's working directory, from which relative paths in the settings start."""
    versions: dict[str, str | None]
    """Versions of the driver's packages, by name."""
    probe: Path | None
    """A lock file that the driver holds in the shared directory; None if no directory is shared."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended."""

    phase: Phase | Literal["held"]
    """`held` if another process is at work in the run's directory."""
    message: str = ""
    """Why the attempt ended like this, for the user."""
    warnings: tuple[str, ...] = ()
    """Problems that the run has survived."""
    update: Update | None = None
    """The last changes of the run directory, if files are sent back."""
    parcels: int = 0
    """Number of parcels of changes that were sent before."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Changes of a run directory on their way to the driver."""

    number: int
    """Index among the attempt's parcels, from 0."""
    update: list[Any]
    """Ray's reference to the `Update`. It is inside a list, because Ray would otherwise fetch the update itself."""


@dataclass
class Desk:
    """An actor on the driver's node: it receives heartbeats and parcels from tasks, and tells them whether to stop.

    If it dies, Ray restarts it, and it has forgotten everything; parcels are numbered so that a lost one is noticed.
    """

    attempts: dict[int, int] = field(default_factory=dict)
    """Current attempt by job; an older one, which may have been cut off from the cluster, is told to stop."""
    nodes: dict[int, str] = field(default_factory=dict)
    """Node by job."""
    mail: list[tuple[int, int, Parcel]] = field(default_factory=list)
    """Job, attempt and parcel, for each parcel that the driver has not collected yet."""
    stopping: bool = False
    """Whether all tasks are to stop."""

    def beat(self, number: int, attempt: int, node: str, parcel: Parcel | None) -> bool:
        """Receive a heartbeat of a task and the parcel that came with it; returns whether the task is to stop."""
        if attempt < self.attempts.get(number, 0):
            return True
        self.attempts[number], self.nodes[number] = attempt, node
        if parcel is not None:
            self.mail.append((number, attempt, parcel))
        return self.stopping

    def collect(self) -> tuple[dict[int, tuple[int, str]], list[tuple[int, int, Parcel]]]:
        """Attempt and node of every job that has begun, and the parcels received since the last call."""
        mail, self.mail = self.mail, []
        return {number: (self.attempts[number], node) for number, node in self.nodes.items()}, mail

    def stop(self) -> None:
        """Ask every task to stop after its step."""
        self.stopping = True


def driver_versions() -> dict[str, str | None]:
    """Versions of the driver's packages, with which `check_versions` compares a node's."""
    return {name: package_version(name) for name in PACKAGES}


def obstacles_on_node(requests: Sequence[RunRequest], directory: str) -> list[str]:
    """Body of a Ray task: the reason why each request cannot begin on this node; an empty text for one that can."""
    with chdir(directory if Path(directory).is_dir() else "."):
        return obstacles(requests)


def make_run(assignment: Assignment, desk: Any, before: Update | None) -> AttemptResult:
    """Body of a Ray task: one attempt at one run. Errors are part of the result; none is raised.

    Args:
        assignment: the run, and what the driver knows about it.
        desk: handle of the actor `Desk`.
        before: what the driver has of the run's directory; None if the directory is shared.
    """
    try:
        check_versions(assignment.versions)
        if assignment.probe is not None:
            check_shared(assignment.probe)
        with _files(assignment, before) as (request, outbox):
            post = Post(assignment, desk, outbox)
            with post.beating() as stop:
                result = _attempt(request, stop)
            if outbox is None:
                return result
            if post.trouble:
                message = f"its files cannot be sent back ({post.trouble}); it can be resumed"
                return AttemptResult("failed", message, result.warnings, parcels=post.sent)
            return replace(result, update=outbox.changes(), parcels=post.sent)
    except Exception as error:  # raised around the run; Ray would wrap it in a traceback of its own
        return AttemptResult("failed", message_of(error))


def _attempt(request: RunRequest, stop: Callable[[], bool]) -> AttemptResult:
    """Make the run, unless it is to be stopped already. The run's own failure is part of the result."""
    if stop():
        return AttemptResult("interrupted", "not begun")
    warnings: list[str] = []
    try:
        with warnings_as_text(warnings.append):
            phase, message = execute(request, stop)
        result = AttemptResult(phase, message)
    except RunLockedError:
        result = AttemptResult("held", "another process is at work in its directory")
    except Exception as error:  # the run's own failure, which is sent back with its files
        result = AttemptResult("failed", message_of(error))
    return replace(result, warnings=tuple(warnings))


def check_versions(expected: dict[str, str | None]) -> None:
    """Refuse a node whose packages differ from the driver's.

    Raises:
        RuntimeError: naming the node, the package and both versions.
    """
    for name in EXACT:
        own = package_version(name)
        if own != expected[name]:
            raise RuntimeError(
                f"node {platform.node()} has {name} {own}, the driver {expected[name]}: install the same everywhere"
            )


def check_shared(probe: Path) -> None:
    """Refuse a directory that this node does not share with the driver, or whose locks do not reach across nodes.

    Raises:
        RuntimeError: naming the node, and saying what to do.
    """
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
    """The request as this node makes it, in the shared directory or in a temporary one whose changes are sent back."""
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
            outbox.changes(quiet=True)  # what came from the driver is not sent back
            yield request, outbox
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class Post:
    """A task's connection to the desk: every second it sends a heartbeat, and the changes in the run's directory."""

    assignment: Assignment
    desk: Any
    """Handle of the actor `Desk`."""
    outbox: Outbox | None
    """Changes of the run's directory; None if the directory is shared."""
    sent: int = 0
    """Number of parcels sent."""
    trouble: str = ""
    """Why changes could not be sent; the task then ends after its step. Empty if all is well."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def beating(self) -> Iterator[Callable[[], bool]]:
        """Send heartbeats from now until the end of the block; yields a function that tells whether to stop."""
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
            except Exception as error:  # such as a full object store: the driver must learn of it
                self.trouble = message_of(error)
                self._stop.set()
                return
