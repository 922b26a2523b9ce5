"""Sizes of a decoder-only model and its number of parameters, without loading it.

The sizes of a local directory and of the embedded model are read from their `config.json`; a hub name that is not on
this machine is looked up in `shapes.toml`. Parameters are counted for the architecture of Llama and Qwen2: attention
with grouped keys and values, a gated MLP, and RMSNorm.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundoff.config import ConfigError, nearest
from roundoff.models.embedded import EMBEDDED

HERE = Path(__file__).parent
BIASED = ("qwen2",)
"""Model types whose query, key and value projections have a bias although their config.json does not say so."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings that show a mixture of experts: its config.json has one of them."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the output embedding is the input embedding."""
    bias: bool
    """Whether the query, key and value projections have a bias."""

    @property
    def kv_width(self) -> int:
        """Number of elements in the keys (or the values) of one token in one layer."""
        return self.kv_heads * self.head_size

    @property
    def linear(self) -> int:
        """Number of parameters in the Linear layers of all decoder layers, which hardware quantizes by default."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        """Number of parameters in one embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_size if self.bias else 0
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear + self.embedding * (1 if self.tied else 2) + biases + norms

    def adapters(self, rank: int) -> int:
        """Number of parameters in LoRA adapters of this rank on every Linear of the decoder layers."""
        query, kv = self.heads * self.head_size, self.kv_width
        ends = 2 * (self.hidden + query) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends


def model_shape(name: str, config: Path | None = None) -> ModelShape:
    """The shape of the model that a profile names.

    Args:
        name: `tiny` or `tiny-long`, a local directory, or a hub name.
        config: a `config.json` to read instead of the model's own.

    Raises:
        ConfigError: if the shape is not known on this machine, or the model is a mixture of experts.
    """
    directory = EMBEDDED.get(name) or Path(name).expanduser()
    path = directory / "config.json" if config is None else config
    if path.is_file():
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return _shape(name, content, str(path))
    known = tomllib.loads((HERE / "shapes.toml").read_text("utf-8"))
    if config is not None or name not in known:
        sought = path if config is not None else name
        raise ConfigError(
            f"the shape of {sought} is not known here{nearest(name, tuple(known))}: name a model directory, or give "
            f"--config the model's config.json (known without: {', '.join(known)})"
        )
    return _shape(name, known[name], "shapes.toml")


def _shape(name: str, content: Mapping[str, Any], source: str) -> ModelShape:
    content = content.get("text_config", content)
    for key in EXPERTS:
        if content.get(key):
            raise ConfigError(
                f"{name} is a mixture of experts ({source}: {key} = {content[key]}), whose size is not counted here: "
                "planning knows dense models of the kind of Llama and Qwen2"
            )
    try:
        heads, hidden = int(content["num_attention_heads"]), int(content["hidden_size"])
        return ModelShape(
            name=name,
            hidden=hidden,
            intermediate=int(content["intermediate_size"]),
            layers=int(content["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(content.get("num_key_value_heads") or heads),
            head_size=int(content.get("head_dim") or hidden // heads),
            vocabulary=int(content["vocab_size"]),
            tied=bool(content.get("tie_word_embeddings", False)),
            bias=bool(content.get("attention_bias", content.get("model_type") in BIASED)),
        )
    except KeyError as error:
        raise ConfigError(f"{source} does not say {error.args[0]}, so the size of {name} is not known") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source} holds a size that is not a number: {error}") from None
