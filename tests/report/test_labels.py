"""Arms with the same id can be told apart wherever the report names them."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from roundoff.config import Experiment, Profile
from roundoff.report import plots, words
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.report.render import markdown, page, terminal_table
from roundoff.runs.record import find_runs
from tests.simulated import experiment, profile, write_run

PLAIN = experiment("plain", title="Plain arithmetic")
HARDWARE = {"matmul_noise": {"relative_std": 0.1}}
NOISE = experiment("noise", title="10 % noise", baseline="plain", hardware=HARDWARE)


def reported(root: Path, arms: list[tuple[Experiment, Profile]]) -> Report:
    rng = np.random.default_rng(0)
    for what, scale in arms:
        share = 0.8 if what.id == "plain" else 0.4
        for seed in range(3):
            solved = (rng.random(100) < share).astype(float)
            write_run(root, what, seed, solved, solved, scale=scale)
    return build_report(find_runs([root])[0])


@pytest.fixture(scope="module")
def two_profiles(tmp_path_factory: pytest.TempPathFactory) -> Report:
    large = profile(prompts_per_step=64).model_copy(update={"name": "large"})
    arms = [(what, scale) for scale in (profile(), large) for what in (PLAIN, NOISE)]
    return reported(tmp_path_factory.mktemp("runs"), arms)


def printed(report: Report) -> str:
    console = Console(width=300, record=True, file=StringIO())
    console.print(terminal_table(report))
    return console.export_text()


def test_an_id_that_occurs_once_is_named_alone(tmp_path: Path) -> None:
    report = reported(tmp_path, [(PLAIN, profile()), (NOISE, profile())])
    assert [(row.label, row.name, row.against) for row in report.rows] == [
        ("plain", "Plain arithmetic", ""),
        ("noise", "10 % noise", "plain"),
    ]


def test_arms_under_two_profiles_are_named_with_their_profile(two_profiles: Report) -> None:
    assert {(row.label, row.name, row.against) for row in two_profiles.rows} == {
        ("plain under tiny", "Plain arithmetic under tiny", ""),
        ("plain under large", "Plain arithmetic under large", ""),
        ("noise under tiny", "10 % noise under tiny", "plain under tiny"),
        ("noise under large", "10 % noise under large", "plain under large"),
    }


def test_every_text_tells_them_apart(two_profiles: Report) -> None:
    (answer,) = words.answers(two_profiles)
    for name in ("tiny", "large"):
        assert f"10 % noise under {name}: costs" in answer.answer
        assert f"noise under {name} against plain under {name}" in printed(two_profiles)
        assert f"| 10 % noise (noise under {name}) |" in markdown(two_profiles)
        assert f"10 % noise under {name} against plain under {name}" in page(two_profiles)
    lines = [line.label for chart in plots.learning_charts(two_profiles.rows) for line in chart.lines]
    assert len(set(lines)) == len(lines) == 4


def test_arms_under_one_profile_are_named_with_the_hash_of_their_settings(tmp_path: Path) -> None:
    report = reported(tmp_path, [(PLAIN, profile()), (PLAIN, profile(prompts_per_step=64))])
    one, two = (row.label for row in report.rows)
    assert one != two
    assert all(f"plain under {row.key.removeprefix('plain/')}" == row.label for row in report.rows)
