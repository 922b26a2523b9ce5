"""Training depends neither on torch's global settings nor on the gradient mode it is called in."""

import pytest
import torch

from roundoff.config import LoRA
from roundoff.experiments import load_experiment
from roundoff.models.logprobs import token_logprobs
from roundoff.models.lora import attach
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_torch_state
from tests.small_models import make
from tests.training.test_loop import reproducible, run


def set_new_name(value):
    torch.backends.fp32_precision = value


SETTERS = {
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta device": (torch.set_default_device, "meta", None),
    "medium precision": (torch.set_float32_matmul_precision, "medium", "highest"),
    "bf16 by its newer name": (set_new_name, "bf16", "none"),
    "flushed denormals": (torch.set_flush_denormal, True, False),
    "no gradients": (torch.set_grad_enabled, False, True),
    "anomalies looked for": (torch.autograd.set_detect_anomaly, True, False),
}


def trained(root, small):
    experiment = load_experiment("quickstart-noise").model_copy(update={"epochs": 1})
    finished = run(root, experiment, small)
    weights = sorted(finished.path.glob("checkpoints/*/*.safetensors"))
    return reproducible(finished.path), [path.read_bytes() for path in weights]


@pytest.fixture(scope="module")
def usual(tmp_path_factory, small):
    """What a run leaves under torch's own settings."""
    metrics, weights = trained(tmp_path_factory.mktemp("usual"), small)
    assert weights
    return metrics, weights


def products():
    backends = (torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    return [backend.fp32_precision for backend in backends]


@pytest.mark.parametrize("name", sorted(SETTERS))
def test_a_run_is_the_same_under_any_setting(tmp_path, small, usual, name):
    setter, value, default = SETTERS[name]
    setter(value)
    try:
        found = trained(tmp_path, small)
    finally:
        setter(default)
    assert found == usual


def test_a_run_is_the_same_in_inference_mode(tmp_path, small, usual):
    with torch.inference_mode():
        assert trained(tmp_path, small) == usual


def test_newer_names_come_back_as_they_were():
    before = products()
    set_new_name("bf16")
    try:
        inherited = products()
        with own_torch_state():
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
            assert float(((x @ x).double() - x.double() @ x.double()).abs().max()) < 1e-4  # bfloat16: about 0.1
        assert products() == inherited
    finally:
        set_new_name("none")
    assert products() == before
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        own = products()
        with own_torch_state():
            pass
        assert products() == own
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_autocast_is_refused_in_training(tmp_path, small):
    tokens = torch.full((1, 4), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"torch\.autocast is on .* training pass"):
            token_logprobs(make(), tokens, torch.ones_like(tokens), 2, temperature=1.0)
        with pytest.raises(RuntimeError, match=r"torch\.autocast is on .* training"):
            trained(tmp_path, small)


@pytest.mark.parametrize("temperature", [1e-38, float("inf"), float("nan")])
def test_temperatures_that_cannot_divide_logits_are_refused(temperature):
    tokens = torch.full((1, 4), 3)
    with pytest.raises(ValueError, match="temperature must be"):
        token_logprobs(make(), tokens, torch.ones_like(tokens), 2, temperature=temperature)


def test_a_merge_is_the_same_under_medium_precision():
    def merged():
        adapters = attach(make(), LoRA(rank=4, alpha=8.0), Key.from_seed(0))
        with torch.no_grad():
            for name, parameter in adapters.peft.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        return adapters.merge().state_dict()

    expected = merged()
    torch.set_float32_matmul_precision("medium")
    try:
        found = merged()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
