"""Sampling depends neither on torch's global settings nor on the mode of the model's root alone."""

import peft
import pytest
import torch

from roundoff.config import Algorithm, ConfigError, validate
from roundoff.models.logprobs import token_logprobs
from roundoff.models.mode import evaluation_mode
from roundoff.numerics.torch_state import flushes_denormals, own_torch_state
from tests.small_models import PROMPTS, draw, make, make_tokenizer


def both(model):
    rollouts = draw(model, make_tokenizer())
    computed, entropy = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
    )
    return rollouts.texts, rollouts.logprobs, computed.detach(), entropy.detach()


def alike(a, b):
    return a[0] == b[0] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


SETTERS = {
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
    "meta device": (torch.set_default_device, "meta", None),
    "medium precision": (torch.set_float32_matmul_precision, "medium", "highest"),
    "flushed denormals": (torch.set_flush_denormal, True, False),
    "deterministic": (torch.use_deterministic_algorithms, True, False),
    "no gradients": (torch.set_grad_enabled, False, True),
}


@pytest.mark.parametrize("name", sorted(SETTERS))
def test_torchs_settings_change_nothing_and_stay_as_they_were(name):
    setter, value, usual = SETTERS[name]
    model = make()
    expected = both(model)
    setter(value)
    try:
        found = both(model)
        state = torch.get_default_dtype(), torch.get_default_device().type, torch.get_float32_matmul_precision()
        flushed = flushes_denormals() if name != "meta device" else False
    finally:
        setter(usual)
    assert alike(found, expected)
    assert state == (
        value if isinstance(value, torch.dtype) else torch.float32,
        "meta" if name == "meta device" else "cpu",
        value if name == "medium precision" else "highest",
    )
    assert flushed == (name == "flushed denormals")


def test_settings_come_back_after_an_exception():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(KeyError), own_torch_state():
            assert torch.get_default_dtype() is torch.float32
            raise KeyError
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"torch\.autocast is on"):
        draw(make(), make_tokenizer())


@pytest.mark.parametrize("outer", [True, False])
def test_adapters_in_training_mode_drop_nothing(outer):
    """huggingface/trl#3000: the root is in evaluation mode, its fresh adapters are not."""
    model = make()
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    modes = {name: module.training for name, module in wrapped.named_modules()}
    assert any(modes.values()) and not model.training
    chosen = wrapped if outer else model
    first, second = (draw(chosen, make_tokenizer(), temperature=0).texts for _ in range(2))
    assert first == second
    assert {name: module.training for name, module in wrapped.named_modules()} == modes


def test_each_module_gets_its_own_mode_back():
    model = make().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        model.extra = torch.nn.Dropout()  # joined inside: it was in no mode before
        raise KeyError
    del model.extra
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("temperature", [1e-38, 1e-4, 2e6, float("inf"), float("nan"), -1.0])
def test_temperatures_that_cannot_divide_logits_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        draw(make(), make_tokenizer(), temperature=temperature)
    with pytest.raises(ConfigError, match="temperature"):
        validate(Algorithm, {"name": "GRPO", "temperature": temperature}, source="test")


@pytest.mark.parametrize("temperature", [1e-3, 1e6])
def test_the_extreme_temperatures_work(temperature):
    rollouts = draw(make(), make_tokenizer(), temperature=temperature)
    assert not rollouts.nonfinite.any() and bool(rollouts.logprobs.isfinite().all())
    if temperature < 1:
        assert rollouts.texts[::4] == draw(make(), make_tokenizer(), temperature=0, group_size=1).texts
    assert len(rollouts.texts) == 4 * len(PROMPTS)


@pytest.mark.parametrize(("top_p", "top_k"), [(1e-300, 0), (1 - 1e-17, 0), (0.5, 10**9)])
def test_extreme_cuts_work(top_p, top_k):
    rollouts = draw(make(), make_tokenizer(), top_p=top_p, top_k=top_k)
    assert not rollouts.nonfinite.any()
