"""What `roundoff compare` does: finds two arms by name and compares them."""

from __future__ import annotations

from pathlib import Path

from roundoff.config import ConfigError
from roundoff.report.pair import Pair, find_arm, make_pair


def compare(treatment: str, baseline: str, root: Path, *, margin: float | None = None) -> Pair:
    """The comparison of two arms, each named by an experiment's id, a directory above runs, or a run's directory.

    Args:
        treatment: what is judged.
        baseline: what it is judged against.
        root: directory in which ids are looked up.
        margin: a loss that would be acceptable (fraction); None: none is tested.

    Raises:
        ConfigError: if a name stands for no arm or for several, if both stand for the same runs, or if the arms cannot
            be compared.
    """
    arms = find_arm(treatment, root), find_arm(baseline, root)
    paths = [{run.path.resolve() for run in arm.runs} for arm in arms]
    if paths[0] & paths[1]:
        raise ConfigError(
            f"A ({treatment}) and B ({baseline}) are the same runs, or share some: name two different experiments or "
            "directories (`roundoff runs` lists the runs)"
        )
    return make_pair(*arms, margin=margin)
