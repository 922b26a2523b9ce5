"""Puts the settings of an experiment into the words of a table; a text is empty if the experiment sets nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roundoff.config import (
    ALGORITHMS,
    AQN,
    NAMES_ONLY,
    SRDD,
    Algorithm,
    Experiment,
    Hardware,
    Precision,
    Profile,
    Settings,
    flatten,
    phases_in_words,
    rules_in_words,
)

IN_WORDS = (
    *(
        "algorithm.name",
        "algorithm.ratio",
        "epochs",
        "lora.rank",
        "hardware.matmul_noise",
        "hardware.accumulator",
        "hardware.deadzone",
        "hardware.faults",
        "hardware.rules",
        "hardware.rollout",
        "hardware.training",
        "hardware.evaluation",
    ),
    *("hardware.precision", "aqn.sigma_start", "aqn.schedule", "aqn.layers", "aqn.noise", "aqn.target", "srdd.metric"),
)
"""Settings and tables that have their own words; any other setting that is not its default is named by its path."""


@dataclass(frozen=True)
class SettingsInWords:
    """The settings of an experiment in words for a table; a text is empty if the experiment sets nothing."""

    algorithm: str
    epochs: int
    lora: str
    weight_format: str
    activation_format: str
    gradient_format: str
    """Format of gradients, and what is done to them besides."""
    kv_cache_format: str
    attention_format: str
    """Format of the operands of QK^T and PV."""
    keep: str
    matmul_noise: float
    """`hardware.matmul_noise.relative_std` (fraction)."""
    other_hardware: str
    aqn: str
    sigma: str
    """First and last sigma of AQN, such as `0.05 → 0.0005`."""
    aqn_layers: str
    srdd: str
    """What the SRDD scan is used for, and the metric by which it ranks."""
    ratio: str
    other: str
    """The settings that have no words of their own and are not their defaults, by path."""
    profile: str
    model: str
    task: str

    @property
    def formats(self) -> str:
        """Formats of weights (W), activations (A), gradients (G), the key-value cache (KV) and attention's operands.

        Examples are `W mxfp4` and `W, A mxfp4, KV fp8_e4m3`.
        """
        named = [("W", self.weight_format), ("A", self.activation_format), ("G", self.gradient_format)]
        if self.weight_format and self.weight_format == self.activation_format and not self.gradient_format:
            named = [("W, A", self.weight_format)]
        named += [("KV", self.kv_cache_format), ("attention", self.attention_format)]
        return ", ".join(f"{what} {name}" for what, name in named if name)

    @property
    def line(self) -> str:
        """The settings that matter, on one line."""
        parts = [
            self.algorithm,
            f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}",
            self.lora,
            self.formats,
            f"high precision: {self.keep}" if self.keep else "",
            f"{_percent(self.matmul_noise)} matmul noise" if self.matmul_noise else "",
            self.other_hardware,
            f"AQN {self.aqn}" if self.aqn else "",
            f"SRDD {self.srdd}" if self.srdd else "",
            f"ratio {self.ratio}",
            self.other,
        ]
        return " · ".join(part for part in parts if part)


def settings_in_words(experiment: Experiment, profile: Profile | None) -> SettingsInWords:
    """The settings of an experiment under a profile, which is None if it is not known because there is no run."""
    precision, algorithm = experiment.hardware.precision, experiment.algorithm
    lora = experiment.lora
    keep = precision.keep
    return SettingsInWords(
        algorithm=algorithm.name,
        epochs=experiment.epochs,
        lora=f"LoRA rank {lora.rank}" if lora else "",
        weight_format=precision.weight or "",
        activation_format=precision.activation or "",
        gradient_format=_gradient(precision),
        kv_cache_format=precision.kv_cache or "",
        attention_format=precision.attention or "",
        keep=keep if isinstance(keep, str) else _layers(keep) if keep else "",
        matmul_noise=experiment.hardware.matmul_noise.relative_std,
        other_hardware=_other(experiment.hardware),
        aqn=_aqn(experiment.aqn) if experiment.aqn else "",
        sigma=_sigma(experiment.aqn) if experiment.aqn else "",
        aqn_layers=experiment.aqn.layers if experiment.aqn else "",
        srdd=_srdd(experiment),
        ratio=algorithm.ratio,
        other=_rest(experiment),
        profile=profile.name if profile else "",
        model=profile.model if profile else "",
        task=profile.task.name if profile else "",
    )


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _gradient(precision: Precision) -> str:
    if precision.gradient is None:
        return ""
    extras = ["stochastic"] if precision.gradient_rounding == "stochastic" else []
    extras += ["Hadamard on dW"] if precision.hadamard == "dw" else []
    return precision.gradient + (f" ({', '.join(extras)})" if extras else "")


def _rest(experiment: Experiment) -> str:
    """The settings without words of their own that differ from a default, such as `algorithm.group_size 8`."""
    name = experiment.algorithm.name
    known = name in ALGORITHMS  # an algorithm of the user's own has no default group size
    own = Algorithm.model_validate({"name": name}) if known else Algorithm.model_construct(name=name, group_size=0)
    default = Experiment.model_construct(id=experiment.id, algorithm=own)
    plain = flatten(default.model_dump(mode="json"))
    tables: tuple[tuple[str, Settings | None], ...] = (
        ("aqn", experiment.aqn),
        ("srdd", experiment.srdd),
        ("lora", experiment.lora),
        ("algorithm.correction", experiment.algorithm.correction),
    )
    for name, part in tables:
        if part is not None:
            fields = type(part).model_fields
            defaults = type(part).model_construct().model_dump(mode="json")
            plain |= {f"{name}.{key}": defaults[key] for key, field in fields.items() if not field.is_required()}
    mine = flatten(experiment.model_dump(mode="json", exclude=NAMES_ONLY["experiment"]))
    constant = experiment.aqn is not None and experiment.aqn.schedule == "constant"
    return ", ".join(
        f"{path} {_shown(value)}"
        for path, value in mine.items()
        if value != plain.get(path)
        and not any(path == other or path.startswith(f"{other}.") for other in IN_WORDS)
        and not (path == "aqn.sigma_end" and not constant)
    )


def _shown(value: Any) -> str:
    """A value as text, with as many digits as it has."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "[" + ", ".join(map(_shown, value)) + "]" if isinstance(value, list) else str(value)


def _sigma(aqn: AQN) -> str:
    start, end = _shown(aqn.sigma_start), _shown(aqn.sigma_end)
    return start if aqn.schedule == "constant" else f"{start} → {end}"


def _aqn(aqn: AQN) -> str:
    extras = [
        f"{aqn.schedule} schedule",
        "" if aqn.layers == "all" else f"{aqn.layers} layers",
        "" if aqn.noise == "absolute" else "relative",
        "" if aqn.target == "rmsnorm" else f"on {aqn.target}",
    ]
    return ", ".join([_sigma(aqn), *(extra for extra in extras if extra)])


def _srdd(experiment: Experiment) -> str:
    if not experiment.needs_scan:
        return ""
    layers = experiment.aqn.layers if experiment.aqn else "all"
    kept = "layers kept" if isinstance(experiment.hardware.precision.keep, str) else ""
    uses = [use for use in ("" if layers == "all" else layers, kept) if use]
    return f"{', '.join(uses)} by {(experiment.srdd or SRDD()).metric}"


def _other(hardware: Hardware) -> str:
    noise, zone = hardware.matmul_noise, hardware.deadzone
    parts = []
    if noise.relative_std and not (noise.forward and noise.backward):
        parts.append(f"noise {'forward' if noise.forward else 'backward'} only")
    if noise.relative_std and not noise.attention:
        parts.append("no noise in attention")
    parts += noise.other_errors
    if hardware.accumulator:
        parts.append(hardware.accumulator.in_words)
    if zone:
        parts.append(f"deadzone {_percent(zone.threshold)} in {_layers(zone.layers)}")
    for fault in hardware.faults:
        details = [f"amount {_shown(fault.amount)}"]
        details += [f"module {fault.module}"] if fault.module else []
        details += [f"share {_shown(fault.share)}"] if fault.share != 1 else []
        details += [f"bit {fault.bit}"] if fault.kind == "bitflip" else []
        parts.append(f"{fault.kind} fault in layer {fault.layer} ({', '.join(details)})")
    return ", ".join([*parts, *rules_in_words(hardware), *phases_in_words(hardware)])


def _percent(fraction: float) -> str:
    """The fraction in percent, such as `5 %`, with enough digits to tell it from every other fraction."""
    short = f"{100 * fraction:g}"
    return f"{short} %" if round(float(short) / 100, 15) == round(fraction, 15) else f"{100 * fraction!r} %"
