"""Where runs came from: commands, commits, machines and versions, each combination once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from roundoff.runs.record import Run


@dataclass(frozen=True)
class Source:
    """Where runs came from: one commit, machine, set of versions and command."""

    command: str
    commit: str
    machine: str
    versions: str
    runs: int


def find_sources(runs: Iterable[Run]) -> tuple[Source, ...]:
    """Every distinct origin, that of most runs first."""
    counts = Counter(_source(run) for run in runs)
    return tuple(replace(source, runs=count) for source, count in counts.most_common())


def _source(run: Run) -> Source:
    known = run.provenance
    machine, versions = known.get("machine"), known.get("versions")
    versions = dict(versions) if isinstance(versions, dict) else {}
    parts = [str(v) for v in machine.values()] if isinstance(machine, dict) else [str(machine or "?")]
    if known.get("python"):
        versions = {"python": known["python"], **versions}
    return Source(
        command=str(known.get("command") or "not recorded"),
        commit=str(known.get("commit") or "not recorded"),
        machine=", ".join([*parts, *([f"kernels for {known['kernels']}"] if known.get("kernels") else [])]),
        versions=", ".join(f"{name} {version}" for name, version in versions.items() if version) or "not recorded",
        runs=0,
    )
