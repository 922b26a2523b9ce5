"""What all settings models share: frozen fields, rules for numbers, and error messages that name the setting."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from roundoff.errors import RoundoffError


class ConfigError(RoundoffError, ValueError):
    """A setting cannot be used; the message names its full path and says what to write instead."""


class Settings(BaseModel):
    """Base class of every settings model: instances are frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    suggested: ClassVar[bool] = True
    """Whether a setting that holds such a table is suggested for an unknown key elsewhere."""

    @classmethod
    def settled(cls, values: dict[str, Any], written: frozenset[str]) -> dict[str, Any]:
        """The values without those that mean nothing since another was changed, except the ones that were `written`."""
        return values


LATER = "later"
"""Marks a setting that version 0.1 did not have (`Annotated[..., LATER]`): its default does what 0.1 did, and enters no
hash, so that runs of earlier versions keep their directories."""


def rule(holds: Callable[[Any], bool], text: str) -> AfterValidator:
    """A validator that rejects values for which `holds` is false; `text` states the rule in the error message."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


Fraction = Annotated[float, rule(lambda v: 0 <= v < 1, "must be in [0, 1) (5 % is 0.05)")]
Share = Annotated[float, rule(lambda v: 0 <= v <= 1, "must be in [0, 1]")]
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, 2.0**127
"""Bounds of the settings that multiply float32 tensors: float32 represents these magnitudes as normal numbers."""
NonNegative = Annotated[
    float,
    rule(
        lambda v: v == 0 or SMALLEST_FLOAT32 <= v <= LARGEST_FLOAT32,
        "must be 0 or more, and a normal number in float32",
    ),
]
Positive = Annotated[
    float, rule(lambda v: SMALLEST_FLOAT32 <= v <= LARGEST_FLOAT32, "must be above 0, and a normal number in float32")
]
Count = Annotated[int, rule(lambda v: v >= 1, "must be a whole number of at least 1")]
Whole = Annotated[int, rule(lambda v: v >= 0, "must be a whole number of at least 0")]


LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e6
"""Bounds of a sampling temperature: between them, division of float32 logits (up to 1e35) cannot overflow."""
TEMPERATURE_RULE = "0 (greedy) or between 0.001 and 1,000,000"


def is_temperature(value: float) -> bool:
    """Whether a temperature is 0 (take the most likely token) or can safely divide logits."""
    return value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE


def nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The clause `; did you mean 'x'?` with the nearest of the `known` names, or an empty string if none is near."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


CLEARLY_SIMILAR = 0.8
"""Similarity (0 to 1) from which a name in another table is suggested."""
Model = TypeVar("Model", bound=Settings)
Trees = Mapping[str, type[Settings]]
"""Settings models in which an unknown key is looked up, by the prefix of their fields' paths (such as `profile.`)."""


def validate(
    model: type[Model], data: Mapping[str, Any], *, source: str, within: str = "", trees: Trees | None = None
) -> Model:
    """Build a `model` from the settings in `data`.

    Args:
        model: the settings model.
        data: the settings, nested as in a TOML file.
        source: where they come from, such as a file name; it begins every line of the error.
        within: prefix of every path in the error, such as `profile.`.
        trees: models whose keys are suggested for an unknown key (default: `model` alone).

    Raises:
        ConfigError: with one line per wrong setting: path, rule, value, and the nearest key if it is unknown.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        known = {within: model} if trees is None else trees
        lines = [_describe(model, item, within, known) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _describe(model: type[BaseModel], item: Mapping[str, Any], within: str, trees: Trees) -> str:
    path = within + ".".join(
        str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "constrained-", "literal["))
    )
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        known = tuple(_fields_at(model, parents))
        suggestion = _suggestion(str(key), item["input"], known, trees)
        suggestion = _inside_changes(model, parents, within, suggestion)
        return f"{path} is not a setting{suggestion or ' (known here: ' + ', '.join(known) + ')'}"
    if item["type"] == "missing":
        return f"{path} is missing: it must be set"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        text = str(item["input"]).lower() if isinstance(item["input"], bool) else str(item["input"])
        return f'{path} must be text, but is {text}: put it in quotation marks ("{text}")'
    if item["type"] in ("tuple_type", "list_type"):
        return f"{path} must be a list, such as [{_shown(item['input'])}], but is {_shown(item['input'])}"
    if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{path} must be a table of settings, but is {_shown(item['input'])}"
    rule = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping | BaseModel) and item["type"] == "value_error":  # of several settings together
        if rule.startswith("."):  # it begins with the rest of the path
            return f"{path.removesuffix('.')}{rule}".removeprefix(".")
        return joined(path, rule)
    rule = rule[0].lower() + rule[1:]
    return f"{path} {rule if rule.startswith('must') else 'is wrong: ' + rule}, but is {item['input']!r}"


def joined(path: str, text: str) -> str:
    """A clause after the path of a table, with a full stop between them if it begins with a setting of that table."""
    if not path:
        return text
    return f"{path}{'.' if re.match(r'[a-z_]+ = ', text) else ' '}{text}"


def _shown(value: Any) -> str:
    """A value as TOML writes it, as far as it is text."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _inside_changes(model: type[BaseModel], parents: list[Any], within: str, suggestion: str) -> str:
    """The suggestion inside the table of changes that the wrong key is in, if it is in one."""
    depth = next((n + 1 for n in range(len(parents)) if not _model_at(model, parents[: n + 1]).suggested), None)
    if depth is None:
        return suggestion
    outer = within + "".join(f"{part}." for part in parents[: depth - 1])
    at = depth + sum(isinstance(part, int) for part in parents[depth : depth + 1])  # with the place in a list
    inner = outer + "".join(f"{part}." for part in parents[depth - 1 : at])

    def moved(found: re.Match[str]) -> str:
        *tables, key = found[1].split(".")
        exists = key in _model_at(model, [*parents[:at], *tables]).model_fields
        return f"'{inner}{found[1]}'" if exists else found[0]

    return re.sub(f"'{re.escape(outer)}([^']+)'", moved, suggestion)


def _suggestion(key: str, value: Any, here: tuple[str, ...], trees: Trees) -> str:
    """A clause that suggests the nearest name in the same table, or a nearer one in another table.

    If `value` is a table of one setting, and the suggested setting has such a setting inside, that one is named.
    """
    paths = [path for prefix, model in trees.items() for path in _paths(model, prefix)]
    elsewhere: dict[str, list[str]] = {}
    for path in paths:
        elsewhere.setdefault(path.rpartition(".")[2], []).append(path)

    def inside(path: str) -> str:
        inner = value
        while isinstance(inner, Mapping) and len(inner) == 1 and f"{path}.{next(iter(inner))}" in paths:
            name, inner = next(iter(inner.items()))
            path = f"{path}.{name}"
        return path

    def similarity(names: Iterable[str]) -> float:
        return max((difflib.SequenceMatcher(None, key, name).ratio() for name in names), default=0.0)

    closest = difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=CLEARLY_SIMILAR)
    if closest and similarity(closest) > similarity(here):
        return f"; did you mean {' or '.join(repr(inside(path)) for path in elsewhere[closest[0]])}?"
    return nearest(key, here)


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Full paths of all settings of a model, including those of nested tables."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
        if all(kind.suggested for kind in tables):
            yield prefix + name
            for kind in tables:
                yield from _paths(kind, f"{prefix}{name}.")


def _fields_at(model: type[BaseModel], path: list[str | int]) -> Iterator[str]:
    """Names of the settings in the table at `path` inside a model."""
    yield from _model_at(model, path).model_fields


def _model_at(model: type[Any], path: list[Any]) -> type[Any]:
    """The table at `path` inside a model."""
    here: type[Any] = model
    for part in path:
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        here = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), here)
    return here
