r"""A grammar of numbers as models write them: a number is read whole or not at all, and never without its sign.

Reading takes two steps. First, `NUMERAL` matches a number together with everything that may belong to it (`1,00,000`,
`2:30`, `1.2.3`, `0b101`, `5{,}000`), including much that is not understood. Then `_NUMBER` must match all of that. The
text directly before and after decides about the sign, or shows that the numeral is part of something else (`2^3`,
`\sqrt{5}`, `5 million`).

    understood    1,080   1,00,000   12'000   12{,}000   12\,000   (and a no-break or thin space as separator)
                  0.75   .5   3/4   6 / 8   1 1/2   and their forms by U+00BD or \frac{3}{4}
                  -5   - $5 as -$5   $-5   US$5   5 EUR as 5 with its sign of currency
    no number     1e5   2^3   1.5 x 10^3   0x1F   2:30   1/2/2020   1.2.3   1,08   1.234,56   12 000   5 million
    unclear sign  - 5   --5   +-5   -(5)   minus 5   a dash that is not a minus sign

Every pattern either looks at a bounded stretch of text or never backtracks, so the time is linear in the length of the
text.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Literal

from roundoff.tasks.number_words import FRACTION, MAGNITUDE, MINUS, SMALLER_FOLLOWS, larger_precedes

LONGEST = 64
"""Maximum number of characters of a numeral; a longer one is not an answer (Python refuses thousands of digits)."""
CONTEXT = 48
"""Number of characters before and after a numeral that are looked at."""

Sign = Literal[-1, 1] | None
"""Sign of a numeral; None if it is unclear, or if the numeral is part of something else."""

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
_LETTER = "A-Za-zÀ-ÖØ-öø-ӿ"  # without the signs of multiplication and division
_FRACTION = r"\\[dtc]?frac(?![A-Za-z])[ ]?(?:\{[^{}\n]{0,64}\}|[0-9])[ ]?(?:\{[^{}\n]{0,64}\}|[0-9])"
_START = rf"(?:(?:(?<!\.)\.)?[0-9]++|[{_VULGAR}]|{_FRACTION})"
_JOIN = rf"""(?:
    [.,:'_/^]{{1,3}}[-+]?                                   # separators, dates, times, versions, powers
  | \{{,\}} | ,?\\[,;:!] | ~ | \u00a0 | \u00b7 | \*\*
  | [ ]?[/:][ ]?[-+]?                                       # 6 / 8 and 2 : 3
  | [ \t]{{1,4}}(?=[0-9]{{1,20}}[ ]?/[ ]?[0-9]|[{_VULGAR}]|\\[dtc]?frac)  # 1 1/2
  | [ ](?<![0-9]{{4}}[ ])(?=[0-9]{{3}}(?![0-9]))            # 12 000: perhaps one number, perhaps two
  | \.?[eE][-+]? | [A-Za-z]{{1,3}}                          # 1e5, 0b101, 2h30
)"""
NUMERAL = re.compile(rf"{_START}(?:(?:{_JOIN})?{_START})*+", re.VERBOSE)
"""A number with everything that may belong to it, in folded text (`tasks.characters`)."""

_SEPARATOR = r"(?:,(?:\\!)?|'|\{,\}|\\[,;:!]|~|\u00a0)"
_GROUPED = rf"[1-9][0-9]{{0,2}}(?P<sep>{_SEPARATOR})[0-9]{{3}}(?:(?P=sep)[0-9]{{3}})*"
_INDIAN = r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
_INTEGER = rf"(?:{_GROUPED}|{_INDIAN}|[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<value>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[ ]?/[ ]?(?P<over>[0-9]+))?"
    r"|(?P<whole>[0-9]+)[ \u00a0](?P<part>[0-9]+)/(?P<of>[0-9]+)"
    rf"|(?:(?P<units>[0-9]+)[ \u00a0]?)?(?:(?P<vulgar>[{_VULGAR}])"
    r"|\\[dtc]?frac[ ]?(?:\{[ ]?(?P<top>[0-9]+)[ ]?\}|(?P<top1>[0-9]))"
    r"[ ]?(?:\{[ ]?(?P<bottom>[0-9]+)[ ]?\}|(?P<bottom1>[0-9])))"
)

_NAME = re.compile(rf"(?<![\\{_LETTER}])[{_LETTER}]+-?$")
_CURRENCY = re.compile(r"(?:(?<![A-Za-z])[A-Z]{1,3})?(?:\\?\$){1,2}[ \u00a0]?$")
_SIGNED = re.compile(r"(?P<before>.?)(?P<sign>[-+])(?P<space>(?:[ \t\u00a0~]|\\[,;:! ])*)$")
_NO_SIGN_AFTER = frozenset("-+\u2014./^_\\)]}%\u00b1\u00b2")
_PLAIN_COMMANDS = (
    "approx|cdot|displaystyle|div|geq?|implies|leq?|qquad|quad|Rightarrow|rightarrow|sim|therefore|times|to|textstyle"
)
_GROUPS = "boxed|fbox|text|textbf|textit|textrm|textsf|mathbf|mathrm|mathit|emph|underline|bf|color"
_PART_BEFORE = re.compile(
    rf"""
    [)\]}}\u230a\u2308\u00b1\u221a\u00b2\u03c0\u00b0\^_\\/][ ]?$ (?<![)\]}}][ ])  # products, roots, powers, degrees
  | \u2014[ \t\u00a0]*(?:\\?\$)?[ ]?$                      # a dash that may be a sign
  | [-\u2014][ \t]*(?:\\left)?[*_`'"(\[{{][*_`'"(\[{{ \t]*$  # a sign before an opening bracket, or a bullet
  | \|-$ | [\u230a\u2308][ ]?-?$ | (?:abs|round|floor|ceil)\([ ]?-?[ ]?$            # an absolute value, and what rounds
  | (?<![A-Za-z0-9])[-\u2014][ ]?(?:[A-Z]{{3}}|Rs\.?)[ ]?$    # -USD 5
  | [0-9][./]?\([ ]?$ | /[ ]?\([ ]?$
  | [0-9)]\*\*$ | [0-9)][ ]\*\*[ ]$
  | [x\u00d7*][ ]?10[ ]?-$                                  # 5x10-3
  | <su[bp]>[ ]?[-+]?$ | [0-9]&nbsp;$ | &(?!nbsp;)[a-z]{{2,8}};$ | &\#[0-9a-fx]{{0,5}};?$  # HTML
  | [0-9]-[0-9]{{1,8}}-$                                   # the day of a date
  | (?:(?<![A-Za-z])|(?<=\\left)|(?<=\\bigl))\\(?!(?:{_PLAIN_COMMANDS})[ ]?-?[ ]?$)[A-Za-z]+\|?[ ]?-?[ ]?$
  | \\(?!(?:{_GROUPS})\{{)[A-Za-z]+(?:\[[^\]]*\])?\{{[ ]?$
  | \}}[ ]?\{{[ ]?$ | [\^_]\{{[-+ ]*$
  | (?:{MINUS}|(?i:\b(?:[sc]b?q?rt|root|log|ln|exp|sin|cos|tan)))[ ]?\(?[ ]?(?:\\?\$)?$
    """,
    re.VERBOSE,
)
_FRACTION_BEFORE = re.compile(r"[0-9](?:-|[ ](?:and|&)[ ])$")
_PLAIN_AFTER = "text|textbf|textrm|mathrm|mathbf|quad|qquad|end|right|rm|displaystyle|approx|le|leq|ge|geq"
_PART_AFTER = re.compile(
    rf"""
    \^ | _[0-9A-Za-z{{(] | [\u00b2\u221a\u03c0\u2030{{]
  | \\(?!(?:{_PLAIN_AFTER}|times|cdot|div|pm|sim|to|in|neq?|implies|Rightarrow|rightarrow)(?![A-Za-z]))[A-Za-z]
  | [ ]\\(?:sqrt|pi|frac|binom|overline)(?![A-Za-z])
  | \.?\([0-9] | \.\\[A-Za-z] | \\[ ][0-9] | \u00b0[ ]?[0-9] | /[ ]?[({{\\-]   # 0.(3), 5(3), 5/(3)
  | [-\u2014](?![A-Za-z0-9\\$. ]) | --
  | [xyznij](?![A-Za-z]) | /[ ]?[xyzn](?![A-Za-z]) | [ ]pi(?![A-Za-z]) | [ ][eE][-+]?[0-9]
  | [ \u00a0]?(?:k|K|M|MM|B|T|bn|Bn|mn|Mn|Cr)(?![A-Za-z]) | [ ]?\u2030
  | (?:[ \u00a0-]?|[ ]?\\(?:text|textbf|textrm|mathrm|mathbf)\{{[ ]?)(?:{MAGNITUDE}|{FRACTION}(?![A-Za-z]))
  | {SMALLER_FOLLOWS}
  | <sup>(?!st|nd|rd|th) | &(?!nbsp;(?![0-9]))(?:[a-z]{{2,8}}[0-9]{{0,2}}|\#[0-9a-fx]{{1,6}});
  | [ ](?:and|&)[ ](?:(?:an?|one|two|three)[ -](?:half|thirds?|quarters?|fourths?|fifths?)|[0-9]+[ ]?/|[{_VULGAR}])
    """,
    re.VERBOSE,
)
_MILLIONS_AFTER = re.compile(r"[ ]?[mb](?![A-Za-z])(?![^$\n]*\$)")  # in $5m, not in $5 m$, which is 5 metres
_GROUP = re.compile(r"[0-9](?:[ $.,\u00a0]{1,4}|&[a-z]{2,8};)$")
_GOES_ON = re.compile(r"\.\.|\.?\u2026|\.?\\[dl]?dots")


def is_name(text: str, numeral: re.Match[str]) -> bool:
    """Whether the digits belong to a word, as in `H2O`, `x1` and `GPT-4`; such a numeral is skipped."""
    return _NAME.search(_before(text, numeral)) is not None


def value_of(text: str, numeral: re.Match[str]) -> Fraction | None:
    """The value of a match of `NUMERAL` in a text; None if it is not a number or its sign is unclear."""
    written = numeral[0]
    if len(written) > LONGEST:
        return None
    number = _NUMBER.fullmatch(written)
    before, after = _before(text, numeral), text[numeral.end() : numeral.end() + CONTEXT]
    sign = _sign(before, written) if number else None
    if number is None or sign is None or _PART_AFTER.match(after) or ("." in written and _GOES_ON.match(after)):
        return None
    if (before.endswith("$") and _MILLIONS_AFTER.match(after)) or larger_precedes(before, after):
        return None
    if len(written) == 3 and written[0] == "0" and _GROUP.search(before):  # 12, 000
        return None
    value = _magnitude(number)
    return None if value is None else sign * value


def _before(text: str, numeral: re.Match[str]) -> str:
    """The text before a numeral in its line, at most `CONTEXT` characters."""
    return text[max(0, numeral.start() - CONTEXT) : numeral.start()].rpartition("\n")[2]


def _sign(before: str, written: str) -> Sign:
    """The sign of a numeral, judged by the text before it in its line."""
    fraction = "/" in written or "frac" in written or any(char in _VULGAR for char in written)
    if _PART_BEFORE.search(before) or (fraction and _FRACTION_BEFORE.search(before)):
        return None
    if written.startswith(".") and before[-1:] in ("%", "'", '"'):
        return None
    before = _CURRENCY.sub("", before)
    if _PART_BEFORE.search(before):
        return None
    signed = _SIGNED.search(before)
    if signed is None:
        return 1
    # In `3-5` and `10 - 2` the sign joins two numbers and does not belong to the second.
    joins = before[: signed.start("sign")].rstrip(" ")[-1:].isdigit()
    if joins and bool(signed["space"]) == (signed["before"] == " "):
        return 1
    outer = _CURRENCY.sub("", before[: signed.start("sign")])
    if signed["before"] in _NO_SIGN_AFTER or signed["before"].isalnum() or outer[-1:] in ("-", "+", "\u2014"):
        return None
    if signed["sign"] == "+":
        return 1
    return None if signed["space"] else -1


def _magnitude(number: re.Match[str]) -> Fraction | None:
    """The value without its sign; None for a division by zero."""
    if number["vulgar"]:
        top, _, bottom = unicodedata.normalize("NFKD", number["vulgar"]).partition("\u2044")
    else:
        top = number["part"] or number["top"] or number["top1"] or "0"
        bottom = number["of"] or number["bottom"] or number["bottom1"] or number["over"] or "1"
    if not int(bottom):
        return None
    if number["value"]:
        plain = re.sub(_SEPARATOR, "", number["value"])
        return Fraction(plain) / int(bottom)
    return int(number["whole"] or number["units"] or 0) + Fraction(int(top), int(bottom))
