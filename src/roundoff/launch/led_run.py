"""A run directory under several ranks: the first one reads and writes, the others learn of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from roundoff.parallel.ranks import Ranks
from roundoff.runs.checkpoint import Checkpoint
from roundoff.runs.directory import RunDirectory
from roundoff.runs.health import Health
from roundoff.runs.outcomes import Evaluation
from roundoff.runs.record import Run, Status


class LedRunDirectory(RunDirectory):
    """A run directory that the first rank holds and writes; every rank learns what it read, and of its errors."""

    def __init__(self, held: RunDirectory, ranks: Ranks) -> None:
        super().__init__(held.path.parents[2], held.experiment, held.profile, held.seed)
        self._held, self._ranks = held, ranks

    def __enter__(self) -> LedRunDirectory:
        self._ranks.first(lambda: self._held.__enter__() and None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks.leads:
            self._held.__exit__()

    def start(self, provenance: Mapping[str, Any], total_steps: int, warnings: Sequence[str] = ()) -> Status:
        """As `RunDirectory.start`."""
        return self._ranks.first(lambda: self._held.start(provenance, total_steps, warnings))

    def set_status(self, status: Status) -> Status:
        """As `RunDirectory.set_status`; a failure is written without a word to the others.

        They may be waiting for something else, which this would be taken for, or have failed themselves.
        """
        if status.state == "failed":
            return self._held.set_status(status) if self._ranks.leads else status
        return self._ranks.first(lambda: self._held.set_status(status))

    def health(self) -> Health:
        """As `RunDirectory.health`."""
        return self._ranks.first(self._held.health)

    def write_scan(self, content: Mapping[str, Any]) -> None:
        """As `RunDirectory.write_scan`."""
        self._ranks.first(lambda: self._held.write_scan(content))

    def scan(self) -> dict[str, Any] | None:
        """As `RunDirectory.scan`."""
        return self._ranks.first(self._held.scan)

    def write_preflight(self, content: Mapping[str, Any]) -> None:
        """As `RunDirectory.write_preflight`."""
        self._ranks.first(lambda: self._held.write_preflight(content))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """As `RunDirectory.append_metrics`."""
        self._ranks.first(lambda: self._held.append_metrics(row))

    def rewind(self, step: int) -> None:
        """As `RunDirectory.rewind`."""
        self._ranks.first(lambda: self._held.rewind(step))

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """As `RunDirectory.write_evaluation`."""
        self._ranks.first(lambda: self._held.write_evaluation(evaluation))

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any], *, keep: int
    ) -> None:
        """As `RunDirectory.save_checkpoint`: every rank holds the same tensors."""
        self._ranks.first(lambda: self._held.save_checkpoint(step, tensors, state, keep=keep))

    def take_over(self, parent: Run, provenance: Mapping[str, Any], total_steps: int) -> None:
        """As `RunDirectory.take_over`."""
        self._ranks.first(lambda: self._held.take_over(parent, provenance, total_steps))

    def load_checkpoint(self) -> Checkpoint | None:
        """As `RunDirectory.load_checkpoint`; it is sent to the other ranks, which need not see the disk."""
        return self._ranks.first(self._held.load_checkpoint)

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """As `RunDirectory.save_adapter`."""
        self._ranks.first(lambda: self._held.save_adapter(write))

    def evaluation(self, step: int) -> Evaluation:
        """As `RunDirectory.evaluation`."""
        return self._ranks.first(lambda: self._held.evaluation(step))

    def save_diagnostics(self, name: str, content: Mapping[str, Any]) -> Path:
        """As `RunDirectory.save_diagnostics`."""
        return self._ranks.first(lambda: self._held.save_diagnostics(name, content))
