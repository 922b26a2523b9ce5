"""Reads the number that a worked solution ends in, exactly.

    #### $1,080.50     ->  2161/2        the answer after the last `####` (strict)
    that is 3/4 of it  ->  3/4           the last number of the text (flexible)

Numbers are compared as fractions, so `18`, `18.00` and `36/2` are the same answer, and `0.33` and `1/3` are different
ones. A percent sign is a unit, as dollars are: `25%` is 25, never 0.25. The grammar of `tasks.numerals` defines what a
number is: it is read whole or not at all, and never without its sign. If the last numeral of a text cannot be read,
there is no answer; an earlier number never takes its place. LaTeX is compared by `math-verify` (`tasks.latex`).
"""

import re
from fractions import Fraction

from roundoff.tasks.characters import folded
from roundoff.tasks.number_words import OPERATOR
from roundoff.tasks.numerals import NUMERAL, is_name, value_of

MARKER = "####"
"""The text that GSM8K writes before a final answer."""

# By far most answers: an integer alone on its line.
_PLAIN = re.compile(r"\s*(-?[0-9]{1,18})(?=\n|\Z)")
_PREFIX = re.compile(r"[-+]?[ ]?(?:[A-Z]{0,3}(?:\\?\$){1,2}[ \u00a0]?)?[-+]?[ ]?")
_TAIL = re.compile(r"\s*(?:\\?%|\\?\$)?\s*\.?\s*")
_MORE = re.compile(
    rf"""
    [ \t\u00a0]*(?:\\?%|\\?\$)?[ \t\u00a0]*
    (?:[-+*/x\u00d7\u00f7\u00b7\u00b1\u2014~,;:&'\u00b0]|\*\*|\\(?:times|cdot|div|pm|sim|to)|to|or|and
     |{OPERATOR}|->|\u2192|\||)
    [ \t\u00a0]*[-+]?(?:\\?\$)?[ ]?\(?(?:\.?[0-9]|[\u00bc-\u00be\u2150-\u215e]|\\[dtc]?frac)
    """,
    re.VERBOSE,
)


def marked_answer(text: str) -> Fraction | None:
    """The number that follows the last `####`, after optional white space; None if there is none.

    A marker that is followed by more than one number (`3-5`, `5 or 6`, `3 + 4`) does not mark an answer.
    """
    _, marker, after = text.rpartition(MARKER)
    if not marker:
        return None
    plain = _PLAIN.match(after)
    if plain:
        return Fraction(int(plain[1]))
    after = folded(after).lstrip()
    numeral = _first(after)
    return None if numeral is None or _MORE.match(after, numeral.end()) else value_of(after, numeral)


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in the text; None if there is none, or if the last numeral cannot be read."""
    text = folded(text)
    for numeral in reversed(list(NUMERAL.finditer(text))):
        if not is_name(text, numeral):
            return value_of(text, numeral)
    return None


def whole_number_text(text: str) -> Fraction | None:
    """The number that makes up the whole text, or None; a currency, `%` and a full stop may follow it."""
    text = folded(text.strip())
    numeral = _first(text)
    return None if numeral is None or _TAIL.fullmatch(text, numeral.end()) is None else value_of(text, numeral)


def _first(text: str) -> re.Match[str] | None:
    """The numeral at the beginning of a text, after its sign and currency."""
    prefix = _PREFIX.match(text)
    return NUMERAL.match(text, prefix.end() if prefix else 0)
