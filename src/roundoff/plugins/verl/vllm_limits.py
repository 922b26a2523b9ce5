"""What of a chip cannot be simulated in vLLM, from the settings alone.

`roundoff verl-config` and the trainer ask here, so that they refuse before any process starts what vLLM's workers would
refuse. The weights that vLLM holds are `Q(W)` from one weight sync to the next, so evaluation must have the weight
formats of rollouts. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from roundoff.config import ConfigError, Hardware, HardwareOfAPhase, Phase, pattern_matches

SAMPLED: tuple[Phase, ...] = ("rollout", "evaluation")
"""The phases that vLLM computes."""
SIMULATED = {
    "": ("precision", "matmul_noise", "exclude", "rules"),
    "precision": ("weight", "activation", "keep", "gradient", "gradient_rounding", "hadamard"),
    "matmul_noise": ("relative_std", "forward", "backward", "attention"),
}
"""Settings by table that `vllm_worker` carries out, and those of the backward pass, which vLLM never computes. All
others are refused, so that a new setting is not left out unnoticed."""


def check_vllm(hardware: Hardware) -> None:
    """Refuse hardware that cannot be simulated in vLLM; the hardware of training plays no part.

    Raises:
        ConfigError: naming the setting and what to write instead.
    """
    for phase in SAMPLED:
        if not hardware.of(phase).changes_nothing:
            _check_phase(hardware.of(phase), f"hardware.{phase}." if hardware.has_phases else "hardware.")
    if _weights(hardware.of("evaluation")) != _weights(hardware.of("rollout")):
        raise ConfigError(
            "hardware.evaluation has other weights than hardware.rollout (precision.weight, precision.keep, exclude or "
            "a rule), but vLLM holds the quantized weights of one phase: give both the same, or evaluate a checkpoint "
            "by `roundoff eval`"
        )


def _check_phase(hardware: Hardware, path: str) -> None:
    variants = hardware.variants()
    if any(variant.matmul_noise.attention_std and variant.matmul_noise.forward for variant in variants):
        raise ConfigError(
            f"{path}matmul_noise.attention = true cannot be simulated in vLLM's attention kernels: add "
            f"--set {path}matmul_noise.attention=false"
        )
    unknown = sorted({name for variant in variants for name in _not_simulated(variant)})
    if unknown:
        raise ConfigError(
            f"{path}{unknown[0]} is not simulated in vLLM: leave it out, or put it back to its default in "
            "[hardware.rollout]"
        )
    if not any(pattern_matches(pattern, "lm_head") for pattern in hardware.exclude):
        raise ConfigError(f"{path}exclude leaves lm_head on the hardware, which is not simulated in vLLM: exclude it")


def _not_simulated(hardware: HardwareOfAPhase) -> Iterator[str]:
    """Paths of the settings that are not their defaults and not among those that are simulated."""
    plain = HardwareOfAPhase()
    for table, known in SIMULATED.items():
        here, default = (getattr(one, table) if table else one for one in (hardware, plain))
        for name in type(default).model_fields:
            if name not in known and getattr(here, name) != getattr(default, name):
                yield f"{table}.{name}".removeprefix(".")


def _weights(hardware: Hardware) -> object:
    """Everything that decides the weight formats of one phase; equal for equal formats, and often only then."""
    if not hardware.quantizes_weights:
        return None
    changes = [(r.match, getattr(r.precision, "weight", r.precision)) for r in hardware.rules if r.precision]
    precision = hardware.precision
    return precision.weight, precision.keep, hardware.exclude, [change for change in changes if change[1] is not None]
