"""Changes to settings: a table in which any setting of another table may be written, and none has to be.

`[hardware.rollout]` holds changes to `[hardware]`, and so does each entry of `[[hardware.rules]]`. The word "none"
takes a number format away, or puts a whole table back to its defaults. The models are made from those that they change,
so that a new setting can be changed without being written down twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ValidationError, WrapSerializer, WrapValidator, create_model, model_validator
from pydantic.fields import FieldInfo

from roundoff.config.base import Settings, joined

NONE = "none"
"""What takes a format away, or a table."""
Changed = TypeVar("Changed", bound=Settings)


class Changes(Settings):
    """Base class of the models that hold changes; None stands for what is not written."""

    suggested = False

    @model_validator(mode="before")
    @classmethod
    def _from_settings(cls, data: Any) -> Any:
        """Settings from Python stand for what was written in them; their None is the word "none"."""
        if isinstance(data, Settings) and not isinstance(data, Changes):
            written = {name: getattr(data, name) for name in data.model_fields_set}
            return {name: NONE if value is None else value for name, value in written.items()}
        return data

    @property
    def written(self) -> dict[str, Any]:
        """The settings that are written, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}


def _unless_none(value: Any, handler: Any) -> Any:
    return NONE if isinstance(value, str) and value == NONE else handler(value)


NONE_PASSES = (WrapValidator(_unless_none), WrapSerializer(_unless_none))
"""Markers of a setting that takes the word "none" beside its values."""


@cache
def changes_of(model: type[Settings], left_out: tuple[str, ...] = ()) -> type[Changes]:
    """The model that holds changes to a model.

    Args:
        model: the settings that are changed.
        left_out: names of settings that cannot be changed.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name not in left_out:
            fields[name] = (_kind(field), None)
    name = "".join([model.__name__, "Changes", *(f"Without{part.title()}" for part in left_out)])
    made: type[Changes] = create_model(name, __base__=Changes, __module__=__name__, __doc__=model.__doc__, **fields)
    globals()[name] = made  # where pickle looks for it
    return made


def _kind(field: FieldInfo) -> Any:
    """The type of a setting in a table of changes."""
    table = table_of(field)
    if table is not None:
        return Annotated[changes_of(table) | None, *NONE_PASSES]
    kind: Any = field.annotation
    for marker in field.metadata:
        kind = Annotated[kind, marker]
    if not _is_optional(field):
        return kind | None
    return Annotated[kind | None, *NONE_PASSES]


def table_of(field: FieldInfo) -> type[Settings] | None:
    """The settings model that a field holds; None if it holds something else, such as a list of tables."""
    for kind in (field.annotation, *(() if get_origin(field.annotation) is tuple else get_args(field.annotation))):
        if isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None


def _is_optional(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def changed(base: Changed, changes: Mapping[str, Any]) -> Changed:
    """Settings with the changes that are written, key by key; lists are replaced as a whole.

    Settings that only refine one that is taken away go with it (`Settings.settled`), unless they are written as well.

    Raises:
        ValidationError: if the settings do not fit together.
    """
    return type(base).model_validate(_merged(type(base), base, changes))


def _merged(model: type[Settings], base: Settings | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a model after the changes, of which nested tables are dictionaries."""
    fields = model.model_fields
    values: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in changes.items():
        table = table_of(fields[name])
        if isinstance(value, str) and value == NONE and (table or _is_optional(fields[name])):
            values[name] = fields[name].get_default(call_default_factory=True)
        elif isinstance(value, Changes) and table is not None:
            values[name] = _merged(table, values.get(name), value.written)
        else:
            values[name] = value
    return values if base is None else model.settled(values, frozenset(changes))


def first_line(error: ValidationError) -> str:
    """The first error as one clause, with the path of its setting."""
    item = error.errors(include_url=False)[0]
    path, text = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
    text = "is missing: it must be set" if item["type"] == "missing" else text
    return joined(path, text)
