"""Will RL fine-tuning of a language model survive the arithmetic of its chip, and does a remedy help?

Every public name can be imported from here; a module is loaded when a name of it is first used, so that
`import roundoff` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
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
    "RoundoffError": "roundoff.errors",
    "RoundoffWarning": "roundoff.errors",
    "load_experiment": "roundoff.experiments",
    "load_profile": "roundoff.experiments",
    "FORMATS": "roundoff.formats.table",
    "Format": "roundoff.formats.table",
    "quantize": "roundoff.numerics.quantize",
    "matmul_noise": "roundoff.numerics.noise",
    "Key": "roundoff.numerics.rng",
    "TASKS": "roundoff.tasks",
    "Problem": "roundoff.tasks",
    "Task": "roundoff.tasks",
    "aqn_sigma": "roundoff.aqn.schedule",
    "group_advantages": "roundoff.training.advantage",
    "policy_loss": "roundoff.training.loss",
    "load_model": "roundoff.models.load",
    "install": "roundoff.hardware",
    "hardware_off": "roundoff.hardware",
    "hardware_phase": "roundoff.hardware",
    "noise_key": "roundoff.hardware",
    "aqn_noise": "roundoff.aqn.noise",
    "SRDD": "roundoff.config",
    "LayerScan": "roundoff.srdd",
    "calibration_batches": "roundoff.models.calibration",
    "find_faults": "roundoff.srdd",
    "resolve_keep": "roundoff.srdd",
    "scan": "roundoff.srdd",
    "sample": "roundoff.sampling.sampler",
    "token_logprobs": "roundoff.models.logprobs",
    "Rollouts": "roundoff.sampling.rollouts",
    "evaluate": "roundoff.evaluation",
    "train": "roundoff.training.loop",
    "Evaluation": "roundoff.runs.outcomes",
    "Run": "roundoff.runs.record",
    "RunDirectory": "roundoff.runs.directory",
    "read_run": "roundoff.runs.record",
    "find_runs": "roundoff.runs.record",
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


def __dir__() -> list[str]:
    return sorted(__all__)
