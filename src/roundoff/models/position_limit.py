"""The length up to which a model's rotary embedding gives a token the same angles in every batch.

Two kinds of rotary embedding change their frequencies with the longest sequence of a batch, for all tokens of all its
sequences. A text would then depend on its neighbours, and a response would meet other frequencies midway as soon as a
longer one in its batch ends.

- `longrope` (Phi-3) uses its short factors up to `original_max_position_embeddings`, and the long ones beyond.
- `dynamic` stretches beyond `max_position_embeddings`, and stays stretched between calls.

Both are constant up to that length, and sequences are kept within it. The other known kinds (`default`, `linear`,
`yarn`, `llama3`, `proportional`) never change. An unknown kind is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.config import ConfigError

STATIC = ("default", "linear", "yarn", "llama3", "proportional")
"""Kinds of rotary embedding whose frequencies never change."""


def position_limit(model: PreTrainedModel) -> tuple[int | None, str]:
    """Tokens that prompt and response may have together (None: any number), and what sets this limit.

    Raises:
        ConfigError: for a rotary embedding of an unknown kind.
    """
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    reason = "positions of the model (max_position_embeddings)"
    for rope in _parameters(config):
        kind = _kind(rope)
        if kind in STATIC:
            continue
        if kind == "dynamic":
            bound = limit
        elif kind == "longrope":
            bound = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
        else:
            raise ConfigError(
                f"the model's rope_parameters.rope_type is {kind!r}, and roundoff does not know whether its positions "
                f"depend on the other sequences of a batch (known: {', '.join((*STATIC, 'dynamic', 'longrope'))})"
            )
        if bound is None:
            raise ConfigError(
                f"rope_type {kind!r} changes its frequencies with the longest sequence of a batch, and the config does "
                "not say beyond which length: set original_max_position_embeddings"
            )
        if limit is None or bound < limit:
            limit, reason = bound, f"positions up to which rope_type {kind!r} keeps its frequencies in every batch"
    return limit, reason


def check_lengths(model: PreTrainedModel, attention_mask: Shaped[Tensor, "rollouts columns"]) -> None:
    """Check that no sequence is longer than the length up to which the model's rotary embedding is constant.

    Raises:
        ConfigError: if one is.
    """
    if has_static_positions(model):
        return
    limit, reason = position_limit(model)
    longest = int((attention_mask != 0).sum(dim=1).max()) if attention_mask.numel() else 0
    if limit is not None and longest > limit:
        raise ConfigError(f"a sequence of {longest} tokens does not fit into the {limit} {reason}")


def has_static_positions(model: PreTrainedModel) -> bool:
    """Whether the frequencies of the model's rotary embedding never change, however long a sequence is."""
    return all(_kind(rope) in STATIC for rope in _parameters(model.config.get_text_config(decoder=True)))


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a config: one set, or one for each kind of layer (Gemma 3)."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(settings, Mapping):
        return
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    yield from nested or [settings]
