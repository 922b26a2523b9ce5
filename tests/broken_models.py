"""Copies of the embedded model that cannot compute everything: NaN in a weight, activations beyond fp16."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from roundoff.models.load import TINY_DIRECTORY


def broken_model(directory: Path, weight: str = "model.layers.1.mlp.up_proj.weight", value: float = math.nan) -> Path:
    """The embedded model with one weight that is not finite, as a directory; loading refuses it."""
    return changed_model(directory, lambda weights: weights[weight].view(-1)[:1].fill_(value))


def overflowing_model(directory: Path) -> Path:
    """The embedded model with finite weights whose products overflow float32."""

    def widen(weights: dict[str, torch.Tensor]) -> None:
        weight = weights["model.layers.1.mlp.up_proj.weight"]
        weight.div_(weight.abs().max()).mul_(3e38)

    return changed_model(directory, widen)


def wide_model(directory: Path) -> Path:
    """The embedded model rescaled: the same function up to rounding, with activations beyond the range of fp16."""

    def widen(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] *= 2.0**20
        weights["model.layers.1.mlp.down_proj.weight"] *= 2.0**-20

    return changed_model(directory, widen)


def changed_model(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the embedded model whose weights `change` has changed."""
    shutil.copytree(TINY_DIRECTORY, directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
