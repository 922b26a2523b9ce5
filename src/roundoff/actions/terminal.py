"""Streams that the commands print to, whatever their encoding and width, and even if their reader is gone.

What a user chose (ids, titles, paths) is never read as markup, and nothing is lost. A character that the encoding lacks
is printed in a plain form, or else as an escape. A table is at least 80 columns wide, and a narrower terminal wraps it.
A pipe that is closed early, as by `head`, does not end the work.
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
"""Width that every table fits into (columns)."""
SUBSTITUTE = "roundoff-plain"
"""Name of the error handler that replaces characters that an encoding lacks."""
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
"""Plain form of each character that has one."""


def plain_form(error: UnicodeError) -> tuple[str, int]:
    """Replacement for the characters that an encoding lacks, and the position after them: a handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


class TolerantStream(io.TextIOWrapper):
    """A text stream that prints every character in some form, and drops the text once its reader is gone."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._target = codecs.lookup(stream.encoding).name
        # click takes an ASCII stream for a mistake and writes UTF-8 to it. So the stream claims to be Latin-1, and
        # `write` makes sure that it receives ASCII only.
        shown = "latin-1" if self._target == "ascii" else self._target
        super().__init__(
            stream.buffer, encoding=shown, errors=SUBSTITUTE, line_buffering=stream.line_buffering, write_through=True
        )

    def write(self, text: str, /) -> int:
        """Write a text, with characters that the encoding lacks replaced; returns its length."""
        with self._reader_may_be_gone():
            super().write(text.encode(self._target, SUBSTITUTE).decode(self._target))
        return len(text)

    def flush(self) -> None:
        """Write out what is still in the buffer."""
        with self._reader_may_be_gone():
            super().flush()

    @contextmanager
    def _reader_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # from now on the stream writes to nowhere, also what is in its buffer
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Make standard output and error tolerant inside the block; a closed or replaced stream is left alone."""
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
    """A console on standard output, as wide as the terminal."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def show(renderable: RenderableType) -> None:
    """Print a table or a text, at least 80 columns wide; a word too long for its column is folded, not cut."""
    from rich.console import Console

    output = console()
    if output.width < LEAST_WIDTH:
        output = Console(markup=False, emoji=False, width=LEAST_WIDTH)
    _fold([renderable])
    output.print(renderable)


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
