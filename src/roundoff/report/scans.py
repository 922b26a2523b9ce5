"""Finds the different SRDD scans that runs depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundoff.report.arms import Arm
from roundoff.report.scan_picture import scan_picture
from roundoff.runs.outcomes import DamagedRunError

SHOWN = ("metrics", "layers", "ranking", "rank_by", "tokens", "agreement", "warnings")
"""The parts of a scan that the report keeps."""


@dataclass(frozen=True)
class Scan:
    """One scan, and the arms whose first run depends on it."""

    content: dict[str, Any]
    """The parts `SHOWN` of the result of `LayerScan.to_json`."""
    used_by: tuple[str, ...]
    """Labels of the arms."""
    seed: int
    """Seed of the run that holds it."""

    @property
    def title(self) -> str:
        """A heading that says which arms the scan is for."""
        return f"Scan of {', '.join(self.used_by)} (seed {self.seed}, {self.content['tokens']:,} tokens)"


def find_scans(arms: Sequence[Arm], labels: Mapping[str, str]) -> tuple[tuple[Scan, ...], tuple[str, ...]]:
    """The different scans of the arms' first runs, and a line for each scan that cannot be read.

    Args:
        arms: the arms.
        labels: what to call each arm, by its key.
    """
    scans: dict[str, tuple[dict[str, Any], list[str], int]] = {}
    damaged = []
    for arm in arms:
        run = arm.runs[0]
        try:
            content = run.scan
            if content is None:
                continue
            checked = {name: content[name] for name in SHOWN}
            scan_picture(checked, "", standalone=False)
        except (DamagedRunError, KeyError, TypeError, ValueError) as error:
            damaged.append(f"{run.path}/scan.json is left out: {error}")
            continue
        key = json.dumps(checked, sort_keys=True)
        scans.setdefault(key, (checked, [], run.seed))[1].append(labels[arm.key])
    return tuple(Scan(content, tuple(used_by), seed) for content, used_by, seed in scans.values()), tuple(damaged)
