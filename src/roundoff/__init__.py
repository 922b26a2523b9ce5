"""Will RL fine-tuning of a language model survive the arithmetic of its chip, and does a remedy help?

Every public name can be imported from here; a module is loaded when a name of it is first used, so that
`import roundoff` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AQN": "roundoff.config",
    "Algorithm": "roundoff.config",
    "ConfigError": "roundoff.config",
    "Experiment": "roundoff.config",
    "Hardware": "roundoff.config",
    "MatmulNoise": "roundoff.config",
    "Precision": "roundoff.config",
    "Profile": "roundoff.config",
    "load_experiment": "roundoff.experiments",
    "load_profile": "roundoff.experiments",
    "FORMATS": "roundoff.numerics.formats",
    "Format": "roundoff.numerics.formats",
    "quantize": "roundoff.numerics.quantize",
    "matmul_noise": "roundoff.numerics.noise",
    "Key": "roundoff.numerics.rng",
    "TASKS": "roundoff.tasks",
    "Problem": "roundoff.tasks",
    "Task": "roundoff.tasks",
    "aqn_sigma": "roundoff.algorithms.schedule",
    "group_advantages": "roundoff.algorithms.advantage",
    "policy_loss": "roundoff.algorithms.loss",
    "load_model": "roundoff.models.load",
    "install": "roundoff.hardware.install",
    "hardware_off": "roundoff.hardware.install",
    "noise_key": "roundoff.hardware.install",
    "aqn_noise": "roundoff.aqn",
    "SRDD": "roundoff.config",
    "LayerScan": "roundoff.srdd",
    "calibration_batches": "roundoff.srdd",
    "find_faults": "roundoff.srdd",
    "resolve_keep": "roundoff.srdd",
    "scan": "roundoff.srdd",
    "sample": "roundoff.sampler",
    "token_logprobs": "roundoff.logprobs",
    "Rollouts": "roundoff.rollouts",
    "evaluate": "roundoff.evaluate",
    "train": "roundoff.train",
    "Evaluation": "roundoff.run_dir",
    "Run": "roundoff.run_dir",
    "RunDirectory": "roundoff.run_dir",
    "read_run": "roundoff.run_dir",
    "find_runs": "roundoff.run_dir",
    "TRACKERS": "roundoff.trackers",
    "compare": "roundoff.report.compare",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'roundoff' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `roundoff.train` and `roundoff.evaluate` the functions: importing their modules does not replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
