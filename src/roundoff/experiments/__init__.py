"""The declared table of experiments and profiles, one TOML file each; reading it never imports torch."""

from roundoff.experiments.registry import (
    experiment_ids,
    families,
    load_experiment,
    load_profile,
    profile_names,
    select,
    with_overrides,
)

__all__ = [
    "experiment_ids",
    "families",
    "load_experiment",
    "load_profile",
    "profile_names",
    "select",
    "with_overrides",
]
