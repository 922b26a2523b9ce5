"""Gradient checkpointing gives the bits of plain backward, whatever the hardware, and holds less."""

import pytest
import torch
from torch import nn

from roundoff.config import ConfigError, Hardware, LoRA, MatmulNoise, Precision
from roundoff.experiments import load_experiment
from roundoff.hardware import hardware_off, install
from roundoff.models.gradient_checkpointing import check_layers, checkpointed
from roundoff.models.keyed_dropout import dropout_on
from roundoff.models.logprobs import token_logprobs
from roundoff.models.lora import attach
from roundoff.models.masks import row_ids
from roundoff.numerics.rng import Key
from roundoff.training.loop import take_step
from roundoff.training.preparation import prepare
from tests.families import Batch, build, every_family
from tests.training.test_loop import with_training

NOISE = Hardware(matmul_noise=MatmulNoise(relative_std=0.1))
W4A4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))
LINEAR_NOISE = Hardware(matmul_noise=MatmulNoise(relative_std=0.1, attention=False))
RESPONSE = 3
KEY = Key.from_seed(1)


def gradients(model, *, enabled, key=KEY):
    """Loss and gradients of the log-probabilities of three responses; backward runs outside of every block."""
    batch = Batch()
    model.zero_grad(set_to_none=True)
    rows = row_ids(torch.arange(3), batch.positions)
    with dropout_on(model), checkpointed(model, enabled):
        logprobs, _ = token_logprobs(
            model, batch.ids, batch.mask, RESPONSE, temperature=1.0, rows=None if key is None else rows, key=key
        )
    loss = logprobs.square().sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert len(a[1]) > 3
    for name, gradient in a[1].items():
        assert torch.equal(gradient, b[1][name]), name


def hardware_for(family, hardware):
    """Experts see only some of the tokens, which row ids do not allow, so noise is tested on dense models only."""
    return None if "moe" in family and hardware in (NOISE, LINEAR_NOISE) else hardware


@every_family
@pytest.mark.parametrize("hardware", [None, W4A4, NOISE], ids=["plain", "w4a4", "noise"])
def test_gradients_are_the_same_bits(family, hardware):
    model = build(family)
    hardware = hardware_for(family, hardware)
    if hardware is not None:
        install(model, hardware, seed=0)
    same(gradients(model, enabled=True), gradients(model, enabled=False))


@pytest.mark.parametrize("hardware", [None, Hardware(precision=Precision(weight="mxfp4")), NOISE])
def test_adapters_with_dropout_over_any_base(hardware):
    model = build("qwen2")
    if hardware is not None:
        install(model, hardware, seed=0)
    attach(model, LoRA(rank=4, dropout=0.3), Key.from_seed(5))
    with torch.no_grad():  # B is zero at first, which would hide A's gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    plain = gradients(model, enabled=False)
    same(gradients(model, enabled=True), plain)
    assert any(g.abs().sum() > 0 for n, g in plain[1].items() if "lora_A" in n)
    assert not torch.equal(gradients(model, enabled=False, key=Key.from_seed(2))[0], plain[0])  # dropout is in force


def test_noise_of_the_call_counters_is_repeated_too():
    """Without a key each product counts its calls, and a layer that is computed again must not count on."""
    found = []
    for enabled in (True, False):
        model = build("qwen2")
        install(model, NOISE, seed=0)
        found.append([gradients(model, enabled=enabled, key=None) for _ in range(2)])
    for a, b in zip(*found, strict=True):
        same(a, b)
    assert not torch.equal(found[0][0][0], found[0][1][0])


def test_a_pass_with_the_hardware_off_is_computed_again_without_it():
    model = build("qwen2")
    plain = gradients(model, enabled=True)
    install(model, W4A4, seed=0)
    batch = Batch()
    model.zero_grad(set_to_none=True)
    with hardware_off(model), checkpointed(model):
        logprobs, _ = token_logprobs(model, batch.ids, batch.mask, RESPONSE, temperature=1.0)
    logprobs.square().sum().backward()  # the hardware is on again
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[1][name])


def saved_bytes(model, enabled):
    """Bytes of the tensors that autograd keeps for backward: each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = Batch(lengths=(40, 38, 37))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), checkpointed(model, enabled):
        logits = model.model(**batch.inputs()).last_hidden_state
    return sum(kept.values()), logits


def test_little_is_kept_for_backward():
    model = build("qwen2")
    with_it, _a = saved_bytes(model, True)
    without, _b = saved_bytes(model, False)
    assert with_it < without / 5  # 2 inputs of layers against about 40 tensors of their size


def test_nothing_else_is_in_training_mode_and_all_is_restored():
    model = build("qwen2")
    before = [(dict(m.__dict__), m.training) for m in model.modules()]
    with checkpointed(model):
        on = {type(m).__name__ for m in model.modules() if m.training}
        assert on == {"Qwen2DecoderLayer"}
    assert [(dict(m.__dict__), m.training) for m in model.modules()] == before
    with torch.no_grad(), checkpointed(model):
        assert not any(m.training for m in model.modules())


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match="no layer of Sequential supports it"):
        check_layers(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_a_training_step_is_the_same_to_the_bit(small, lora):
    experiment = load_experiment("quickstart-noise").model_copy(update={"lora": lora})
    weights = []
    for enabled in (False, True):
        profile = with_training(small, gradient_checkpointing=enabled, micro_batch=24, lora_learning_rate=0.01)
        session = prepare(experiment, profile, 0)
        take_step(session, 1, None)
        weights.append({name: p.detach().clone() for name, p in session.trainable.items()})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
