"""Each phase computes on its own hardware, to the bit, and phases share what they have in common."""

import copy

import pytest
import torch

from roundoff.config import PHASES, Hardware, validate
from roundoff.hardware import hardware_off, hardware_phase, install, installed, noise_key, rollout_phase, uninstall
from roundoff.models.gradient_checkpointing import checkpointed
from roundoff.models.logprobs import token_logprobs
from roundoff.numerics.rng import Key
from tests.families import Batch, build
from tests.small_models import ROUNDING, draw, make

KEY, ROWS = Key.from_seed(4), Batch().rows
THREE = {
    "precision": {"weight": "mxfp4", "activation": "mxfp4"},
    "matmul_noise": {"relative_std": 0.1},
    "rollout": {"precision": {"weight": "nvfp4", "activation": "none"}, "matmul_noise": {"attention": False}},
    "training": {"precision": {"gradient": "mxfp4"}, "matmul_noise": "none"},
    "evaluation": {"precision": "none", "matmul_noise": "none"},
}
"""Phases that have nothing in common; evaluation is plain."""


def hardware(**settings):
    return validate(Hardware, settings, source="test")


def passed(model):
    """Logits and gradients of one pass under one key."""
    model.zero_grad()
    with noise_key(model, KEY, ROWS):
        logits = model(**Batch().inputs()).logits
        logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def alone(settings, phase, family="qwen2"):
    """The same on a model that has the hardware of this phase alone."""
    model = build(family)
    one = settings.of(phase)
    if not one.changes_nothing:
        install(model, one, seed=0)
        return passed(model)
    logits = model(**Batch().inputs()).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen3_moe"])
def test_a_phase_computes_like_a_model_on_its_hardware_alone(family):
    settings, model = hardware(**THREE), build(family)
    install(model, settings, seed=0)
    expected = {phase: alone(settings, phase, family) for phase in PHASES}
    assert not any(equal(expected[a], expected[b]) for a, b in (PHASES[:2], PHASES[1:], PHASES[::2]))
    assert equal(passed(model), expected["training"])  # outside of any block
    for phase in (*PHASES, *reversed(PHASES)):
        with hardware_phase(model, phase):
            assert equal(passed(model), expected[phase]), phase
    uninstall(model)
    assert equal(alone(Hardware(), "training", family)[:1], [model(**Batch().inputs()).logits])


def test_blocks_nest_and_hardware_off_holds_in_every_phase():
    model, plain = build(), build()
    state = install(model, hardware(**THREE), seed=0)
    with hardware_phase(model, "rollout"), rollout_phase(model):
        with hardware_phase(model, "evaluation"), rollout_phase(model):
            assert state.runtime.phase == "evaluation"
        assert state.runtime.phase == "rollout"
        with hardware_off(model), torch.no_grad():
            assert torch.equal(model(**Batch().inputs()).logits, plain(**Batch().inputs()).logits)
    assert state.runtime.phase == "training"
    with rollout_phase(model):
        assert state.runtime.phase == "rollout"
    with pytest.raises(ValueError, match="phase must be one of rollout"), hardware_phase(model, "training rollouts"):
        pass
    with hardware_phase(plain, "rollout"):  # without hardware
        assert installed(plain) is None


def test_phases_share_states_and_weights_that_agree():
    model = build()
    state = install(
        model, hardware(precision={"weight": "mxfp4"}, training={"precision": {"gradient": "hif8"}}), seed=0
    )
    assert state.phases["rollout"] is state.phases["evaluation"] is not state.phases["training"]
    passed(model)
    count = state.quantizations()
    assert count == len(state.entries)
    for phase in PHASES:
        with hardware_phase(model, phase), torch.no_grad():
            model(**Batch().inputs())
    assert state.quantizations() == count
    other = build()
    state = install(other, hardware(precision={"weight": "mxfp4"}, training={"precision": {"weight": "none"}}), seed=0)
    passed(other)
    assert state.quantizations() == 0
    with hardware_phase(other, "rollout"), torch.no_grad():
        other(**Batch().inputs())
    assert state.quantizations() == count


@pytest.mark.parametrize("tokens", [1, 300])
def test_writes_that_torch_does_not_count_are_noticed_after_a_change_of_phase(tokens):
    model = build()
    state = install(
        model, hardware(rollout={"precision": {"weight": "mxfp4"}}, training={"precision": {"weight": "int4"}}), seed=0
    )

    def computed(phase):
        with hardware_phase(model, phase), torch.no_grad():
            return model(input_ids=torch.arange(8 * tokens).view(tokens, 8) % 40).logits

    weight = state.in_force.modules[0].weight
    before = {phase: computed(phase) for phase in PHASES}
    for _ in range(2):
        weight.data.mul_(1.5)
        after = {phase: computed(phase) for phase in PHASES}
        assert not any(torch.equal(before[phase], after[phase]) for phase in PHASES)
        state.refresh()
        assert all(torch.equal(after[phase], computed(phase)) for phase in PHASES)
        before = after


def test_copies_have_phases_of_their_own_and_are_not_made_inside_one():
    model = build()
    settings = hardware(**THREE)
    install(model, settings, seed=0)
    with hardware_phase(model, "rollout"), pytest.raises(RuntimeError, match="leave the block first"):
        copy.deepcopy(model)
    other = copy.deepcopy(model)
    with hardware_phase(other, "rollout"):
        assert equal(passed(model), alone(settings, "training"))
        assert equal(passed(other), alone(settings, "rollout"))


def test_a_checkpointed_layer_is_computed_again_in_its_own_phase():
    settings, model = hardware(**THREE), build()
    install(model, settings, seed=0)
    with checkpointed(model, True), hardware_phase(model, "rollout"), noise_key(model, KEY, ROWS):
        logits = model(**Batch().inputs()).logits
    logits.square().sum().backward()
    found = [logits.detach(), *(p.grad for p in model.parameters())]
    assert equal(found, alone(settings, "rollout"))
    assert installed(model).runtime.phase == "training"


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("width", [32, 64])
def test_rollouts_are_sampled_on_their_hardware_and_training_computes_on_its_own(tokenizer, noise, width):
    model = make(hidden_size=width)
    changes = {"precision": {"weight": "mxfp4", "activation": "mxfp4"}, "matmul_noise": {"relative_std": noise}}
    alike = make(hidden_size=width)
    install(alike, hardware(**changes), seed=0)
    install(model, hardware(rollout=changes), seed=0)
    rollouts, expected = draw(model, tokenizer), draw(alike, tokenizer)
    assert torch.equal(rollouts.tokens, expected.tokens) and torch.equal(rollouts.logprobs, expected.logprobs)

    def logprobs(key):
        arguments = rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1]
        return token_logprobs(model, *arguments, temperature=1.0, rows=rollouts.rows, key=key)[0]

    with hardware_phase(model, "rollout"):
        torch.testing.assert_close(logprobs(rollouts.noise_key), rollouts.logprobs, **ROUNDING)
    trained = logprobs(None)
    plain = make(hidden_size=width)
    arguments = rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1]
    assert torch.equal(trained, token_logprobs(plain, *arguments, temperature=1.0)[0])
    assert (trained - rollouts.logprobs).abs().max() > 0.01
