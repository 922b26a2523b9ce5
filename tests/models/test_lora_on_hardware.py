"""Adapters on the hardware: `hardware.lora = true`."""

import pytest
import torch

from roundoff.config import ConfigError, Hardware, LoRA, validate
from roundoff.experiments import load_experiment
from roundoff.hardware import hardware_phase, install, noise_key
from roundoff.models.load import load_model
from roundoff.models.lora import attach
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from tests.models.test_lora import INPUT, set_b

FORMATS = {"weight": "mxfp4", "activation": "int8", "gradient": "hif8"}


def adapted(adapter, **settings):
    model = load_model("tiny").model
    hardware = validate(Hardware, settings, source="test")
    if not hardware.changes_nothing:
        install(model, hardware, seed=0)
    attach(model, adapter, Key.from_seed(0))
    set_b(model)
    return model


def one_layer(model):
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))


def test_adapters_stay_off_the_hardware_unless_they_are_asked_for():
    off = adapted(LoRA(rank=4), precision=FORMATS)
    on = adapted(LoRA(rank=4), precision=FORMATS, lora=True)
    counts = [len(model.hardware_installed.entries) for model in (off, on)]
    assert counts[1] == 3 * counts[0] and "lora_A" not in off.hardware_installed.summary()
    assert "mlp.up_proj.lora_B.default" in on.hardware_installed.summary()
    assert set(off.state_dict()) == set(on.state_dict())


def test_the_products_of_adapters_and_their_gradients_have_the_formats():
    """Against a reference written by hand, in float64 after each operand is quantized along its own axis."""
    layer = one_layer(adapted(LoRA(rank=4, alpha=8.0), precision=FORMATS, lora=True))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, layer.in_features, generator=generator, requires_grad=True)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    inner = a(x)
    qx, qa = quantize(x.detach(), "int8", tensor_scale="row").double()[0], quantize(a.weight, "mxfp4").double()
    torch.testing.assert_close(inner[0].double(), qx @ qa.t(), rtol=1e-5, atol=1e-5)
    y = b(inner)
    qi, qb = quantize(inner.detach(), "int8", tensor_scale="row").double()[0], quantize(b.weight, "mxfp4").double()
    torch.testing.assert_close(y[0].double(), qi @ qb.t(), rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=generator)
    with_grad = torch.autograd.grad(y, [inner, b.weight], dy)
    flat = dy[0]
    dx = quantize(flat, "hif8", tensor_scale="row").double() @ quantize(b.weight, "mxfp4", axis=0).double()
    dw = quantize(flat, "hif8", axis=0).double().t() @ quantize(inner.detach()[0], "int8", axis=0).double()
    torch.testing.assert_close(with_grad[0][0].double(), dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_grad[1].double(), dw, rtol=1e-5, atol=1e-5)


def test_noise_on_adapters_is_keyed_and_follows_phases():
    model = adapted(LoRA(rank=4), matmul_noise={"relative_std": 0.1}, lora=True, training={"lora": False})
    layer = one_layer(model)
    x = torch.ones(1, 5, layer.in_features)
    clean = layer.lora_B["default"](layer.lora_A["default"](x))
    rows = torch.arange(5)[None]

    def noisy(seed):
        with hardware_phase(model, "rollout"), noise_key(model, Key.from_seed(seed), rows), torch.no_grad():
            return layer.lora_B["default"](layer.lora_A["default"](x))

    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert not torch.equal(noisy(1), clean)
    with noise_key(model, Key.from_seed(1), rows):
        assert torch.equal(layer.lora_B["default"](layer.lora_A["default"](x)), clean)
    assert model(**INPUT).logits.isfinite().all()


def test_rules_reach_adapters_after_they_are_attached():
    rules = [{"match": ["up_proj"], "precision": {"weight": "hif8"}}]
    model = adapted(LoRA(rank=4), precision={"weight": "mxfp4", "keep": [-1]}, rules=rules, lora=True)
    formats = {entry.name.split("layers.")[1]: entry.weight for entry in model.hardware_installed.entries}
    assert formats["0.mlp.up_proj.lora_A.default"] == formats["0.mlp.up_proj"] == "hif8"
    assert formats["0.mlp.down_proj.lora_B.default"] == "mxfp4"
    last = max(int(name.split(".")[0]) for name in formats)
    assert last == model.config.num_hidden_layers - 2


def test_hardware_of_adapters_without_adapters_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "quickstart-mxfp4"\n[hardware]\nlora = true\n')
    with pytest.raises(ConfigError, match=r"hardware\.lora = true does nothing without adapters"):
        load_experiment(str(path))
    with pytest.raises(ConfigError, match=r"does nothing without adapters on the hardware's Linears"):
        adapted(
            LoRA(rank=4, targets=("q_proj",)), precision={"weight": "mxfp4"}, exclude=("lm_head", "q_proj"), lora=True
        )
