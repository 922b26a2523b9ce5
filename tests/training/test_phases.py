"""Runs whose rollouts, training and evaluation are on hardware of their own."""

import pytest

from roundoff.config import ConfigError, Hardware
from roundoff.experiments import load_experiment, load_profile, recipe_names
from roundoff.planning.cost_model import CostModel, default_assumptions
from roundoff.planning.machine import MACHINES
from roundoff.planning.shape import model_shape
from roundoff.training.before_first_step import phase_warnings
from tests.training.test_loop import reproducible, run

PHASES = """
[hardware.rollout.precision]
weight = "nvfp4"
activation = "nvfp4"
[hardware.training.precision]
weight = "bf16"
gradient = "mxfp8_e4m3"
gradient_rounding = "stochastic"
"""


def experiment(tmp_path, text=PHASES, base='"quickstart-clean"', name="mine"):
    path = tmp_path / f"{name}.toml"
    path.write_text(f"extends = {base}\n{text}")
    return load_experiment(str(path))


@pytest.mark.parametrize("base", ['"quickstart-clean"', '["quickstart-clean", "qerl"]'])
def test_a_run_with_phases_goes_on_to_the_same_bits(tmp_path, small, base):
    mine = experiment(tmp_path, base=base)
    whole = run(tmp_path / "whole", mine, small)
    run(tmp_path / "parts", mine, small, stop_after=1)
    resumed = run(tmp_path / "parts", mine, small)
    assert reproducible(resumed.path) == reproducible(whole.path)
    assert resumed.evaluation(2) == whole.evaluation(2)


def test_each_phase_of_a_run_computes_on_its_own_hardware(tmp_path, small):
    """The first scores tell evaluation's hardware, the first rewards that of rollouts, the gradient training's."""
    w4 = '{ weight = "mxfp4", activation = "mxfp4" }'
    runs = {
        name: run(tmp_path / name, experiment(tmp_path, text, name=name), small)
        for name, text in {
            "plain": "",
            "all": f"[hardware]\nprecision = {w4}",
            "rollout": f"[hardware]\nrollout.precision = {w4}\nevaluation.precision = 'none'",
            "training": f"[hardware]\ntraining.precision = {w4}",
            "evaluation": f"[hardware]\nevaluation.precision = {w4}",
        }.items()
    }
    start = {name: one.evaluation(0) for name, one in runs.items()}
    assert start["rollout"] == start["training"] == start["plain"] != start["all"] == start["evaluation"]
    first = {name: one.metrics[1] for name, one in runs.items()}
    keys = "reward", "response_tokens", "truncated"

    def sampled(name):
        return [first[name][key] for key in keys]

    assert sampled("rollout") == sampled("all") != sampled("plain") == sampled("training") == sampled("evaluation")
    assert first["training"]["grad_norm"] != first["plain"]["grad_norm"] == first["evaluation"]["grad_norm"]
    clean = [o.clean_response for o in runs["all"].evaluation(0).outcomes]
    assert clean == [o.response for o in start["plain"].outcomes]


def test_a_score_on_hardware_that_no_rollout_had_is_said(tmp_path, small):
    mine = experiment(tmp_path, "[hardware.evaluation.precision]\nweight = 'int4'\n")
    with pytest.warns(UserWarning, match="evaluation on weight int4, rollouts on none"):
        finished = run(tmp_path, mine, small)
    assert any("hardware that no rollout had" in line for line in finished.status.warnings)


@pytest.mark.parametrize("table", ["rollout", "training"])
def test_replayed_noise_is_refused_where_phases_draw_other_noise(tmp_path, table):
    noise = f"[hardware.{table}.matmul_noise]\nrelative_std = 0.02\n"
    with pytest.raises(ConfigError, match=r"algorithm\.ratio = 'replayed' means nothing here: rollouts and training"):
        experiment(tmp_path, noise)
    assert experiment(tmp_path, "algorithm.ratio = 'rollout'\n" + noise).hardware.has_phases
    same = "[hardware.matmul_noise]\nrelative_std = 0.02\n[hardware.training.matmul_noise]\nbackward = false\n"
    assert experiment(tmp_path, same).algorithm.ratio == "replayed"


def test_the_scan_and_kept_layers_follow_the_rollouts(tmp_path, small):
    text = '[hardware.rollout.precision]\nweight = "mxfp4"\nactivation = "mxfp4"\nkeep = "srdd:2"\n'
    finished = run(tmp_path, experiment(tmp_path, text), small)
    assert finished.scan["hardware"]["precision"]["weight"] == "mxfp4"
    assert finished.is_final


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(tmp_path, small, name):
    finished = run(tmp_path, experiment(tmp_path, "", base=f'["quickstart-clean", "{name}"]'), small)
    assert finished.is_final and finished.metrics[1]["grad_norm"] > 0


def test_the_settings_of_a_run_are_recorded_with_their_phases(tmp_path, small):
    mine = experiment(tmp_path, PHASES + '[hardware.evaluation]\nprecision = "none"\n')
    with pytest.warns(UserWarning, match="no rollout had"):
        finished = run(tmp_path, mine, small)
    assert finished.experiment == mine and finished.experiment.hardware.of("evaluation").changes_nothing


def test_the_estimate_knows_phases(tmp_path):
    scale = load_profile("gsm8k-1.5b")
    costs = CostModel(
        scale, model_shape(scale.model), MACHINES["a100-80gb"], 1, (7473, 1319), default_assumptions(scale)
    )
    noise = "algorithm.ratio = 'recomputed'\n[hardware.{}.matmul_noise]\nrelative_std = 0.05\n"
    plain, rollout, training = (
        costs.estimate(experiment(tmp_path, text, name=name), steps=10)
        for name, text in (("a", ""), ("b", noise.format("rollout")), ("c", noise.format("training")))
    )
    assert rollout.parts["sampling"] > plain.parts["sampling"] == training.parts["sampling"]
    assert training.parts["update"] > plain.parts["update"] == rollout.parts["update"]
    weights = [
        costs.estimate(experiment(tmp_path, text, name=name), steps=10).memory["quantized weights"]
        for name, text in (("d", "[hardware.precision]\nweight = 'mxfp4'"), ("e", PHASES))
    ]
    assert weights[1] == 2 * weights[0] > 0


def test_a_score_on_hardware_that_no_rollout_had_names_what_differs() -> None:
    rules = [{"match": ["layers.0.*"], "precision": {"weight": "int8"}}]
    chip = {"precision": {"weight": "mxfp4", "activation": "mxfp4"}, "rules": rules}
    (line,) = phase_warnings(Hardware.model_validate({**chip, "evaluation": {"precision": {"weight": "nvfp4"}}}))
    assert line.endswith("no rollout had: precision.weight nvfp4 in evaluation, mxfp4 in rollouts")
    (line,) = phase_warnings(Hardware.model_validate({**chip, "evaluation": {"rules": []}}))
    assert line.endswith("rules none in evaluation, layers.0.*: weight int8 in rollouts")
    (line,) = phase_warnings(Hardware.model_validate({**chip, "evaluation": "none"}))
    assert "evaluation on none (plain arithmetic), rollouts on weight mxfp4" in line
    assert not phase_warnings(Hardware.model_validate(chip))
