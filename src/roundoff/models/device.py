"""The device that a setting names."""

from __future__ import annotations

import torch

from roundoff.config import ConfigError


def resolve_device(name: str) -> str:
    """The device meant by `name`; `auto` takes an accelerator if there is one.

    Raises:
        ConfigError: if the device is not there.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return present.type if present else "cpu"
    if name != "cpu" and (present is None or present.type != name):
        raise ConfigError(f"device {name!r} is not there (found: {present.type if present else 'cpu'})")
    return name
