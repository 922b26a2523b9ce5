"""AQN, Adaptive Quantization Noise: noise on the model's weights during rollouts (QeRL, arXiv:2510.11696).

`absolute` noise, as published, sets the weight to `w + sigma * m * eps`; `relative` noise multiplies the gain by
`1 + sigma * m * eps`. The gain of an RMSNorm is its weight `w`, or `1 + w` where the model defines its norm that way
(Gemma); passing ones through the norm shows which one it is. `m` is the layer's multiplier, and `eps ~ N(0, 1)` is
drawn from (key, parameter).

`aqn.target` decides what is perturbed (`aqn_targets` lists it):
- `rmsnorm`: the weight of every module whose class name ends in RMSNorm: norms before and after attention and MLP,
  q_norm and k_norm, and the final norm. A norm right in front of a mixture-of-experts router is left out, because
  there the noise would mainly change which experts are chosen.
- `linear`: the weight of every Linear inside the decoder layers, except LoRA adapters.

Modules outside the decoder layers (the final norm) and layers that the multipliers do not name have multiplier 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roundoff.config import AQN, ConfigError
from roundoff.hardware.freshness import bit_sums
from roundoff.hardware.inventory import layer_index, plain_name
from roundoff.numerics.rng import Key, normal
from roundoff.numerics.transfer import fetch

_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm")
"""Possible names of the norm whose output a decoder layer's MLP reads; the first one that a layer has is used."""

_ACTIVE = "_roundoff_aqn_active"
"""Attribute of a perturbed module, and of its weight: the number of open `aqn_noise` blocks around them.

The module's count is visible from every model that holds the module, under whatever wrapper, and stays on a copy made
inside the block, which keeps the noise. The weight's count is visible from other modules that share the weight.
"""

_SAVED = "_roundoff_aqn_saved"
"""Attribute of a perturbed weight: what its open `aqn_noise` blocks will restore, in the order they were entered."""


_OFFSET = "_roundoff_gain_offset"
"""Attribute of a norm: 0 if it multiplies by its weight, 1 if by 1 + its weight."""


@dataclass(eq=False, slots=True)
class _Saved:
    """What one block will restore of one weight.

    Blocks inside generators that were left open may close in any order. A block that is not the innermost does not
    touch the weight when it closes; it hands its original to the block that was entered after it.
    """

    original: Tensor
    noisy: Int[Tensor, ""] | None = None
    """Sum of the weight's bits with the block's noise, to detect writes; where the weight is."""


@dataclass(frozen=True, slots=True)
class AqnTarget:
    """One weight that AQN perturbs."""

    name: str
    """Dotted name of the module, without what PEFT adds to it."""
    layer: int | None
    """Index of the decoder layer, from 0; None outside the layers (the final norm)."""
    module: nn.Module

    @property
    def weight(self) -> Float[Tensor, "*shape"]:
        """The parameter itself."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def aqn_targets(model: nn.Module, aqn: AQN, *, router_norms: bool = False) -> list[AqnTarget]:
    """The weights that AQN perturbs, in the model's order.

    A weight that two modules share is listed once, under the first of them. `router_norms` includes the norms in front
    of a router.

    Raises:
        ConfigError: if there is none.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    excluded = set() if router_norms else set(_norms_before_routers(modules))
    candidates = [
        AqnTarget(name, layer_index(name), module)
        for name, module in modules.items()
        if _is_target(name, module, aqn) and name not in excluded
    ]
    targets = list({id(target.weight): target for target in reversed(candidates)}.values())[::-1]
    if not targets:
        classes = sorted({type(m).__name__ for m in modules.values() if any(True for _ in m.parameters(recurse=False))})
        raise ConfigError(
            f"aqn.target = {aqn.target!r} matches no module, so AQN would do nothing; modules with weights here: "
            f"{', '.join(classes) or 'none'}"
        )
    return targets


def _is_target(name: str, module: nn.Module, aqn: AQN) -> bool:
    if aqn.target == "rmsnorm":
        return type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor)
    adapter = any(part.startswith("lora_") for part in name.split("."))
    return isinstance(module, nn.Linear) and layer_index(name) is not None and not adapter


def _norms_before_routers(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the norms that feed a mixture of experts: those of layers that hold a module named `experts`."""
    for name in modules:
        layer, separator, inner = name.rpartition(".experts")
        if not separator or inner:
            continue
        block = layer.rpartition(".")[0]
        yield from [f"{block}.{norm}" for norm in _BEFORE_MLP if f"{block}.{norm}" in modules][:1]


def check_multipliers(model: nn.Module, aqn: AQN, multipliers: Mapping[int, float] | None) -> None:
    """Refuse what `aqn_noise` would refuse; called before anything is computed.

    Raises:
        ConfigError: if a multiplier is invalid or names a layer without a target, or if nothing would be perturbed.
    """
    _factors(aqn_targets(model, aqn), multipliers)


def noise_shares(model: nn.Module, sigma: float, multipliers: Mapping[int, float] | None, aqn: AQN) -> dict[str, float]:
    """Ratio of noise to weight (both RMS) of every target, by module name. For a norm, the weight is its gain."""
    targets = aqn_targets(model, aqn)
    shares = {}
    with torch.no_grad():
        for target, factor in zip(targets, _factors(targets, multipliers), strict=True):
            size = 1.0
            if aqn.noise == "absolute":
                gain = target.module(torch.ones_like(target.weight)[None]) if aqn.target == "rmsnorm" else target.weight
                size = float(gain.to(torch.float32).square().mean().sqrt())
            shares[target.name] = sigma * factor / size if size else math.inf
    return shares


@contextmanager
def aqn_noise(
    model: nn.Module, sigma: float, multipliers: Mapping[int, float] | None, key: Key, aqn: AQN
) -> Iterator[None]:
    """Inside the block, the model's weights are noisy. Leaving it restores every bit, even after an exception.

    If several blocks are open, the last one to be left restores the weights.

    Args:
        model: whose weights are perturbed in place.
        sigma: the step's standard deviation, of the weight or relative to its gain. Skip the block at a silent step
            (sigma 0).
        multipliers: factor on sigma of each decoder layer; None: 1 in all layers.
        key: of the noise; the same key gives the same noise.
        aqn: what is perturbed, and whether sigma is absolute or relative.

    Raises:
        ConfigError: if sigma or a multiplier is invalid, if a multiplier names a layer without a target, or if nothing
            would be perturbed.
        RuntimeError: on leaving, if the weights were written to inside the block (by an optimizer, say). Such a write
            is lost.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"sigma of AQN must be above 0 and finite, but is {sigma}: skip AQN at silent steps")
    targets = aqn_targets(model, aqn)
    factors = _factors(targets, multipliers)
    offsets = _gain_offsets(targets, aqn)
    saved: list[tuple[Tensor, _Saved]] = []
    try:
        with torch.no_grad():
            for target, factor, offset in zip(targets, factors, offsets, strict=True):
                if factor:
                    weight = target.weight
                    saved.append((weight, _Saved(weight.detach().clone())))
                    weight.__dict__.setdefault(_SAVED, []).append(saved[-1][1])
                    _perturb(weight, sigma * factor, key.fold("aqn", target.name), aqn, offset)
        for (_, own), noisy in zip(saved, bit_sums([weight for weight, _ in saved]), strict=True):
            own.noisy = noisy
        marked = [place for target in targets for place in (target.module, target.weight)]
        _count(marked, 1)
        try:
            yield
        finally:
            _count(marked, -1)
            written = _written(saved)
    finally:
        with torch.no_grad():
            for weight, own in reversed(saved):
                _restore(weight, own)
    if written:
        raise RuntimeError(
            f"{written} of the model's weights were written to inside aqn_noise, which restored what they were before: "
            "leave it before an optimizer's step, a merge or the loading of weights"
        )


def _written(saved: list[tuple[Tensor, _Saved]]) -> int:
    """Number of weights that no longer hold their block's noise; those perturbed again or cast are not counted."""
    pairs = [(weight, own) for weight, own in saved if weight.dtype is own.original.dtype]
    last = [(weight, own) for weight, own in pairs if weight.__dict__[_SAVED][-1] is own]
    noisy = [own.noisy for _, own in last if own.noisy is not None]
    return int((bit_sums([weight for weight, _ in last]) != torch.stack(noisy)).sum()) if noisy else 0


def _restore(weight: Tensor, own: _Saved) -> None:
    stack: list[_Saved] = weight.__dict__[_SAVED]
    place = stack.index(own)
    if own is stack[-1]:
        weight.copy_(own.original)
    else:
        stack[place + 1].original = own.original
    del stack[place]
    if not stack:
        del weight.__dict__[_SAVED]


def is_aqn_active(model: nn.Module) -> bool:
    """Whether a weight of the model is inside an `aqn_noise` block, so that a score would include that noise."""
    places = (*model.modules(), *model.parameters())
    return any(place.__dict__.get(_ACTIVE, 0) for place in places)


def _count(places: list[nn.Module | Tensor], change: int) -> None:
    for place in places:
        count = place.__dict__.pop(_ACTIVE, 0) + change
        if count:
            place.__dict__[_ACTIVE] = count


def _factors(targets: list[AqnTarget], multipliers: Mapping[int, float] | None) -> list[float]:
    """The factor on sigma of each target."""
    by_layer = dict(multipliers or {})
    bad = {layer: value for layer, value in by_layer.items() if not (math.isfinite(value) and value >= 0)}
    if bad:
        raise ConfigError(f"multipliers of AQN must be finite and not negative, but are {bad}")
    layers = {target.layer for target in targets if target.layer is not None}
    unknown = sorted(set(by_layer) - layers)
    if unknown:
        raise ConfigError(f"multipliers of AQN name layers {unknown}, which have no target (layers: {sorted(layers)})")
    factors = [1.0 if target.layer is None else by_layer.get(target.layer, 1.0) for target in targets]
    if not any(factors):
        raise ConfigError("every multiplier of AQN is 0, so it would do nothing")
    return factors


def _perturb(weight: Tensor, sigma: float, key: Key, aqn: AQN, offset: float) -> None:
    """Add noise to one weight in place, computed in float32 and rounded once to the weight's dtype.

    Its gain is `weight + offset`.
    """
    eps = normal(key, weight.shape, device=weight.device)
    value = weight.to(torch.float32)
    if aqn.noise == "absolute":
        value = value + sigma * eps
    else:
        value = value + (value + offset) * (sigma * eps)
    weight.copy_(value)


@torch.no_grad()
def _gain_offsets(targets: list[AqnTarget], aqn: AQN) -> list[float]:
    """0 for a norm that multiplies by `w`, 1 for one that multiplies by `1 + w`; 0 wherever that does not matter.

    The offset is a property of the module, and is kept there.

    Raises:
        ConfigError: if a norm multiplies by neither, so that relative noise is not defined for it.
    """
    if aqn.noise == "absolute" or aqn.target != "rmsnorm":
        return [0.0] * len(targets)
    new = [target for target in targets if _OFFSET not in target.module.__dict__]
    for target, fits in zip(new, fetch([_fitting_offsets(target) for target in new]), strict=True):
        is_zero, is_one = fits.tolist()
        if not (is_zero or is_one):
            raise ConfigError(
                f"{target.name} ({type(target.module).__name__}) multiplies neither by w nor by 1 + w, so relative "
                "noise is not defined for it: set aqn.noise = 'absolute'"
            )
        target.module.__dict__[_OFFSET] = 0.0 if is_zero else 1.0
    return [float(target.module.__dict__[_OFFSET]) for target in targets]


def _fitting_offsets(target: AqnTarget) -> Tensor:
    """Whether the gain of a norm is `w`, and whether it is `1 + w`.

    Ones have RMS 1, so that the norm of ones is its gain.
    """
    weight = target.weight
    gain = target.module(torch.ones_like(weight)[None])[0].to(torch.float32)
    shift = gain - weight.to(torch.float32)
    # The norm's epsilon (1e-6 to 1e-5, added to 1) and rounding to bfloat16 (2^-8) shift the gain a little.
    return torch.stack([((shift - offset).abs() <= 0.02 * (1.0 + weight.abs())).all() for offset in (0.0, 1.0)])
