"""What every settings model has: frozen fields, the rules of its numbers, and error messages that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
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


Model = TypeVar("Model", bound=Settings)


def validate(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """The settings in `data` as a `model`.

    Raises:
        ConfigError: with one line per offending setting: path, rule, value, and the nearest key if it is unknown.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = [_describe(model, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _describe(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    path = ".".join(
        str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "constrained-", "literal["))
    )
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        known = tuple(_fields_at(model, parents))
        return f"{path} is not a setting{nearest(str(key), known) or ' (known here: ' + ', '.join(known) + ')'}"
    if item["type"] == "missing":
        return f"{path} is missing: it must be set"
    rule = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping | BaseModel):
        return f"{path} {rule}" if path else rule
    rule = rule[0].lower() + rule[1:]
    return f"{path} {rule if rule.startswith('must') else 'is wrong: ' + rule}, but is {item['input']!r}"


def _fields_at(model: type[BaseModel], path: list[str | int]) -> Iterator[str]:
    here: type[BaseModel] = model
    for part in path:
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        here = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), here)
    yield from here.model_fields
