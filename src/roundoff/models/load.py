"""Loads a language model with its tokenizer: an embedded one, a local directory, or (if allowed) a hub model.

Nothing in a model directory is ever executed: its code is not trusted, and weights are read only from safetensors,
never from pickle files.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from roundoff.models.embedded import EMBEDDED, TINY
from roundoff.models.errors import ModelError
from roundoff.models.tokenizer import check_added_bos, check_tokenizer
from roundoff.models.weights import check_files, check_weights
from roundoff.numerics.torch_state import own_defaults

__all__ = ["TINY_DIRECTORY", "LoadedModel", "ModelError", "check_readable", "load_model", "no_progress_bar", "skeleton"]

TINY_DIRECTORY = EMBEDDED[TINY]
"""The embedded model `tiny`, a Hugging Face directory."""

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# While transformers loads a model it replaces a method of its class of all models, and puts it back afterwards. Two
# threads that load at once would leave it replaced: no model of the process would tie its embeddings from then on.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode, with a tokenizer that pads on the left."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """The name passed to `load_model`."""
    source: str
    """Where the files came from: a directory, or `hub:<name>`."""


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    allow_download: bool = False,
    chat: Literal["auto"] | bool = "auto",
) -> LoadedModel:
    """The model of this name, in evaluation mode, with its tokenizer.

    Args:
        name: `tiny` or `tiny-long`, a local directory, or a hub name such as `Qwen/Qwen2.5-1.5B-Instruct`.
        dtype: of the weights.
        device: where the weights go.
        attention: an attention implementation that transformers knows; None keeps the model's default.
        allow_download: whether a name that is not a directory may be fetched from the hub.
        chat: `auto` keeps the tokenizer's chat template, False removes it, True requires one.

    Raises:
        ModelError: if there is no such model, it has no safetensors weights, or its weights do not fit its
            architecture; or if its tokenizer has neither a padding nor an end token, names a token that the model has
            no embedding for, appends a token to prompts, or lacks a chat template that is required.
    """
    location, source = check_model(name, allow_download=allow_download)
    local = not source.startswith("hub:")
    options = {} if attention is None else {"attn_implementation": attention}
    with _ONE_AT_A_TIME, no_progress_bar(), own_defaults():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local,
                ignore_mismatched_sizes=True,  # check_weights refuses them by name
                output_loading_info=True,
                **options,
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(
                location, trust_remote_code=False, local_files_only=local, padding_side="left"
            )
        except Exception as error:  # transformers, safetensors and tokenizers each raise errors of their own
            raise ModelError(f"model {name!r} could not be loaded from {source}: {error}") from error
    check_weights(model, info, name)
    _set_padding(tokenizer, model, name)
    if chat is True and tokenizer.chat_template is None:
        raise ModelError(
            f"profile.chat = true, but the tokenizer of model {name!r} has no chat template: set it to auto"
        )
    if chat is False:
        tokenizer.chat_template = None
    added = check_tokenizer(tokenizer, model, name)
    if local:
        check_added_bos(tokenizer, _tokenizer_settings(Path(location)), added, name)
    return LoadedModel(model.to(device).eval(), tokenizer, name, source)


def check_model(name: str, *, allow_download: bool = False) -> tuple[str, str]:
    """Check that a model of this name exists, without reading its weights.

    Returns:
        The name or path to hand to transformers, and the source to report (as in `LoadedModel.source`).

    Raises:
        ModelError: if there is no such model, or its directory is incomplete.
    """
    location, source = _locate(name, allow_download)
    if not source.startswith("hub:"):
        _check_directory(Path(location), name)
        check_files(Path(location), name)
    return location, source


def skeleton(name: str) -> PreTrainedModel | None:
    """The modules of an embedded model or of a local directory on torch's meta device, without weights.

    None if the model is not on this machine, or transformers cannot build it from its configuration alone.
    """
    directory = EMBEDDED.get(name) or Path(name).expanduser()
    if not (directory / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except Exception:  # of any kind: loading the model itself will say what is wrong with it
        return None
    return model


def check_readable(loaded: LoadedModel, prompts: Iterable[str]) -> None:
    """Check that the tokenizer silently drops no character of any prompt.

    Raises:
        ModelError: if a character has no token; the message shows the first such prompt.
    """
    known: dict[str, bool] = {}
    unknown_id = loaded.tokenizer.unk_token_id
    # The tokenizer reads an added token in one piece, so its characters need no tokens of their own.
    added_tokens = sorted(loaded.tokenizer.get_added_vocab(), key=len, reverse=True)
    added_pattern = re.compile("|".join(map(re.escape, added_tokens)) or "(?!)")
    for prompt in prompts:
        for character in added_pattern.sub("", prompt):
            if character not in known:
                ids = loaded.tokenizer(character, add_special_tokens=False)["input_ids"]
                known[character] = any(token != unknown_id for token in ids)
            if not known[character]:
                raise ModelError(
                    f"model {loaded.name!r} cannot read the character {character!r} of the prompt "
                    f"{prompt[:80]!r}; its tokenizer has no token for it"
                )


def _locate(name: str, allow_download: bool) -> tuple[str, str]:
    """The name or path to hand to transformers, and the source to report."""
    if name in EMBEDDED:
        return str(EMBEDDED[name]), str(EMBEDDED[name])
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return str(directory), str(directory.resolve())
    if name and directory.exists():
        raise ModelError(f"model {name!r} is a file; name the directory that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        embedded = " nor ".join(map(repr, EMBEDDED))
        raise ModelError(
            f"model {name!r} is neither {embedded}, nor an existing directory, nor a hub name (owner/model)"
        )
    if not allow_download:
        raise ModelError(
            f"model {name!r} is not a directory on this machine, and downloading is off; "
            "download it yourself and name its directory, or set profile.allow_download = true (`roundoff scan`: "
            "--allow-download; in Python: allow_download=True)"
        )
    return name, f"hub:{name}"


def _check_directory(directory: Path, name: str) -> None:
    """Catch what transformers would report obscurely."""
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"model {name!r}: {directory} holds no config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model {name!r}: {config} is not JSON: {error}") from error
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"model {name!r}: {directory} holds its weights in pickle files ({', '.join(pickles)}), which can run "
            "code when read; convert them to safetensors"
        )
    raise ModelError(f"model {name!r}: {directory} holds no weights (*.safetensors)")


def _set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise ModelError(f"model {name!r}: its tokenizer has neither a padding nor an end token; give it one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _tokenizer_settings(directory: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json, which is known to be JSON because transformers has read it."""
    path = directory / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return settings


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Inside the block, transformers shows no progress bars while it loads or saves weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
