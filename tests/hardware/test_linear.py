"""One Linear on hardware: products and gradients computed by hand, the cache of Q(W), and replayed noise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from roundoff.config import Deadzone, Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.numerics.backend import kernels_for, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

KEY = Key.from_seed(11)


class One(nn.Module):
    """A model of one Linear, named as in a decoder layer."""

    def __init__(self, weight, bias=None):
        super().__init__()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": linear})])

    @property
    def linear(self):
        return self.layers[0]["up_proj"]

    def forward(self, x):
        return self.linear(x)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise(std, **settings):
    return Hardware(matmul_noise=MatmulNoise(relative_std=std, attention=False, **settings))


def run(model, x, dy):
    """The output, and the gradients of x, weight and bias for the output gradient `dy`."""
    x = x.clone().requires_grad_(True)
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    bias = model.linear.bias
    return y.detach(), x.grad, model.linear.weight.grad, None if bias is None else bias.grad


def test_quantized_products_and_gradients_match_those_by_hand():
    # MXFP4 with one block per row; the grid is 0 .5 1 1.5 2 3 4 6 times the scale.
    # W row 0: amax 2.6, floor(log2) = 1, scale 2^(1-2) = 1/2: 2.6/.5 = 5.2 -> 6 -> 3; .8/.5 = 1.6 -> 1.5 -> .75.
    # W row 1: amax 5, scale 1: 5 is a tie between 4 and 6; codes 6 (even) and 7, so 4. 0.3 -> .5 (0.25 is the tie).
    # x: amax 7, scale 1: 7 saturates at 6; 2.4 -> 2.
    weight, x = torch.tensor([[2.6, 0.8], [5.0, 0.3]]), torch.tensor([[7.0, 2.4]])
    qw, qx = torch.tensor([[3.0, 0.75], [4.0, 0.5]]), torch.tensor([[6.0, 2.0]])
    bias = torch.tensor([0.1, -0.2])
    model = One(weight, bias)
    install(model, Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")), seed=0)
    dy = torch.tensor([[1.0, 2.0]])
    y, dx, dw, db = run(model, x, dy)
    assert torch.equal(y, torch.tensor([[6 * 3 + 2 * 0.75 + 0.1, 6 * 4 + 2 * 0.5 - 0.2]]))
    assert torch.equal(dx, torch.tensor([[1 * 3 + 2 * 4, 1 * 0.75 + 2 * 0.5]]))  # dY Q(W)
    assert torch.equal(dw, torch.tensor([[1 * 6.0, 1 * 2.0], [2 * 6.0, 2 * 2.0]]))  # dY^T Q(x)
    assert torch.equal(db, dy[0])
    assert torch.equal(dy @ qw, dx) and torch.equal(dy.t() @ qx, dw)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,)])
@pytest.mark.parametrize(("weight", "activation"), [("mxfp4", None), (None, "nvfp4"), ("nvfp4", "mxfp4")])
def test_formats_give_the_bits_of_the_formulas(shape, bias, weight, activation):
    model = One(normal(48, 64), normal(48, seed=1) if bias else None)
    install(model, Hardware(precision=Precision(weight=weight, activation=activation)), seed=0)
    x, dy = normal(*shape, seed=2), normal(*shape[:-1], 48, seed=3)
    w = model.linear.weight.detach()
    qw = quantize(w, weight) if weight else w
    qx = quantize(x, activation, tensor_scale="row") if activation else x
    y, dx, dw, db = run(model, x, dy)
    assert torch.equal(y, F.linear(qx, qw, model.linear.bias.detach() if bias else None))
    assert torch.equal(dx, dy @ qw)
    assert torch.equal(dw, dy.reshape(-1, 48).t() @ qx.reshape(-1, 64))
    assert db is None or torch.equal(db, dy.reshape(-1, 48).sum(0))
    with torch.no_grad():  # the same bits without autograd
        assert torch.equal(model(x), y)


def test_noise_of_each_product_is_matmul_noise_under_the_documented_keys():
    model = One(normal(48, 64), normal(48, seed=1))
    install(model, noise(0.1), seed=0)
    x, dy = normal(2, 3, 64, seed=2), normal(2, 3, 48, seed=3)
    rows = torch.tensor([[5, 6, 7], [100, 101, 102]])
    with noise_key(model, KEY, rows):
        y, dx, dw, db = run(model, x, dy)
    w, b = model.linear.weight.detach(), model.linear.bias.detach()
    name = "layers.0.up_proj"
    # The product is perturbed, then the bias is added.
    assert torch.equal(y, matmul_noise(F.linear(x, w), 0.1, KEY.fold(name, "forward"), rows=rows) + b)
    assert torch.equal(dx, matmul_noise(dy @ w, 0.1, KEY.fold(name, "dx"), rows=rows))
    clean = dy.reshape(-1, 48).t() @ x.reshape(-1, 64)
    assert not torch.equal(dw, clean)
    relative = (dw - clean) / clean.abs() / 0.1
    # 48 * 64 draws: 4.5 standard errors of mean and variance.
    assert abs(relative.mean()) < 4.5 / relative.numel() ** 0.5
    assert abs(relative.var() - 1) < 4.5 * (2 / relative.numel()) ** 0.5
    assert torch.equal(db, dy.reshape(-1, 48).sum(0))


def test_weight_gradients_of_two_micro_batches_have_separate_draws_that_replay():
    model = One(normal(48, 64))
    install(model, noise(0.1), seed=0)
    x, dy = normal(1, 3, 64, seed=2), normal(1, 3, 48, seed=3)

    def weight_gradient(rows):
        with noise_key(model, KEY, rows):
            return run(model, x, dy)[2].clone()

    rows = torch.tensor([[0, 1, 2]])
    assert torch.equal(weight_gradient(rows), weight_gradient(rows))
    assert not torch.equal(weight_gradient(rows), weight_gradient(rows + (1 << 20)))


@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True)])
def test_forward_and_backward_noise_have_separate_switches(forward, backward):
    model, plain = One(normal(48, 64)), One(normal(48, 64))
    install(model, noise(0.1, forward=forward, backward=backward), seed=0)
    x, dy = normal(4, 64, seed=2), normal(4, 48, seed=3)
    results, expected = run(model, x, dy), run(plain, x, dy)
    assert [torch.equal(a, b) for a, b in zip(results[:3], expected[:3], strict=True)] == [
        not forward,
        not backward,
        not backward,
    ]


def test_without_noise_key_draws_follow_a_call_counter_of_the_seed():
    def outputs(seed):
        model = One(normal(48, 64))
        install(model, noise(0.1), seed=seed)
        with torch.no_grad():
            return [model(normal(4, 64, seed=2)) for _ in range(2)]

    first, again, other = outputs(0), outputs(0), outputs(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_backward_replays_the_draw_of_its_forward_pass_outside_of_the_block():
    model = One(normal(48, 64))
    install(model, noise(0.1), seed=0)
    rows = torch.tensor([[0, 1, 2]])
    x, dy = normal(1, 3, 64, seed=2).requires_grad_(True), normal(1, 3, 48, seed=3)
    with noise_key(model, KEY, rows):
        inside = torch.autograd.grad(model(x), x, dy)[0]
        y = model(x)
    with noise_key(model, KEY.fold("other"), rows + 5):
        outside = torch.autograd.grad(y, x, dy)[0]
    assert torch.equal(inside, outside)


@pytest.mark.usefixtures("unchecked_shapes")
def test_rows_that_do_not_fit_the_tokens_are_an_error():
    model = One(normal(48, 64))
    install(model, noise(0.1), seed=0)
    with noise_key(model, KEY, torch.zeros(2, 3, dtype=torch.int64)):
        model(normal(2, 3, 64))
        model(normal(6, 64))  # flattened: the same tokens
        with pytest.raises(
            ValueError, match=r"layers\.0\.up_proj sees tokens of shape \(2, 2\).*rows of shape \(2, 3\)"
        ):
            model(normal(2, 2, 64))
    with (
        pytest.raises(ValueError, match=r"int64 of shape \[rollouts, columns\]"),
        noise_key(model, KEY, torch.zeros(2, 3)),
    ):
        pass


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_weight_is_quantized_once_per_optimizer_step_into_one_buffer(how, copied):
    model = One(normal(48, 64))
    install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    model = copy.deepcopy(model) if copied else model
    installed, linear = model.hardware_installed, model.linear
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{how: True})
    x = normal(4, 64)
    for step in range(3):
        for _ in range(4):  # micro-batches, and rollouts without gradient
            model(x).sum().backward()
            with torch.no_grad():
                model(x)
        assert installed.quantizations() == step + 1
        address = linear.hardware_state.stored.quantized(linear.weight).data_ptr()
        optimizer.step()
    with torch.no_grad():
        y = model(x)
    assert torch.equal(y, F.linear(x, quantize(linear.weight.detach(), "mxfp4")))
    assert linear.hardware_state.stored.quantized(linear.weight).data_ptr() == address


@pytest.mark.skipif(kernels_for(torch.ones(1)) is None, reason="only kernels check every small pass")
def test_new_values_by_data_or_load_state_dict_are_seen():
    model = One(normal(48, 64))
    install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    x = normal(4, 64)
    with torch.no_grad():
        old = model(x)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.linear.weight.data = normal(48, 64, seed=9)  # another address
        assert not torch.equal(model(x), old)
        model.load_state_dict(kept)
        assert torch.equal(model(x), old)
        model.linear.weight.data.mul_(4.0)  # torch does not count this write
        assert torch.equal(model(x), old * 4.0)


def test_other_weights_at_the_same_address_are_seen():
    # Weights that are passed to one call are freed after it. The next ones may get the same address, at version 0.
    model = One(normal(48, 64))
    install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    name, x = "layers.0.up_proj.weight", normal(4, 64)
    for seed in range(5):
        weights = {name: normal(48, 64, seed=seed)}
        with torch.no_grad():
            y = torch.func.functional_call(model, weights, (x,))
        assert torch.equal(y, F.linear(x, quantize(weights[name], "mxfp4"))), seed
        del weights


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize(("weight", "activation"), [("mxfp4", None), ("mxfp4", "mxfp4"), ("bf16", None)])
def test_training_continues_after_an_evaluation_in_inference_mode(weight, activation, path):
    model, x = One(normal(48, 64)), normal(4, 64)
    install(model, Hardware(precision=Precision(weight=weight, activation=activation)), seed=0)
    with use_backend(path):
        with torch.inference_mode():
            first = model(x).clone()
        for _ in range(2):
            y = model(x)
            y.sum().backward()
            assert torch.equal(y.detach(), first)
            with torch.no_grad():
                model.linear.weight.mul_(2.0)
            first = first * 2.0


def test_a_weight_changed_between_forward_and_backward_is_an_error_as_on_a_plain_linear():
    model = One(normal(48, 64))
    install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    y = model(normal(4, 64).requires_grad_(True))
    with torch.no_grad():
        model.linear.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_linears_that_see_one_input_share_its_quantization_until_it_changes():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    install(model, Hardware(precision=Precision(activation="mxfp4")), seed=0)
    x = normal(4, 64)
    with torch.no_grad():
        first = model[0].hardware_state.shared_input(x)
        assert model[1].hardware_state.shared_input(x) is first
        x.mul_(3.0)
        assert torch.equal(model[1].hardware_state.shared_input(x), quantize(x, "mxfp4"))


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_e4m3", "mxfp4"])
def test_a_token_is_quantized_alike_in_any_batch(fmt):
    model = One(torch.eye(64))
    install(model, Hardware(precision=Precision(activation=fmt)), seed=0)
    x = normal(2, 3, 64) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    with torch.no_grad():
        # With the identity matrix each sum has one term that is not zero, so that it is exact in any order.
        assert torch.equal(model(x)[:1, 1:2], model(x[:1, 1:2]))


def test_deadzone_is_relative_to_the_tokens_maximum_and_straight_through():
    model = One(torch.eye(4))
    hardware = Hardware(deadzone=Deadzone(threshold=0.25, layers=(0,)))
    install(model, hardware, seed=0)
    x = torch.tensor([[4.0, 1.0, -0.99, -2.0], [0.4, 0.05, -0.2, 0.0]])
    y, dx, dw, _ = run(model, x, torch.ones(2, 4))
    kept = torch.tensor([[4.0, 1.0, 0.0, -2.0], [0.4, 0.0, -0.2, 0.0]])
    assert torch.equal(y, kept)
    assert torch.equal(dx, torch.ones(2, 4))
    assert torch.equal(dw, kept.sum(0).expand(4, 4))


@pytest.mark.parametrize("hardware", [noise(0.1), Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(hardware):
    model = One(normal(48, 64), normal(48, seed=1))
    install(model, hardware, seed=0)
    x = normal(4, 64, seed=2).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in (x, model.linear.weight, model.linear.bias)} == {torch.float32}
    with hardware_off(model):
        assert (y - model(x)).norm() < 0.4 * model(x).norm()  # 10 % noise or W4A4 (18 dB for each factor), and bfloat16


def test_bfloat16_weights_stay_bfloat16():
    model = One(normal(48, 64)).to(torch.bfloat16)
    hardware = Hardware(
        precision=Precision(weight="mxfp4"), matmul_noise=MatmulNoise(relative_std=0.1, attention=False)
    )
    install(model, hardware, seed=0)
    y, dx, dw, _ = run(model, normal(4, 64).bfloat16(), normal(4, 48).bfloat16())
    assert {t.dtype for t in (y, dx, dw)} == {torch.bfloat16}


@pytest.mark.parametrize("activation", [None, "mxfp4"])
def test_a_frozen_base_keeps_the_cached_copy_and_no_more(activation):
    model = One(normal(48, 64))
    model.requires_grad_(False)
    install(model, Hardware(precision=Precision(weight="mxfp4", activation=activation)), seed=0)
    x = normal(4, 64).requires_grad_(True)
    y = model(x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert x.grad is not None
    state = model.linear.hardware_state
    weight = model.linear.weight  # also saved, for torch's check of its version
    assert set(saved) <= {state.stored.quantized(weight).data_ptr(), weight.data_ptr()}


def test_nan_spoils_its_block_and_nothing_else():
    weight = torch.ones(2, 64)
    weight[0, 3] = float("nan")
    model = One(weight)
    installed = install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    assert installed.nonfinite == installed.check_weights() == ("layers.0.up_proj.weight",)
    assert "NaN or Inf in layers.0.up_proj.weight" in installed.summary()
    state = model.linear.hardware_state
    bad = state.stored.quantized(model.linear.weight).isnan()
    assert bool(bad[0, :32].all()) and not bool(bad[0, 32:].any()) and not bool(bad[1].any())
    assert installed.diagnose(x=torch.ones(1, 64)) == ("layers.0.up_proj",)
