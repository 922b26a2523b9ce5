"""The declared experiments and profiles, one TOML file each, and how names, files and `--set` select among them.

What a setting means and which values it takes is in `roundoff.config`; running an experiment is in `roundoff.launch`.
Reading this table never imports torch.

Doors: the names below (`select`, the functions that load, `with_overrides`, `variants`, the lists of names,
`reference_scores` and `evidence`). They are all in `__all__`.
"""

from roundoff.experiments.evidence import Evidence, evidence
from roundoff.experiments.files import experiment_ids, families, profile_names, recipe_names
from roundoff.experiments.reference import Reference, reference_scores
from roundoff.experiments.registry import (
    families_named,
    load_experiment,
    load_profile,
    load_recipe,
    select,
    with_overrides,
)
from roundoff.experiments.sweep import variants

__all__ = [
    "Evidence",
    "Reference",
    "evidence",
    "experiment_ids",
    "families",
    "families_named",
    "load_experiment",
    "load_profile",
    "load_recipe",
    "profile_names",
    "recipe_names",
    "reference_scores",
    "select",
    "variants",
    "with_overrides",
]
