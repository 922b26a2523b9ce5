"""Settings of an experiment in the words of a table; empty text where it sets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from roundoff.config import AQN, Experiment, Hardware, Profile


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
    aqn_layers: str
    ratio: str
    profile: str
    model: str
    task: str

    @property
    def line(self) -> str:
        """The settings that matter on one line."""
        formats = f"W {self.weight_format or '–'} / A {self.activation_format or '–'}"
        parts = [
            self.algorithm,
            f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}",
            self.lora,
            formats if self.weight_format or self.activation_format else "",
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
        aqn_layers=experiment.aqn.layers if experiment.aqn else "",
        ratio=algorithm.ratio,
        profile=profile.name if profile else "",
        model=profile.model if profile else "",
        task=profile.task.name if profile else "",
    )


def _aqn(aqn: AQN) -> str:
    falls = f"{aqn.sigma_start:g}" if aqn.schedule == "constant" else f"{aqn.sigma_start:g} → {aqn.sigma_end:g}"
    extras = [
        f"{aqn.schedule} schedule",
        "" if aqn.layers == "all" else f"{aqn.layers} layers",
        "" if aqn.noise == "absolute" else "relative",
        "" if aqn.target == "rmsnorm" else f"on {aqn.target}",
    ]
    return ", ".join([falls, *(extra for extra in extras if extra)])


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
