"""Settings of an experiment in the words of a table; empty text where it sets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from roundoff.config import AQN, SRDD, Experiment, Hardware, Profile


@dataclass(frozen=True)
class Settings:
    """What an experiment sets, in words for a table; empty where it sets nothing."""

    algorithm: str
    epochs: int
    lora: str
    weight_format: str
    activation_format: str
    keep: str
    matmul_noise: float
    """`relative_std` (fraction)."""
    other_hardware: str
    aqn: str
    sigma: str
    """First and last sigma of AQN, such as `0.05 → 0.0005`."""
    aqn_layers: str
    srdd: str
    """What the SRDD scan is used for, and how it ranks."""
    ratio: str
    profile: str
    model: str
    task: str

    @property
    def formats(self) -> str:
        """Formats of weights (W) and activations (A), such as `W mxfp4` or `W, A mxfp4`; empty without any."""
        if self.weight_format and self.weight_format == self.activation_format:
            return f"W, A {self.weight_format}"
        named = (("W", self.weight_format), ("A", self.activation_format))
        return ", ".join(f"{what} {name}" for what, name in named if name)

    @property
    def line(self) -> str:
        """The settings that matter on one line."""
        parts = [
            self.algorithm,
            f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}",
            self.lora,
            self.formats,
            f"high precision: {self.keep}" if self.keep else "",
            f"{100 * self.matmul_noise:g} % matmul noise" if self.matmul_noise else "",
            self.other_hardware,
            f"AQN {self.aqn}" if self.aqn else "",
        ]
        return " · ".join(part for part in parts if part)


def settings_in_words(experiment: Experiment, profile: Profile | None) -> Settings:
    """Settings of an experiment under a profile (None: not known, for it has no run)."""
    precision, algorithm = experiment.hardware.precision, experiment.algorithm
    lora = experiment.lora
    keep = precision.keep
    return Settings(
        algorithm=algorithm.name,
        epochs=experiment.epochs,
        lora=f"LoRA rank {lora.rank}" if lora else "",
        weight_format=precision.weight or "",
        activation_format=precision.activation or "",
        keep=keep if isinstance(keep, str) else f"layers {', '.join(map(str, keep))}" if keep else "",
        matmul_noise=experiment.hardware.matmul_noise.relative_std,
        other_hardware=_other(experiment.hardware),
        aqn=_aqn(experiment.aqn) if experiment.aqn else "",
        sigma=_sigma(experiment.aqn) if experiment.aqn else "",
        aqn_layers=experiment.aqn.layers if experiment.aqn else "",
        srdd=_srdd(experiment),
        ratio=algorithm.ratio,
        profile=profile.name if profile else "",
        model=profile.model if profile else "",
        task=profile.task.name if profile else "",
    )


def _sigma(aqn: AQN) -> str:
    return f"{aqn.sigma_start:g}" if aqn.schedule == "constant" else f"{aqn.sigma_start:g} → {aqn.sigma_end:g}"


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
    if zone:
        parts.append(f"deadzone {100 * zone.threshold:g} % in layers {', '.join(map(str, zone.layers))}")
    parts += [f"{fault.kind} fault in layer {fault.layer}" for fault in hardware.faults]
    return ", ".join(parts)
