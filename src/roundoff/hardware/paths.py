"""Models and settings that `install` refuses, because a product would bypass the hardware or get the wrong noise.

- torch's `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` have a fast path for evaluation that reads the
  weights of their Linears without calling them.
- Some adapters of PEFT compute with the weight of the Linear that they wrap, without calling it.
- A module that a model holds under two names may be computed twice in one pass. Its draws are keyed by its name, so
  both products would have the same noise.
- A pattern of `hardware.exclude` that matches nothing leaves the module that it was meant for on the hardware.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import nn

from roundoff.config import ConfigError, Hardware
from roundoff.hardware.inventory import Candidate, exclusion, plain_name
from roundoff.numerics.quantize import quantize

SAFE = 1e4
"""Magnitude up to which weights stay finite in every format (fp16 ends at 65,504, the others at 1.7e38 or beyond)."""
AROUND = frozenset(f"peft.tuners.{name}" for name in ("frod", "hra", "shira", "supertuning"))
"""Modules of the PEFT methods whose layers read the weight of the Linear that they wrap, as of peft 0.21."""
_DEFAULT_EXCLUDE: tuple[str, ...] = Hardware.model_fields["exclude"].default


def check_paths(model: nn.Module, covered: Sequence[Candidate], hardware: Hardware) -> None:
    """Refuse a model or settings for a reason of the list above.

    Raises:
        ConfigError: for torch's fast path, for adapters that bypass a covered Linear, for a module under two names that
            draws noise, and for a pattern of `hardware.exclude` that matches no module.
    """
    _check_fast_path(model, covered)
    check_adapters(model, [item.module for item in covered])
    _check_two_names(model, covered, hardware)
    _check_exclude(model, hardware)


def check_range(item: Candidate, fmt: str | None) -> None:
    """Refuse finite weights of a module that become infinite in their format.

    Only fp16 does that below 2^127; the other formats may do it above.

    Raises:
        ConfigError: naming the weight and its largest magnitude.
    """
    if fmt is None:
        return
    for name, weight in item.module.named_parameters(recurse=False):
        if weight.is_meta or weight.dim() < 2 or weight.numel() == 0:
            continue
        max_abs = float(weight.detach().abs().max())
        if not SAFE < max_abs < math.inf:
            continue
        if bool(weight.isfinite().all()) and not bool(quantize(weight.detach(), fmt).isfinite().all()):
            raise ConfigError(
                f"{item.name}.{name} holds numbers up to {max_abs:.3g}, which hardware.precision.weight = {fmt!r} "
                "rounds to infinity: the weights of this model are broken, or need another scale"
            )


def _check_fast_path(model: nn.Module, covered: Sequence[Candidate]) -> None:
    if not torch.backends.mha.get_fastpath_enabled():
        return
    modules = {id(item.module) for item in covered}
    for name, module in model.named_modules():
        fast = isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        if fast and any(id(inner) in modules for inner in module.modules()):
            raise ConfigError(
                f"{name or 'the model'} is a torch.nn.{type(module).__name__}, whose fast path for evaluation reads "
                "its weights around the hardware: call torch.backends.mha.set_fastpath_enabled(False) first"
            )


def check_adapters(model: nn.Module, covered: Sequence[nn.Module]) -> None:
    """Refuse adapters that read the weight of a covered Linear without calling it.

    Raises:
        ConfigError: naming the layer and the method of PEFT.
    """
    modules = {id(module) for module in covered}
    for name, module in model.named_modules():
        method = type(module).__module__.removesuffix(".layer")
        if method in AROUND and id(module._modules.get("base_layer")) in modules:
            raise ConfigError(
                f"{name} is a layer of {method}, which computes with the weight of the Linear that it wraps, around "
                "the hardware: use LoRA, or another method that calls its base layer"
            )


def _check_two_names(model: nn.Module, covered: Sequence[Candidate], hardware: Hardware) -> None:
    if not (hardware.matmul_noise.relative_std or hardware.is_noisy):
        return
    modules = {id(item.module): item.name for item in covered}
    for name, module in model.named_modules(remove_duplicate=False):
        first = modules.get(id(module), name)
        if first != name:
            raise ConfigError(
                f"{first} and {name} are one module, so that both products of a pass would draw the same noise: give "
                "the model two modules (they may share the weight), or name it in hardware.exclude"
            )


def _check_exclude(model: nn.Module, hardware: Hardware) -> None:
    names = [plain_name(name) for name, _ in model.named_modules() if name]
    for pattern in hardware.exclude:
        if pattern in _DEFAULT_EXCLUDE or any(exclusion(name, (pattern,)) for name in names):
            continue
        parts = sorted({part for name in names for part in (name, *name.split(".")) if not part.isdigit()})
        near = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"its modules have names like {names[-1]!r}"
        raise ConfigError(f"hardware.exclude names {pattern!r}, which matches no module of this model: {hint}")
