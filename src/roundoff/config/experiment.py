"""One row of the table, and the hash that separates runs whose results can differ."""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import model_validator

from roundoff.config.algorithm import Algorithm
from roundoff.config.base import Count, Settings
from roundoff.config.hardware import Hardware
from roundoff.config.profile import Profile
from roundoff.config.remedies import AQN, SRDD, LoRA


class Experiment(Settings):
    """One row of the table: what is trained, on which hardware, with which remedy."""

    id: str
    title: str = ""
    family: str = ""
    baseline: str | None = None
    """Id of the experiment that a benefit is measured against."""
    algorithm: Algorithm
    epochs: Count = 1
    hardware: Hardware = Hardware()
    aqn: AQN | None = None
    srdd: SRDD | None = None
    """The scan of an experiment that needs one; None: its defaults."""
    lora: LoRA | None = None

    @model_validator(mode="after")
    def _not_its_own_baseline(self) -> Self:
        if self.baseline == self.id:
            raise ValueError(f"baseline must be another experiment, but is {self.id!r} itself")
        return self

    @model_validator(mode="after")
    def _scan_has_a_use(self) -> Self:
        if self.srdd is not None and not self.needs_scan:
            raise ValueError(
                "has a table [srdd] that nothing uses: set aqn.layers to a mode of the scan, or "
                "hardware.precision.keep = 'srdd:k', or leave the table away"
            )
        return self

    @property
    def needs_scan(self) -> bool:
        """Whether a setting refers to the layers that the SRDD scan finds."""
        aimed = self.aqn is not None and self.aqn.layers != "all"
        return aimed or isinstance(self.hardware.precision.keep, str)


NAMES_ONLY = {"experiment": {"id", "title", "family", "baseline"}, "profile": {"name", "title"}}
"""Fields that name a run without changing its result."""


def result_hash(experiment: Experiment, profile: Profile) -> str:
    """Eight hex digits over every setting that changes a result, and over no name."""
    content = {
        "experiment": experiment.model_dump(mode="json", exclude=NAMES_ONLY["experiment"]),
        "profile": profile.model_dump(mode="json", exclude=NAMES_ONLY["profile"] | {"device", "allow_download"}),
    }
    content["profile"]["task"].pop("directory", None)  # where a file lies changes no result
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
