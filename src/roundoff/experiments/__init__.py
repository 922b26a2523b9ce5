"""The declared table of experiments and profiles, one TOML file each; reading it never imports torch."""

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
