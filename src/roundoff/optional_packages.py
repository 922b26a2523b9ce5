"""Optional packages: each is imported where it is used, and the error for a missing one names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from roundoff.config import ConfigError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        ConfigError: if its package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ConfigError(f"{module} is not installed: pip install 'roundoff[{extra}]'") from error
