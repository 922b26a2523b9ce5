"""Finds where runs came from: the different combinations of command, commit, machine and versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from roundoff.runs.record import Run


@dataclass(frozen=True)
class Source:
    """One command, commit, machine and set of versions."""

    command: str
    commit: str
    machine: str
    versions: str
    runs: int
    """Number of runs that came from there."""


def find_sources(runs: Iterable[Run]) -> tuple[Source, ...]:
    """The different sources of the runs, beginning with that of most runs."""
    counts = Counter(_source(run) for run in runs)
    return tuple(replace(source, runs=count) for source, count in counts.most_common())


def _source(run: Run) -> Source:
    """The source of one run, with a count of 0."""
    provenance = run.provenance
    machine, versions = provenance.get("machine"), provenance.get("versions")
    versions = dict(versions) if isinstance(versions, dict) else {}
    parts = [str(v) for v in machine.values()] if isinstance(machine, dict) else [str(machine or "?")]
    if provenance.get("kernels"):
        parts.append(f"kernels for {provenance['kernels']}")
    if provenance.get("python"):
        versions = {"python": provenance["python"], **versions}
    return Source(
        command=str(provenance.get("command") or "not recorded"),
        commit=str(provenance.get("commit") or "not recorded"),
        machine=", ".join(parts),
        versions=", ".join(f"{name} {version}" for name, version in versions.items() if version) or "not recorded",
        runs=0,
    )
