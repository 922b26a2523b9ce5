"""The device that a setting names."""

from __future__ import annotations

import torch

from roundoff.config import ConfigError


def resolve_device(name: str) -> str:
    """The device that `name` means; `auto` means the accelerator if there is one, and `cpu` otherwise.

    Raises:
        ConfigError: if this machine does not have the device.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return present.type if present else "cpu"
    if name != "cpu" and (present is None or present.type != name):
        raise ConfigError(f"device {name!r} is not there (found: {present.type if present else 'cpu'})")
    return name
