"""What of a chip cannot be simulated in vLLM, from the settings alone.

`roundoff verl-config` and the trainer ask here, so that they refuse before any process starts what vLLM's workers would
refuse. The weights that vLLM holds are `Q(W)` from one weight sync to the next, so evaluation must have the weight
formats of rollouts. This module does not import torch.
"""

from __future__ import annotations

from roundoff.config import ConfigError, Hardware, Phase, pattern_matches

SAMPLED: tuple[Phase, ...] = ("rollout", "evaluation")
"""The phases that vLLM computes."""


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
    if any(v.matmul_noise.relative_std and v.matmul_noise.forward and v.matmul_noise.attention for v in variants):
        raise ConfigError(
            f"{path}matmul_noise.attention = true cannot be simulated in vLLM's attention kernels: add "
            f"--set {path}matmul_noise.attention=false"
        )
    if any(v.deadzone is not None or v.faults for v in variants):
        raise ConfigError(
            f"{path}deadzone and {path}faults are not simulated in vLLM: leave them out, or "
            'write deadzone = "none" and faults = [] in [hardware.rollout]'
        )
    if not any(pattern_matches(pattern, "lm_head") for pattern in hardware.exclude):
        raise ConfigError(f"{path}exclude leaves lm_head on the hardware, which is not simulated in vLLM: exclude it")


def _weights(hardware: Hardware) -> object:
    """Everything that decides the weight formats of one phase; equal for equal formats, and often only then."""
    if not hardware.quantizes_weights:
        return None
    changes = [(r.match, getattr(r.precision, "weight", r.precision)) for r in hardware.rules if r.precision]
    precision = hardware.precision
    return precision.weight, precision.keep, hardware.exclude, [change for change in changes if change[1] is not None]
