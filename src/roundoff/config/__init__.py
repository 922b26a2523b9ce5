"""Frozen settings of an experiment (*what* is run) and of a profile (*how big* it is), and their error messages.

Every setting is checked before any weight is loaded. An error names the full path of the setting, the rule, the value
and, for an unknown key, the nearest known one. This package imports neither torch nor any other part of roundoff.
The declared experiments and the code that reads TOML files live in `roundoff.experiments`; the settings of a task
belong to `roundoff.tasks`.

Doors: everything that this module exports.
"""

from roundoff.config.algorithm import ALGORITHMS, Algorithm
from roundoff.config.arithmetic import Accumulator
from roundoff.config.base import TEMPERATURE_RULE, ConfigError, Count, Settings, is_temperature, nearest, validate
from roundoff.config.changes import first_line
from roundoff.config.correction import REJECTIONS, Rejection, RolloutCorrection
from roundoff.config.experiment import NAMES_ONLY, Experiment, result_hash
from roundoff.config.hardware import (
    FORMAT_NAMES,
    PLAIN_FORMAT_NAMES,
    Deadzone,
    Fault,
    MatmulNoise,
    Precision,
    activation_format,
    known_format,
)
from roundoff.config.in_force import learning_rate, steps_per_epoch, training_in_force
from roundoff.config.phases import PHASES, Hardware, HardwareOfAPhase, Phase
from roundoff.config.profile import Profile, Task, Training, with_paths
from roundoff.config.remedies import AQN, SRDD, LoRA
from roundoff.config.rules import Rule, pattern_matches
from roundoff.config.words import differences, flatten, hardware_in_words, phases_in_words, rules_in_words

__all__ = [
    "ALGORITHMS",
    "AQN",
    "FORMAT_NAMES",
    "NAMES_ONLY",
    "PHASES",
    "PLAIN_FORMAT_NAMES",
    "REJECTIONS",
    "SRDD",
    "TEMPERATURE_RULE",
    "Accumulator",
    "Algorithm",
    "ConfigError",
    "Count",
    "Deadzone",
    "Experiment",
    "Fault",
    "Hardware",
    "HardwareOfAPhase",
    "LoRA",
    "MatmulNoise",
    "Phase",
    "Precision",
    "Profile",
    "Rejection",
    "RolloutCorrection",
    "Rule",
    "Settings",
    "Task",
    "Training",
    "activation_format",
    "differences",
    "first_line",
    "flatten",
    "hardware_in_words",
    "is_temperature",
    "known_format",
    "learning_rate",
    "nearest",
    "pattern_matches",
    "phases_in_words",
    "result_hash",
    "rules_in_words",
    "steps_per_epoch",
    "training_in_force",
    "validate",
    "with_paths",
]
