"""The perturbed model: `install`, `uninstall`, `hardware_off`, `noise_key`."""

from roundoff.hardware.draw import POSITIONS
from roundoff.hardware.install import install, uninstall
from roundoff.hardware.installed import InstalledHardware, hardware_off, installed, noise_key
from roundoff.hardware.inventory import Entry, Skipped

__all__ = [
    "POSITIONS",
    "Entry",
    "InstalledHardware",
    "Skipped",
    "hardware_off",
    "install",
    "installed",
    "noise_key",
    "uninstall",
]
