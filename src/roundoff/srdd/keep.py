"""Turns `hardware.precision.keep = "srdd:k"` into the k layers that a scan found most sensitive."""

from __future__ import annotations

from roundoff.config import ConfigError, Hardware
from roundoff.srdd.layer_scan import LayerScan


def keep_names_a_scan(hardware: Hardware) -> bool:
    """Whether `precision.keep` names a scan that has yet to choose the layers, rather than the layers themselves."""
    return hardware.needs_scan


def kept_count(keep: str, layers: int) -> int:
    """The k of `srdd:k`, for a model with this many layers.

    Raises:
        ConfigError: if k exceeds the number of layers.
    """
    k = int(keep.removeprefix("srdd:"))
    if k > layers:
        raise ConfigError(f"hardware.precision.keep = {keep!r} keeps more layers than the model has ({layers})")
    return k


def resolve_keep(hardware: Hardware, scan: LayerScan, *, metric: str | None = None) -> Hardware:
    """The same hardware with `precision.keep` as layer indices, in every phase; indices stay as they are.

    `metric` ranks the layers; None means the scan's own choice.

    Raises:
        ConfigError: if k exceeds the number of layers, or if the hardware has no format, so that keeping has no effect.
    """

    def chosen(keep: tuple[int, ...] | str) -> tuple[int, ...]:
        if not isinstance(keep, str):
            return keep
        if not any(one.precision.quantizes_forward for one in hardware.variants()):
            raise ConfigError(
                f"hardware.precision.keep = {keep!r} does nothing without a format: set weight or activation"
            )
        return scan.most_sensitive(kept_count(keep, len(scan.layers)), metric)

    return hardware.with_keep(chosen) if hardware.needs_scan else hardware
