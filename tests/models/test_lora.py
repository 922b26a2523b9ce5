"""Adapters over the installed base: what is trained, what stays exact, what plain PEFT reads back."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from roundoff.config import AQN, ConfigError, Hardware, LoRA, Precision
from roundoff.hardware import hardware_off, install
from roundoff.hardware.linear import HardwareLinear
from roundoff.models.keyed_dropout import KeyedDropout, dropout_draws, dropout_on
from roundoff.models.load import load_model
from roundoff.models.lora import attach, load_adapters
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample

NOISY = Hardware.model_validate(
    {"precision": {"weight": "mxfp4", "activation": "mxfp4"}, "matmul_noise": {"relative_std": 0.1}}
)
INPUT = {"input_ids": torch.tensor([[4, 5, 6, 7, 8]])}


def adapted(lora: LoRA = LoRA(rank=4), *, hardware: Hardware | None = None, seed: int = 0, **options):  # noqa: B008
    model = load_model("tiny", **options).model
    if hardware is not None:
        install(model, hardware, seed=0)
    return model, attach(model, lora, Key.from_seed(seed))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_b(model: nn.Module) -> None:
    """Give B values, so that the adapters do something (they begin as zero)."""
    generator = torch.Generator().manual_seed(1)
    for name, p in trainable(model).items():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))


def test_all_linear_is_every_linear_of_the_layers_and_nothing_else_is_trained():
    model, adapters = adapted()
    assert len(adapters.modules) == 6 * 7  # q, k, v, o, gate, up, down in each of 6 layers
    assert "lm_head" not in adapters.modules
    names = trainable(model)
    assert len(names) == 2 * 42
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert all(p.shape[0 if ".lora_A." in name else 1] == 4 for name, p in names.items())


def test_gradients_reach_the_adapters_alone():
    model, _ = adapted(hardware=NOISY)
    set_b(model)
    model(**INPUT).logits.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name), name


def test_a_fresh_adapter_changes_no_bit_of_the_first_policy():
    plain = load_model("tiny").model
    install(plain, NOISY, seed=0)
    model, _ = adapted(hardware=NOISY)
    # the calls of each layer are counted alike, and its name is what it was: the same draws, although PEFT wraps it
    assert torch.equal(plain(**INPUT).logits, model(**INPUT).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_stay_in_high_precision(dtype):
    model, _ = adapted(hardware=NOISY, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer.base_layer) is HardwareLinear
    for adapter in (layer.lora_A["default"], layer.lora_B["default"]):
        assert type(adapter) is nn.Linear
        assert adapter.weight.dtype == torch.float32
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    set_b(model)
    a, b = (m["default"].weight for m in (layer.lora_A, layer.lora_B))
    seen = []
    handle = layer.lora_B["default"].register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer(x.to(dtype))
    handle.remove()
    assert torch.equal(seen[0], x.to(dtype).float() @ a.T @ b.T)  # neither noise nor format


def test_initial_values_come_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (trainable(adapted(seed=seed)[0]) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    for name in first:
        assert torch.equal(first[name], again[name])
        if ".lora_B." in name:
            assert not first[name].any()
        else:
            assert not torch.equal(first[name], other[name])
            assert float(first[name].detach().abs().max()) <= first[name].shape[1] ** -0.5


def test_disabled_is_the_base_on_the_same_hardware_and_is_undone():
    base = load_model("tiny").model
    install(base, NOISY, seed=0)
    model, adapters = adapted(hardware=NOISY)
    set_b(model)
    with adapters.disabled(), torch.no_grad():
        assert torch.equal(model(**INPUT).logits, base(**INPUT).logits)
    assert len(trainable(model)) == 84
    assert not torch.allclose(model(**INPUT).logits, base(**INPUT).logits, atol=0.1)


def test_saved_adapters_are_loaded_by_plain_peft_and_give_equal_logits(tmp_path):
    model, adapters = adapted(LoRA(rank=4, targets=("q_proj", "down_proj")), hardware=NOISY)
    set_b(model)
    adapters.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(load_model("tiny").model, str(tmp_path)).eval()
    with torch.no_grad(), hardware_off(model):
        assert torch.equal(loaded(**INPUT).logits, model(**INPUT).logits)
        assert not torch.equal(loaded(**INPUT).logits, load_model("tiny").model(**INPUT).logits)


def test_load_adapters_puts_saved_ones_over_installed_hardware(tmp_path):
    model, adapters = adapted(hardware=NOISY)
    set_b(model)
    adapters.save(tmp_path)
    again = load_model("tiny").model
    install(again, NOISY, seed=0)
    load_adapters(again, tmp_path)
    assert trainable(again) == {}
    with torch.no_grad():
        assert torch.equal(again(**INPUT).logits, model(**INPUT).logits)


def test_merged_is_a_plain_model_with_the_same_function():
    model, adapters = adapted()
    set_b(model)
    with torch.no_grad():
        expected = model(**INPUT).logits
        merged = adapters.merge()
        # one float32 product instead of two: rounding of sums of up to 192 terms of size 1
        torch.testing.assert_close(merged(**INPUT).logits, expected, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_merging_on_hardware_is_refused():
    _, adapters = adapted(hardware=NOISY)
    with pytest.raises(ConfigError, match="without hardware"):
        adapters.merge()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), "names 'q_prj', which no Linear of this model is called; did you mean 'q_proj'"),
        (("q_proj", "nothing"), "names 'nothing'"),  # PEFT alone would take q_proj and say nothing
        (("mlp",), "names 'mlp'"),  # a module, but no Linear
        (("roj",), "names 'roj'"),  # part of a name
        ((), "is empty"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(targets, message):
    with pytest.raises(ConfigError, match=message):
        adapted(LoRA(targets=targets))


def test_the_base_is_quantized_only_once():
    model, _ = adapted(hardware=Hardware(precision=Precision(weight="mxfp4")))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(3):
        model(**INPUT).logits.sum().backward()
        optimizer.step()
    assert model.hardware_installed.quantizations() == 42


def test_aqn_noise_on_linears_leaves_adapters_out():
    from roundoff.aqn.noise import aqn_targets

    model, _ = adapted()
    aqn = AQN(sigma_start=0.01, sigma_end=0.01, target="linear")
    targets = aqn_targets(model, aqn)
    assert {t.name for t in targets} == {t.name for t in aqn_targets(load_model("tiny").model, aqn)}


class TestDropout:
    rows = torch.arange(5)[None]

    def test_is_off_in_sampling_and_in_a_plain_call(self):
        model, _ = adapted(LoRA(rank=4, dropout=0.5))
        plain, _ = adapted(LoRA(rank=4))
        for m in (model, plain):
            set_b(m)
        assert any(isinstance(m, KeyedDropout) for m in model.modules())
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(**INPUT).logits, plain(**INPUT).logits)
        loaded = load_model("tiny")
        texts = [
            sample(m, loaded.tokenizer, ["1+2="] * 8, group_size=1, max_new_tokens=8, temperature=1.0, key=Key(3)).texts
            for m in (model, plain)
        ]
        assert texts[0] == texts[1]

    def test_draws_the_share_by_key_and_row_and_scales_the_rest(self):
        model, _ = adapted(LoRA(rank=4, dropout=0.25))
        layer = model.model.layers[0].mlp.up_proj.lora_dropout["default"]
        ones = torch.ones(2, 400, 64)
        rows = torch.arange(800).view(2, 400)
        with dropout_on(model), dropout_draws(model, Key(1), rows):
            y = layer(ones)
            assert torch.equal(y, layer(ones))
            with dropout_draws(model, Key(1), rows[1:, 100:]):
                assert torch.equal(layer(ones[1:, 100:]), y[1:, 100:])  # by row, wherever it is in the batch
            with dropout_draws(model, Key(2), rows):
                assert not torch.equal(layer(ones), y)
        assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1) / 0.75)}
        # 51,200 draws: standard error 0.0019, five of them
        assert abs(float((y == 0).float().mean()) - 0.25) < 0.01

    def test_without_draws_it_is_an_error_not_another_generator(self):
        model, _ = adapted(LoRA(rank=4, dropout=0.25))
        with dropout_on(model), pytest.raises(RuntimeError, match="no key"):
            model(**INPUT)
