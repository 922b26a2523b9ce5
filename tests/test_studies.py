"""The scripts of the studies: the search for a rule of thumb, pooled effects, pages, and rows of evidence."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from benchmarks import mismatch_study, remedies_study, study_page
from benchmarks.mismatch_rule import Dose, rule
from benchmarks.study_page import SCORES, effects, publish, read_study, write_evidence
from benchmarks.table import BEGIN, END

from roundoff import stats
from roundoff.experiments import evidence, load_experiment
from roundoff.experiments.evidence import as_csv, parse
from tests.simulated import World, write_run

SEEDS, PROBLEMS = 4, 250


def simulated(root: Path, arms: dict[str, float]) -> None:
    """Runs of declared experiments with their effects on the deployed score (logits; the clean one has half)."""
    rng, world = np.random.default_rng(0), World()
    difficulty = world.difficulty(rng, PROBLEMS)
    for name, effect in arms.items():
        deployed, clean = (world.arm(rng, difficulty, SEEDS, effect=e) for e in (effect, effect / 2))
        for seed in range(SEEDS):
            write_run(root, load_experiment(name), seed, deployed[seed], clean[seed])


def law(kl: float, factor: float, exponent: float) -> Dose:
    spread = (0.9, 1.0, 1.1, 1.0)
    return Dose(tuple(kl * s for s in spread), tuple(factor * (kl * s) ** exponent for s in spread))


def test_a_law_that_holds_is_found_again() -> None:
    found = rule({str(kl): law(kl, 50.0, 0.8) for kl in (0.003, 0.01, 0.05, 0.2)})
    assert found is not None
    assert found.kl == pytest.approx((1 / 50) ** (1 / 0.8), rel=1e-3)
    assert found.low <= found.kl <= found.high < 1.1 * found.kl
    assert found.exponent == pytest.approx(0.8, rel=1e-3)
    assert found.error < 0.1


def test_arithmetics_that_do_not_agree_give_a_large_error() -> None:
    kinds = {str(kl): law(kl, 50.0, 0.8) for kl in (0.003, 0.05, 0.2)} | {"harmless": law(0.25, 0.01, 0.8)}
    found = rule(kinds)
    assert found is not None
    assert found.error > 5


def test_no_law_is_laid_through_two_points_or_two_seeds() -> None:
    assert rule({str(kl): law(kl, 50.0, 0.8) for kl in (0.003, 0.05)}) is None
    short = {str(kl): Dose((kl, kl), (1.0, 1.0)) for kl in (0.003, 0.05, 0.2)}
    assert rule(short) is None


def test_effects_are_those_against_the_declared_baselines(tmp_path: Path) -> None:
    simulated(tmp_path, {"remedies-clean": 0.0, "remedies-mxfp4": -1.0, "remedies-mxfp4-hadamard": 0.5})
    study = read_study([tmp_path], "remedies")
    found = effects(study.arms)
    assert set(found) == {(key, s) for key in ("remedies-mxfp4", "remedies-mxfp4-hadamard") for s in SCORES}
    assert found["remedies-mxfp4", "deployed"].interval.estimate < -0.05
    assert found["remedies-mxfp4-hadamard", "deployed"].interval.estimate > 0.05
    for effect in found.values():
        assert effect.p_holm is not None and effect.interval.p is not None
        assert effect.p_holm >= effect.interval.p


def test_a_page_gets_its_tables_and_recommend_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(tmp_path / "runs", {"remedies-clean": 0.0, "remedies-mxfp4": -1.0, "remedies-mxfp4-hadamard": 0.5})
    page, rows = tmp_path / "page.md", tmp_path / "evidence.csv"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    monkeypatch.setattr(study_page, "write_evidence", partial(write_evidence, path=rows))
    publish(remedies_study.FAMILY, remedies_study.document, [str(tmp_path / "runs"), "--out", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "stale" not in text
    assert "| `remedies-mxfp4-hadamard` | MXFP4 complete, Hadamard transform on dW | 4 |" in text
    assert str(tmp_path) not in text
    written = {row.experiment: row for row in parse(rows.read_text()) if row.experiment.startswith("remedies")}
    assert written["remedies-mxfp4-hadamard"].baseline == "remedies-mxfp4"
    assert written["remedies-mxfp4-hadamard"].seeds == SEEDS
    assert written["remedies-mxfp4"].deployed.points < -5


def test_rows_of_other_studies_stay(tmp_path: Path) -> None:
    before = evidence()
    write_evidence("remedies", "tiny", [], path=tmp_path / "evidence.csv")
    kept = [row for row in before if not row.experiment.startswith("remedies")]
    assert (tmp_path / "evidence.csv").read_text() == as_csv(kept)


def test_effects_are_pooled_over_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mismatch_study, "GROUPS", {"formats": ["fp8", "mxfp4"], "noise": []})
    arms = {"mismatch-clean": 0.0, "mismatch-fp8": -0.1, "mismatch-mxfp4": -0.8}
    simulated(tmp_path, {**arms, "mismatch-fp8-token": 0.4, "mismatch-mxfp4-token": 0.2})
    study = read_study([tmp_path], "mismatch")
    alone = effects(study.arms)
    mean = np.mean([alone[f"mismatch-{h}-token", "deployed"].interval.estimate for h in ("fp8", "mxfp4")])
    (row,) = (row for row in mismatch_study.pooled(study.arms) if row[0] == "token weights")
    assert row[1].strip("*").startswith(f"+{100 * mean:.1f} [")
    assert row[3:] == ["", ""]


def test_the_figure_has_a_line_for_each_correction_and_no_date(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.study_figure import Line, Point, draw

    level = stats.score(np.random.default_rng(0).random((3, 50)) < 0.7)
    points = (Point(0.01, level, "FP8", False), Point(0.1, level, "5 % noise", True))
    panels = {"deployed": ([Line("none", points), Line("token weights", points)], level)}
    for name in ("a.svg", "b.svg"):
        draw(panels, tmp_path / name, x="KL")
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("token weights", "FP8", "5 % noise"))
    assert text == (tmp_path / "b.svg").read_text().replace("b.svg", "a.svg")
