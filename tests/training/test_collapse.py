"""Runs that collapsed: the rule at its edges, its rates on simulated arms, and what an interval says of them."""

import numpy as np
import pytest

from roundoff import stats
from tests.simulated import WORLDS, World, collapse_rates


@pytest.mark.parametrize(
    ("scores", "starts", "expected"),
    [
        ([0.70, 0.72, 0.05], [0.59, 0.60, 0.58], (2,)),
        ([0.70, 0.72, 0.05], None, (2,)),  # below half of the best run
        ([0.70, 0.72, 0.45], [0.59, 0.60, 0.58], (2,)),  # below the start, and apart
        ([0.70, 0.72, 0.45], None, ()),  # without a start that is a bad seed
        ([0.70, 0.72, 0.56], [0.59, 0.60, 0.58], ()),  # 3.5 points below the start: less than 5
        ([0.02, 0.03, 0.70], [0.59, 0.59, 0.59], (0, 1)),  # two of three
        ([0.02, 0.03, 0.01], [0.59, 0.59, 0.59], ()),  # every run is down: one group
        ([0.70, 0.05], [0.59, 0.59], ()),  # two runs tell nothing
        ([0.70], [0.59], ()),
        ([0.04, 0.03, 0.0], [0.02, 0.02, 0.02], ()),  # less than 10 points apart
        ([0.70, 0.72, 0.05], [None, None, float("nan")], (2,)),
        ([0.70, 0.70, 0.70], [0.59, 0.59, 0.59], ()),
        ([1.0, 1.0, 0.0], [1.0, 1.0, 1.0], (2,)),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], ()),
        ([0.80, 0.55, 0.40], [0.5] * 3, ()),  # no farther from the others than these are from each other
    ],
)
def test_a_run_far_below_the_others_and_its_start_has_collapsed(
    scores: list[float], starts: list[float] | None, expected: tuple[int, ...]
) -> None:
    assert stats.collapsed_runs(scores, problems=1000, starts=starts) == expected


def test_few_problems_ask_for_a_wider_gap() -> None:
    """Of 20 problems, 8 and 3 differ by 25 points, within three standard errors of 16."""
    assert stats.collapsed_runs([0.4, 0.4, 0.15], problems=20) == ()
    assert stats.collapsed_runs([0.4, 0.4, 0.15], problems=2000) == (2,)


def test_an_interval_says_how_many_runs_collapsed() -> None:
    rng = np.random.default_rng(0)
    healthy, other = ((rng.random((4, 500)) < 0.7).astype(float) for _ in range(2))
    bad = healthy.copy()
    bad[2] = rng.random(500) < 0.02
    assert [stats.score(y).collapsed for y in (healthy, bad, bad[:2])] == [0, 1, 0]
    assert stats.paired_benefit(bad, other).collapsed == stats.paired_benefit(other, bad).collapsed == 1
    assert stats.paired_benefit(bad, bad).collapsed == 2
    assert stats.score(bad, collapsed=0).collapsed == 0  # who knows the starts decides


@pytest.mark.parametrize("seeds", [3, 5])
def test_nearly_every_collapse_is_found_and_no_healthy_run_is_called_one(seeds: int) -> None:
    """300 arms of each kind: no false alarm among healthy ones (below 1 % at 95 %), and nearly every collapse seen."""
    found = collapse_rates(World(), seeds, repeats=300, problems=256, start=3)
    assert found.false_alarms == 0
    assert found.hits > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("world", WORLDS)
def test_collapse_is_found_in_every_world_with_few_false_alarms(world: str, seeds: int) -> None:
    found = collapse_rates(WORLDS[world], seeds, repeats=3000, problems=512, start=5)
    assert found.false_alarms < 0.01
    assert found.hits > 0.97
