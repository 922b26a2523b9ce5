"""Saved adapters are read completely, or refused before anything is computed with them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from roundoff.config import ConfigError, Hardware, LoRA
from roundoff.hardware import install
from roundoff.models.load import TINY_DIRECTORY, load_model
from roundoff.models.lora import attach, load_adapters
from roundoff.numerics.rng import Key

INPUT = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}


def logits(model):
    with torch.no_grad():
        return model(**INPUT).logits


def with_values(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def by_peft(directory, base="tiny", **settings):
    """An adapter that plain PEFT has saved; returns the logits of its model."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
    model = with_values(get_peft_model(load_model(base).model, config).eval())
    model.save_pretrained(str(directory))
    return logits(model)


@pytest.fixture
def adapter(tmp_path):
    by_peft(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(directory, edit):
    """Apply `edit` to the tensors of an adapter; the header of its file stays as it is."""
    path = directory / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(edit(load_file(path)), path, metadata=metadata)


def configure(directory, **settings):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_of_plain_peft_is_read_to_the_bit(tmp_path, settings):
    expected = by_peft(tmp_path, **settings)
    model = load_model("tiny").model
    load_adapters(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(expected, logits(load_model("tiny").model))


def first(tensors):
    return next(iter(tensors))


TENSORS = {
    "all renamed": lambda t: {k.replace("model.layers", "module.layers"): v for k, v in t.items()},
    "a layer missing": lambda t: {k: v for k, v in t.items() if "layers.3." not in k},
    "a layer too many": lambda t: t | {k.replace("layers.0.", "layers.9."): v.clone() for k, v in t.items()},
    "one B missing": lambda t: {k: v for k, v in t.items() if k != next(n for n in t if "lora_B" in n)},
    "another tensor": lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(16, 64)},
    "another rank": lambda t: {k: v[:2].clone() if "lora_A" in k else v[:, :2].clone() for k, v in t.items()},
    "another width": lambda t: t | {first(t): torch.zeros(4, 63)},
    "whole numbers": lambda t: t | {first(t): torch.zeros(4, 64, dtype=torch.int8)},
    "not a number": lambda t: t | {first(t): torch.full((4, 64), torch.nan)},
    "infinite": lambda t: t | {first(t): torch.full((4, 64), torch.inf)},
    "nothing": lambda t: {},
}
MESSAGES = {
    "a layer missing": r"lacks base_model\.model\.model\.layers\.3\.",
    "a layer too many": r"holds base_model.*layers\.9\..*no place for",
    "another rank": r"of shape \[2, 64\].*must be \[4, 64\]",
    "another width": r"of shape \[4, 63\]",
    "whole numbers": "in int8: it must be one of float32, bfloat16, float16",
    "not a number": "holds NaN or infinity in",
    "infinite": "holds NaN or infinity in",
    "nothing": "is empty",
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_do_not_fit_are_refused_and_leave_the_model_as_it_was(adapter, damage):
    change(adapter, TENSORS[damage])
    model = load_model("tiny").model
    before = logits(model)
    with pytest.raises(ConfigError, match=MESSAGES.get(damage, "lacks|holds")):
        load_adapters(model, adapter)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "must be a LoRA adapter, but peft_type.* is 'IA3'"),
        ({"peft_type": None}, "must be a LoRA adapter"),
        ({"use_dora": True}, "use_dora = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*changes the base"),
        ({"bias": "all"}, "changes the base's biases"),
        ({"target_modules": ["q_proj"]}, "holds .*v_proj.*no place for"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"lacks .*o_proj"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
        ({"r": 8}, r"of shape \[4, 64\].*must be \[8, 64\]"),
        ({"modules_to_save": ["lm_head"]}, r"lacks base_model\.model\.lm_head\.weight"),
        ({"layers_to_transform": [0, 1]}, "no place for"),
    ],
)
def test_settings_that_disagree_with_the_tensors_are_refused(adapter, settings, message):
    configure(adapter, **settings)
    with pytest.raises(ConfigError, match=message):
        load_adapters(load_model("tiny").model, adapter)


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"kasa_config": {"a": 1}},
            {"velora_config": {"a": 1}},
            {"monteclora_config": {"a": 1}},
            {"use_tomorrow": True},
        ),
        *({"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": "8"}, {"alpha_pattern": {"q_proj": 0}}),
    ],
)
def test_settings_that_change_the_function_are_refused(adapter, settings):
    configure(adapter, **settings)
    with pytest.raises(ConfigError, match="q_proj" if "alpha_pattern" in settings else next(iter(settings))):
        load_adapters(load_model("tiny").model, adapter)


def test_settings_of_a_newer_peft_that_are_off_are_ignored(adapter):
    configure(adapter, use_tomorrow=False, tomorrow_config=None, lora_alpha=16)
    load_adapters(load_model("tiny").model, adapter)


def test_an_adapter_that_changes_nothing_gives_a_warning(adapter):
    change(adapter, lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    with pytest.warns(UserWarning, match="changes nothing"):
        load_adapters(load_model("tiny").model, adapter)


@pytest.mark.parametrize("victim", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:30])])
def test_files_that_are_missing_or_cut_are_refused(adapter, victim, damage):
    damage(adapter / victim)
    with pytest.raises(ConfigError, match=r"is no adapter|is not JSON|has no adapter_model|cannot be read"):
        load_adapters(load_model("tiny").model, adapter)


def test_a_second_adapter_is_refused(adapter):
    model = load_model("tiny").model
    load_adapters(model, adapter)
    for put in (lambda: load_adapters(model, adapter), lambda: attach(model, LoRA(rank=2), Key(0))):
        with pytest.raises(ConfigError, match="has adapters already"):
            put()


class TestAdapterOfARun:
    @pytest.fixture
    def own(self, tmp_path):
        """An adapter that roundoff has saved, as a run would leave it."""
        model = load_model("tiny").model
        adapters = attach(model, LoRA(rank=4), Key(0))
        with_values(model)
        (tmp_path / "run" / "adapter").mkdir(parents=True)
        (tmp_path / "run" / "experiment.toml").write_text("[experiment.lora]\nrank = 4\nalpha = 16.0\n")
        adapters.save(tmp_path / "run" / "adapter")
        return tmp_path / "run" / "adapter"

    def test_is_read_over_its_base_with_and_without_hardware(self, own):
        plain, installed = load_model("tiny").model, load_model("tiny").model
        install(installed, Hardware.model_validate({"precision": {"weight": "mxfp4"}}), seed=0)
        for model in (plain, installed):
            load_adapters(model, own)
        expected = PeftModel.from_pretrained(load_model("tiny").model, str(own)).eval()
        assert torch.equal(logits(plain), logits(expected))

    def test_equal_adapters_are_equal_files(self, own, tmp_path):
        for n in range(4):
            model = load_model("tiny").model
            adapters = attach(model, LoRA(rank=4), Key(0))
            with_values(model)
            (tmp_path / str(n)).mkdir()
            adapters.save(tmp_path / str(n))
            name = "adapter_model.safetensors"
            assert (tmp_path / str(n) / name).read_bytes() == (own / name).read_bytes()

    def test_over_another_base_is_refused(self, own, tmp_path):
        directory = tmp_path / "model"
        shutil.copytree(TINY_DIRECTORY, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        change_model = load_file(directory / "model.safetensors")
        load_adapters(load_model(str(directory)).model, own)  # the same weights, elsewhere
        change_model["model.norm.weight"][0] += 1
        save_file(change_model, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="was trained on weights other than"):
            load_adapters(load_model(str(directory)).model, own)
        with pytest.raises(ConfigError, match=r"a base in float32, but the model is in bfloat16: set profile\.dtype"):
            load_adapters(load_model("tiny", dtype=torch.bfloat16).model, own)

    @pytest.mark.parametrize("settings", [{"lora_alpha": 32.0}, {"use_rslora": True}])
    def test_settings_that_no_tensor_shows_are_those_it_was_saved_with(self, own, settings):
        configure(own, **settings)
        with pytest.raises(ConfigError, match=f"has {first(settings)} = .*but was saved with"):
            load_adapters(load_model("tiny").model, own)

    def test_of_another_run_is_refused(self, own):
        (own.parent / "experiment.toml").write_text("[experiment.lora]\nrank = 4\nalpha = 8.0\n")
        with pytest.raises(ConfigError, match=r"lora_alpha = 16.0, but its run has lora\.alpha = 8\.0"):
            load_adapters(load_model("tiny").model, own)
        (own.parent / "experiment.toml").write_text("[experiment]\nid = 'full'\n")
        with pytest.raises(ConfigError, match="run without adapters"):
            load_adapters(load_model("tiny").model, own)
