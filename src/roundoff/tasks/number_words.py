"""Words that change the number beside them, in the languages that models write most, as parts of a pattern.

`tasks.numerals` does not read a number with such a word: `5 Millionen` is not 5, and neither is `moins 5`. The words
are folded in the same way as the texts (`tasks.characters`).
"""

import re

from roundoff.tasks.characters import folded

# Stems match with any ending. `mil` and `mille` are among the whole words, because of miles.
_STEMS = (
    "hundred|thousand|million|milliard|billion|billiard|trillion|lakh|crore|myriad"
    "|tausend|duizend|tusen|tuhat|tisíc|tysi[ąeę]c|miljoen|miljon|miljard|biljo|bilion|bilió|milion|milió|miliard"
    "|millón|millon|millar|billón|billon|millier|milhão|milhões|milhar|bilhão|bilhões|trilh|milyon|milyar|miliar|trilyun"
    "|тысяч|миллион|миллиард|триллион|мільйон|мільярд|тисяч|χιλιάδες|εκατομμύρι|δισεκατομμύρι"
    "|सौ|हज़ार|हजार|लाख|करोड़|करोड|हाज़ार|হাজার|লক্ষ|কোটি|พัน|หมื่น|แสน|ล้าน"
    "|ألف|آلاف|مئة|مليون|ملايين|مليار|هزار|میلیون|میلیارد|אלף|אלפים|מיליון|מיליארד"
)
_WORDS = (
    "mil|mille|mila|mio|mrd|mrds|mdr|mia|mld|mln|mlrd|tsd|tys|tis|ribu|juta|nghìn|ngàn|triệu|tỷ|tỉ|тыс|млн|млрд|трлн"
)
_BIG_CHARACTERS = "百千万萬億亿兆백천만억조"

MAGNITUDE = rf"(?:(?i:{folded(_STEMS)})|(?i:{folded(_WORDS)})(?!\w)|[{_BIG_CHARACTERS}])"
"""A word after a number that multiplies it."""

MINUS = (
    r"(?i:\b(?:minus|negativ\w*|mínus|miinus|минус|мінус|отрицательн\w*|négati\w*|negatif|eksi|âm|μείον|πλην)"
    r"|(?<!\bau[ ])(?<!\bdu[ ])\bmoins|(?<!\bal[ ])(?<!\bao[ ])(?<!lo[ ])\bmenos|(?<!\blo[ ])\bmeno"
    r"|(?<!\w)(?:سالب|ناقص|منفی|ऋण)"
    r"|マイナス|마이너스|ลบ|[负負])"
)
"""A word before a number that may be its sign; `au moins` and `al menos` are excluded, as they mean "at least"."""

FRACTION = r"(?:thirds|fifths|sixths|sevenths|eighths|ninths|tenths|twelfths)"
"""A word after a number that divides it; `quarters` is not among them, because they are coins as well."""

OPERATOR = (
    r"(?:plus|minus|times|divided[ ]by|multiplied[ ]by|over|out[ ]of|mod(?:ulo)?|point|vs\.?|versus|remainder"
    r"|with[ ]a[ ]remainder[ ]of|[rR]|(?:raised[ ])?to[ ]the[ ]power[ ]of)"
)
"""A word between two numbers that joins them into one quantity."""

# (larger unit, smaller unit): `1 hour 30 minutes` is one quantity, neither 1 nor 30.
_HOURS, _MINUTES, _DAYS = r"(?:hours?|hrs?\.?|h)", r"(?:minutes?|mins?\.?|m)", r"days?"
_PAIRS = (
    (_DAYS, _HOURS),
    (_HOURS, _MINUTES),
    (_MINUTES, r"(?:seconds?|secs?\.?|s)"),
    (r"weeks?", _DAYS),
    (r"years?", r"months?"),
    (r"(?:feet|foot|ft\.?)", r"(?:inch(?:es)?|in\.?)"),
    (r"(?:dollars?|euros?)", r"cents?"),
    (r"(?:pounds?|lbs?\.?)", r"(?:ounces?|oz\.?|pence)"),
)
_AND = r",?[ ](?:and[ ])?"
SMALLER_FOLLOWS = "|".join(rf"[ ]?{large}{_AND}[0-9./]+[ -]?{small}(?![A-Za-z])" for large, small in _PAIRS)
"""A unit after a number, followed by a second number with the next smaller unit."""
_COMPILED = tuple(
    (re.compile(rf"[0-9][ ]?{large}{_AND}$"), re.compile(rf"[ -]?{small}(?![A-Za-z])")) for large, small in _PAIRS
)


def larger_precedes(before: str, after: str) -> bool:
    """Whether a number is the second one of such a quantity, judged by the text before and after it."""
    return any(large.search(before) and small.match(after) for large, small in _COMPILED)
