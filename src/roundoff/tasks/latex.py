"""Final answers in LaTeX, read and compared by `math-verify` (extra `math`).

    \\boxed{\\frac{3}{4}}  equals  $0.75$  equals  \\frac{6}{8}

`math-verify` guards itself with an alarm signal, which exists in the main thread alone; elsewhere it runs without one.
"""

import threading
from dataclasses import dataclass
from typing import Any, Self

from roundoff.extras import require

SECONDS = 5
"""For one expression; one that takes longer is no answer."""
LONGEST = 2000
"""Characters at the end of a response that are searched for its answer."""


@dataclass(frozen=True, slots=True)
class Expression:
    """An answer as `math-verify` holds it."""

    parsed: tuple[Any, ...]
    """The expression, then the text that it was read from."""

    @property
    def text(self) -> str:
        """What the answer was read from, without the box."""
        return str(self.parsed[-1])

    @classmethod
    def of_truth(cls, text: str) -> Self | None:
        """The expression that a text of the data set is, boxed or bare."""
        return cls._of(text if "\\boxed" in text else f"$\\boxed{{{text}}}$", boxed=True) if text.strip() else None

    @classmethod
    def of_response(cls, text: str) -> Self | None:
        """The last boxed expression of a response, or the last one without a box."""
        return cls._of(text[-LONGEST:], boxed=False)

    @classmethod
    def _of(cls, text: str, *, boxed: bool) -> Self | None:
        verify = require("math_verify", "math")
        latex = verify.LatexExtractionConfig(boxed_match_priority=0)
        found = verify.parse(
            text,
            extraction_config=[latex] if boxed else [latex, verify.ExprExtractionConfig()],
            parsing_timeout=_seconds(),
        )
        return cls(tuple(found)) if found else None

    def equals(self, other: Self) -> bool:
        """Whether the other expression (a response's) is this one (the right one)."""
        verify = require("math_verify", "math")
        return bool(verify.verify(list(self.parsed), list(other.parsed), timeout_seconds=_seconds()))


def _seconds() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None
