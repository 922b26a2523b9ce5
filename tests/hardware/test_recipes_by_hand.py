"""Every recipe: forward and both gradients of a Linear in each phase, against a float64 reference written by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from roundoff.config import PHASES
from roundoff.experiments import load_experiment, load_recipe, recipe_names
from roundoff.formats.table import get_format
from roundoff.hardware import hardware_phase, install, noise_key
from roundoff.numerics.hadamard import hadamard
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from tests.parallel.test_ranks import assert_same_to_rounding, metrics

KEY, OUT, IN = Key.from_seed(5), 160, 256
ROWS = torch.arange(3 * 16).reshape(3, 16)


class Two(nn.Module):
    """Layers of one Linear each, of which a recipe may keep the last; they are used side by side."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(IN, OUT, bias=False, dtype=dtype) for _ in range(2))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(OUT, IN, generator=generator) * 0.1)

    def forward(self, x):
        return self.layers[0](x) + 0 * self.layers[1](x)


def stored(tensor, fmt, **options):
    return tensor.double() if fmt is None else quantize(tensor, fmt, **options).double()


def by_hand(x, w, dy, p, keys):
    """y, dX and dW in float64, each operand quantized along the axis over which its product sums."""
    y = stored(x, p.activation, tensor_scale="row") @ stored(w, p.weight).t()
    if p.gradient is None:
        return y, dy.double() @ stored(w, p.weight), dy.double().t() @ stored(x, p.activation, tensor_scale="row")
    two_dimensional = p.weight is not None and get_format(p.weight).rows > 1
    w_along_out = stored(w, p.weight) if two_dimensional else stored(w, p.weight, axis=0)
    random = [key if p.gradient_rounding == "stochastic" else None for key in keys]
    dx = stored(dy, p.gradient, tensor_scale="row", stochastic=random[0]) @ w_along_out
    a, b = (t.t().contiguous() for t in (dy, x))
    if p.hadamard == "dw":
        a, b = hadamard(a, 16), hadamard(b, 16)
    dw = stored(a, p.gradient, stochastic=random[1]) @ stored(b, p.activation).t()
    return y, dx, dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", recipe_names())
def test_a_linear_computes_what_the_recipe_says(name, checkpointing, dtype):
    hardware = load_recipe(name).hardware
    if not any(v.precision.weight or v.precision.activation for v in hardware.variants()):
        pytest.skip("the recipe concerns attention alone (tests/hardware/test_attention_formats.py)")
    model = Two(dtype)
    state = install(model, hardware, seed=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, IN, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(3, 16, OUT, generator=generator).to(dtype)
    weight = model.layers[0].weight
    for phase in PHASES:
        with hardware_phase(model, phase), noise_key(model, KEY, ROWS):
            y = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
            found = [y, *torch.autograd.grad(y, [x, weight], dy)]
            keys = model.layers[0].hardware_state.keys(KEY)
            mark = state.runtime.draw.fingerprint
        own = keys.dx.fold(mark).fold("gradient", "dx"), keys.dw.fold(mark).fold("gradient", "dw")
        flat_x, flat_dy = x.detach().reshape(-1, IN), dy.reshape(-1, OUT)
        expected = by_hand(flat_x, weight.detach(), flat_dy, hardware.of(phase).precision, own)
        tolerance = 3e-6 if dtype is torch.float32 else 2**-7
        for value, reference in zip(found, expected, strict=True):
            value = value.detach().double().reshape(reference.shape)
            assert torch.allclose(value, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max())), (
                phase
            )


@pytest.mark.parametrize("name", ["fp8-rollout-bf16-training", "nvfp4-rollout-bf16-training", "w4a8"])
def test_two_ranks_make_the_run_of_one(tmp_path, small, name):
    """Gradients are straight through here; blocks of a quantized dW hold the tokens of one rank."""
    from roundoff.launch.request import RunRequest, execute
    from tests.thread_ranks import on_ranks

    (tmp_path / "mine.toml").write_text(f'extends = ["quickstart-clean", "{name}"]\n')
    mine = load_experiment(str(tmp_path / "mine.toml"))
    profile = small.model_copy(update={"training": small.training.model_copy(update={"micro_batch": 12})})
    alone, shared = (RunRequest(mine, profile, 0, tmp_path / n, {}, tracker="none") for n in ("one", "several"))
    execute(alone, lambda: False)
    assert on_ranks(2, lambda ranks: execute(shared, lambda: False, ranks)) == [("complete", "")] * 2
    assert_same_to_rounding(metrics(alone.path), metrics(shared.path))
