"""`hardware.precision.keep = "srdd:k"` turned into the layers that a scan found most sensitive."""

from __future__ import annotations

from roundoff.config import ConfigError, Hardware
from roundoff.srdd.layer_scan import LayerScan


def keep_names_a_scan(hardware: Hardware) -> bool:
    """Whether `precision.keep` still names a scan instead of layers."""
    return isinstance(hardware.precision.keep, str)


def resolve_keep(hardware: Hardware, scan: LayerScan, *, metric: str | None = None) -> Hardware:
    """The same hardware with `precision.keep` as a list of layer indices; unchanged if it is one already.

    Raises:
        ConfigError: if k exceeds the model's layers or there is no format for kept layers to be kept from.
    """
    keep = hardware.precision.keep
    if not isinstance(keep, str):
        return hardware
    k = int(keep.removeprefix("srdd:"))
    if not (hardware.precision.weight or hardware.precision.activation):
        raise ConfigError(f"hardware.precision.keep = {keep!r} does nothing without a format: set weight or activation")
    if k > len(scan.layers):
        raise ConfigError(
            f"hardware.precision.keep = {keep!r} keeps more layers than the model has ({len(scan.layers)})"
        )
    precision = hardware.precision.model_copy(update={"keep": scan.most_sensitive(k, metric)})
    return hardware.model_copy(update={"precision": precision})
