"""Copies of installed modules: which share the switches of a model, which have their own, and which are refused."""

import copy
import pickle

import pytest
import torch
from peft import AdaLoraConfig, HRAConfig, LoraConfig, ShiraConfig, get_peft_model
from torch.optim.optimizer import _global_optimizer_post_hooks

from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, installed, noise_key, uninstall
from roundoff.hardware.phases import states_of
from roundoff.numerics.rng import Key
from tests.families import Batch, build

W4A4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"), exclude=("embed_tokens",))
NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1), exclude=("embed_tokens",))
KEY = Key.from_seed(5)


def logits(model):
    with torch.no_grad():
        return model(**Batch().inputs()).logits


def replayed(model):
    with noise_key(model, KEY, Batch().rows):
        return logits(model)


def with_saved_modules(saved):
    """A model whose PEFT wrapper trains copies of some modules (huggingface/peft#602)."""
    model = build()
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)).eval()


@pytest.mark.parametrize("saved", ["lm_head", "o_proj", "norm"])
@pytest.mark.parametrize("hardware", [W4A4, NOISY])
def test_switches_reach_the_copies_that_peft_puts_into_a_model(saved, hardware):
    plain = with_saved_modules([saved])
    clean = logits(plain)
    model = build()
    install(model, hardware, seed=0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])).eval()
    wrapped.load_state_dict(plain.state_dict())
    assert not torch.equal(logits(wrapped), clean)
    with hardware_off(wrapped):
        assert torch.equal(logits(wrapped), clean)
    assert torch.equal(replayed(wrapped), replayed(wrapped))
    uninstall(model)
    assert torch.equal(logits(wrapped), clean)
    assert not any(states_of(module) for module in wrapped.modules())


def test_a_copy_that_peft_trains_is_quantized_again_after_each_step():
    model = build()
    installation = install(model, W4A4, seed=0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1, fused=True)
    wrapped(**Batch().inputs()).logits.sum().backward()
    optimizer.step()
    seen = logits(wrapped)
    installation.refresh()
    assert torch.equal(logits(wrapped), seen)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_of_the_whole_model_has_switches_of_its_own(duplicate):
    model = build()
    install(model, W4A4, seed=0)
    other = duplicate(model)
    deployed = logits(model)
    assert installed(other) is not installed(model) and installed(other).model is other
    with hardware_off(other):
        assert torch.equal(logits(model), deployed)
        assert not torch.equal(logits(other), deployed)
    with hardware_off(model):
        assert torch.equal(logits(other), deployed)
    other.get_submodule("model.layers.0.mlp.up_proj").weight.data.mul_(2.0)
    assert torch.equal(logits(model), deployed) and not torch.equal(logits(other), deployed)


def test_a_part_of_an_installed_model_is_on_its_hardware():
    model = build()
    installation = install(model, W4A4, seed=0)
    assert installed(model.model) is installation and installed(model.model.layers[0].mlp) is installation
    with hardware_off(model.model):
        assert not installation.is_on


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_module_copied_into_another_model_is_refused(duplicate):
    model, other = build(), build()
    install(model, W4A4, seed=0)
    other.model.layers[1] = duplicate(model.model.layers[1])
    for attempt in (installed, lambda m: install(m, W4A4, seed=0)):
        with pytest.raises(ConfigError, match=r"copied out of a model|installed on"):
            attempt(other)


def test_a_copy_made_within_noise_key_draws_its_own_noise():
    model = build()
    install(model, NOISY, seed=0)
    with noise_key(model, KEY, Batch().rows):
        other = copy.deepcopy(model)
    assert not torch.equal(logits(other), logits(other))
    assert torch.equal(replayed(other), replayed(model))


def test_a_layer_that_was_copied_within_the_model_is_refused_under_noise():
    model = build()
    install(model, NOISY, seed=0)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(ConfigError, match=r"model\.layers\.2.* is a copy of model\.layers\.1"), hardware_off(model):
        pass


@pytest.mark.parametrize(
    "config", [HRAConfig(r=2, target_modules=["up_proj"]), ShiraConfig(target_modules=["up_proj"])]
)
def test_adapters_that_compute_around_the_hardware_are_refused(config):
    model = build()
    install(model, W4A4, seed=0)
    wrapped = get_peft_model(model, config)
    with pytest.raises(ConfigError, match=r"up_proj is a layer of peft\.tuners"), hardware_off(wrapped):
        pass
    uninstall(wrapped)
    with pytest.raises(ConfigError, match=r"up_proj is a layer of peft\.tuners"):
        install(wrapped, W4A4, seed=0)


def test_adapters_may_add_to_an_output_in_place():
    """AdaLoRA does; autograd refuses it if a custom function returned a view (for Linears with a bias)."""
    model = build()
    install(model, W4A4, seed=0)
    wrapped = get_peft_model(model, AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj"]))
    wrapped(**Batch().inputs()).logits.sum().backward()


def test_one_hook_serves_every_installation():
    """Hooks cannot be removed safely, so that one of each installation would slow down every later optimizer step."""
    install(build(), W4A4, seed=0)
    before = len(_global_optimizer_post_hooks)
    for _ in range(3):
        install(build(), W4A4, seed=0)
    assert len(_global_optimizer_post_hooks) == before
