"""Loading models: where they come from, what is refused, and in what state they arrive."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from roundoff.models.errors import ModelError
from roundoff.models.load import TINY_DIRECTORY, check_readable, load_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    target = tmp_path / "model"
    target.mkdir()
    for path in [*TINY_DIRECTORY.glob("*.json"), *TINY_DIRECTORY.glob("*.safetensors")]:
        shutil.copy(path, target)
    return target


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tiny_arrives_ready_to_sample() -> None:
    loaded = load_model("tiny")
    assert (loaded.name, loaded.source) == ("tiny", str(TINY_DIRECTORY))
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token_id not in (None, loaded.tokenizer.eos_token_id)


def test_dtype_and_attention_are_passed_on() -> None:
    loaded = load_model("tiny", dtype=torch.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "eager"


def test_loading_in_several_threads_at_once_leaves_transformers_as_it_was() -> None:
    # Without a lock, transformers ties no embeddings of any model in this process afterwards.
    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_model, ["tiny"] * 6))
    assert PreTrainedModel.tie_weights is before


def test_a_directory_gives_the_same_weights(directory: Path) -> None:
    loaded = load_model(str(directory))
    assert loaded.source == str(directory.resolve())
    saved = load_file(TINY_DIRECTORY / "model.safetensors")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "neither 'tiny' nor 'tiny-long', nor an existing directory, nor a hub name"),
        ("./nowhere", "nor an existing directory"),
        ("/nowhere/at/all", "nor an existing directory"),
        ("", "neither 'tiny'"),
        ("owner/model", "downloading is off.*allow_download=True"),
    ],
)
def test_names_that_lead_nowhere_are_refused(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_file_is_refused_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match="is a file; name the directory"):
        load_model(str(path))


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_a_configuration_that_is_not_json_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load_model(str(directory))


def test_an_unknown_architecture_is_refused(directory: Path) -> None:
    edit(directory / "config.json", model_type="no_such_type")
    with pytest.raises(ModelError, match="could not be loaded from"):
        load_model(str(directory))


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(str(directory))


def test_pickle_weights_are_refused_unread(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"pickle files \(pytorch_model\.bin\).*convert them to safetensors"):
        load_model(str(directory))


def test_truncated_weights_are_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded from"):
        load_model(str(directory))


def test_missing_weights_are_not_left_random(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing_keys: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(directory))


def test_weights_of_another_shape_are_refused(directory: Path) -> None:
    edit(directory / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match=r"mismatched_keys: .*mlp"):
        load_model(str(directory))


def test_code_in_a_directory_is_never_run(directory: Path, tmp_path: Path) -> None:
    edit(
        directory / "config.json",
        model_type="custom",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load_model(str(directory))
    assert not (tmp_path / "ran").exists()


def test_the_end_token_pads_where_there_is_no_other(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", pad_token=None)
    tokenizer = load_model(str(directory)).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_a_tokenizer_without_end_or_padding_token_is_refused(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_model(str(directory))


def test_check_readable_names_the_character_that_would_be_dropped() -> None:
    loaded = load_model("tiny")
    check_readable(loaded, ["37-12+5=", "1>2"])
    with pytest.raises(ModelError, match=r"cannot read the character 'x' of the prompt '3x4='"):
        check_readable(loaded, ["1+1=", "3x4="])
