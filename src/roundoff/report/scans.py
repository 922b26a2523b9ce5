"""The SRDD scans that runs rest on, each different one once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roundoff.report.arms import Arm
from roundoff.report.scan_picture import scan_picture
from roundoff.runs.outcomes import DamagedRunError

SHOWN = ("metrics", "layers", "ranking", "rank_by", "tokens", "agreement", "warnings")
"""Parts of a scan that the report keeps."""


@dataclass(frozen=True)
class Scan:
    """One scan, and the arms whose first run rests on it."""

    content: dict[str, Any]
    """The parts `SHOWN` of what `LayerScan.to_json` gives."""
    used_by: tuple[str, ...]
    """Ids of experiments."""
    seed: int

    @property
    def title(self) -> str:
        """What was scanned for whom."""
        return f"Scan of {', '.join(self.used_by)} (seed {self.seed}, {self.content['tokens']:,} tokens)"


def find_scans(arms: Sequence[Arm]) -> tuple[tuple[Scan, ...], tuple[str, ...]]:
    """Every different scan of the arms' first runs, and a line for each that cannot be read."""
    found: dict[str, tuple[dict[str, Any], list[str], int]] = {}
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
        found.setdefault(key, (content, [], run.seed))[1].append(arm.experiment.id)
    return tuple(
        Scan({name: content[name] for name in SHOWN}, tuple(ids), seed) for content, ids, seed in found.values()
    ), tuple(damaged)
