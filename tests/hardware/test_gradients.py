"""Quantized gradients: both backward products of a Linear against a reference in float64 written by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from roundoff.config import ConfigError, Hardware, Precision, validate
from roundoff.hardware import install, noise_key
from roundoff.hardware.gradients import GradientArithmetic
from roundoff.hardware.linear import LINEAR_STATE
from roundoff.numerics.hadamard import hadamard
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

KEY = Key.from_seed(5)


class One(nn.Module):
    """A model with one Linear of 96 -> 80."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.proj = nn.Linear(96, 80, dtype=dtype)
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(80, 96, generator=generator) * 0.1)
            self.proj.bias.copy_(torch.randn(80, generator=generator))

    def forward(self, x):
        return self.proj(x)


def operands(dtype=torch.float32, shape=(3, 12)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 96, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(*shape, 80, generator=generator).to(dtype)


def gradients(model, x, dy, rows=None, real=None):
    with noise_key(model, KEY, rows, real=real):
        model(x).backward(dy)
    grads = x.grad, model.proj.weight.grad, model.proj.bias.grad
    x.grad = model.proj.weight.grad = model.proj.bias.grad = None
    return grads


def close(found, expected, dtype):
    tolerance = 2e-6 if dtype is torch.float32 else 2**-8
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "activation", "gradient"),
    [
        ("nvfp4:2d", "nvfp4:te", "nvfp4:te"),
        ("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8_e5m2"),
        ("mxfp4", None, "mxfp4"),
        (None, "hif4", "hif4"),
        (None, None, "fp8_e4m3"),
        ("int8", "int8", "hif8"),
    ],
)
def test_each_operand_is_quantized_along_its_own_axis(weight, activation, gradient, dtype):
    model = One(dtype)
    install(model, Hardware(precision={"weight": weight, "activation": activation, "gradient": gradient}), seed=0)
    x, dy = operands(dtype)
    dx, dw, db = gradients(model, x, dy)

    def stored(tensor, fmt, **options):
        return tensor.double() if fmt is None else quantize(tensor.detach(), fmt, **options).double()

    w = model.proj.weight
    flat_dy, flat_x = dy.reshape(-1, 80), x.detach().reshape(-1, 96)
    along_out = stored(w, weight) if weight == "nvfp4:2d" else stored(w, weight, axis=0)
    expected_dx = stored(dy, gradient, tensor_scale="row") @ along_out
    expected_dw = stored(flat_dy, gradient, axis=0).t() @ stored(flat_x, activation, axis=0)
    close(dx, expected_dx, dtype)
    close(dw, expected_dw, dtype)
    close(db, flat_dy.double().sum(0), torch.bfloat16)


def test_without_a_format_gradients_pass_straight_through():
    x, dy = operands()
    plain, set_to_nearest = One(), One()
    install(plain, Hardware(precision={"weight": "mxfp4", "activation": "mxfp4"}), seed=0)
    install(set_to_nearest, Hardware(precision={"weight": "mxfp4", "activation": "mxfp4", "gradient": "bf16"}), seed=0)
    first, second = gradients(plain, x, dy), gradients(set_to_nearest, x, dy.to(torch.bfloat16).float())
    qw, qx = quantize(plain.proj.weight.detach(), "mxfp4"), quantize(x.detach(), "mxfp4").reshape(-1, 96)
    assert torch.equal(first[0], dy @ qw) and torch.equal(first[1], dy.reshape(-1, 80).t() @ qx)
    assert not torch.equal(first[1], second[1])


def test_padding_tokens_are_left_out_of_the_blocks_of_dw():
    precision = {"weight": "mxfp4", "activation": "mxfp4", "gradient": "mxfp4"}
    x, dy = operands(shape=(2, 48))
    real = torch.ones(2, 48, dtype=torch.bool)
    real[0, :5] = real[1, 40:] = False
    dy = dy * real[..., None]
    rows = torch.arange(96).reshape(2, 48)
    model = One()
    install(model, Hardware(precision=precision), seed=0)
    everything = gradients(model, x, dy, rows)
    masked = gradients(model, x, dy, rows, real)
    alone = gradients(model, x.detach()[real].requires_grad_(), dy[real])
    assert torch.equal(masked[1], gradients(model, x, dy, rows, real)[1])
    again_x = x.detach()[real].requires_grad_()
    with noise_key(model, KEY):
        model(again_x).backward(dy[real])
    assert torch.equal(masked[1], model.proj.weight.grad) and not torch.equal(masked[1], everything[1])
    assert torch.equal(masked[0], everything[0]) and alone[1] is not None


def test_stochastic_rounding_is_keyed_unbiased_and_leaves_x_alone():
    # The rule ceil saturates nothing; what saturates is biased under every rounding.
    precision = {"weight": "nvfp4:2d", "activation": "nvfp4:te", "gradient": "mxfp4:ceil"}
    hardware = Hardware(precision=precision | {"gradient_rounding": "stochastic"})
    model = One()
    install(model, hardware, seed=0)
    x, dy = operands()
    first, again = gradients(model, x, dy), gradients(model, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    sums = [torch.zeros_like(first[0]), torch.zeros_like(first[1])]
    count = 400
    for seed in range(count):
        with noise_key(model, Key.from_seed(seed)):
            model(x).backward(dy)
        sums[0] += x.grad
        sums[1] += model.proj.weight.grad
        x.grad = model.proj.weight.grad = None
    qw = quantize(model.proj.weight.detach(), "nvfp4:2d")
    qx = quantize(x.detach().reshape(-1, 96), "nvfp4:te", axis=0)
    for total, one, expected in zip(sums, first[:2], (dy @ qw, dy.reshape(-1, 80).t() @ qx), strict=True):
        error, of_one = ((found - expected).square().mean().sqrt() for found in (total / count, one))
        assert error < 0.07 * of_one  # 1/sqrt(400) = 0.05 if unbiased


@pytest.mark.parametrize("shape", [(1, 1), (1, 17)])
def test_operands_are_never_overwritten(shape):
    model = One()
    install(model, Hardware(precision={"weight": "mxfp4", "activation": "mxfp4", "gradient": "mxfp4"}), seed=0)
    x, dy = operands(shape=shape)
    before = x.detach().clone(), dy.clone()
    for columns in (80, 1):
        arithmetic = GradientArithmetic("mxfp4")
        arithmetic.for_dw(dy.reshape(-1, 80)[:, :columns], x.detach().reshape(-1, 96)[:, :1], "mxfp4", None, None)
    gradients(model, x, dy)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


def test_the_hadamard_transform_is_applied_to_both_operands_of_dw_and_cancels():
    exact = GradientArithmetic("bf16", hadamard=True)
    x, dy = operands(shape=(1, 37))
    flat_x, flat_dy = x.detach()[0], dy[0]
    qdy, qx = exact.for_dw(flat_dy, flat_x, None, None, None)
    padded = torch.nn.functional.pad(flat_dy, (0, 0, 0, 11))
    assert torch.equal(qdy, hadamard(padded, axis=0).to(torch.bfloat16).float().t()) and qx.shape == (96, 48)
    assert torch.allclose(qdy @ qx.t(), flat_dy.t() @ flat_x, atol=0.3)
    plain = GradientArithmetic("mxfp4", hadamard=True).for_dw(flat_dy, flat_x, "mxfp4", None, None)
    assert torch.equal(plain[0], quantize(hadamard(padded, axis=0), "mxfp4", axis=0).t())


def test_the_weight_along_out_features_is_computed_once_until_the_weight_changes():
    model = One()
    install(model, Hardware(precision={"weight": "mxfp4", "gradient": "mxfp4"}), seed=0)
    x, dy = operands()
    before = gradients(model, x, dy)
    state = model.proj.__dict__[LINEAR_STATE].stored
    kept = state._along_out
    gradients(model, x, dy)
    assert state._along_out is kept
    with torch.no_grad():
        model.proj.weight *= 3.0
    assert not torch.equal(gradients(model, x, dy)[0], before[0])
    assert torch.equal(state._along_out, quantize(model.proj.weight.detach(), "mxfp4", axis=0))


def test_a_frozen_weight_still_has_a_quantized_dx():
    model = One()
    install(model, Hardware(precision={"weight": "mxfp4", "gradient": "mxfp4"}), seed=0)
    model.requires_grad_(False)
    x, dy = operands()
    model(x).backward(dy)
    w = model.proj.weight
    assert torch.equal(x.grad, quantize(dy, "mxfp4") @ quantize(w, "mxfp4", axis=0))


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ({"gradient_rounding": "stochastic"}, "does nothing without a format of gradients"),
        ({"hadamard": "dw"}, "does nothing without a format of gradients"),
        ({"gradient": "bf16", "gradient_rounding": "stochastic"}, "not defined for the cast"),
        ({"gradient": "nvfp4:2d"}, "span tokens"),
        ({"gradient": "mxfp4", "gradient_rounding": "up"}, "nearest"),
    ],
)
def test_settings_that_contradict_each_other(precision, said):
    with pytest.raises(ConfigError, match=said):
        validate(Hardware, {"precision": precision}, source="own.toml")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_that_does_not_know_the_padding_is_an_error(reentrant):
    model = One()
    install(model, Hardware(precision=Precision(gradient="mxfp4"), exclude=()), seed=0)
    x, dy = operands()
    rows, real = torch.arange(36).reshape(3, 12), torch.ones(3, 12, dtype=torch.bool)
    real[:, :5] = False
    expected = gradients(model, x, dy, rows, real)
    with noise_key(model, KEY, rows, real=real):
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.backward(dy)
    assert torch.equal(model.proj.weight.grad, expected[1])
    with noise_key(model, KEY, rows, real=real):
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="does not know which tokens are padding"):
        y.backward(dy)
    model.proj.weight.grad = None
    checkpoint(model, x, use_reentrant=reentrant).backward(dy)  # without noise_key there is nothing to know
    assert torch.equal(model.proj.weight.grad, gradients(model, x, dy)[1])
