"""What runs in the child process of `tasks.latex`: reads and compares expressions by `math-verify`."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from roundoff.optional_packages import require
from roundoff.tasks.limited_child import Answer, serve

KEPT = 1 << 16
"""Right answers that are kept as they were read."""


def main() -> None:
    """Serve the parent."""
    serve(_start)


def _start() -> Answer:
    verify = require("math_verify", "math")
    logging.disable(logging.CRITICAL)
    latex = verify.LatexExtractionConfig(boxed_match_priority=0)
    anywhere = [latex, verify.ExprExtractionConfig()]

    def read(text: str, *, boxed: bool) -> list[Any]:
        """What `math-verify` found, then the text that it was read from."""
        if boxed:
            return list(verify.parse(f"$\\boxed{{{text}}}$", extraction_config=[latex], parsing_timeout=None))
        return list(verify.parse(text, extraction_config=anywhere, parsing_timeout=None))

    @lru_cache(maxsize=KEPT)
    def truth(text: str) -> list[Any]:
        return read(text, boxed=True)

    def answer(question: Mapping[str, Any]) -> dict[str, Any]:
        right = truth(question["truth"])
        if "response" not in question:  # a right answer that equals nothing would make every response wrong
            usable = bool(right) and bool(verify.verify(right, right, timeout_seconds=None))
            return {"text": str(right[-1]) if usable else None}
        found = read(question["response"], boxed=question["boxed"])
        return {"equal": bool(found) and bool(verify.verify(right, found, timeout_seconds=None))}

    return answer
