"""Simulated hardware on a model: what installs it, switches it, and computes each product on it.

The arithmetic of one tensor (formats, noise, keys) lives in `roundoff.numerics`, loading a model and a pass through it
in `roundoff.models`, and the scan for sensitive layers in `roundoff.srdd`.

Doors: everything that this module exports; `inventory.plain_name`, `inventory.layer_index`, `inventory.exclusion`,
`inventory.kept_layers` and `inventory.check_rules` for names of modules; `linear.HardwareLinear`, `experts.PROJECTIONS`
and `experts.is_experts` to recognize modules; `installed.required`, `attention`, `attention_formats.AttentionFormats`
and `freshness.bit_sums`.
"""

from roundoff.hardware.contexts import hardware_off, hardware_phase, noise_key, plain_arithmetic, rollout_phase
from roundoff.hardware.install import install, install_adapters, surveys, uninstall
from roundoff.hardware.installed import InstalledHardware, installed
from roundoff.hardware.inventory import Entry, Skipped
from roundoff.hardware.row_ids import POSITIONS

__all__ = [
    "POSITIONS",
    "Entry",
    "InstalledHardware",
    "Skipped",
    "hardware_off",
    "hardware_phase",
    "install",
    "install_adapters",
    "installed",
    "noise_key",
    "plain_arithmetic",
    "rollout_phase",
    "surveys",
    "uninstall",
]
