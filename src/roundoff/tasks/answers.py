"""Reading the number that a worked solution ends in, exactly.

    #### $1,080.50     ->  2161/2        the answer after the last `####` (strict)
    that is 3/4 of it  ->  3/4           the last number of the text (flexible)

Numbers are compared as fractions, so that `18`, `18.00` and `36/2` are one answer and `0.33` and `1/3` are two.
Understood are thousands' commas (`1,080`), signs (also U+2212), currency before or after, decimals, fractions and
mixed numbers (`1 1/2`). A percent sign is a unit, as dollars are: `25%` is 25, never 0.25. What is written in another
way (`1,08`, `1.2.3`, `1e5`, `1_000`, `2^3`) is no number at all: half of it is never taken for the answer. LaTeX is
left to `math-verify` (`tasks.latex`).
"""

import re
from collections.abc import Iterator
from fractions import Fraction

MARKER = "####"
"""What GSM8K writes before a final answer."""
LONGEST = 64
"""Characters; anything longer is no answer (and Python refuses to convert thousands of digits)."""

_CURRENCY = r"(?:\\?[$€£¥₹])"
_VALUE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
_NUMBER = re.compile(
    # a minus sign after a digit, a letter or a bracket is a subtraction or a hyphen
    rf"(?:(?<![0-9A-Za-z)\]}}%])(?P<sign>[-+−])(?={_CURRENCY}|[.0-9]))?"
    rf"{_CURRENCY}?(?P<late>(?<=[$€£¥₹])[-+−])?"
    r"(?<![A-Za-z_0-9^])(?<![0-9][.,/])"
    rf"(?:(?P<whole>[0-9]+) (?P<part>[0-9]+)/(?P<of>[0-9]+)|(?P<value>{_VALUE})(?: ?/ ?(?P<over>[0-9]+))?)"
    r"(?![0-9]|[.,/][0-9]|\.?[eE][-+]?[0-9]|_[0-9]|[xX][0-9]|\^)"
)
_AFTER = re.compile(rf"\s*(?:%|\\%|{_CURRENCY})?\s*\.?\s*")


def marked_answer(text: str) -> Fraction | None:
    """The number that follows the last `####`, white space aside; None where there is none."""
    _, marker, after = text.rpartition(MARKER)
    match = _NUMBER.match(after.lstrip()) if marker else None
    return _value(match) if match else None


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in the text, or None."""
    found = None
    for value in _numbers(text):
        found = value
    return found


def whole_number_text(text: str) -> Fraction | None:
    """The number that the whole text is (currency, `%` and a full stop may follow it), or None."""
    match = _NUMBER.match(text.strip())
    if match is None or _AFTER.fullmatch(text.strip(), match.end()) is None:
        return None
    return _value(match)


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            yield value


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero and for what is too long to be an answer."""
    if match.end() - match.start() > LONGEST:
        return None
    negative = (match["sign"] or match["late"] or "") in ("-", "−")
    divisor = Fraction(match["of"] or match["over"] or 1)
    if not divisor:
        return None
    if match["whole"]:
        value = Fraction(match["whole"]) + Fraction(match["part"]) / divisor
    else:
        value = Fraction(match["value"].replace(",", "")) / divisor
    return -value if negative else value
