"""The child process of `tasks.latex`, which reads and compares expressions by means of `math-verify`."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from roundoff.optional_packages import require
from roundoff.tasks.limited_child import Answer, serve

KEPT = 1 << 16
"""Number of right answers that are kept in the form in which `math-verify` reads them."""


def main() -> None:
    """Answer the parent's questions until it is gone."""
    serve(_start)


def _start() -> Answer:
    """Import `math-verify`, and return the function that answers a question."""
    verify = require("math_verify", "math")
    logging.disable(logging.CRITICAL)
    latex = verify.LatexExtractionConfig(boxed_match_priority=0)
    anywhere = [latex, verify.ExprExtractionConfig()]

    def read(text: str, *, boxed: bool) -> list[Any]:
        """The expressions that `math-verify` reads, and after them the text that they come from."""
        if boxed:
            return list(verify.parse(f"$\\boxed{{{text}}}$", extraction_config=[latex], parsing_timeout=None))
        return list(verify.parse(text, extraction_config=anywhere, parsing_timeout=None))

    @lru_cache(maxsize=KEPT)
    def truth(text: str) -> list[Any]:
        return read(text, boxed=True)

    def answer(question: Mapping[str, Any]) -> dict[str, Any]:
        right = truth(question["truth"])
        if "response" not in question:  # a right answer that does not equal itself would make every response wrong
            usable = bool(right) and bool(verify.verify(right, right, timeout_seconds=None))
            return {"text": str(right[-1]) if usable else None}
        expressions = read(question["response"], boxed=question["boxed"])
        return {"equal": bool(expressions) and bool(verify.verify(right, expressions, timeout_seconds=None))}

    return answer
