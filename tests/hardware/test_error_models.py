"""Errors besides the published noise, computed by hand on a Linear and in attention: scales, gain and converter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from roundoff.config import ConfigError, Deadzone, Fault, Hardware, MatmulNoise, validate
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.hardware.attention import STATE, AttentionState, attention_forward
from roundoff.hardware.draw import Draw
from roundoff.hardware.error_models import converted
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.backend import use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal
from roundoff.numerics.scaled_noise import scaled_noise
from tests.families import Batch, build

KEY = Key.from_seed(5)
NAME = "layers.0.up_proj"


class One(nn.Module):
    """A Linear named as in a decoder layer, 96 inputs and 80 outputs, with a bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        linear = nn.Linear(96, 80, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for parameter in linear.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": linear})])

    @property
    def linear(self):
        return self.layers[0]["up_proj"]

    def forward(self, x):
        return self.linear(x)


def on_hardware(dtype=torch.float32, seed=0, precision=None, **noise):
    model = One(dtype)
    settings = {"attention": False} | noise
    install(model, Hardware(precision=precision or {}, matmul_noise=MatmulNoise(**settings)), seed=seed)
    return model


def operands(dtype=torch.float32, shape=(3, 12)):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 96, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(*shape, 80, generator=generator).to(dtype)


def run(model, x, dy, rows, key=KEY):
    """Output without gradient, dX and dW under one key."""
    with noise_key(model, key, rows):
        y = model(x)
        y.backward(dy)
    found = y.detach(), x.grad, model.linear.weight.grad
    x.grad = model.linear.weight.grad = model.linear.bias.grad = None
    return found


ROWS = torch.arange(36).reshape(3, 12) + (1 << 20)


def scale_of(kind, a, b):
    """The scale of the noise on `a @ b^T` in float64."""
    if kind == "row":
        return (a @ b.t()).square().mean(-1, keepdim=True).sqrt()
    return (a.square() @ b.square().t()).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, {"weight": "mxfp4", "activation": "mxfp4", "gradient": "mxfp4"}])
@pytest.mark.parametrize("scale", ["operands", "row"])
def test_noise_of_each_product_has_its_scale_and_the_eps_of_the_published_noise(scale, precision, dtype):
    std = 0.1
    model = on_hardware(dtype, precision=precision, relative_std=std, scale=scale)
    x, dy = operands(dtype)
    found = run(model, x, dy, ROWS)
    w, flat_x, flat_dy = model.linear.weight.detach(), x.detach().reshape(-1, 96), dy.reshape(-1, 80)
    if precision is None:
        forward, for_dx, for_dw = (flat_x, w), (flat_dy, w.t()), (flat_dy.t(), flat_x.t())
    else:
        fmt = "mxfp4"
        forward = quantize(flat_x, fmt), quantize(w, fmt)
        for_dx = quantize(flat_dy, fmt), quantize(w, fmt, axis=0).t()
        for_dw = quantize(flat_dy, fmt, axis=0).t(), quantize(flat_x, fmt, axis=0).t()
    keys = KEY.fold(NAME, "forward"), KEY.fold(NAME, "dx"), KEY.fold(NAME, "dw").fold(Draw(KEY, ROWS).fingerprint)
    for y, (a, b), key, rows in zip(found, (forward, for_dx, for_dw), keys, (ROWS, ROWS, None), strict=True):
        a, b = a.double(), b.double()
        ids = None if rows is None else rows.reshape(-1)
        eps = normal(key, (len(a), len(b)), rows=ids).double()
        expected = a @ b.t() + std * scale_of(scale, a, b) * eps
        if y is found[0]:
            expected = expected + model.linear.bias.detach().double()
        tolerance = 1e-5 if dtype is torch.float32 else 3 * 2**-8  # product, noise and bias are each rounded
        assert torch.allclose(y.reshape(expected.shape).double(), expected, rtol=tolerance, atol=tolerance * 30)


@pytest.mark.parametrize(("scale", "columns"), [("operands", 80), ("row", 80)])
def test_the_noise_has_the_stated_size_and_no_bias(scale, columns):
    model = on_hardware(relative_std=0.1, scale=scale)
    x, _ = operands(shape=(100, 5))
    a, w = x.detach().reshape(-1, 96), model.linear.weight.detach()
    with torch.no_grad(), noise_key(model, KEY, torch.arange(500).reshape(100, 5)):
        y = model(x)
    with torch.no_grad(), hardware_off(model):
        clean = model(x)
    relative = ((y - clean).reshape(500, columns).double() / scale_of(scale, a.double(), w.double()) / 0.1).flatten()
    count = relative.numel()  # 40,000 draws: 4.5 standard errors of mean and variance
    assert abs(relative.mean()) < 4.5 / count**0.5
    assert abs(relative.var() - 1) < 4.5 * (2 / count) ** 0.5


ALL = {"relative_std": 0.1, "gain_std": 0.05, "adc_bits": 8}


@pytest.mark.parametrize("scale", ["output", "operands", "row"])
def test_a_token_has_the_same_result_in_any_batch_and_behind_padding(scale):
    model = on_hardware(scale=scale, **ALL)
    x, _ = operands()
    with torch.no_grad():
        # Weights of few bits make every sum exact in any order, so that equal bits may be asked for.
        model.linear.weight.copy_(quantize(model.linear.weight, "mxfp4"))
        x = quantize(x.detach(), "mxfp4")
        with noise_key(model, KEY, ROWS):
            whole, again = model(x), None
        with noise_key(model, KEY, ROWS):
            again = model(x)
        with noise_key(model, KEY, ROWS[1:2]):
            alone = model(x[1:2])
        padded = torch.cat([torch.randn(3, 4, 96), x], 1)
        with noise_key(model, KEY, torch.cat([ROWS[:, :1].expand(3, 4), ROWS], 1)):
            behind = model(padded)[:, 4:]
        with noise_key(model, KEY.fold("other"), ROWS):
            other = model(x)
    assert torch.equal(whole, again) and torch.equal(whole[1:2], alone) and torch.equal(whole, behind)
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_are_constant_over_passes_and_leave_gradients_alone(dtype):
    model = on_hardware(dtype, gain_std=0.05)
    x, dy = operands(dtype)
    y, dx, dw = run(model, x, dy, ROWS)
    assert all(torch.equal(a, b) for a, b in zip((y, dx, dw), run(model, x, dy, ROWS, KEY.fold(1)), strict=True))
    state = model.linear.hardware_state
    g = normal(Key.from_seed(0).fold("hardware").fold("gain", NAME), (1, 80))[0]
    w, bias = model.linear.weight.detach(), model.linear.bias.detach()
    expected = (F.linear(x.detach(), w).float() * (1 + 0.05 * g)).to(dtype) + bias
    assert torch.equal(y, expected)
    assert torch.equal(dx, dy @ w) and torch.equal(dw, dy.reshape(-1, 80).t() @ x.detach().reshape(-1, 96))
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate.linear.hardware_state.errors.gain, state.errors.gain)
    assert not torch.equal(on_hardware(gain_std=0.05, seed=1).linear.hardware_state.errors.gain, state.errors.gain)
    with torch.no_grad(), hardware_off(model):
        assert torch.equal(model(x), F.linear(x, w, bias))


def test_gains_of_all_modules_are_independent_draws_of_the_stated_size():
    model = build("qwen2")
    install(model, Hardware(matmul_noise=MatmulNoise(gain_std=0.05)), seed=0)
    states = model.hardware_installed.current_states()
    drawn = torch.cat([(state.errors.gain - 1) / 0.05 for state in states])
    assert abs(drawn.mean()) < 4.5 / len(drawn) ** 0.5 and abs(drawn.var() - 1) < 4.5 * (2 / len(drawn)) ** 0.5
    assert not torch.equal(states[0].errors.gain, states[3].errors.gain)
    assert "gain error 0.05" in model.hardware_installed.summary()
    assert not model.hardware_installed.hardware.is_noisy


def test_the_converter_rounds_to_its_levels_and_saturates():
    # 3 bits: levels -3 to 3 of step 2 range / (8 - 2); a range of 6 gives a step of 2. Ties go to the even level.
    y = torch.tensor([[0.9, 1.1, -3.0, 5.0, 7.0, -100.0, float("nan")]])
    found = converted(y, torch.tensor([[6.0]]), 3)
    assert torch.equal(found[:, :6], torch.tensor([[0.0, 2.0, -4.0, 4.0, 6.0, -6.0]])) and found[0, 6].isnan()
    assert not converted(torch.ones(2, 2), torch.zeros(2, 1), 8).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [12.0, 0.5])
def test_the_range_of_a_token_is_that_of_its_largest_input_and_the_largest_weight(limit, dtype):
    model = on_hardware(dtype, adc_bits=6, adc_range=limit)
    x, dy = operands(dtype)
    with torch.no_grad():
        x[0, 0] *= 64.0
    y, dx, dw = run(model, x, dy, ROWS)
    w, bias = model.linear.weight.detach(), model.linear.bias.detach()
    most = (x.detach().abs().amax(-1, keepdim=True).float() * w.abs().max().float()) * limit
    step = most / 31
    product = F.linear(x.detach(), w).float()
    expected = ((product / step).round().clamp(-31, 31) * step).to(dtype) + bias
    # Where the quotient is within rounding of a half, the neighbouring level is as good.
    assert ((y.float() - expected.float()).abs() > 1e-4 * most).float().mean() < 1e-3
    saturated = (product.abs() > most).float().mean()
    assert saturated == 0 if limit == 12.0 else 0.2 < saturated < 0.9
    assert torch.equal(dx, dy @ w) and torch.equal(dw, dy.reshape(-1, 80).t() @ x.detach().reshape(-1, 96))


def test_noise_comes_before_gain_gain_before_converter_and_bias_and_faults_last():
    model = One()
    fault = Fault(kind="gain", layer=0, amount=1.0)
    install(model, Hardware(matmul_noise=MatmulNoise(attention=False, **ALL), faults=(fault,)), seed=0)
    x, _ = operands()
    with torch.no_grad(), noise_key(model, KEY, ROWS):
        y = model(x)
    w, bias = model.linear.weight.detach(), model.linear.bias.detach()
    product = F.linear(x.detach(), w)
    noisy = product + 0.1 * product.abs() * normal(KEY.fold(NAME, "forward"), product.shape, rows=ROWS)
    gained = noisy * model.linear.hardware_state.errors.gain
    most = x.detach().abs().amax(-1, keepdim=True) * w.abs().max() * 12.0
    read = (gained / (most / 127)).round().clamp(-127, 127) * (most / 127)
    expected = (read + bias) * 2.0
    assert ((y - expected).abs() > 1e-3 * most).float().mean() < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_operands_in_attention_and_experts_replay_in_any_batch_behind_padding_and_with_a_cache(family):
    model, batch, padded = build(family), Batch(), Batch(pad=3)
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05, scale="operands", gain_std=0.02)), seed=0)
    real = batch.mask.bool()

    def logits(b, rows=slice(None)):
        inputs = {name: value[rows] for name, value in b.inputs().items()}
        with torch.no_grad(), noise_key(model, KEY, b.rows[rows]):
            return model(**inputs).logits[:, -7:]

    whole = logits(batch)
    assert torch.equal(whole, logits(batch))
    # Sums over other shapes differ by rounding. Other draws differ by over 1e-2.
    torch.testing.assert_close(logits(padded)[real], whole[real], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits(batch, slice(1, 3))[real[1:]], whole[1:][real[1:]], rtol=0, atol=5e-5)
    cache, parts = None, []
    for columns in (slice(0, 5), slice(5, 7)):
        with torch.no_grad(), noise_key(model, KEY, batch.rows[:, columns]):
            out = model(
                input_ids=batch.ids[:, columns],
                position_ids=batch.positions[:, columns],
                attention_mask=batch.mask[:, : columns.stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=5e-5)
    with torch.no_grad(), hardware_off(model):
        clean = model(**batch.inputs()).logits
    assert (whole - clean)[real].abs().max() > 1e-2


def test_the_six_products_of_attention_have_noise_of_their_operands():
    rows, std = torch.tensor([[0, 1, 2, 3]]) + (3 << 20), 0.1
    q, k, v, do = (torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))
    module = nn.Module()
    runtime = Runtime(Key.from_seed(0), draw=Draw(KEY, rows))
    module.__dict__[STATE] = AttentionState("a", runtime, std, std, "operands")
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, weights = attention_forward(module, *leaves, None, scaling=0.5)
    out.transpose(1, 2).backward(do)
    own = rows[:, None] * 2 + torch.arange(2)[:, None]
    zero = torch.zeros(1, 2, 4, dtype=torch.int64)

    def noisy(a, b, product, ids, start=None):
        eps = normal(KEY.fold("a", product), (*a.shape[:-1], b.shape[-1]), rows=ids, column_start=start)
        return a @ b + std * (a.square() @ b.square()).sqrt() * eps

    s = noisy(q, k.mT, "scores", own, zero) * 0.5
    p = s.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), torch.finfo(s.dtype).min).softmax(-1)
    torch.testing.assert_close(weights.detach(), p)
    torch.testing.assert_close(out.detach().transpose(1, 2), noisy(p, v, "mix", own))
    dp = noisy(do, v.mT, "mix_dp", own, zero)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * 0.5
    torch.testing.assert_close(leaves[0].grad, noisy(ds, k, "scores_dq", own))
    torch.testing.assert_close(leaves[1].grad, noisy(ds.mT, q, "scores_dk", own))
    torch.testing.assert_close(leaves[2].grad, noisy(p.mT, do, "mix_dv", own))


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_noise_of_a_given_size_draws_what_the_published_noise_draws(path):
    y, ids = torch.randn(2, 3, 50), torch.arange(6).reshape(2, 3) + 7
    start = torch.tensor([[0, -3, 5], [4, 1, 2]])
    with use_backend(path):
        expected = matmul_noise(torch.ones(2, 3, 50), 0.25, KEY, rows=ids, column_start=start) - 1.0
        found = scaled_noise(y.clone(), torch.full_like(y, 0.25), KEY, rows=ids, column_start=start) - y
        assert torch.allclose(found, expected, atol=1e-6)
        bf16 = y.bfloat16()
        rounded = scaled_noise(bf16.clone(), torch.full((2, 3, 1), 0.25), KEY, rows=ids, column_start=start)
        assert torch.equal(
            rounded, (bf16.float() + 0.25 * normal(KEY, y.shape, rows=ids, column_start=start)).bfloat16()
        )
        turned = y.transpose(0, 1)  # not contiguous
        again = scaled_noise(turned, torch.zeros(3, 2, 1), KEY)
        assert again is turned and torch.equal(again, y.transpose(0, 1))


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({"scale": "operands"}, "scale = 'operands' does nothing without noise: set relative_std"),
        ({"scale": "row", "relative_std": 0.1}, "scale = 'row' cannot be used in attention"),
        ({"scale": "column", "relative_std": 0.1}, "output.*operands.*row"),
        ({"gain_std": 0.1, "forward": False}, "gain_std concerns the product of the forward pass"),
        ({"gain_std": 1.0}, r"gain_std must be in \[0, 1\)"),
        ({"adc_bits": 8, "forward": False}, "adc_bits concerns the product of the forward pass"),
        ({"adc_bits": 1}, "adc_bits must be a whole number of bits, 2 to 16"),
        ({"adc_bits": 17}, "adc_bits must be a whole number of bits, 2 to 16"),
        ({"adc_range": 3.0}, "adc_range = 3 does nothing without a converter: set adc_bits"),
        ({"adc_bits": 8, "adc_range": 0.0}, "adc_range must be above 0"),
    ],
)
def test_settings_that_cannot_work(noise, said):
    with pytest.raises(ConfigError, match=said):
        validate(Hardware, {"matmul_noise": noise}, source="own.toml")


def test_gain_and_converter_alone_are_no_noise_and_need_no_key():
    hardware = Hardware(matmul_noise=MatmulNoise(gain_std=0.1, adc_bits=8))
    assert not (hardware.changes_nothing or hardware.is_noisy or hardware.draws_in_training)
    assert not hardware.separates_rollouts
    model = One()
    install(model, hardware.model_copy(update={"deadzone": Deadzone(threshold=0.1, layers=(0,))}), seed=0)
    x, dy = operands()
    model(x).backward(dy)
    assert "8-bit converter, range 12" in model.hardware_installed.summary()
