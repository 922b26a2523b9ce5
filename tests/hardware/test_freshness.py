"""Q(W) follows every write to its weight, including those that torch does not count."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from roundoff.config import Hardware, Precision
from roundoff.hardware import install, installed, noise_key
from roundoff.hardware.freshness import ALL_EVERY, ALL_FROM
from roundoff.numerics.backend import kernels_for, use_backend
from roundoff.numerics.rng import Key
from tests.families import Batch, build

W4A16 = Hardware(precision=Precision(weight="mxfp4"))
LARGE = torch.randint(2, 48, (ALL_FROM // 32, 32), generator=torch.Generator().manual_seed(0))
SMALL = torch.randint(2, 48, (1, 3), generator=torch.Generator().manual_seed(0))
NAME = "model.layers.1.mlp.up_proj"
kernels_watch = pytest.mark.skipif(kernels_for(torch.ones(1)) is None, reason="only kernels check every small pass")
SIZES = [pytest.param(SMALL, id="few tokens", marks=kernels_watch), pytest.param(LARGE, id="many tokens")]


def logits(model, ids=SMALL):
    with torch.no_grad():
        return model(input_ids=ids).logits


def through_data(weight, values):
    weight.data.copy_(values)


def through_a_kept_alias(weight, values):
    through_a_kept_alias.alias.copy_(values)


def through_numpy(weight, values):
    np.copyto(weight.detach().numpy(), values.numpy())


def through_dlpack(weight, values):
    torch.from_dlpack(weight.detach()).data.copy_(values)


def through_assigned_data(weight, values):
    weight.data = values.clone()


def through_set(weight, values):
    with torch.no_grad():
        weight.set_(values.clone())


def through_the_storage(weight, values):
    weight.untyped_storage().copy_(values.clone().untyped_storage())


def through_vector_to_parameters(weight, values):
    nn.utils.vector_to_parameters(values.reshape(-1), [weight])


def through_an_average(weight, values):
    weight.data.mul_(0.5).add_(values, alpha=0.5)


def counted(weight, values):
    with torch.no_grad():
        weight.copy_(values)


WRITES = [
    through_data,
    through_a_kept_alias,
    through_numpy,
    through_dlpack,
    through_assigned_data,
    through_set,
    through_the_storage,
    through_vector_to_parameters,
    through_an_average,
    counted,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("ids", SIZES)
def test_the_next_pass_sees_the_write(write, ids):
    model = build()
    install(model, W4A16, seed=0)
    weight = model.get_submodule(NAME).weight
    through_a_kept_alias.alias = weight.data
    before = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    write(weight, values)
    seen = logits(model, ids)
    assert not torch.equal(seen, before)
    installed(model).refresh()
    assert torch.equal(logits(model, ids), seen)


@pytest.mark.parametrize("place", [0, 1, 1000, -1])
def test_a_large_pass_sees_one_changed_element(place):
    model = build()
    install(model, W4A16, seed=0)
    weight = model.get_submodule(NAME).weight
    before = logits(model, LARGE)
    weight.data.view(-1)[place] += 4.0
    assert not torch.equal(logits(model, LARGE), before)


def test_a_large_pass_sees_two_exchanged_elements():
    model = build()
    install(model, W4A16, seed=0)
    rows = model.get_submodule(NAME).weight.data
    before = logits(model, LARGE)
    rows[[3, 4]] = rows[[4, 3]]
    assert not torch.equal(logits(model, LARGE), before)


def test_the_plain_torch_path_sees_writes_before_large_passes():
    model = build()
    with use_backend("torch"):
        install(model, W4A16, seed=0)
        before = logits(model, LARGE)
        model.get_submodule(NAME).weight.data.mul_(2.0)
        model.get_submodule(NAME).weight.data[0, 0] += 1.0
        assert not torch.equal(logits(model, LARGE), before)


@pytest.mark.parametrize("ids", SIZES)
def test_writes_are_seen_under_another_default_device(ids):
    """Code that builds models on the meta device, or on a GPU, sets a default device around everything it does."""
    model = build()
    install(model, W4A16, seed=0)
    weight = model.get_submodule(NAME).weight
    with torch.device("meta"):
        before = logits(model, ids)
        weight.data.mul_(2.0)
        assert not torch.equal(logits(model, ids), before)


@kernels_watch
def test_writes_are_seen_after_the_backend_was_changed():
    model = build()
    installation = install(model, W4A16, seed=0)
    logits(model)
    with use_backend("torch"):
        before = logits(model)
        model.get_submodule(NAME).weight.data.mul_(2.0)
        seen = logits(model)
        installation.refresh()
        assert torch.equal(logits(model), seen) and not torch.equal(seen, before)


@pytest.mark.slow
def test_steps_of_compiled_fused_optimizers_are_seen():
    """torch.compile bypasses both the version counter and the hook that counts the steps of fused optimizers."""
    model = build()
    installation = install(model, W4A16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    step = torch.compile(optimizer.step)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=LARGE, labels=LARGE).loss.backward()
        step()
        seen = logits(model)
        installation.refresh()
        assert torch.equal(logits(model), seen)


@kernels_watch
def test_a_merge_into_the_base_is_seen():
    model = build()
    install(model, W4A16, seed=0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"])).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    logits(wrapped)
    merged = wrapped.merge_and_unload()
    seen = logits(merged)
    installed(merged).refresh()
    assert torch.equal(logits(merged), seen)


def test_stacked_experts_are_watched_too():
    model = build("qwen3_moe")
    install(model, W4A16, seed=0)
    before = logits(model, LARGE)
    model.model.layers[0].mlp.experts.gate_up_proj.data.mul_(2.0)
    assert not torch.equal(logits(model, LARGE), before)


@kernels_watch
def test_a_layer_computed_alone_is_watched_too():
    model = build()
    install(model, W4A16, seed=0)
    module = model.get_submodule(NAME)
    x = torch.randn(4, module.in_features)
    with torch.no_grad():
        before = module(x)
        module.weight.data.mul_(2.0)
        assert not torch.equal(module(x), before)


def test_frozen_weights_are_quantized_only_once():
    model, batch = build(), Batch()
    installation = install(model, W4A16, seed=0)
    for _ in range(3):
        logits(model, LARGE)
        with noise_key(model, Key.from_seed(1), batch.rows):
            model(**batch.inputs())
    assert installation.quantizations() == len(installation.entries)
    assert installation.runtime.freshness.checks >= 5


def test_a_weight_that_is_gone_is_not_read():
    model = build()
    installation = install(model, W4A16, seed=0)
    logits(model)
    module = model.get_submodule(NAME)
    module.weight = nn.Parameter(torch.zeros_like(module.weight))
    storage = model.get_submodule("model.layers.0.mlp.up_proj").weight.untyped_storage()
    storage.resize_(0)  # FSDP frees a weight like this, and gathers it again later
    installation.runtime.freshness.check_all(ALL_FROM)
    assert installation.runtime.freshness.checks == 1


def test_memory_that_is_freed_and_allocated_again_is_read_again():
    """FSDP frees a weight after its layer and gathers it again into the same tensor."""
    model = build()
    installation = install(model, W4A16, seed=0)
    before = logits(model)
    weight = model.get_submodule(NAME).weight
    storage, values = weight.untyped_storage(), weight.detach() * 2.0
    size = storage.nbytes()
    storage.resize_(0)
    installation.runtime.freshness.check_all(1)
    storage.resize_(size)
    weight.data.copy_(values)
    seen = logits(model)
    assert not torch.equal(seen, before)
    installation.refresh()
    assert torch.equal(logits(model), seen)


def test_layers_that_are_changed_one_after_the_other_are_seen():
    """Calibration and offloading write to each layer right before it is computed, in the middle of a pass."""
    model = build()
    installation = install(model, W4A16, seed=0)
    before = logits(model, LARGE)
    handles = [
        layer.register_forward_pre_hook(lambda module, _: [p.data.mul_(1.5) for p in module.parameters()] and None)
        for layer in model.model.layers
    ]
    seen = logits(model, LARGE)
    for handle in handles:
        handle.remove()
    installation.refresh()
    assert torch.equal(logits(model, LARGE), seen) and not torch.equal(seen, before)


@kernels_watch
def test_a_compiled_model_sees_writes_too():
    model = build()
    installation = install(model, W4A16, seed=0)
    compiled = torch.compile(model.model.layers[1].mlp, backend="eager")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = compiled(x)
        model.get_submodule(NAME).weight.data.mul_(2.0)
        seen = compiled(x)
        installation.refresh()
        assert torch.equal(compiled(x), seen) and not torch.equal(seen, before)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_small_passes_see_one_changed_element_eventually(backend):
    """For example, a row of token embeddings is written to, and torch does not count the write."""
    model = Alone(nn.Linear(512, 64))
    x = torch.ones(1, 512)
    with use_backend(backend), torch.no_grad():
        install(model, W4A16, seed=0)
        before = model(x)
        model(x)
        model.inner.weight.data[3, 100] += 4.0
        passes = next((i for i in range(ALL_EVERY) if not torch.equal(model(x), before)), None)
    assert passes is not None


class Alone(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)
