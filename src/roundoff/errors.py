"""Which errors and warnings are roundoff's own words to the user; they are shown as text, others with their type."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PACKAGE = Path(__file__).parent


def is_expected(error: BaseException) -> bool:
    """Whether roundoff raised the error on purpose, for the user to read: its class is one of roundoff's."""
    return type(error).__module__.split(".")[0] == "roundoff"


def message_of(error: BaseException) -> str:
    """What to show of an error: its text where it was written for the user, with its type before it otherwise."""
    if is_expected(error) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def warnings_as_text(show: Callable[[str], None]) -> Iterator[None]:
    """Hand roundoff's own warnings to `show` as plain text; those of other packages are printed as ever."""
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
            if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
                show(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = shown
        yield
