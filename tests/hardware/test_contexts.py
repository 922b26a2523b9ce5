"""`hardware_off` and `noise_key`: blocks close in any order, belong to one thread and one model, and reach wrappers."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, installed, noise_key, uninstall
from roundoff.numerics.rng import Key
from tests.families import Batch, build

W4A4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))
NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1))
ROWS = Batch().rows


def logits(model):
    with torch.no_grad():
        return model(**Batch().inputs()).logits


def left_open(block, *more):
    """A generator that stays inside the block until it is closed."""
    with block:
        yield from (None, *more)


@pytest.mark.parametrize("first", [0, 1])
def test_hardware_off_may_be_left_in_any_order(first):
    model = build()
    installation = install(model, W4A4, seed=0)
    blocks = [left_open(hardware_off(model)), left_open(hardware_off(model))]
    for block in blocks:
        next(block)
    blocks.pop(first).close()
    assert not installation.is_on
    blocks.pop().close()
    assert installation.is_on


@pytest.mark.parametrize("first", [0, 1, 2])
def test_noise_key_may_be_left_in_any_order(first):
    model = build()
    installation = install(model, NOISY, seed=0)
    keys = [Key.from_seed(seed) for seed in (1, 2, 3)]
    blocks = [left_open(noise_key(model, key, ROWS)) for key in keys]
    for block in blocks:
        next(block)
    blocks.pop(first).close()
    keys.pop(first)
    assert installation.runtime.draw.key == keys[-1]
    blocks.pop(0).close()
    assert installation.runtime.draw.key == keys[-1]
    blocks.pop().close()
    assert installation.runtime.draw is None and installation.runtime.thread is None


@pytest.mark.parametrize("opened", ["noise_key", "hardware_off"])
def test_another_thread_neither_enters_nor_computes(opened):
    model = build()
    install(model, NOISY, seed=0)
    blocks = {
        "noise_key": lambda: noise_key(model, Key.from_seed(1), ROWS),
        "hardware_off": lambda: hardware_off(model),
    }
    errors = []

    def attempt(what):
        try:
            what()
        except RuntimeError as error:
            errors.append(str(error))

    def other():
        for what in (lambda: blocks["noise_key"]().__enter__(), lambda: blocks["hardware_off"]().__enter__()):
            attempt(what)
        attempt(lambda: logits(model))

    with blocks[opened]():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 3 and all("another thread" in error for error in errors)
    logits(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
@pytest.mark.parametrize("hardware", [W4A4, NOISY])
def test_a_copy_made_within_hardware_off_is_on_its_hardware(duplicate, hardware):
    model = build()
    install(model, hardware, seed=0)
    with hardware_off(model), hardware_off(model):
        other = duplicate(model)
    assert installed(other).is_on
    with noise_key(model, Key.from_seed(1), ROWS), noise_key(other, Key.from_seed(1), ROWS):
        assert torch.equal(logits(model), logits(other))


def test_a_wrapper_of_two_installed_models_is_refused():
    actor, critic = build(), build()
    for model in (actor, critic):
        install(model, W4A4, seed=0)
    with pytest.raises(ConfigError, match="holds 2 models"), hardware_off(nn.ModuleDict({"a": actor, "c": critic})):
        pass
    with hardware_off(nn.ModuleDict({"actor": actor, "again": actor, "value": nn.Linear(2, 2)})):
        assert not installed(actor).is_on and installed(critic).is_on


def test_a_layer_of_another_installed_model_is_refused():
    model, other = build(), build()
    for each in (model, other):
        install(each, W4A4, seed=0)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(ConfigError, match="belongs to the hardware of another model"), hardware_off(model):
        pass


def test_attention_that_was_switched_away_is_refused():
    model = build()
    installation = install(model, NOISY, seed=0)
    model.set_attn_implementation("sdpa")
    for block in (lambda: noise_key(model, Key.from_seed(1), ROWS), lambda: hardware_off(model)):
        with pytest.raises(ConfigError, match="'sdpa' after install"), block():
            pass
    with pytest.raises(ConfigError, match="'sdpa' after install"):
        logits(model)
    uninstall(model)
    assert torch.equal(logits(model), logits(build()))
    assert not installation.is_on


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight):
        return weight * self.gain


def test_a_parametrized_linear_is_quantized_again_and_can_be_uninstalled():
    model = build()
    installation = install(model, W4A4, seed=0)
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    before = logits(model)
    parametrize.register_parametrization(linear, "weight", Scale())
    seen = logits(model)
    assert not torch.equal(seen, before)
    linear.parametrizations.weight[0].gain.data.mul_(2.0)
    assert not torch.equal(logits(model), seen)
    assert installation.quantizations() > 0
    with hardware_off(model):
        plain = logits(model)
    uninstall(model)
    assert torch.equal(logits(model), plain)
    parametrize.remove_parametrizations(linear, "weight")
    assert type(linear) is nn.Linear and torch.equal(logits(model), plain)
