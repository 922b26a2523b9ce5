r"""Final answers in LaTeX, read and compared by `math-verify` (extra `math`).

    \boxed{\frac{3}{4}}  equals  $0.75$  equals  \frac{6}{8}

The last `\boxed` (or `\fbox`) of a response is its answer, here and not in `math-verify`, which joins neighbouring
boxes into a set. `math-verify` runs in a process of its own (`tasks.limited_process`), because its own guard against
`10^{10^{10}}` is a signal, which exists in the main thread alone and cannot stop a call into C.
"""

import atexit
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Self

from roundoff.optional_packages import require
from roundoff.tasks.base import RewardError
from roundoff.tasks.characters import folded
from roundoff.tasks.limited_process import LimitedProcess, LimitExceededError, Limits

LIMITS = Limits(seconds=5, clock_seconds=15, memory=2 << 30)
"""Of reading one response and comparing it."""
LONGEST = 2000
"""Characters of an expression, and at the end of a response without a box that are searched for one."""

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?P<open>\{)?|\\.|[{}]", re.DOTALL)
_NESTED = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?=\{)")
# between the groups of a number: `12\,000` and `12 000` are products to math-verify
_GROUPS = re.compile(r"(?<=[0-9])(?:,?\\[,;:! ]|[~\u00a0\u2000-\u200a\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACED = re.compile(r"[1-9][0-9]{0,2}(?: [0-9]{3})+")


@dataclass(frozen=True, slots=True)
class Expression:
    """A right answer."""

    source: str
    """As the data set gives it, without its box."""
    text: str
    """What `math-verify` reads it from."""

    @classmethod
    def of_truth(cls, text: str) -> Self | None:
        """The expression that a text of the data set is, boxed or bare; None if it is none, or equals nothing.

        Raises:
            RewardError: if it cannot be read, and compared with itself, within `LIMITS`.
        """
        if not text.strip():
            return None
        box = last_box(text)
        source = _plain(text if box is None else box)
        if not source.strip() or len(source) > LONGEST:
            return None
        read = _asked({"truth": source})["text"]
        return None if read is None else cls(source, str(read))

    def is_answer_of(self, response: str) -> bool:
        """Whether the last box of a response, or its last expression where it has no box, equals this one.

        Raises:
            RewardError: if that could not be computed within `LIMITS`.
        """
        box = last_box(response)
        given = response[-LONGEST:] if box is None else box
        if not given.strip() or len(given) > LONGEST:
            return False
        question = {"truth": self.source, "response": _plain(given), "boxed": box is not None}
        return bool(_asked(question)["equal"])


def last_box(text: str) -> str | None:
    """What the last box of a text holds, boxes inside of it opened; None where the text has no box.

    A last box that is empty, or never closed, gives the empty text: an earlier one is not taken for it.
    """
    closed: list[tuple[int, int, int]] = []  # where a box, and what it holds, begins and ends
    unclosed: list[tuple[int, int] | None] = []  # the boxes and (None) the other braces around this place
    bare = -1
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0] == "{":
            unclosed.append(None)
        elif match[0] == "}":
            opened = unclosed.pop() if unclosed else None
            if opened is not None:
                while closed and closed[-1][0] > opened[0]:
                    closed.pop()  # it lies inside of this one
                closed.append((*opened, match.start()))
        elif match["open"]:
            unclosed.append((match.start(), match.end()))
        elif _is_box(match[0]):
            bare = match.start()
    last_open = max((opened[0] for opened in unclosed if opened is not None), default=-1)
    if not closed:
        return "" if max(last_open, bare) >= 0 else None
    _, inner, end = closed[-1]
    return "" if max(last_open, bare) > end else _NESTED.sub("", text[inner:end])


def _is_box(command: str) -> bool:
    return command.rstrip() in ("\\boxed", "\\fbox", "\\framebox")


def _plain(text: str) -> str:
    """The text with ordinary digits and minus signs, and without separators between groups of digits."""
    if not text.isascii():
        text = "".join(folded(c) if unicodedata.category(c) in ("Nd", "Pd") else c for c in text)
    if _SPACED.fullmatch(text.strip()):
        return text.replace(" ", "")
    return _GROUPS.sub("", text)


def _asked(question: dict[str, object]) -> dict[str, object]:
    try:
        return _process().ask(question)
    except LimitExceededError as error:
        raise RewardError(f"the expression could not be compared: {error}") from None


@cache
def _process() -> LimitedProcess:
    """The child of this process, shared by all tasks.

    Raises:
        ConfigError: if `math-verify` is not installed.
    """
    if find_spec("math_verify") is None:
        require("math_verify", "math")
    process = LimitedProcess("roundoff.tasks.latex_process", LIMITS)
    atexit.register(process.close)
    return process
