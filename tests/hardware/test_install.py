"""Installation on whole models: which modules are covered, what the report says, and plain bits when it is off."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from roundoff.config import ConfigError, Deadzone, Hardware, MatmulNoise, Precision
from roundoff.hardware import hardware_off, install, installed, noise_key, uninstall
from roundoff.numerics.rng import Key
from tests.families import Batch, build, every_family

KEY = Key.from_seed(8)
W4A4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))
NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1))
EVERYTHING = Hardware(
    precision=Precision(weight="nvfp4", activation="mxfp4"),
    matmul_noise=MatmulNoise(relative_std=0.1),
    deadzone=Deadzone(threshold=0.01, layers=(1,)),
)


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or Batch()).inputs()).logits


@every_family
@pytest.mark.parametrize("hardware", [W4A4, NOISY, EVERYTHING])
def test_off_and_uninstalled_are_the_plain_model_to_the_bit(family, hardware):
    model, plain = build(family), build(family)
    keys = list(model.state_dict())
    install(model, hardware, seed=0)
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits(model), logits(plain))
    with hardware_off(model):
        assert torch.equal(logits(model), logits(plain))
    uninstall(model)
    assert torch.equal(logits(model), logits(plain))
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))
    assert installed(model) is None


@every_family
def test_noise_of_zero_is_the_plain_model_to_the_bit(family):
    model, plain = build(family), build(family)
    installation = install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.0)), seed=0)
    assert installation.entries == () and "nothing to simulate" in installation.summary()
    with noise_key(model, KEY, Batch().rows):
        assert torch.equal(logits(model), logits(plain))


@every_family
def test_training_gives_finite_gradients_to_every_weight_that_has_one_in_the_plain_model(family):
    model, plain, batch = build(family), build(family), Batch()
    install(model, EVERYTHING, seed=0)
    for m in (model, plain):
        with noise_key(m, KEY, batch.rows) if m is model else torch.enable_grad():
            m(**batch.inputs(), labels=batch.ids.masked_fill(batch.mask == 0, -100)).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or bool(p.grad.isfinite().all()), name
    p, q = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (model, plain))
    assert not torch.equal(p, q)


def test_the_report_lists_entries_and_reasons():
    model = build()
    hardware = EVERYTHING.model_copy(update={"precision": Precision(weight="nvfp4", activation="mxfp4", keep=(0,))})
    installation = install(model, hardware, seed=0)
    entries = {e.name: e for e in installation.entries}
    assert len(entries) == 14
    first, second = (entries[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert (first.layer, first.weight, first.activation, first.noise, first.deadzone) == (0, None, None, 0.1, 0.0)
    assert (second.layer, second.weight, second.activation, second.deadzone) == (1, "nvfp4", "mxfp4", 0.01)
    assert {s.name: s.reason for s in installation.skipped} == {
        "model.embed_tokens": "excluded by hardware.exclude ('embed_tokens')",
        "lm_head": "excluded by hardware.exclude ('lm_head')",
    }
    text = installation.summary()
    assert "7 modules: weight nvfp4, activation mxfp4, noise 0.1, deadzone 0.01" in text
    assert "2 attention layers: noise 0.1" in text
    assert "1 skipped: excluded by hardware.exclude ('lm_head')" in text


def test_kept_layers_are_plain_and_listed():
    model = build()
    installation = install(model, Hardware(precision=Precision(weight="mxfp4", keep=(0,))), seed=0)
    assert {e.layer for e in installation.entries} == {1}
    kept = [s for s in installation.skipped if "keep" in s.reason]
    assert len(kept) == 7 and all(".layers.0." in s.name for s in kept)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_exclude_takes_shell_patterns_on_parts_and_on_the_whole_name():
    model = build()
    installation = install(model, W4A4.model_copy(update={"exclude": ("lm_head", "model.layers.1.*")}), seed=0)
    assert {e.layer for e in installation.entries} == {0}
    uninstall(model)
    wrapped = lora(build())  # patterns match names without PEFT's prefix
    assert {e.layer for e in install(wrapped, installation.hardware, seed=0).entries} == {0}
    installation = install(model, W4A4.model_copy(update={"exclude": ("lm_head", "[qkv]_proj")}), seed=0)
    assert {e.name.rpartition(".")[2] for e in installation.entries} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_output_head_may_be_installed_and_takes_the_last_tokens():
    model, batch = build(), Batch()
    install(model, NOISY.model_copy(update={"exclude": ()}), seed=0)
    with noise_key(model, KEY, batch.rows), torch.no_grad():
        whole = model(**batch.inputs()).logits
        last = model(**batch.inputs(), logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], rtol=0, atol=2e-5)  # products of other shapes round differently
    assert torch.equal(model.model.embed_tokens.weight, build().model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        (Hardware(exclude=("*",), precision=Precision(weight="mxfp4")), r"leaves no Linear.*model\.layers\.0"),
        (Hardware(precision=Precision(weight="mxfp4", keep="srdd:2")), r"srdd:2.*resolved by a scan before install"),
        (Hardware(precision=Precision(weight="mxfp4", keep=(5,))), r"precision\.keep names layer 5.*0 to 1"),
        (Hardware(precision=Precision(weight="mxfp4", keep=(0, 1))), r"keeps every layer"),
        (Hardware(deadzone=Deadzone(threshold=0.1, layers=(2,))), r"deadzone\.layers names layer 2"),
        (Hardware(deadzone=Deadzone(threshold=0.1, layers=())), r"deadzone\.layers is empty"),
    ],
)
def test_settings_that_reach_nothing_are_errors_and_leave_the_model_alone(hardware, message):
    model = build()
    with pytest.raises(ConfigError, match=message):
        install(model, hardware, seed=0)
    assert installed(model) is None
    assert not any(type(m).__name__ == "HardwareLinear" for m in model.modules())


def test_installing_twice_is_an_error_and_again_after_uninstall_is_not():
    model = build()
    install(model, W4A4, seed=0)
    with pytest.raises(ConfigError, match="already"):
        install(model, NOISY, seed=0)
    with pytest.raises(ConfigError, match="already"):
        install(nn.ModuleList([model]), NOISY, seed=0)
    uninstall(model)
    install(model, NOISY, seed=0)


@pytest.mark.parametrize(
    "call", [uninstall, lambda m: hardware_off(m).__enter__(), lambda m: noise_key(m, KEY).__enter__()]
)
def test_without_hardware_its_blocks_and_uninstall_are_errors(call):
    with pytest.raises(ConfigError, match="no hardware is installed"):
        call(build())


def test_a_half_precision_model_is_an_error():
    with pytest.raises(ConfigError, match="float16"):
        install(build().half(), W4A4, seed=0)


def test_weights_made_in_inference_mode_are_an_error_under_a_format():
    with torch.inference_mode():
        model = build()
        with pytest.raises(ConfigError, match=r"made in torch\.inference_mode"):
            install(model, W4A4, seed=0)
        install(model, NOISY, seed=0)
        assert bool(logits(model).isfinite().all())


def test_off_nests_and_survives_exceptions():
    model, plain = build(), logits(build())
    installation = install(model, EVERYTHING, seed=0)
    with hardware_off(model):
        with hardware_off(model):
            assert not installation.is_on
        assert not installation.is_on
        assert torch.equal(logits(model), plain)
        with pytest.raises(KeyError), hardware_off(model):
            raise KeyError
        assert not installation.is_on
    assert installation.is_on
    with pytest.raises(KeyError), noise_key(model, KEY):
        raise KeyError
    assert installation.runtime.draw is None


def test_noise_keys_nest():
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    with noise_key(model, KEY, batch.rows):
        first = logits(model)
        with noise_key(model, KEY.fold(1), batch.rows):
            assert not torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)


@every_family
def test_same_key_same_bits(family):
    model, batch = build(family), Batch()
    install(model, EVERYTHING, seed=0)
    results = []
    for key in (KEY, KEY, KEY.fold(1)):
        with noise_key(model, key, batch.rows):
            results.append(logits(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_copy_draws_the_same_noise_and_has_its_own_switch():
    model = build()
    install(model, EVERYTHING, seed=0)
    copied = copy.deepcopy(model)  # for example, a reference model
    with noise_key(model, KEY, Batch().rows), noise_key(copied, KEY, Batch().rows):
        assert torch.equal(logits(model), logits(copied))
    with hardware_off(model):
        assert installed(copied).is_on
        assert copied.config._attn_implementation == "roundoff"


def test_an_installed_model_can_be_pickled():
    model = build()
    install(model, W4A4, seed=0)
    for _ in range(2):  # before and after a pass, which caches quantized weights and an activation
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)
        assert torch.equal(logits(again), logits(model))


def test_a_copy_made_in_a_block_does_not_keep_its_draw():
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    with noise_key(model, KEY, batch.rows):
        copied = copy.deepcopy(model)
    assert not torch.equal(logits(copied), logits(copied))


def test_saved_models_do_not_contain_the_hardware(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build()
    install(model, EVERYTHING, seed=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(build()))


def lora(model):
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)).eval()
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    return wrapped


def test_adapters_stay_in_high_precision_whichever_comes_first():
    first, batch = build(), Batch()
    install(first, EVERYTHING, seed=0)
    first, second = lora(first), lora(build())
    installation = install(second, EVERYTHING, seed=0)
    assert len(installation.entries) == 14 and all(e.name.endswith(".base_layer") for e in installation.entries)
    assert {s.reason for s in installation.skipped if "lora" in s.name} == {"LoRA adapter: stays in high precision"}
    for model in (first, second):
        for name, module in model.named_modules():
            if "lora_" in name and isinstance(module, nn.Linear):
                assert type(module) is nn.Linear
            elif name.endswith("base_layer"):
                assert type(module).__name__ == "HardwareLinear"
    outputs = []
    for model in (first, second):
        with noise_key(model, KEY, batch.rows):
            outputs.append(logits(model))
    assert torch.equal(*outputs)  # draws do not depend on the wrapping
    with hardware_off(first):
        assert torch.equal(logits(first), logits(lora(build())))


def test_a_frozen_base_is_quantized_once_and_adapters_get_gradients():
    model, batch = build(), Batch()
    install(model, W4A4, seed=0)
    model = lora(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(**batch.inputs()).logits.square().mean().backward()
        optimizer.step()
    assert installed(model).quantizations() == 14
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_diagnose_names_the_first_module_that_is_not_finite():
    model, batch = build(), Batch()
    installation = install(model, W4A4, seed=0)
    assert installation.diagnose(**batch.inputs()) == ()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    assert installation.check_weights() == ("model.layers.1.mlp.up_proj.weight",)
    assert installation.diagnose(**batch.inputs())[0] == "model.layers.1.mlp.up_proj"


def test_weights_are_checked_under_adapters_too():
    model = build()
    installation = install(model, W4A4, seed=0)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert installation.check_weights() == ()
    with torch.no_grad():
        installation.in_force.modules[0].weight[0, 0] = float("nan")
    assert installation.check_weights() == (f"{installation.entries[0].name}.weight",)


def test_summary_names_layers_and_modules():
    model = build("qwen2")
    kept = Hardware.model_validate({"precision": {"weight": "mxfp4", "keep": [0]}})
    text = install(model, kept, seed=0).summary()
    last = model.config.num_hidden_layers - 1
    shown = f"layers 1-{last}: " if last > 1 else "layer 1: "
    assert shown + "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp." in text
