"""Replaces characters that stand for digits, signs, separators and currencies by plain ones of the same meaning.

Models write `５`, `٥`, `−5`, `12 000` with a thin space, and `€5`. The grammar of numbers (`tasks.numerals`) should not
have to know all of them, so the variants that Unicode offers are folded into a few characters:

    -         a minus sign or a hyphen: U+002D, U+2010 to U+2013, U+2212, and their small, full-width and heavy forms
    DASH      any other dash, which may be a sign or punctuation
    $         any currency
    NO_BREAK  any space but the plain one, including those that keep together what they join
    CLINGS    superscripts, subscripts, combining marks and numbers of other systems, which change the number they touch
"""

import unicodedata
from functools import lru_cache

DASH = "\u2014"
NO_BREAK = "\u00a0"
CLINGS = "\u00b2"

_MINUS = frozenset("-\u2010\u2011\u2012\u2013\u2212\u02d7\u2796\ufe58\ufe63\uff0d")
# Dashes by Unicode's property Dash that are not in the category Pd, and characters that look like a dash.
_OTHER_DASHES = frozenset("\u00ad\u2043\u2053\u2448\u30fc\uff70")
_RAISED_SIGNS = frozenset("\u207a\u207b\u208a\u208b")
_NAMED = {
    **dict.fromkeys("\u2018\u2019\u02bc\u2032\u02b9\u201b", "'"),
    **dict.fromkeys("\u2044\u2215", "/"),  # fraction slash, division slash
    **dict.fromkeys("\u2715\u2716\u2a2f", "\u00d7"),
    **dict.fromkeys("\u22c5\u2219\u2022\u2027\u30fb\u00b7", "\u00b7"),
    **dict.fromkeys("\u221b\u221c", "\u221a"),
    **dict.fromkeys("\u2213", "\u00b1"),
    **dict.fromkeys("\u066b\ufe52", "."),
    **dict.fromkeys("\u066c\u060c\u3001\uff64\ufe50\ufe51", ","),
    "\u066a": "%",
    "\u2236": ":",
    "\ufe0f": "",  # asks for a picture of the character before it
    "\u20e3": "",  # draws a key around it
}


def folded(text: str) -> str:
    """The text with each character replaced by the plain one that means the same in a number."""
    return text if text.isascii() else "".join(map(_folded, text))


@lru_cache(maxsize=4096)
def _folded(char: str) -> str:
    if char.isascii():
        return char
    if char in _MINUS:
        return "-"
    if char in _NAMED:
        return _NAMED[char]
    if char in _RAISED_SIGNS:
        return CLINGS
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if "\uff01" <= char <= "\uff5e":
        return chr(ord(char) - 0xFEE0)  # full-width forms of ASCII
    if category == "Pd" or char in _OTHER_DASHES:
        return DASH
    if category in ("Nl", "No"):
        return char if is_vulgar_fraction(char) else CLINGS
    by_category = {"Sc": "$", "Zs": NO_BREAK, "Cf": "", "Mn": CLINGS, "Me": CLINGS, "Mc": CLINGS, "Lm": CLINGS}
    return by_category.get(category, char)


def is_vulgar_fraction(char: str) -> bool:
    """Whether the character is a fraction that Unicode spells out as numerator and denominator, such as U+00BD."""
    top, slash, bottom = unicodedata.normalize("NFKD", char).partition("\u2044")
    return bool(slash and top.isdecimal() and bottom.isdecimal())
