"""Stacked experts on simulated hardware."""

import pytest
import torch

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from tests.families import Batch, build
from tests.pretend_device import pretended, waits

KEY = Key.from_seed(8)
W4A4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))
NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1))
MOE = pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or Batch()).inputs()).logits


@MOE
def test_experts_are_computed_with_quantized_weights(family):
    model, plain = build(family), build(family)
    installation = install(model, Hardware(precision=Precision(weight="nvfp4")), seed=0)
    experts = [e.name for e in installation.entries if e.name.endswith("experts")]
    assert experts == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert {s.name.rpartition(".")[2] for s in installation.skipped} == {"embed_tokens", "lm_head", "gate"}
    with torch.no_grad():
        for entry in installation.entries:
            for parameter in plain.get_submodule(entry.name).parameters(recurse=False):
                for matrix in parameter if parameter.dim() == 3 else [parameter]:
                    if matrix.dim() == 2:
                        matrix.copy_(quantize(matrix, "nvfp4"))
    # The two computations sum the same products in different orders, so they differ by float32 rounding.
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-5)


@MOE
def test_gradients_of_experts_are_those_of_the_plain_model_without_rounding(family):
    model, plain, batch = build(family), build(family), Batch()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=1e-12, attention=False)), seed=0)
    for m in (model, plain):
        m(**batch.inputs(), labels=batch.ids.masked_fill(batch.mask == 0, -100)).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@MOE
def test_noise_reaches_experts_and_is_off_when_off(family):
    model, plain, batch = build(family), build(family), Batch()
    install(model, NOISY.model_copy(update={"exclude": ("embed_tokens", "lm_head", "*_proj", "*gate")}), seed=0)
    layer, x = model.model.layers[0].mlp, torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), noise_key(model, KEY, batch.rows[:2]):
        assert not torch.equal(layer(x), plain.model.layers[0].mlp(x))
    with torch.no_grad(), noise_key(model, KEY, batch.rows[1:2]):
        one = layer(x[1:])
    with torch.no_grad(), noise_key(model, KEY, batch.rows[:2]):
        # A token's noise does not depend on the other tokens that chose the same experts.
        torch.testing.assert_close(layer(x)[1:], one, rtol=0, atol=2e-5)
    with torch.no_grad(), hardware_off(model):
        assert torch.equal(layer(x), plain.model.layers[0].mlp(x))


def test_a_layer_of_experts_waits_once_for_its_device():
    with pretended() as device:
        model, batch = build("qwen3_moe").to(device), Batch()
        install(model, NOISY, seed=0)
        layer = model.model.layers[0].mlp
        x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        there = batch.rows.to(device)
        with waits() as waited, noise_key(model, KEY, there, host=batch.rows):
            layer(x).sum().backward()
    assert [line.split()[0] for line in waited] == ["cpu"], waited


def test_experts_that_are_not_simulated_are_listed():
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.has_bias = True
    installation = install(model, W4A4, seed=0)
    reasons = {s.name: s.reason for s in installation.skipped}
    assert "has biases, which is not simulated" in reasons["model.layers.0.mlp.experts"]
    assert "model.layers.1.mlp.experts" in {e.name for e in installation.entries}
