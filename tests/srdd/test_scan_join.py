"""The SRDD scan joined to a run: multipliers in rollouts, layers kept in high precision, the file it is kept in."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from roundoff.actions.evaluate import score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.config import ConfigError, Experiment, validate
from roundoff.experiments import load_experiment
from roundoff.models.calibration import calibration_batches, calibration_texts
from roundoff.models.load import load_model
from roundoff.srdd import LayerScan, scan
from roundoff.tasks import TASKS
from roundoff.trackers import scalars
from roundoff.training.preparation import aqn_plan, prepare
from tests.training.test_loop import reproducible, run

training = import_module("roundoff.training.loop")  # `roundoff.training.loop` is the function
TOKENS = 100


def changed(name: str, **tables) -> Experiment:
    """A packaged experiment with settings replaced, one epoch long."""
    content = load_experiment(name).model_dump(exclude_none=True)
    for table, settings in tables.items():
        content[table] = {**content.get(table, {}), **settings}
    return validate(Experiment, {**content, "epochs": 1}, source="test")


TARGETED = changed("quickstart-noise-aqn", aqn={"layers": "targeted"}, srdd={"format": "mxfp4", "tokens": TOKENS})
KEPT = changed("quickstart-mxfp4", hardware={"precision": {"weight": "mxfp4", "activation": "mxfp4", "keep": "srdd:2"}})


def scan_by_hand(small, **options) -> LayerScan:
    """The scan of an experiment without the machinery of a run."""
    loaded = load_model("tiny")
    texts = calibration_texts(TASKS["arithmetic"](small.task.settings))
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=TOKENS, batches=4)
    return scan(loaded.model, batches, "mxfp4", **options)


def test_multipliers_are_those_of_a_scan_of_the_tasks_training_texts(small):
    session = prepare(TARGETED, small, 0)
    assert session.aqn.at(1).multipliers == session.aqn.at(2).multipliers == scan_by_hand(small).multipliers("targeted")
    assert sorted(session.aqn.at(1).multipliers.values()) == [0, 0, 0, 0, 0, 1]


def test_metric_and_direction_are_the_experiments(small):
    classic = {"format": "mxfp4", "tokens": TOKENS, "metric": "relative_error", "direction": "robust"}
    session = prepare(changed("quickstart-noise-aqn", aqn={"layers": "targeted"}, srdd=classic), small, 0)
    expected = scan_by_hand(small, rank_by="relative_error").multipliers("targeted", direction="robust")
    assert session.aqn.at(1).multipliers == expected


def test_zone_moves_at_half_of_the_run(small):
    zone = changed("quickstart-noise-aqn", aqn={"layers": "zone"}, srdd={"tokens": TOKENS})
    session = prepare(zone, small, 0)
    plan = aqn_plan(zone, 4, 4, session.scan)
    zones = [{layer for layer, factor in plan.at(step).multipliers.items() if factor} for step in (1, 2, 3, 4)]
    assert zones[0] == zones[1]
    assert zones[2] == zones[3]
    assert zones[0] | zones[2] == set(range(6))
    assert not zones[0] & zones[2]


def test_rollouts_are_noisy_in_the_targeted_layer_only(small, monkeypatch):
    session = prepare(TARGETED, small, 0)
    session.aqn = replace(session.aqn, curve=(0.05, 0.05))
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    perturbed = set()

    def watched(model, *arguments, **options):
        perturbed.update(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
        return real(model, *arguments, **options)

    real = training.sample
    monkeypatch.setattr(training, "sample", watched)
    training.sample_batch(session, 1)
    (target,) = [layer for layer, factor in session.aqn.at(1).multipliers.items() if factor]
    assert {name.split(".")[2] for name in perturbed - {"model.norm.weight"}} == {str(target)}
    assert "model.norm.weight" in perturbed  # outside of the layers: multiplier 1


def test_true_sigma_of_each_layer_is_logged(tmp_path, small):
    finished = run(tmp_path, TARGETED, small)
    factors = LayerScan.from_json(finished.scan).multipliers("targeted")
    row = finished.metrics[2]
    assert row["sigma"] > 0
    assert row["sigma_layers"] == [row["sigma"] * factors[layer] for layer in range(6)]
    assert "sigma_layers" not in run(tmp_path, load_experiment("quickstart-noise-aqn"), small).metrics[2]


def test_trackers_receive_one_scalar_per_layer():
    row = {"step": 3, "time": "now", "sigma": 0.1, "trained": True, "sigma_layers": [0.1, 0.0]}
    assert scalars(row) == {"sigma": 0.1, "trained": 1.0, "sigma/layer.0": 0.1, "sigma/layer.1": 0.0}


def test_a_scan_is_read_back_with_the_same_bits(small):
    found = scan_by_hand(small, exact=True)
    back = LayerScan.from_json(json.loads(json.dumps(found.to_json())))
    assert back == found
    with pytest.raises(ConfigError, match="not a scan"):
        LayerScan.from_json({"tokens": 3})


def test_a_resumed_run_reads_its_scan_and_ends_with_the_same_bits(tmp_path, small, monkeypatch):
    whole = run(tmp_path / "whole", TARGETED, small)
    stopped = run(tmp_path / "parts", TARGETED, small, stop_after=1)
    assert stopped.scan == whole.scan
    monkeypatch.setattr("roundoff.training.preparation.experiment_scan", None)  # a second scan would be an error
    resumed = run(tmp_path / "parts", TARGETED, small)
    assert reproducible(resumed.path) == reproducible(whole.path)
    assert resumed.evaluation(2) == whole.evaluation(2)


def test_the_most_sensitive_layers_are_kept_in_high_precision(tmp_path, small):
    session = prepare(KEPT, small, 0)
    expected = session.scan.most_sensitive(2)
    quantized = {e.name.split(".")[2] for e in session.policy.installed.entries if e.weight}
    assert quantized == {str(layer) for layer in range(6) if layer not in expected}
    assert session.aqn.at(1).multipliers is None
    finished = run(tmp_path, KEPT, small)
    assert LayerScan.from_json(finished.scan).most_sensitive(2) == expected
    assert score_subject(open_subject(str(finished.path))).agrees


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"hardware": {"precision": {"weight": "mxfp4", "keep": "srdd:7"}}}, "keeps more layers than the model has"),
        ({"hardware": {"precision": {"keep": "srdd:1"}}}, "does nothing without a format"),
        ({"aqn": {"sigma_start": 0.1, "sigma_end": 0.1, "layers": "targeted"}}, "leaves every forward pass as it is"),
    ],
)
def test_a_scan_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, small, tables, expected):
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path, changed("quickstart-clean", **tables), small)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_a_table_of_a_scan_that_nothing_uses_is_refused():
    with pytest.raises(ConfigError, match=r"\[srdd\] that nothing uses"):
        changed("quickstart-noise-aqn", srdd={"tokens": 3})
