"""The table of published experiments: every row is declared with its published settings, and runs."""

import csv
import math
from pathlib import Path

import pytest

from roundoff.config import Experiment, Profile
from roundoff.experiments import experiment_ids, families, load_experiment, load_profile, reference_scores
from roundoff.runs.record import Run
from tests.training.test_loop import run, with_training

with (Path(__file__).parents[1] / "golden" / "experiments.csv").open(newline="") as file:
    ROWS = {row["id"]: row for row in csv.DictReader(file)}
OWN = ("quickstart", "ratio", "mismatch", "remedies")
"""Families that nobody else has published."""
REPRESENTATIVES = (
    *("E9b", "E3b", "E12", "E12-2ep", "E14a", "ratio-noise-one"),
    *("mismatch-noise10-unified-geometric", "mismatch-nvfp4-bypass", "remedies-hif4-keep"),
)
"""One experiment of each family, with a scan if the family has one."""


def described(experiment: Experiment) -> dict[str, str]:
    """An experiment in the words of the published table."""
    hardware, aqn, algorithm = experiment.hardware, experiment.aqn, experiment.algorithm
    layers = "" if aqn is None else aqn.layers
    return {
        "id": experiment.id,
        "algorithm": algorithm.name,
        "epochs": str(experiment.epochs),
        "lora": "no" if experiment.lora is None else "yes",
        "weight_format": hardware.precision.weight or "",
        "activation_format": hardware.precision.activation or "",
        "matmul_noise": f"{hardware.matmul_noise.relative_std:g}",
        "aqn_sigma_start": "" if aqn is None else f"{aqn.sigma_start:g}",
        "aqn_sigma_end": "" if aqn is None else f"{aqn.sigma_end:g}",
        "aqn_schedule": "" if aqn is None else aqn.schedule,
        "aqn_layers": layers if layers in ("", "all", "zone") else f"srdd-{layers}",
        "baseline": experiment.baseline or "",
    }


def published(row: dict[str, str]) -> dict[str, str]:
    """A row of the published table with numbers in one form, without its scores and category."""
    numbers = {key: f"{float(row[key]):g}" for key in ("matmul_noise", "aqn_sigma_start", "aqn_sigma_end") if row[key]}
    left_out = ("category", "reference_score_percent", "reference_label")
    return {key: value for key, value in {**row, **numbers}.items() if key not in left_out}


def family(row: dict[str, str]) -> str:
    return "two-epoch" if row["epochs"] == "2" and row["category"] != "hardware" else row["category"]


@pytest.mark.parametrize("name", ROWS)
def test_every_published_row_is_declared_as_it_was(name):
    experiment = load_experiment(name)
    assert described(experiment) == published(ROWS[name])
    assert experiment.family == family(ROWS[name])
    assert experiment.algorithm.ratio == "recomputed"
    if experiment.needs_scan:
        assert (experiment.srdd.metric, experiment.srdd.format) == ("relative_error", "mxfp4")


def test_families_hold_the_rows_and_nothing_else():
    declared = {name for group, names in families().items() if group not in OWN for name in names}
    assert declared == set(ROWS)


def test_reference_scores_are_those_of_the_published_table():
    expected = {
        name: (float(row["reference_score_percent"]), row["reference_label"])
        for name, row in ROWS.items()
        if row["reference_score_percent"]
    }
    assert {name: (r.score_percent, r.label) for name, r in reference_scores().items()} == expected


def test_ratio_family_crosses_hardware_and_modes():
    found = {name: load_experiment(name) for name in families()["ratio"]}
    assert len(found) == 12
    for name, experiment in found.items():
        _, hardware, mode = name.split("-")
        assert experiment.algorithm.ratio == mode
        plain = experiment.algorithm.model_copy(update={"ratio": "recomputed"})
        base = found[f"ratio-{hardware}-recomputed"]
        assert (plain, experiment.hardware, experiment.epochs) == (base.algorithm, base.hardware, base.epochs)
        assert experiment.baseline == (
            base.id if mode != "recomputed" else None if hardware == "clean" else "ratio-clean-recomputed"
        )


def test_profiles_are_of_the_published_scale():
    training = load_profile("gsm8k-1.5b").training
    assert 7473 // training.prompts_per_step == 58  # GRPO: steps an epoch, findings
    dapo = load_experiment("E8a").algorithm
    assert 7473 // (training.prompts_per_step * dapo.oversampling) == 29  # DAPO
    assert training.prompts_per_step // training.minibatches == 32
    assert (training.learning_rate, training.lora_learning_rate, training.warmup_steps) == (5e-7, 1e-5, 10)
    assert (dapo.clip_low, dapo.clip_high, dapo.overlong_buffer * training.max_new_tokens) == (0.2, 0.25, 256)


def two_steps(root: Path, name: str, small: Profile) -> Run:
    """A run of two steps in one epoch, whatever the number of prompts that the experiment draws at a time."""
    experiment = load_experiment(name).model_copy(update={"epochs": 1})
    steps = 1 if experiment.algorithm.ratio == "one" else 2  # `one` makes a step of each of the two minibatches
    problems = 8 * steps * experiment.algorithm.oversampling
    settings = {**small.task.settings, "train_problems": problems}
    profile = small.model_copy(update={"task": small.task.model_copy(update={"settings": settings})})
    return run(root, experiment, with_training(profile, checkpoint_every=2))


def check_two_steps(root: Path, name: str, small: Profile) -> None:
    finished = two_steps(root, name, small)
    assert finished.is_final
    assert finished.evaluated_steps == (0, 2)
    assert [row["step"] for row in finished.metrics] == [0, 1, 2]
    assert all(len(finished.evaluation(step).outcomes) == 32 for step in (0, 2))
    last = finished.metrics[-1]
    assert (last["deployed"], last["clean"]) == (finished.evaluation(2).deployed, finished.evaluation(2).clean)
    assert all(math.isfinite(value) for value in last.values() if isinstance(value, float))
    assert (finished.scan is not None) == finished.experiment.needs_scan


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_one_experiment_of_each_family_runs_two_steps(tmp_path, small, name):
    check_two_steps(tmp_path, name, small)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in experiment_ids() if name not in REPRESENTATIVES])
def test_every_other_experiment_runs_two_steps(tmp_path, small, name):
    check_two_steps(tmp_path, name, small)
