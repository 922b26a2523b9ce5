"""Linears whose products an accumulator of few bits sums: the three products, padding, and layers that are kept."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from roundoff.actions.show import products
from roundoff.config import Accumulator, ConfigError, Hardware, validate
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.numerics.accumulate import PartialSums, accumulated
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal
from tests.families import Batch, build

KEY = Key.from_seed(5)
FEW = {"bits": 4, "promote": 16, "group": 8}
SUMS = PartialSums(4, 16, 8, "align")


class One(nn.Module):
    """A Linear of 96 inputs and 80 outputs, with a bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.proj = nn.Linear(96, 80, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.proj.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.proj(x)


def operands(dtype=torch.float32, shape=(3, 12)):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 96, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(*shape, 80, generator=generator).to(dtype)


def run(model, x, dy, rows=None, real=None):
    with noise_key(model, KEY, rows, real=real):
        y = model(x)
        y.backward(dy)
    found = y.detach(), x.grad, model.proj.weight.grad
    x.grad = model.proj.weight.grad = model.proj.bias.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "precision", [{}, {"weight": "mxfp8_e4m3", "activation": "mxfp8_e4m3", "gradient": "mxfp8_e5m2"}]
)
@pytest.mark.parametrize("rounding", ["align", "truncate", "nearest"])
def test_the_three_products_sum_their_quantized_operands_in_chunks(rounding, precision, dtype):
    model, sums = One(dtype), PartialSums(4, 16, 8, rounding)
    install(model, Hardware(precision=precision, accumulator=Accumulator(**FEW, rounding=rounding)), seed=0)
    x, dy = operands(dtype)
    y, dx, dw = run(model, x, dy)
    w, bias = model.proj.weight.detach(), model.proj.bias.detach()
    flat_x, flat_dy = x.detach().reshape(-1, 96), dy.reshape(-1, 80)

    def stored(tensor, name, **options):
        return quantize(tensor, precision[name], **options) if precision else tensor

    forward = accumulated(stored(flat_x, "activation"), stored(w, "weight"), sums) + bias
    for_dx = accumulated(stored(flat_dy, "gradient"), stored(w, "weight", axis=0).t(), sums)
    for_dw = accumulated(stored(flat_dy, "gradient", axis=0).t(), stored(flat_x, "activation", axis=0).t(), sums)
    for found, expected in ((y, forward), (dx, for_dx), (dw, for_dw)):
        assert torch.equal(found.reshape(expected.shape), expected)
    with torch.no_grad():
        assert torch.equal(model(x), y)
        alone = model(x[1, 3])
        assert torch.equal(alone, y[1, 3])
        with hardware_off(model):
            plain = model(x)
    error = (y - plain).norm() / plain.norm()
    assert error > 0.01


def test_padding_does_not_enter_the_chunks_of_dw():
    model = One()
    install(model, Hardware(accumulator=Accumulator(**FEW)), seed=0)
    x, dy = operands(shape=(2, 30))
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :5] = real[1, 26:] = False
    dy = dy * real[..., None]
    rows = torch.arange(60).reshape(2, 30)
    masked, everything = run(model, x, dy, rows, real), run(model, x, dy, rows)
    assert torch.equal(masked[2], accumulated(dy[real].t(), x.detach()[real].t(), SUMS))
    assert not torch.equal(masked[2], everything[2])
    assert torch.equal(masked[0], everything[0]) and torch.equal(masked[1], everything[1])


def test_a_recomputation_that_does_not_know_the_padding_is_an_error():
    model = One()
    install(model, Hardware(accumulator=Accumulator(**FEW), exclude=()), seed=0)
    x, dy = operands()
    rows, real = torch.arange(36).reshape(3, 12), torch.ones(3, 12, dtype=torch.bool)
    with noise_key(model, KEY, rows, real=real):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="does not know which tokens are padding"):
        y.backward(dy)


def test_noise_is_added_to_the_sum_of_the_accumulator():
    model = One()
    noise = {"relative_std": 0.1, "attention": False, "scale": "operands"}
    install(model, Hardware(matmul_noise=noise, accumulator=Accumulator(**FEW)), seed=0)
    x, dy = operands()
    rows = torch.arange(36).reshape(3, 12)
    y, dx, _ = run(model, x, dy, rows)
    w, bias = model.proj.weight.detach(), model.proj.bias.detach()
    for found, a, b, product in ((y - bias, x.detach(), w, "forward"), (dx, dy, w.t(), "dx")):
        a = a.reshape(-1, a.shape[-1])
        eps = normal(KEY.fold("proj", product), (36, len(b)), rows=rows.reshape(-1))
        expected = accumulated(a, b, SUMS) + 0.1 * (a.square() @ b.square().t()).sqrt() * eps
        assert torch.allclose(found.reshape(expected.shape), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_kept_layers_have_no_accumulator_and_a_token_has_the_same_result_in_any_batch(family):
    model, batch, padded = build(family), Batch(), Batch(pad=3)
    hardware = Hardware(precision={"weight": "mxfp8_e4m3", "keep": [0]}, accumulator=Accumulator(**FEW))
    install(model, hardware, seed=0)
    states = {state.name: state.sums for state in model.hardware_installed.current_states()}
    assert {sums for name, sums in states.items() if name.startswith("model.layers.1.")} == {SUMS}
    assert not any(name.startswith("model.layers.0.") for name in states)
    assert "sums of 4 bits (align, groups of 8, promoted every 16)" in model.hardware_installed.summary()
    with torch.no_grad():
        whole = model(**batch.inputs()).logits
        behind = model(**padded.inputs()).logits[:, -7:]
        with hardware_off(model):
            clean = model(**batch.inputs()).logits
    real = batch.mask.bool()
    # Attention outside of the accumulator sums in another order; a changed bit may move a sum of 4 bits by one of them.
    moved = (behind - whole)[real].abs() > 1e-4
    assert moved.float().mean() < 0.1
    assert (whole - clean)[real].norm() > 0.01 * clean[real].norm()


def test_what_the_settings_say_about_themselves():
    hardware = Hardware(accumulator=Accumulator(bits=13))
    assert not (hardware.changes_nothing or hardware.is_noisy or hardware.draws_in_training)
    assert hardware.separates_rollouts
    text = "all three: sums of 13 bits (align, groups of 32, promoted every 128)"
    assert products(hardware).splitlines()[-1] == text
    assert Accumulator(bits="bf16").mantissa == Accumulator(bits=7).mantissa


@pytest.mark.parametrize(
    ("accumulator", "said"),
    [
        ({"bits": 1}, "accumulator.bits must be a number of mantissa bits, 2 to 23"),
        ({"bits": 24}, "accumulator.bits must be a number of mantissa bits, 2 to 23"),
        ({"bits": "bf17"}, "one of 'bf16', 'fp16', 'fp32', but is 'bf17'"),
        ({"bits": True}, "accumulator.bits must be"),
        ({"promote": 128}, "accumulator.bits is missing"),
        ({"bits": 13, "promote": 0}, "accumulator.promote must be a whole number of at least 1"),
        ({"bits": 13, "group": 0}, "accumulator.group must be a whole number of at least 1"),
        ({"bits": 13, "promote": 16}, "promotes after 16 products, which is no multiple of group = 32"),
        ({"bits": 13, "rounding": "up"}, "align.*truncate.*nearest"),
        ({"bits": 13, "chunk": 128}, "accumulator.chunk is not a setting"),
    ],
)
def test_settings_that_cannot_work(accumulator, said):
    with pytest.raises(ConfigError, match=said):
        validate(Hardware, {"accumulator": accumulator}, source="own.toml")
