"""The weight of one Linear on hardware, `Q(W)`, kept until the weight changes; phases with one format share it.

`Q(W)` is held in a buffer of its own, outside of the parameters, and is computed again only when the weight has changed
(version counter, storage, address, dtype or device). torch does not count every write. A hook in `installed.py` counts
the steps of fused optimizers; `freshness.py` detects the others, such as writes through `weight.data` and the steps of
compiled optimizers, by the weight's memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.formats.table import get_format
from roundoff.hardware.freshness import Part, part_name
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.quantize import quantize


@dataclass(eq=False, slots=True, weakref_slot=True)
class QuantizedWeight:
    """A weight as the products see it, from a cache."""

    name: str
    """Dotted name without the parts that PEFT adds, so that draws do not depend on adapters around the model."""
    runtime: Runtime
    """State that all layers of the model share."""
    format: str | None = None
    """Format of the weight; None means high precision."""
    quantizations: int = 0
    """How often `Q(W)` was computed."""
    _cached: Tensor | None = None
    """`Q(W)`, valid only while `_cached_of` describes the weight."""
    _along_out: Tensor | None = None
    """The weight in blocks along `out_features`, for dX; valid only beside `_cached_of`."""
    _cached_of: tuple[int, int, torch.dtype, torch.device] | None = None
    """Version, address, dtype and device of the weight that `Q(W)` was computed from."""
    _cached_in: weakref.ref[torch.UntypedStorage] | None = None
    """Storage of that weight; needed because a later tensor of version 0 may get the same address."""
    _checked: int = -1
    """Value of `Part.checks` when this Linear was last computed."""
    _watched: Part | None = None
    """The part of `Freshness` that holds this weight; looked up at the first use."""
    _part: str = field(init=False)
    """Name of that part."""

    def __post_init__(self) -> None:
        self._part = part_name(self.name)

    def quantized(self, weight: Float[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        """`Q(W)`, from the cache unless the weight has changed; the weight itself if it has no format."""
        if self.format is None:
            return weight.detach()
        tag = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        cached, storage = self._cached, self._cached_in
        if cached is None or storage is None or tag != self._cached_of or storage() is not weight.untyped_storage():
            if cached is not None and (cached.shape, cached.dtype, cached.device) != (
                weight.shape,
                weight.dtype,
                weight.device,
            ):
                cached = None
            self._cached_of = self._along_out = None  # an error below must not leave a half-written copy in use
            if torch.is_inference_mode_enabled():  # autograd does not accept a tensor made in inference mode
                with torch.inference_mode(False):
                    cached = self._cached = quantize(weight.detach(), self.format, out=cached)
            else:
                cached = self._cached = quantize(weight.detach(), self.format, out=cached)
            self._cached_of, self._cached_in = tag, weakref.ref(weight.untyped_storage())
            self.quantizations += 1
            self.runtime.freshness.record(self._watch(), self, weight)
        return cached

    def for_dx(
        self, weight: Float[Tensor, "out_features in_features"], quantized: Float[Tensor, "out_features in_features"]
    ) -> Float[Tensor, "out_features in_features"]:
        """The weight in blocks along `out_features`, from which dX is computed where gradients are quantized.

        It is the `Q(W)` of the forward pass, `quantized`, if that has two-dimensional blocks or no format.
        """
        if self.format is None or get_format(self.format).rows > 1:
            return quantized
        if self._along_out is None or quantized is not self._cached:
            along = quantize(weight.detach(), self.format, axis=0).to(quantized.dtype)
            if quantized is not self._cached:
                return along
            self._along_out = along
        return self._along_out

    def check_weights(self, x: Float[Tensor, "*tokens in_features"]) -> None:
        """Detect writes that torch did not count; call this before every product (it acts once in a pass)."""
        part = self._watched or self._watch()
        if self._checked == part.checks:  # computed since the last check, so a new pass has begun
            self.runtime.freshness.check(part, x.numel() // max(1, x.shape[-1]))
        self._checked = part.checks

    def begin_pass(self) -> None:
        """Let the next product be checked as the first of a pass: other phases have computed since the last one."""
        if self.format is not None:
            self._checked = self._watch().checks

    def _watch(self) -> Part:
        """The part of `Freshness` that holds this Linear's weight."""
        if self._watched is None:
            self._watched = self.runtime.freshness.part(self._part)
        return self._watched

    def refresh(self) -> None:
        """Discard `Q(W)`, so that the next product computes it again."""
        self._cached_of = None

    @property
    def cached_address(self) -> int:
        """Address of `Q(W)`, which stays where it is when it is computed again; 0 if there is none."""
        return 0 if self._cached is None else self._cached.data_ptr()

    @property
    def is_cached(self) -> bool:
        """Whether there is a `Q(W)` to use."""
        return self._cached_of is not None

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy (deepcopy, pickle), without `Q(W)`: the copy quantizes its own weight."""
        state = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        return state | {
            "_cached": None,
            "_along_out": None,
            "_cached_of": None,
            "_cached_in": None,
            "_checked": -1,
            "_watched": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
