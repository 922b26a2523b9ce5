"""A run directory under several ranks: the first rank reads and writes it, and the others are told.

One rule covers every public method and property of `RunDirectory`, also those that are added later: the first rank
calls it, and all ranks return what it returned or raise what it raised. Two things differ from the rule. The attributes
that are set when a directory is opened, such as its path, are the same on every rank, so nothing is sent. And a failure
is written without telling the others (`set_status`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roundoff.parallel.ranks import Ranks
from roundoff.runs.directory import RunDirectory
from roundoff.runs.record import Status


class LedRunDirectory(RunDirectory):
    """A run directory that the first rank holds, reads and writes on behalf of all ranks.

    Every rank must call the same methods in the same order, because each call is a collective operation.
    """

    def __init__(self, held: RunDirectory, ranks: Ranks) -> None:
        super().__init__(held.path.parents[2], held.experiment, held.profile, held.seed)
        self._held, self._ranks = held, ranks

    def __enter__(self) -> LedRunDirectory:
        self._ranks.first(lambda: self._held.__enter__() and None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks.leads:
            self._held.__exit__()

    def set_status(self, status: Status) -> Status:
        """Write `status` as `RunDirectory.set_status` does; the first rank writes a failure without telling the others.

        The other ranks may be waiting for another message, which this one would be taken for, or may have failed
        themselves.
        """
        if status.state == "failed":
            return self._held.set_status(status) if self._ranks.leads else status
        return self._ranks.first(lambda: self._held.set_status(status))


def _led(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `RunDirectory` that the first rank calls for all ranks."""

    @wraps(method)
    def on_the_first(self: LedRunDirectory, *arguments: Any, **options: Any) -> Any:
        return self._ranks.first(lambda: method(self._held, *arguments, **options))

    return on_the_first


def _lead_every_method() -> None:
    """Replace each public method and property that `LedRunDirectory` has not defined itself."""
    for name, member in vars(RunDirectory).items():
        if name.startswith("_") or name in vars(LedRunDirectory):
            continue
        if isinstance(member, property) and member.fget is not None:
            setattr(LedRunDirectory, name, property(_led(member.fget)))
        elif callable(member):
            setattr(LedRunDirectory, name, _led(member))


_lead_every_method()
