"""The declared experiments and profiles, one TOML file each, and how names, files and `--set` select among them.

What a setting means and which values it takes is in `roundoff.config`; running an experiment is in `roundoff.launch`.
Reading this table never imports torch.

Doors: the names below (`select`, `load_experiment`, `load_profile`, `with_overrides`, `variants`, the lists of names,
and `reference_scores`). They are all in `__all__`.
"""

from roundoff.experiments.reference import Reference, reference_scores
from roundoff.experiments.registry import (
    experiment_ids,
    families,
    families_named,
    load_experiment,
    load_profile,
    profile_names,
    select,
    with_overrides,
)
from roundoff.experiments.sweep import variants

__all__ = [
    "Reference",
    "experiment_ids",
    "families",
    "families_named",
    "load_experiment",
    "load_profile",
    "profile_names",
    "reference_scores",
    "select",
    "variants",
    "with_overrides",
]
