"""Sweeps: every combination of several values of some settings, together with the declared baselines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from roundoff.config import ConfigError, Experiment, Profile, result_hash
from roundoff.experiments.registry import load_experiment, with_overrides

OPENING, CLOSING = "[{(", "]})"
"""Brackets inside which a comma does not separate two values."""


def variants(
    experiments: Sequence[Experiment], profile: Profile, assignments: Sequence[str]
) -> list[tuple[Experiment, Profile]]:
    """The experiments and profiles to run for `assignments` such as `aqn.sigma_start=0.01,0.05`.

    There is one for each combination of the values; its id (or the name of its profile) says what varies. A baseline
    that is not among the experiments is added as it is declared, under each profile, so that the variants can be
    compared with it.

    Raises:
        ConfigError: if an assignment is malformed, changes no experiment or gives a wrong value, if nothing varies, or
            if a value is given twice.
    """
    choices = [_choices(text) for text in assignments]
    if all(len(values) == 1 for values in choices):
        raise ConfigError("a sweep needs a setting with several values, such as --set aqn.sigma_start=0.01,0.05")
    by_name: dict[tuple[str, str], tuple[Experiment, Profile]] = {}
    for combination in product(*choices):
        changed, scale = with_overrides(experiments, profile, combination)
        named = {experiment.id for experiment in (*experiments, *changed)}
        baselines = dict.fromkeys(e.baseline for e in changed if e.baseline and e.baseline not in named)
        varied = [text for text, values in zip(combination, choices, strict=True) if len(values) > 1]
        of_profile = [text for text in varied if text.lstrip().startswith("profile.")]
        for experiment in (load_experiment(name) for name in baselines):
            by_name.setdefault((experiment.id, scale.name), (_titled(experiment, experiment, of_profile), scale))
        for declared, experiment in zip(experiments, changed, strict=True):
            shown = of_profile if experiment.id == declared.id else varied
            kept = by_name.setdefault((experiment.id, scale.name), (_titled(experiment, declared, shown), scale))
            if result_hash(*kept) != result_hash(experiment, scale):
                raise ConfigError(
                    f"two variants would both be called {experiment.id!r} with profile {scale.name!r}, because their "
                    "values differ only in spaces or slashes: declare them in files of your own"
                )
    return list(by_name.values())


def _titled(experiment: Experiment, declared: Experiment, varied: Sequence[str]) -> Experiment:
    """The experiment with its declared title and the settings that vary, but not those that all variants share."""
    pairs = [text.partition("=") for text in varied]
    settings = ", ".join(f"{path.strip().rpartition('.')[2]}={value}" for path, _, value in pairs)
    return experiment.model_copy(update={"title": declared.title + (f" ({settings})" if settings else "")})


def _choices(text: str) -> list[str]:
    """One assignment for each value of `path=value,value`; a comma inside brackets or quotes belongs to a value."""
    path, equals, values = text.partition("=")
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in OPENING) - (character in CLOSING)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if quote or depth:
        raise ConfigError(f"--set {path} must close its brackets and quotation marks, but is {values!r}")
    stripped = [part.strip() for part in parts]
    if len(set(stripped)) < len(stripped) or (len(stripped) > 1 and not all(stripped)):
        raise ConfigError(f"--set {path} must give each value once and leave none empty, but is {values!r}")
    return [f"{path}{equals}{part}" for part in stripped]
