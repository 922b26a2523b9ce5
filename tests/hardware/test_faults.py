"""The effect of each fault, computed by hand, on the elements that it should affect and on no others."""

import pytest
import torch
from torch import nn

from roundoff.config import ConfigError, Fault, Hardware
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.hardware.faults import flip_bit, install_fault
from roundoff.numerics.rng import Key

KEY = Key.from_seed(3)
Y = torch.tensor([[4.0, -1.0, 0.5, -3.0], [0.2, 0.1, -0.4, 0.0]])


def apply(kind, amount, **settings):
    fault = Fault(kind=kind, layer=0, amount=amount, **settings)
    return install_fault(fault, Y.shape[-1], KEY).apply(Y.clone(), KEY, None)


def test_deadzone_zeroes_small_outputs():
    assert torch.equal(apply("deadzone", 0.25), torch.tensor([[4.0, -1.0, 0.0, -3.0], [0.2, 0.1, -0.4, 0.0]]))


def test_saturation_clamps_large_outputs():
    assert torch.equal(apply("saturation", 0.5), torch.tensor([[2.0, -1.0, 0.5, -2.0], [0.2, 0.1, -0.2, 0.0]]))


def test_gain_scales_outputs():
    assert torch.equal(apply("gain", 0.5), Y * 1.5)


def test_the_requested_share_of_channels_is_stuck_at_the_constant():
    output = apply("stuck", 0.7, share=0.5)
    stuck = (output == 0.7).all(0)
    assert int(stuck.sum()) == 2
    assert torch.equal(output[:, ~stuck], Y[:, ~stuck])
    assert torch.equal(output, apply("stuck", 0.7, share=0.5))


def test_a_small_share_breaks_one_channel_at_least():
    assert int((apply("gain", 0.5, share=0.01) != Y).any(0).sum()) == 1


def test_bitflip_inverts_one_bit():
    # 1.0 is 0x3F800000. Bit 31 is the sign. Bit 23 is the lowest of the exponent 127, so that the exponent becomes 126
    # and the number 0.5. Bit 22 is the highest of the mantissa and adds one half.
    one = torch.ones(1)
    assert flip_bit(one, 31).item() == -1.0
    assert flip_bit(one, 23).item() == 0.5
    assert flip_bit(one, 22).item() == 1.5
    assert flip_bit(one, 0).item() == 1.0 + 2.0**-23
    assert flip_bit(torch.ones(1, dtype=torch.bfloat16), 22).item() == 1.5
    assert torch.equal(apply("bitflip", 1.0, bit=31), -Y)


@pytest.mark.parametrize("kind", ["noise", "bitflip"])
def test_random_faults_affect_their_share_at_random(kind):
    y = torch.ones(400, 100)
    fault = install_fault(Fault(kind=kind, layer=0, amount=0.1, share=0.2), 100, KEY)
    first, again, other = (fault.apply(y, key, None) for key in (KEY, KEY, KEY.fold(1)))
    assert torch.equal(first, again)
    hit = first != y
    # 40,000 Bernoulli draws: 4.5 standard errors.
    assert abs(hit.float().mean() - 0.2) < 4.5 * (0.2 * 0.8 / y.numel()) ** 0.5
    assert not torch.equal(hit, other != y)
    if kind == "noise":
        eps = (first[hit] - 1) / 0.1
        assert abs(eps.var() - 1) < 4.5 * (2 / eps.numel()) ** 0.5


def test_random_faults_follow_the_token_and_not_the_batch():
    fault = install_fault(Fault(kind="bitflip", layer=0, amount=0.1, share=0.3), 100, KEY)
    y, rows = torch.ones(6, 100), torch.arange(6) + 40
    whole = fault.apply(y, KEY, rows)
    assert torch.equal(fault.apply(y[2:4], KEY, rows[2:4]), whole[2:4])


class Layers(nn.Module):
    """Two layers of two Linears."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2)
            )

    def forward(self, x):
        for layer in self.layers:
            x = layer["down"](layer["up"](x).relu())
        return x


def outputs(model, x):
    """The output of every Linear, by name."""
    by_name = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: by_name.update({name: out.detach()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return by_name


@pytest.mark.parametrize(("module", "broken"), [("down", {"down"}), (None, {"up", "down"})])
def test_a_fault_reaches_the_linears_of_its_layer_only(module, broken):
    model, x = Layers(), torch.ones(3, 8)
    installed = install(model, Hardware(faults=(Fault(kind="stuck", layer=1, module=module, amount=5.0),)), seed=0)
    for name, out in outputs(model, x).items():
        layer, linear = name.split(".")[1:]
        assert bool((out == 5.0).all()) == (layer == "1" and linear in broken)
    assert {e.name for e in installed.entries} == {f"layers.1.{linear}" for linear in broken}
    with hardware_off(model):
        assert torch.equal(model(x), Layers()(x))


def test_gradients_pass_straight_through_a_fault():
    model, plain = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    plain.load_state_dict(model.state_dict())
    install(model, Hardware(faults=(Fault(kind="saturation", layer=0, amount=0.1),)), seed=0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_(True)
        m(leaf).backward(torch.ones(3, 8))
        gradients.append((leaf.grad, m[0].weight.grad, m[0].bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_random_fault_replays_under_a_key():
    model, x = Layers(), torch.ones(1, 3, 8)
    install(model, Hardware(faults=(Fault(kind="noise", layer=0, amount=0.2, share=0.5),)), seed=0)
    results = []
    for key in (KEY, KEY, KEY.fold(1)):
        with noise_key(model, key, torch.tensor([[0, 1, 2]])):
            results.append(model(x).detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "gain", "layer": 9, "amount": 0.1}, r"hardware\.faults\.0\.layer names layer 9.*0 to 1"),
        ({"kind": "gain", "layer": 0, "amount": 0.1, "module": "gate"}, r"'gate'.*it has: up, down"),
        ({"kind": "noise", "layer": 0, "amount": 0.1, "share": 0.0}, r"share is 0"),
        ({"kind": "gain", "layer": 0, "amount": 0.1, "share": 0.0}, r"share is 0"),
    ],
)
def test_faults_that_reach_nothing_are_errors(fault, message):
    with pytest.raises(ConfigError, match=message):
        install(Layers(), Hardware(faults=(Fault(**fault),)), seed=0)


def test_a_low_bit_of_a_bfloat16_model_is_an_error():
    fault = Fault(kind="bitflip", layer=0, amount=1.0, bit=3)
    with pytest.raises(ConfigError, match="no bit 3"):
        install(Layers().to(torch.bfloat16), Hardware(faults=(fault,)), seed=0)


def test_a_low_bit_that_autocast_rounds_away_is_an_error():
    model = Layers()
    install(model, Hardware(faults=(Fault(kind="bitflip", layer=0, amount=1.0, bit=5),)), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="bit 5 on bfloat16"):
        model(torch.ones(2, 8))
