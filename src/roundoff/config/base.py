"""What every settings model has: frozen fields, the rules of its numbers, and error messages that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it in full and says what to do."""


class Settings(BaseModel):
    """Base of every settings model: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def rule(holds: Callable[[Any], bool], text: str) -> AfterValidator:
    """A validator that refuses what does not hold, with `text` as the rule."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


Fraction = Annotated[float, rule(lambda v: 0 <= v < 1, "must be in [0, 1) (5 % is 0.05)")]
Share = Annotated[float, rule(lambda v: 0 <= v <= 1, "must be in [0, 1]")]
LEAST, MOST = 2.0**-126, 2.0**127
"""Sizes that float32 holds as normal numbers; what a setting multiplies is computed in float32."""
NonNegative = Annotated[
    float, rule(lambda v: v == 0 or LEAST <= v <= MOST, "must be 0 or more, and a normal number in float32")
]
Positive = Annotated[float, rule(lambda v: LEAST <= v <= MOST, "must be above 0, and a normal number in float32")]
Count = Annotated[int, rule(lambda v: v >= 1, "must be a whole number of at least 1")]
Whole = Annotated[int, rule(lambda v: v >= 0, "must be a whole number of at least 0")]


LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e6
"""Sampling temperatures between which float32 logits (up to 1e35) can be divided without overflow."""
TEMPERATURE_RULE = "0 (greedy) or between 0.001 and 1,000,000"


def is_temperature(value: float) -> bool:
    """Whether logits can be divided by a temperature, or it is 0: take the most likely token."""
    return value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE


def nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """A clause `; did you mean 'x'?` for the nearest of `known`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


CLEARLY_MEANT = 0.8
"""Likeness (0 to 1) from which a name in another table is suggested."""
Model = TypeVar("Model", bound=Settings)


Trees = Mapping[str, type[Settings]]
"""Settings models by the path before their fields (such as `profile.`), among which an unknown key is looked for."""


def validate(
    model: type[Model], data: Mapping[str, Any], *, source: str, within: str = "", trees: Trees | None = None
) -> Model:
    """The settings in `data` as a `model`.

    `within` stands before every path in a message, and `trees` are what else the user could have meant (default: the
    model itself).

    Raises:
        ConfigError: with one line per offending setting: path, rule, value, and the nearest key if it is unknown.
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
        meant = _meant(str(key), item["input"], known, trees)
        return f"{path} is not a setting{meant or ' (known here: ' + ', '.join(known) + ')'}"
    if item["type"] == "missing":
        return f"{path} is missing: it must be set"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        text = str(item["input"]).lower() if isinstance(item["input"], bool) else str(item["input"])
        return f'{path} must be text, and {text} is that only in quotation marks: "{text}"'
    rule = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping | BaseModel) and item["type"] == "value_error":  # of several settings together
        return f"{path} {rule}" if path else rule
    rule = rule[0].lower() + rule[1:]
    return f"{path} {rule if rule.startswith('must') else 'is wrong: ' + rule}, but is {item['input']!r}"


def _meant(key: str, value: Any, here: tuple[str, ...], trees: Trees) -> str:
    """A clause with the setting that was meant: the nearest name in the same table, or a nearer one in another.

    If `value` is a table of one setting, and the setting that was meant has such a setting inside, that one is named.
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

    def likeness(names: Iterable[str]) -> float:
        return max((difflib.SequenceMatcher(None, key, name).ratio() for name in names), default=0.0)

    closest = difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=CLEARLY_MEANT)
    if closest and likeness(closest) > likeness(here):
        return f"; did you mean {' or '.join(repr(inside(path)) for path in elsewhere[closest[0]])}?"
    return nearest(key, here)


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Full paths of all settings of a model and of the tables inside it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _paths(kind, f"{prefix}{name}.")


def _fields_at(model: type[BaseModel], path: list[str | int]) -> Iterator[str]:
    here: type[BaseModel] = model
    for part in path:
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        here = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), here)
    yield from here.model_fields
