"""Whether the weights in a model directory are all there, fit the architecture, and are numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from roundoff.models.errors import ModelError

INDEX = "model.safetensors.index.json"
"""File that says which shard holds which tensor."""


def check_files(directory: Path, name: str) -> None:
    """Check that every shard that the index lists is there, and that no index contradicts a single file.

    Raises:
        ModelError: naming what is missing.
    """
    path = directory / INDEX
    if not path.is_file() or (directory / "model.safetensors").is_file():  # transformers reads the single file first
        return
    try:
        shards = {str(shard) for shard in json.loads(path.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model {name!r}: {path} is no index of shards: {error!r}") from None
    if absent := sorted(shard for shard in shards if not (directory / shard).is_file()):
        raise ModelError(
            f"model {name!r}: {INDEX} lists {len(shards)} shards, but {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not in {directory}: copy the whole directory again"
        )


def check_weights(model: PreTrainedModel, info: dict[str, object], name: str) -> None:
    """Check that every weight of the model came from its files, and every tensor of its files went into it.

    Raises:
        ModelError: naming tensors that are missing, of another shape or unknown, or hold NaN or infinity.
    """
    for key in ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys"):
        if found := info.get(key):
            shown = sorted(map(str, found))  # type: ignore[call-overload]
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise ModelError(
                f"model {name!r}: its weights do not fit its architecture ({key}: {', '.join(shown[:3])}{more})"
            )
    for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"model {name!r}: {part} holds NaN or infinity, so every result would be worthless")
