"""The bases of roundoff's errors and warnings, and how both are shown to the user.

What roundoff raises on purpose is a `RoundoffError`, and what it warns of is a `RoundoffWarning`. The command line
shows their text alone, since it was written for the user, and all others with their type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


class RoundoffError(Exception):
    """An error that roundoff raises on purpose; its message says what is wrong and what to do about it."""


class RoundoffWarning(UserWarning):
    """A warning from roundoff; the run goes on."""


def message_of(error: BaseException) -> str:
    """The text of an error, preceded by its type unless it is a `RoundoffError`, which was written for the user."""
    if isinstance(error, RoundoffError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def warnings_as_text(show: Callable[[str], None]) -> Iterator[None]:
    """Hand roundoff's own warnings to `show` as plain text; those of other packages are printed as usual."""
    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.filterwarnings("default")

        def shown(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, RoundoffWarning):
                show(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = shown
        yield
