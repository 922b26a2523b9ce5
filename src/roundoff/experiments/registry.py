"""Loads and checks experiments, profiles and recipes, selects them by name, and replaces settings by `--set`.

The family of a packaged experiment is its folder. A user's own file belongs to the family of what it extends (`files`),
unless it names another.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundoff.config import (
    ALGORITHMS,
    FORMAT_NAMES,
    PHASES,
    Algorithm,
    ConfigError,
    Experiment,
    Hardware,
    Profile,
    Settings,
    nearest,
    validate,
)
from roundoff.experiments.files import (
    TABLE,
    experiment_ids,
    families,
    files,
    merge,
    merged,
    profile_names,
    recipe_names,
    shown,
)
from roundoff.experiments.places import placed

Assignment = tuple[list[str], Any]
"""Path of a setting, and its value."""
LONGEST_LABEL = 160
"""Maximum number of bytes that changed settings append to a name, because the name becomes that of a directory."""
TREES: dict[str, type[Settings]] = {"": Experiment, "profile.": Profile}
"""Models of the settings that `--set` can change, by the beginning of their path."""
OPTIONAL_TABLES = ("aqn", "srdd", "lora")
"""Tables that an experiment may lack; `--set` inside one leaves experiments without it unchanged."""


def load_experiment(name: str) -> Experiment:
    """The experiment with this packaged id, or that of this TOML file.

    Raises:
        ConfigError: if there is no such experiment or file, or a setting is wrong.
    """
    path = _find(name, experiment_ids(), "experiment")
    content = {"id": path.stem, **merged(path)}
    _check_kind(name, "experiment", content)
    if path.parent.parent == TABLE:
        content["family"] = path.parent.name
    return validate(Experiment, content, source=shown(path))


def load_profile(name: str) -> Profile:
    """The profile with this packaged name, or that of this TOML file.

    Raises:
        ConfigError: if there is no such profile or file, or a setting is wrong.
    """
    names = profile_names()
    path = files()[f"profiles/{name}"] if name in names else _find(name, names, "profile")
    content = {"name": path.stem, **merged(path)}
    _check_kind(name, "profile", content)
    return validate(Profile, content, source=shown(path))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A packaged recipe: hardware, and the remedies that belong to it."""

    title: str
    hardware: Hardware
    tables: dict[str, Any]
    """Its tables as they are written: `hardware`, and possibly `aqn` and `lora`."""


def load_recipe(name: str) -> Recipe:
    """The packaged recipe with this name.

    Raises:
        ConfigError: if there is no recipe of that name.
    """
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}{nearest(name, recipe_names())} ({', '.join(recipe_names())})")
    path = files()[f"recipes/{name}"]
    content = merged(path)
    hardware = validate(Hardware, content["hardware"], source=shown(path), within="hardware.")
    return Recipe(content.pop("title"), hardware, content)


def families_named(names: Sequence[str]) -> list[str]:
    """The names themselves, after checking that each is a family.

    Raises:
        ConfigError: if one is not a family; the message suggests the nearest.
    """
    known = families()
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no family {name!r}{nearest(name, tuple(known))} ({', '.join(known)})")
    return list(names)


def select(names: Sequence[str], *, everything: bool = False) -> list[Experiment]:
    """The experiments that ids, families and TOML files stand for, in order and each once.

    Args:
        names: ids, families and paths of TOML files.
        everything: whether to add all packaged experiments.

    Raises:
        ConfigError: if a name is none of these (the message suggests the nearest), or nothing is named.
    """
    known = families()
    if not names and not everything:
        raise ConfigError(
            f"name an experiment, a family ({', '.join(known)}) or a TOML file; `roundoff list` shows all"
        )
    ids = [name for entry in names for name in known.get(entry, (entry,))]
    ids += experiment_ids() if everything else ()
    return [load_experiment(name) for name in dict.fromkeys(ids)]


def with_overrides(
    experiments: Sequence[Experiment], profile: Profile, assignments: Sequence[str]
) -> tuple[list[Experiment], Profile]:
    """The experiments and the profile with settings such as `hardware.matmul_noise.relative_std=0.2` replaced.

    The path of a profile's setting begins with `profile.`. An experiment without `[aqn]` (or `[lora]`) is not changed
    by an assignment inside that table. Each changed experiment gets a new id that names its changes, a baseline that
    changes as well is referred to by its new id, and a changed profile gets a new name, so that results under different
    settings are never mixed.

    Args:
        experiments: the experiments to change.
        profile: the profile to change.
        assignments: texts such as `aqn.sigma_start=0.02`.

    Raises:
        ConfigError: if an assignment is malformed, changes no experiment, or gives a wrong value.
    """
    parsed = [_parse_assignment(text) for text in assignments]
    of_profile = [(keys[1:], value) for keys, value in parsed if keys[0] == "profile"]
    of_experiments = [(keys, value) for keys, value in parsed if keys[0] != "profile"]
    changes = placed(_nested(of_profile, {}), Path.cwd(), profile.model_dump())
    content = merge(profile.model_dump(exclude_none=True), changes)
    scale = validate(Profile, content, source="--set", within="profile.", trees=TREES)
    if scale != profile and scale.name == profile.name:
        scale = scale.model_copy(update={"name": f"{profile.name}+{_label(of_profile)}"})
    renamed: dict[str, str] = {}
    changed: list[Experiment] = []
    used: set[str] = set()
    for experiment in experiments:
        new, touching = _overridden(experiment, of_experiments)
        used |= {".".join(keys) for keys, _ in touching}
        if new != experiment:
            label = _label(touching)
            renamed[experiment.id] = f"{experiment.id}+{label}"
            new = new.model_copy(update={"title": f"{new.title} ({label})" if new.title else ""})
        changed.append(new)
    for keys, _ in of_experiments:
        if ".".join(keys) not in used:
            raise ConfigError(f"--set {'.'.join(keys)} changes nothing: no experiment chosen has a table [{keys[0]}]")
    names = {e.id: renamed.get(e.id, e.id) for e in experiments}
    return [
        e.model_copy(update={"id": names[e.id], "baseline": names.get(e.baseline or "", e.baseline)}) for e in changed
    ], scale


def _overridden(experiment: Experiment, parsed: Sequence[Assignment]) -> tuple[Experiment, list[Assignment]]:
    """The experiment with the assignments that concern it, and those assignments; none is inside a table that it lacks.

    Assignments inside `[srdd]` count only if the other settings need a scan. Another `algorithm.name` brings the
    defaults of that name, over which the experiment's own settings stay in force.
    """
    others = [
        (keys, value)
        for keys, value in parsed
        if keys[0] != "srdd" and not (keys[0] in OPTIONAL_TABLES and getattr(experiment, keys[0]) is None)
    ]
    source = f"--set, {experiment.id}"
    content = _content(experiment, others)
    if any(keys == ["algorithm", "name"] for keys, _ in others):
        own = _own_settings(experiment.algorithm)
        content["algorithm"] = _nested([(keys[1:], value) for keys, value in others if keys[0] == "algorithm"], own)
    scan = content.pop("srdd", {})
    plain = validate(Experiment, content, source=source, trees=TREES)
    if not plain.needs_scan:
        return plain, others
    of_scan = [(keys, value) for keys, value in parsed if keys[0] == "srdd"]
    if not of_scan and experiment.srdd is None:
        return plain, others
    scanned = _nested(of_scan, {**content, "srdd": scan})
    return validate(Experiment, scanned, source=source, trees=TREES), [*others, *of_scan]


def _own_settings(algorithm: Algorithm) -> dict[str, Any]:
    """The settings of an algorithm that are not the defaults of its name."""
    settings = algorithm.model_dump()
    if algorithm.name not in ALGORITHMS:
        return settings
    named = Algorithm.model_validate({"name": algorithm.name}).model_dump()
    return {key: value for key, value in settings.items() if value != named[key]}


def _label(parsed: Sequence[Assignment]) -> str:
    """What assignments append to a name, such as `sigma_start=0.02`."""
    flat = [
        (name, inner)
        for keys, value in parsed
        for name, inner in (
            [(_phase_in(keys) + key, one) for key, one in value.items()]
            if isinstance(value, dict)
            else [(_phase_in(keys[:-1]) + keys[-1], value)]
        )
    ]
    label = ",".join(f"{name}={value}" for name, value in flat).replace("/", "_").replace(" ", "")
    printable = "".join(character if character.isprintable() and character != "\\" else "_" for character in label)
    if printable == label and len(label.encode()) <= LONGEST_LABEL:
        return label
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]  # tells two labels apart that are shown alike
    return printable.encode()[: LONGEST_LABEL - 9].decode(errors="ignore") + "~" + digest


def _phase_in(keys: Sequence[str]) -> str:
    """The phase of hardware that a path leads through, with a full stop; empty if it leads through none.

    A phase at the end of a path names itself, unless its settings are written as one table.
    """
    return f"{keys[1]}." if len(keys) > 1 and keys[0] == "hardware" and keys[1] in PHASES else ""


def _parse_assignment(text: str) -> Assignment:
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or keys == ["profile"]:
        raise ConfigError(f"--set must read path.to.setting=value, but is {text!r}")
    if keys == ["id"]:
        raise ConfigError(
            "--set id: a changed experiment gets an id that names its changes; to choose its id, declare it in a "
            "TOML file of your own"
        )
    if any("\ud800" <= character <= "\udfff" for character in raw) or "\0" in raw:
        raise ConfigError(f"--set {path.strip()} must be text in UTF-8 without null characters, but is {raw!r}")
    return keys, _value(raw)


def _value(raw: str) -> Any:
    """The value that TOML reads from the text, or the text itself if it is not one value that a setting can have.

    The text is read inside an array, so that a comment or a line break in it cannot hide the rest.
    """
    try:
        content = tomllib.loads(f"value = [{raw}, 0]")
    except (tomllib.TOMLDecodeError, RecursionError):
        return raw
    is_one_value = set(content) == {"value"} and len(content["value"]) == 2
    return content["value"][0] if is_one_value and _is_plain(content["value"][0]) else raw


def _is_plain(value: Any) -> bool:
    """Whether a value holds no date. No setting takes one, so text that looks like a date stays text."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | bool | int | float)


def _content(settings: Settings, parsed: Sequence[Assignment]) -> dict[str, Any]:
    """Settings as plain data with all values replaced, so that they can be checked together."""
    return _nested(parsed, settings.model_dump(exclude_none=True))


def _nested(parsed: Sequence[Assignment], content: dict[str, Any]) -> dict[str, Any]:
    """The content with the assignments merged over it, in order."""
    for keys, value in parsed:
        inner: Any = value
        for key in reversed(keys):
            inner = {key: inner}
        content = merge(content, inner)
    return content


def _find(name: str, known: tuple[str, ...], kind: str) -> Path:
    """The file of a packaged name or of a path; `kind` is the word for it in messages."""
    if name in known:
        return files()[name]
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"there is no file {name}")
        return path
    if name in recipe_names():
        raise ConfigError(
            f"{name} is a recipe of hardware: extend it in a file of your own "
            f'(extends = ["quickstart-clean", "{name}"], baseline = "quickstart-clean"), or give it to --hardware of '
            "`roundoff eval` and `scan`"
        )
    if name in FORMAT_NAMES:
        raise ConfigError(
            f"{name} is a number format: set hardware.precision in a file of your own, or give it to --hardware of "
            "`roundoff eval` and `scan`"
        )
    if name in (profile_names() if kind == "experiment" else experiment_ids()):
        raise ConfigError(_of_other_kind(name, kind))
    hint = nearest(name, (*known, *families()))
    raise ConfigError(f"there is no {kind} {name!r}{hint} (`roundoff list` shows all; a file name ends in .toml)")


def _check_kind(name: str, kind: str, content: Mapping[str, Any]) -> None:
    """Refuse a file of profile settings where an experiment is expected, and the reverse."""
    of_experiment, of_profile = (model.model_fields.keys() - {"id", "name", "title"} for model in (Experiment, Profile))
    expected, other = (of_experiment, of_profile) if kind == "experiment" else (of_profile, of_experiment)
    if content.keys() & other and not content.keys() & expected - {"family"}:
        raise ConfigError(_of_other_kind(name, kind))


def _of_other_kind(name: str, kind: str) -> str:
    if kind == "experiment":
        return f"{name} is a profile, not an experiment: give it as --profile {name}"
    return f"{name} is an experiment, not a profile: give it as the name of an experiment, not to --profile"
