"""Ways of computing that would bypass the hardware are refused."""

import threading
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from roundoff.config import ConfigError, Deadzone, Fault, Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, noise_key
from roundoff.numerics.rng import Key
from tests.families import Batch, build

NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1, attention=False))
W4 = Hardware(precision=Precision(weight="mxfp4"))


@pytest.mark.parametrize("kind", ["encoder", "attention"])
def test_torchs_fast_path_is_refused(kind):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if kind == "encoder" else nn.Sequential(layer, nn.Linear(32, 32))
    with pytest.raises(ConfigError, match="set_fastpath_enabled"):
        install(model.eval(), W4, seed=0)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        plain = model(torch.ones(2, 5, 32))
        install(model, W4, seed=0)
        with torch.no_grad():
            assert not torch.equal(model(torch.ones(2, 5, 32)), plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_module_under_two_names_is_refused_with_noise_only():
    model = build()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ConfigError, match=r"model\.layers\.0.* and model\.layers\.1.* are one module"):
        install(model, NOISY, seed=0)
    install(model, W4, seed=0)


@pytest.mark.parametrize(
    ("pattern", "hint"), [("up_prj", "'up_proj'"), ("layers.1.mlp", "did you mean"), ("*.weight", "names like")]
)
def test_a_pattern_that_excludes_nothing_is_refused(pattern, hint):
    model = build()
    with pytest.raises(ConfigError, match=r"hardware\.exclude") as error:
        install(model, W4.model_copy(update={"exclude": ("lm_head", pattern)}), seed=0)
    assert pattern in str(error.value) and hint in str(error.value)
    install(model, W4, seed=0)  # the refusal left no trace in the model


def test_default_patterns_need_not_match():
    install(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), W4, seed=0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        return self.inner(self.inner(x))


def test_a_module_that_is_called_twice_in_one_pass_causes_a_warning():
    model, rows = Twice(), torch.zeros(1, 3, dtype=torch.int64)
    install(model, NOISY, seed=0)
    x = torch.randn(1, 3, 32)
    with pytest.warns(UserWarning, match="inner is computed a second time"), noise_key(model, Key.from_seed(1), rows):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # outside of noise_key each call draws anew
        with noise_key(model, Key.from_seed(1), rows):
            model.inner(x)
        with noise_key(model, Key.from_seed(1), rows):
            model.inner(x).sum().backward()


def test_two_threads_do_not_share_a_key():
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    errors = []

    def other():
        for block in (lambda: noise_key(model, Key.from_seed(2), batch.rows), lambda: hardware_off(model)):
            try:
                with block():
                    errors.append(None)
            except RuntimeError as error:
                errors.append(str(error))

    first, second = (noise_key(model, Key.from_seed(seed), batch.rows) for seed in (1, 3))
    with first, second:  # one thread may nest blocks
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("another thread is inside noise_key" in error for error in errors)
    with noise_key(model, Key.from_seed(1), batch.rows):
        pass


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(precision=Precision(weight="mxfp4", activation="mxfp4", keep=(0,))),
        Hardware(precision=Precision(weight="mxfp4"), exclude=("embed_tokens", "lm_head", "*.layers.0.mlp.experts")),
        Hardware(precision=Precision(weight="mxfp4"), exclude=("embed_tokens", "lm_head", "experts")),
        Hardware(deadzone=Deadzone(threshold=0.05, layers=(1,))),
        Hardware(faults=(Fault(kind="gain", layer=1, amount=0.05),)),
    ],
    ids=["keep", "exclude one", "exclude all", "deadzone", "fault"],
)
def test_experts_without_hardware_compute_as_in_the_plain_model(family, hardware):
    plain, model = build(family), build(family)
    hidden = {}

    def keep(name):
        return lambda _module, _inputs, output: hidden.setdefault(name, []).append(output)

    for which in (plain, model):
        which.model.layers[0].mlp.experts.register_forward_hook(keep("first"))
    install(model, hardware, seed=0)
    with torch.no_grad():
        same = plain(**Batch().inputs()).logits
        other = model(**Batch().inputs()).logits
        with hardware_off(model):
            assert torch.equal(model(**Batch().inputs()).logits, same)
    assert not torch.equal(other, same)
    if hardware.deadzone or hardware.faults:  # only layer 1 is on hardware
        assert torch.equal(hidden["first"][0], hidden["first"][1])


@pytest.mark.parametrize(("fmt", "size"), [("mxfp4:ceil", 3e38), ("mxfp8_e4m3:rceil", 3.4e38), ("fp16", 7e4)])
def test_weights_that_a_format_makes_infinite_are_refused(fmt, size):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = size
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers up to .* infinity"):
        install(model, Hardware(precision=Precision(weight=fmt)), seed=0)
    install(model, Hardware(precision=Precision(activation="mxfp4")), seed=0)


def test_weights_that_became_nan_are_found_through_a_wrapper():
    """Names of modules within PEFT's wrapper differ from those of the weights' plain model."""
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["up_proj"]))
    installed = install(wrapped, W4, seed=0)
    assert installed.check_weights() == ()
    with torch.no_grad():
        wrapped.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = float("nan")
    (name,) = installed.check_weights()
    assert "layers.1.mlp.up_proj" in name


def test_a_backward_pass_may_recompute_under_another_default_device():
    """Gradient checkpointing compares the keys of the two passes by a small tensor, which must hold numbers."""
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with torch.device("meta"):
        with noise_key(model, Key.from_seed(1), batch.rows):
            loss = model(**batch.inputs()).logits.sum()
        with noise_key(model, Key.from_seed(1), batch.rows):
            loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.isfinite().all()
