"""AQN in a rollout process: once for each sync, the same in every process, and off in evaluations."""

import pytest
import torch

from roundoff.config import AQN
from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.plugins.verl.aqn_switch import AqnSwitch, digest

CONSTANT = AQN(sigma_start=0.05, sigma_end=0.05, schedule="constant")


def new_switch(aqn=CONSTANT, seed=0) -> AqnSwitch:
    return AqnSwitch(load_model("tiny").model, aqn, Key.from_seed(seed))


def sync(switch: AqnSwitch, step: int, sigma: float, shift: float = 0.0) -> None:
    """One weight sync, which adds `shift` to every parameter as training would."""
    switch.announce(step, sigma)
    switch.before_sync()
    with torch.no_grad():
        for parameter in switch.model.parameters():
            parameter += shift
    switch.after_sync()


def norms(switch: AqnSwitch) -> torch.Tensor:
    return torch.cat([p.detach().clone() for name, p in switch.model.named_parameters() if "norm" in name])


def test_each_sync_draws_once_and_noise_does_not_pile_up():
    switch = new_switch()
    clean = norms(switch)
    sync(switch, 0, 0.05)
    first = norms(switch)
    sync(switch, 1, 0.05)
    second = norms(switch)
    # 832 weights: the standard deviation of the draw has a standard error of 2.5 %; 15 % is six of them.
    for noisy in (first, second):
        assert float((noisy - clean).std()) == pytest.approx(0.05, rel=0.15)
    assert not torch.equal(first, second)
    assert [s.step for s in switch.syncs] == [0, 1]
    assert switch.syncs[0].clean == switch.syncs[1].clean
    assert switch.syncs[0].noisy != switch.syncs[1].noisy


def test_every_rollout_process_draws_the_same():
    one, other, of_another_seed = new_switch(), new_switch(), new_switch(seed=1)
    for switch in (one, other, of_another_seed):
        sync(switch, 3, 0.05)
    assert one.syncs == other.syncs
    assert one.syncs[0].noisy != of_another_seed.syncs[0].noisy


def test_an_evaluation_sees_clean_weights_and_gives_the_same_noise_back():
    switch = new_switch()
    clean = norms(switch)
    sync(switch, 0, 0.05)
    noisy = norms(switch)
    assert switch.is_noisy
    switch.evaluation(True)
    switch.evaluation(True)  # told twice, done once
    torch.testing.assert_close(norms(switch), clean, rtol=0, atol=0)
    assert not switch.is_noisy
    switch.evaluation(False)
    torch.testing.assert_close(norms(switch), noisy, rtol=0, atol=0)
    assert switch.is_noisy
    assert len(switch.syncs) == 1


def test_a_sync_within_an_evaluation_stays_clean_until_its_end():
    switch = new_switch()
    sync(switch, 0, 0.05)
    switch.evaluation(True)
    sync(switch, 0, 0.05, shift=0.25)
    clean = norms(switch)
    assert digest([clean]) != ""
    assert not switch.is_noisy
    switch.evaluation(False)
    assert float((norms(switch) - clean).std()) == pytest.approx(0.05, rel=0.15)


def test_multipliers_choose_the_layers_with_noise():
    switch = new_switch()
    switch.multipliers = {layer: float(layer == 2) for layer in range(6)}
    before = {name: p.detach().clone() for name, p in switch.model.named_parameters()}
    sync(switch, 1, 0.05)
    moved = {name for name, p in switch.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_weights_outside_of_the_targets_are_left_alone():
    switch = new_switch()
    before = {name: p.detach().clone() for name, p in switch.model.named_parameters() if "norm" not in name}
    sync(switch, 0, 0.05)
    for name, parameter in switch.model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("aqn", "sigma"), [(CONSTANT, 0.0), (None, 0.0)])
def test_a_silent_step_and_no_aqn_leave_the_weights_alone(aqn, sigma):
    switch = new_switch(aqn)
    clean = norms(switch)
    sync(switch, 0, sigma)
    torch.testing.assert_close(norms(switch), clean, rtol=0, atol=0)
    assert not switch.is_noisy
    assert switch.syncs[0].noisy == switch.syncs[0].clean
