"""What the commands print on: streams of any encoding, of any width, and whose reader may have gone.

Nothing that a user chose (ids, titles, paths) is read as markup, and nothing is lost: a character that the stream's
encoding lacks is printed as its nearest plain form, or else as its escape; a table is never narrower than 80 columns,
which a narrower terminal wraps; and a pipe that is closed early, as by `head`, ends no work that is under way.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LEAST_WIDTH = 80
"""Columns that every table fits into."""
SUBSTITUTE = "roundoff-plain"
"""Name of the error handler that puts plain characters in the place of those that an encoding lacks."""
PLAIN = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}─━╌╍═╸╺╶╴", "-"),
    **dict.fromkeys("│┃║╎╏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┡┩╇", "+"),
    **dict.fromkeys("\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}", " "),
    **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "'"),
    **dict.fromkeys("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    **dict.fromkeys("█▇▆▅▄▃▂▁", "#"),
    "±": "+/-",
    "\N{MULTIPLICATION SIGN}": "x",
    "·": ".",
    "•": "*",
    "†": "^",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "µ": "u",
    "μ": "u",
    "ε": "eps",
    "σ": "sigma",
    "…": "...",
}
"""Plain forms, by character."""


def plain_form(error: UnicodeError) -> tuple[str, int]:
    """The plain form of the characters that an encoding lacks, as an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


class TolerantStream(io.TextIOWrapper):
    """A text stream that prints every character in some form, and drops what nobody reads any more."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._target = codecs.lookup(stream.encoding).name
        # click takes a stream of ASCII for a mistake and writes UTF-8 to it, so the stream is said to be Latin-1; that
        # nothing but ASCII gets there is seen to by `write`
        shown = "latin-1" if self._target == "ascii" else self._target
        super().__init__(
            stream.buffer, encoding=shown, errors=SUBSTITUTE, line_buffering=stream.line_buffering, write_through=True
        )

    def write(self, text: str, /) -> int:
        """Write a text in the characters that the stream has."""
        with self._reader_may_be_gone():
            super().write(text.encode(self._target, SUBSTITUTE).decode(self._target))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        with self._reader_may_be_gone():
            super().flush()

    @contextmanager
    def _reader_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # from here on, what is written goes nowhere; so does what is still in the buffer
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Make standard output and error tolerant inside; a stream that is closed, or is no stream of bytes, stays so."""
    codecs.register_error(SUBSTITUTE, plain_form)
    before = sys.stdout, sys.stderr
    tolerant = [TolerantStream(s) if isinstance(s, io.TextIOWrapper) else s for s in before]
    sys.stdout, sys.stderr = tolerant
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in tolerant:
            if isinstance(stream, TolerantStream):
                stream.flush()
                with suppress(ValueError):  # closed meanwhile
                    stream.detach()


def console() -> Console:
    """Standard output for tables, as wide as the terminal."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def show(renderable: RenderableType) -> None:
    """Print a table or a text, at least 80 columns wide; a word too long for its column is folded and not cut."""
    from rich.console import Console

    found = console()
    if found.width < LEAST_WIDTH:
        found = Console(markup=False, emoji=False, width=LEAST_WIDTH)
    _fold([renderable])
    found.print(renderable)


def _fold(renderables: Iterable[RenderableType]) -> None:
    from rich.console import Group
    from rich.table import Table

    for part in renderables:
        if isinstance(part, Group):
            _fold(part.renderables)
        elif isinstance(part, Table):
            for column in part.columns:
                if not column.no_wrap:
                    column.overflow = "fold"
