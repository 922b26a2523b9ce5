r"""Reads and compares final answers in LaTeX by means of `math-verify` (extra `math`).

    \boxed{\frac{3}{4}}  equals  $0.75$  equals  \frac{6}{8}

The answer of a response is its last `\boxed` (or `\fbox`). This module finds it, because `math-verify` would join
neighbouring boxes into a set. `math-verify` runs in a separate process (`tasks.limited_process`): its own guard against
`10^{10^{10}}` is a signal, which works in the main thread only and cannot stop a call into C.
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
"""Limits for reading and comparing one response."""
LONGEST = 2000
"""Maximum number of characters of an expression, and of the end of a response without a box that is searched."""

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?P<open>\{)?|\\.|[{}]", re.DOTALL)
_NESTED = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?=\{)")
# Separators between the groups of a number, because `12\,000` and `12 000` are products to math-verify.
_GROUPS = re.compile(r"(?<=[0-9])(?:,?\\[,;:! ]|[~\u00a0\u2000-\u200a\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACED = re.compile(r"[1-9][0-9]{0,2}(?: [0-9]{3})+")


@dataclass(frozen=True, slots=True)
class Expression:
    """A right answer."""

    source: str
    """The expression as the data set writes it, without its box."""
    text: str
    """The part of it that `math-verify` reads."""

    @classmethod
    def of_truth(cls, text: str) -> Self | None:
        """The expression of a text from the data set, boxed or bare; None if it is not one that equals itself.

        Raises:
            RewardError: if it cannot be read and compared with itself within `LIMITS`.
        """
        if not text.strip():
            return None
        box = last_box(text)
        source = _plain(text if box is None else box)
        if not source.strip() or len(source) > LONGEST:
            return None
        read = _answer_of_child({"truth": source})["text"]
        return None if read is None else cls(source, str(read))

    def is_answer_of(self, response: str) -> bool:
        """Whether the last box of a response, or without a box its last expression, equals this expression.

        Raises:
            RewardError: if they could not be compared within `LIMITS`.
        """
        box = last_box(response)
        answer = response[-LONGEST:] if box is None else box
        if not answer.strip() or len(answer) > LONGEST:
            return False
        question = {"truth": self.source, "response": _plain(answer), "boxed": box is not None}
        return bool(_answer_of_child(question)["equal"])


def last_box(text: str) -> str | None:
    """The content of the last box of a text, without boxes inside it; None if the text has no box.

    If the last box is empty or never closed, the result is an empty text: an earlier box does not take its place.
    """
    closed: list[tuple[int, int, int]] = []  # where a box begins, and where its content begins and ends
    unclosed: list[tuple[int, int] | None] = []  # the boxes and (None) the other braces that are open here
    bare = -1
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0] == "{":
            unclosed.append(None)
        elif match[0] == "}":
            opened = unclosed.pop() if unclosed else None
            if opened is not None:
                while closed and closed[-1][0] > opened[0]:
                    closed.pop()  # it lies inside this one
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


def _answer_of_child(question: dict[str, object]) -> dict[str, object]:
    """The answer of the child process to a question."""
    try:
        return child_process().ask(question)
    except LimitExceededError as error:
        raise RewardError(f"the expression could not be compared: {error}") from None


@cache
def child_process() -> LimitedProcess:
    """The child process, which all tasks share.

    Raises:
        ConfigError: if `math-verify` is not installed.
    """
    if find_spec("math_verify") is None:
        require("math_verify", "math")
    process = LimitedProcess("roundoff.tasks.latex_process", LIMITS)
    atexit.register(process.close)
    return process
