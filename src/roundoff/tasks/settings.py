"""Checks the settings of a task, and reports one line for each that is wrong."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from roundoff.tasks.base import TaskError

Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], settings: Mapping[str, object], task: str) -> Model:
    """The settings as a `model`; settings that are left out take their defaults.

    Raises:
        TaskError: if settings are wrong, with one line for each: its path, the rule, and its value.
    """
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        lines = [_explain(model, task, details) for details in error.errors(include_url=False)]
        raise TaskError("\n".join(lines)) from None


def _explain(model: type[BaseModel], task: str, details: Mapping[str, object]) -> str:
    """The line of one wrong setting, from pydantic's details of the error."""
    location = details["loc"]
    path = ".".join(map(str, location)) if isinstance(location, tuple) else ""
    if details["type"] == "extra_forbidden":
        return f"{path} is not a setting of the {task} task, which has {', '.join(model.model_fields)}"
    message = str(details["msg"]).removeprefix("Value error, ")
    if not path:  # a rule about several settings, which names them itself
        return message
    return f"{path}: {message[0].lower()}{message[1:]}, but is {details['input']!r}"
