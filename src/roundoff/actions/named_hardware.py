"""Hardware by the name that a user gives it, as `roundoff eval --hardware` and `roundoff scan --hardware` take it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from roundoff.config import FORMAT_NAMES, PLAIN_FORMAT_NAMES, ConfigError, Hardware, nearest, validate
from roundoff.experiments import experiment_ids, load_experiment, load_recipe, recipe_names

PLAIN = "none"
"""Name of the hardware that changes nothing."""


def load_hardware(name: str) -> Hardware:
    """The hardware of an experiment (packaged or a TOML file), a TOML file of its own, a recipe, a format, or `none`.

    The name of a format means that of weights and activations, as in `roundoff scan --format`.

    Raises:
        ConfigError: if there is none of that name, or a setting is wrong.
    """
    if name == PLAIN:
        return Hardware()
    if name in FORMAT_NAMES or (name.count("/") == 2 and not Path(name).exists()):
        return validate(Hardware, {"precision": {"weight": name, "activation": name}}, source="--hardware")
    if name in recipe_names():
        return load_recipe(name).hardware
    path = Path(name)
    if name.endswith(".toml") and path.is_file():
        try:
            content = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: is not TOML: {error}") from None
        if "extends" not in content and "algorithm" not in content:
            beside = [key for key in content if key in Hardware.model_fields]
            if "hardware" in content and beside:
                raise ConfigError(f"{name}: {', '.join(beside)} must be inside [hardware], not beside it")
            return validate(Hardware, content.get("hardware", content), source=name)
    if path.suffix != ".toml" and name not in experiment_ids():
        known = (PLAIN, *FORMAT_NAMES, *recipe_names(), *experiment_ids())
        raise ConfigError(
            f"--hardware must be {PLAIN!r}, a format for weights and activations ({PLAIN_FORMAT_NAMES}; "
            f"or one of your own as element/block/scale, such as 'e2m1/16/e8m0:ceil'), a recipe "
            f"({', '.join(recipe_names())}), the id of an experiment (`roundoff list` shows all) or a TOML file, "
            f"but is {name!r}{nearest(name, known)}"
        )
    return load_experiment(name).hardware
