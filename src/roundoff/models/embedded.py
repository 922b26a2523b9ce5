"""The models inside the package, each a Hugging Face directory, by the name that stands for it wherever a model does.

Reading this table imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

TINY = "tiny"
LONG = "tiny-long"
HERE = Path(__file__).parent
EMBEDDED: Mapping[str, Path] = MappingProxyType({TINY: HERE / "tiny", LONG: HERE / "tiny_long"})
"""Directory of each embedded model. The packaged profile of the same name asks it the task that it was warmed up on."""


def default_profile(model: str) -> str:
    """Name of the profile that is taken for a model if none is named: an embedded model has its own."""
    return model if model in EMBEDDED else TINY
