"""The pre-flight of AQN: what it measures, what it warns about, and that it changes nothing."""

import math
from importlib import import_module

import pytest
import torch

from roundoff.aqn.noise import noise_shares
from roundoff.aqn.preflight import preflight, rounded_away
from roundoff.config import AQN, Hardware
from roundoff.experiments import load_experiment
from roundoff.hardware import install
from roundoff.models.load import LoadedModel, load_model
from roundoff.numerics.rng import Key
from roundoff.training.before_first_step import rounding_warnings
from roundoff.training.preparation import prepare
from tests.families import build, every_family
from tests.training.test_loop import reproducible, run

KEY = Key.from_seed(3)
TEXTS = ["37-12+5=25>30", "8+9=17", "12-37+5=-25>-20", "40+3-2=43>41"]
ABSOLUTE = AQN(sigma_start=0.05, sigma_end=0.05)
RELATIVE = AQN(sigma_start=0.05, sigma_end=0.05, noise="relative")


@pytest.fixture
def tiny() -> LoadedModel:
    return load_model("tiny")


def measured(loaded, aqn=ABSOLUTE, sigma=0.05, multipliers=None):
    return preflight(loaded, TEXTS, aqn, sigma, multipliers, KEY)


def test_it_grows_with_sigma_and_is_small_where_noise_is_small(tiny):
    small, large = measured(tiny, sigma=0.001), measured(tiny, sigma=0.5)
    assert 0 < small.kl < 1e-3 < large.kl
    # the KL is quadratic in a small perturbation: twice the noise (same draws), four times the KL, up to third order
    assert measured(tiny, sigma=0.002).kl == pytest.approx(4 * small.kl, rel=0.1)
    assert small.tokens == sum(len(tiny.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert small.kl == pytest.approx(sum(small.kl_draws) / 4)
    assert len(set(small.kl_draws)) == 4


def test_hardware_is_off_under_aqn_and_measured_separately(tiny):
    plain = measured(tiny)
    install(tiny.model, Hardware.model_validate({"precision": {"weight": "mxfp4", "activation": "mxfp4"}}), seed=0)
    deployed = measured(tiny)
    assert plain.hardware_kl is None
    assert (deployed.kl, deployed.noise_share) == (plain.kl, plain.noise_share)
    assert 0.05 < deployed.hardware_kl < 5


def test_the_model_and_a_second_measurement_are_the_same_bits(tiny):
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    first, second = measured(tiny), measured(tiny)
    assert first == second
    assert all(torch.equal(p, before[name]) for name, p in tiny.model.named_parameters())
    assert all(p.requires_grad for p in tiny.model.parameters())


def test_an_absolute_sigma_drowns_small_weights_and_a_relative_one_does_not(tiny):
    assert measured(tiny).warnings() == ()
    norm = tiny.model.model.layers[2].input_layernorm
    with torch.no_grad():
        norm.weight.mul_(0.02 / norm.weight.square().mean().sqrt())
    found = measured(tiny)
    assert found.drowned == {"model.layers.2.input_layernorm": pytest.approx(0.05 / 0.02, rel=1e-4)}
    assert (
        "drowns 1 of 13 weights (noise over weight up to 2.5, in model.layers.2.input_layernorm)" in found.warnings()[0]
    )
    assert set(measured(tiny, RELATIVE).noise_share.values()) == {0.05}


def test_a_sigma_that_moves_the_model_far_is_warned_about(tiny):
    (last,) = [line for line in measured(tiny, sigma=2.0).warnings() if "nats" in line]
    assert "aqn.noise = 'relative'" in last


def test_multipliers_scale_the_noise_of_their_layer(tiny):
    factors = dict.fromkeys(range(6), 0.0) | {1: 2.0}
    shares, plain = (noise_shares(tiny.model, 0.05, m, ABSOLUTE) for m in (factors, None))
    for name, share in shares.items():
        factor = 1.0 if name == "model.norm" else factors[int(name.split(".")[2])]
        assert share == pytest.approx(factor * plain[name])


def test_noise_that_the_dtype_rounds_away_is_reported(small):
    # norm weights of tiny lie around 1, where bfloat16 has steps of 1/256 and 1/128: sigma 0.05 is felt, 0.0005 is not
    model = load_model("tiny", dtype=torch.bfloat16).model
    assert rounded_away(model, 0.05, None, KEY, ABSOLUTE) < 0.1
    assert rounded_away(model, 0.0005, None, KEY, ABSOLUTE) > 0.9
    assert rounded_away(load_model("tiny").model, 0.0005, None, KEY, ABSOLUTE) < 0.1
    falling = load_experiment("quickstart-noise-aqn")
    falling = falling.model_copy(update={"epochs": 4, "aqn": falling.aqn.model_copy(update={"schedule": "linear"})})
    low = small.model_copy(update={"dtype": "bfloat16"})
    (line,) = rounding_warnings(prepare(falling, low, 0))  # eight steps from 0.05 to 0.0005; the last is lost
    assert line.startswith("AQN at sigma 0.0005 and below (1 of 8 noisy steps) leaves more than half of the weights")
    assert rounding_warnings(prepare(falling, small, 0)) == ()
    loud = falling.model_copy(update={"aqn": falling.aqn.model_copy(update={"sigma_end": 0.05})})
    assert rounding_warnings(prepare(loud, low, 0)) == ()
    assert rounding_warnings(prepare(load_experiment("quickstart-clean"), low, 0)) == ()


@every_family
def test_every_family_has_a_share_for_each_target(family):
    shares = noise_shares(build(family), 0.05, None, ABSOLUTE)
    assert shares
    assert all(0 < share < math.inf for share in shares.values())  # Gemma's gain is 1 + w, and w is 0 there


def test_a_run_keeps_it_and_warns_and_a_resumed_one_does_not_measure_again(tmp_path, small, monkeypatch):
    loud = load_experiment("quickstart-noise-aqn")
    aqn = loud.aqn.model_copy(update={"sigma_start": 3.0, "schedule": "constant"})
    loud = loud.model_copy(update={"aqn": aqn})
    with pytest.warns(UserWarning, match="drowns"):
        whole = run(tmp_path / "whole", loud, small)
    assert whole.preflight["sigma"] == max(row["sigma"] for row in whole.metrics[1:])
    assert whole.status.warnings == tuple(whole.preflight["warnings"])
    with pytest.warns(UserWarning, match="drowns"):
        stopped = run(tmp_path / "parts", loud, small, stop_after=1)
    assert run(tmp_path / "plain", load_experiment("quickstart-clean"), small).preflight is None
    monkeypatch.setattr(import_module("roundoff.training.before_first_step"), "measure_aqn", None)
    resumed = run(tmp_path / "parts", loud, small)
    assert resumed.preflight == stopped.preflight == whole.preflight
    assert resumed.status.warnings == whole.status.warnings
    assert reproducible(resumed.path) == reproducible(whole.path)
