"""One declared experiment, and the hash that distinguishes runs whose results can differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from typing import Any, Self

from pydantic import model_validator

from roundoff.config.algorithm import Algorithm
from roundoff.config.base import LATER, Count, Settings
from roundoff.config.phases import PHASES, Hardware
from roundoff.config.profile import Profile
from roundoff.config.remedies import AQN, SRDD, LoRA


class Experiment(Settings):
    """One row of the table of experiments: the objective, the hardware and the remedies, without the scale."""

    id: str
    title: str = ""
    family: str = ""
    baseline: str | None = None
    """Id of the experiment that this one is compared against."""
    algorithm: Algorithm
    epochs: Count = 1
    hardware: Hardware = Hardware()
    aqn: AQN | None = None
    srdd: SRDD | None = None
    """Settings of the scan, for an experiment that needs one; None means the defaults of `SRDD`."""
    lora: LoRA | None = None

    @model_validator(mode="after")
    def _not_its_own_baseline(self) -> Self:
        if self.baseline == self.id:
            raise ValueError(f"baseline must be another experiment, but is {self.id!r} itself")
        return self

    @model_validator(mode="after")
    def _adapters_exist(self) -> Self:
        if self.lora is None and any(self.hardware.of(phase).lora for phase in PHASES):
            raise ValueError(".hardware.lora = true does nothing without adapters: add a table [lora], or set it false")
        return self

    @model_validator(mode="after")
    def _replays_what_was_drawn(self) -> Self:
        if self.hardware.draws_differ and self.algorithm.ratio_rule.replays_noise:
            raise ValueError(
                ".algorithm.ratio = 'replayed' means nothing here: rollouts and training draw different noise in the "
                "forward pass (hardware.rollout, hardware.training), so no pass of training can repeat that of a "
                "rollout: set algorithm.ratio = 'recomputed', or 'rollout' to correct for the difference"
            )
        return self

    @model_validator(mode="after")
    def _scan_has_a_use(self) -> Self:
        if self.srdd is not None and not self.needs_scan:
            raise ValueError(
                "has a table [srdd] that nothing uses: set aqn.layers to a mode of the scan, or "
                "hardware.precision.keep = 'srdd:k', or remove the table"
            )
        return self

    @property
    def needs_scan(self) -> bool:
        """Whether a setting depends on the result of the SRDD scan."""
        scales_layers = self.aqn is not None and self.aqn.layers != "all"
        return scales_layers or self.hardware.needs_scan


NAMES_ONLY = {"experiment": {"id", "title", "family", "baseline"}, "profile": {"name", "title"}}
"""Fields that only name a run: they do not change its result."""


def _hashed(settings: Settings, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """The settings as JSON, without those that came later and have their default."""
    content = settings.model_dump(mode="json", exclude=set(exclude))
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in exclude:
            continue
        if LATER in field.metadata and value == field.get_default(call_default_factory=True):
            del content[name]
        elif isinstance(value, Settings):
            content[name] = _hashed(value)
        elif isinstance(value, tuple) and any(isinstance(one, Settings) for one in value):
            content[name] = [_hashed(one) for one in value]
    return content


def result_hash(experiment: Experiment, profile: Profile) -> str:
    """Hash (eight hexadecimal digits) of every setting that can change a result; names do not enter it."""
    content = {
        "experiment": _hashed(experiment, NAMES_ONLY["experiment"]),
        "profile": _hashed(profile, NAMES_ONLY["profile"] | {"device", "allow_download"}),
    }
    content["profile"]["task"].pop("directory", None)  # the location of a file does not change a result
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
