"""Weights of a model directory are complete, of the right shape and finite, whatever torch's global state is."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from roundoff.config import ConfigError, LoRA
from roundoff.models.errors import ModelError
from roundoff.models.load import TINY_DIRECTORY, load_model
from roundoff.models.lora import attach, load_adapters
from roundoff.models.weights import shared_weights, weights_digest
from roundoff.numerics.rng import Key
from tests.models.test_adapter_file import by_peft, with_values
from tests.models.test_load import directory, edit
from tests.small_models import make, make_tokenizer

__all__ = ["directory"]

INPUT = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}


def change(directory: Path, **tensors: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.bias", "model.norm.bias"]
)
def test_a_tensor_that_the_architecture_has_no_place_for_is_refused(directory: Path, name: str) -> None:
    change(directory, **{name: torch.zeros(16)})
    with pytest.raises(ModelError, match=f"unexpected_keys: {name}"):
        load_model(str(directory))


def test_constants_that_old_versions_saved_are_ignored(directory: Path) -> None:
    change(directory, **{"model.layers.0.self_attn.masked_bias": torch.tensor(-1e9)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(directory))


def test_fewer_layers_than_the_files_hold_are_refused(directory: Path) -> None:
    edit(directory / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    with pytest.raises(ModelError, match=r"unexpected_keys: model\.layers\.5"):
        load_model(str(directory))


def test_tensors_of_a_part_that_the_model_lacks_give_a_warning(directory: Path) -> None:
    change(directory, **{"vision_tower.patches.weight": torch.zeros(16)})
    with pytest.warns(UserWarning, match=r"were not read: vision_tower\.patches\.weight"):
        load_model(str(directory))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(directory: Path, value: float) -> None:
    norm = load_file(directory / "model.safetensors")["model.norm.weight"]
    norm[3] = value
    change(directory, **{"model.norm.weight": norm})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or infinity"):
        load_model(str(directory))


def test_a_shard_that_is_listed_and_absent_is_named(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="300KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    assert load_model(str(directory)).model is not None
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lists {len(shards)} shards, but {shards[1].name} is not in"):
        load_model(str(directory))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelError, match="is no index of shards"):
        load_model(str(directory))


def test_the_digest_is_that_of_the_base_under_adapters() -> None:
    model = load_model("tiny").model
    expected = weights_digest(model)
    adapters = attach(model, LoRA(rank=2), Key(0))
    assert weights_digest(adapters.peft.get_base_model()) == expected
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert weights_digest(model) != expected


class TestTiedEmbeddings:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        make(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
        make_tokenizer().save_pretrained(tmp_path / "tied")
        return tmp_path / "tied"

    def test_are_found(self, tied: Path) -> None:
        names = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
        assert shared_weights(load_model(str(tied)).model) == names
        assert shared_weights(load_model("tiny").model) == {}

    @pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
    def test_as_a_target_are_refused_and_leave_the_model_as_it_was(self, tied: Path, targets: tuple[str, ...]) -> None:
        model = load_model(str(tied)).model
        before = model(**INPUT).logits
        with pytest.raises(ConfigError, match=r"lora\.targets includes lm_head\.weight, whose weight is shared with"):
            attach(model, LoRA(rank=2, targets=targets), Key(0))
        assert torch.equal(model(**INPUT).logits, before)

    def test_untied_ones_are_a_target_like_another(self, tmp_path: Path) -> None:
        model = load_model("tiny").model
        adapters = attach(model, LoRA(rank=2, targets=("lm_head",)), Key(0))
        with_values(model)
        self.merges(model, adapters, tmp_path, load_model("tiny").tokenizer)

    def test_elsewhere_do_not_hinder(self, tied: Path, tmp_path: Path) -> None:
        model = load_model(str(tied)).model
        adapters = attach(model, LoRA(rank=2), Key(0))
        with_values(model)
        self.merges(model, adapters, tmp_path, make_tokenizer())

    def merges(self, model, adapters, tmp_path, tokenizer) -> None:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            before = model(**INPUT).logits
            adapters.merge().save_pretrained(tmp_path / "out")
            tokenizer.save_pretrained(tmp_path / "out")
            after = load_model(str(tmp_path / "out")).model(**INPUT).logits
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # one float32 product instead of two

    @pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
    def test_of_another_tool_s_adapter_are_computed_and_not_merged(self, tied: Path, tmp_path: Path, settings) -> None:  # type: ignore[no-untyped-def]
        expected = by_peft(tmp_path / "adapter", base=str(tied), **settings)
        model = load_model(str(tied)).model
        adapters = load_adapters(model, tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(model(**INPUT).logits, expected)
        other = load_model(str(tied)).model
        with torch.no_grad():
            other.lm_head.weight[0] += 1
        if "modules_to_save" not in settings:  # PEFT has saved a copy of the weight that is adapted
            with pytest.raises(ConfigError, match="which differs from the base's own"):
                load_adapters(other, tmp_path / "adapter")
        with pytest.raises(ConfigError, match=r"lm_head\.weight cannot be merged: the weight is shared"):
            adapters.merge()


@pytest.mark.parametrize("state", ["bfloat16", "float64", "meta", "inference", "autocast"])
def test_what_another_library_set_does_not_reach_a_model(tmp_path: Path, state: str) -> None:
    def made() -> list[torch.Tensor]:
        model = load_model(str(TINY_DIRECTORY)).model
        attach(model, LoRA(rank=2), Key(0))
        other = load_model("tiny").model
        load_adapters(other, tmp_path)
        return [t for m in (model, other) for t in (*m.parameters(), *m.buffers())]

    by_peft(tmp_path)
    expected = made()
    before = torch.get_default_dtype()
    try:
        if state == "meta":
            with torch.device("meta"):
                found = made()
        elif state == "inference":
            with torch.inference_mode():
                found = made()
        elif state == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = made()
        else:
            torch.set_default_dtype(getattr(torch, state))
            found = made()
            assert torch.get_default_dtype() == getattr(torch, state)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.device, a.is_inference()) == (b.dtype, b.device, False)
        assert torch.equal(a, b)
