"""The TOML files of experiments, profiles and recipes: where they are, and what they build on.

`extends = "NAME"` takes every setting of the experiment (or file) NAME except its id and title, and the tables of the
extending file are merged over it key by key. `extends = ["A", "B"]` merges several, each over those before it: an
experiment and a recipe of hardware, say. Files whose name begins with `_` are bases to extend, and not experiments
themselves.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from roundoff.config import ConfigError, nearest
from roundoff.experiments.places import placed

TABLE = Path(__file__).parent
"""Directory of the packaged files."""
OTHER_KINDS = ("profiles", "recipes")
"""Directories of files that are no experiments."""


@cache
def files() -> dict[str, Path]:
    """Every packaged file by name: experiments, bases (as `family/_base`), `profiles/NAME` and `recipes/NAME`."""
    paths = {}
    for path in sorted(TABLE.glob("*/*.toml"), key=lambda p: (p.parent.name, p.stem)):
        plain = path.parent.name not in OTHER_KINDS and not path.stem.startswith("_")
        paths[path.stem if plain else f"{path.parent.name}/{path.stem}"] = path
    return paths


def experiment_ids() -> tuple[str, ...]:
    """Ids of the packaged experiments, family by family."""
    return tuple(name for name in files() if "/" not in name)


def families() -> dict[str, tuple[str, ...]]:
    """Families of the packaged experiments, each with the ids of its experiments."""
    ids: dict[str, tuple[str, ...]] = {}
    for name in experiment_ids():
        family = files()[name].parent.name
        ids[family] = (*ids.get(family, ()), name)
    return ids


def profile_names() -> tuple[str, ...]:
    """Names of the packaged profiles."""
    return tuple(n.removeprefix("profiles/") for n in files() if n.startswith("profiles/"))


def recipe_names() -> tuple[str, ...]:
    """Names of the packaged recipes of hardware."""
    return tuple(n.removeprefix("recipes/") for n in files() if n.startswith("recipes/"))


def merged(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Content of a file, merged over the content of what it extends; `seen` are the files that led to it."""
    if path in seen:
        raise ConfigError(f"{shown(path)}: extends itself: {' -> '.join(p.stem for p in (*seen, path))}")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(path)}: is not TOML: {error}") from None
    given = content.pop("extends", [])
    base: dict[str, Any] = {}
    for parent in given if isinstance(given, list) else [given]:
        above = _parent(path, parent)
        content_above = merged(above, (*seen, path))
        if above.parent.parent == TABLE and above.parent.name not in OTHER_KINDS:
            content_above["family"] = above.parent.name
        base = merge(base, {key: v for key, v in content_above.items() if key not in ("id", "title", "name")})
    return merge(base, placed(content, path.parent.resolve(), base))


def _parent(path: Path, name: Any) -> Path:
    """The file that `extends = name` in the file `path` refers to."""
    if not isinstance(name, str):
        raise ConfigError(f"{shown(path)}: extends must be the name of an experiment or a file, but is {name!r}")
    sibling = path.parent / (name if name.endswith(".toml") else f"{name}.toml")
    named = next((files()[key] for key in (name, *(f"{kind}/{name}" for kind in OTHER_KINDS)) if key in files()), None)
    if sibling.is_file() and sibling != path:
        return sibling
    if named is None:
        raise ConfigError(f"{shown(path)}: extends {name!r}, which does not exist{nearest(name, tuple(files()))}")
    return named


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The content `over` merged over `base`, table by table; another task replaces the whole table of the old one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        another = key == "task" and both and value.get("name", merged[key].get("name")) != merged[key].get("name")
        merged[key] = merge(merged[key], value) if both and not another else value
    return merged


def shown(path: Path) -> str:
    """The path as messages show it: packaged files relative to the table."""
    return str(path.relative_to(TABLE)) if path.is_relative_to(TABLE) else str(path)
