"""Numbers as models write them: each is read whole or not at all, and never without its sign."""

import sys
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roundoff.tasks.answers import last_number, marked_answer, whole_number_text

F = Fraction
READERS = {
    "strict": lambda text: marked_answer(f"so\n#### {text}"),
    "flexible": lambda text: last_number(f"at 4 the result is {text}"),
    "whole": whole_number_text,
}


def readings(text: str) -> list[F | None]:
    return [read(text) for read in READERS.values()]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5{,}000", F(5000)),
        ("5\\,000", F(5000)),
        ("5,\\!000", F(5000)),
        ("5\\!000\\!000", F(5_000_000)),
        ("1,00,000", F(100_000)),  # Indian groups
        ("12\u00a0000", F(12000)),
        ("12\u2009000", F(12000)),
        ("12\u202f345", F(12345)),
        ("12\u2007000", F(12000)),
        ("12'000", F(12000)),
        ("12\u2019000", F(12000)),
        ("12~000", F(12000)),
        ("5\u200b000", F(5000)),  # a space of no width does not belong to the number
        ("５０００", F(5000)),
        ("٥٠", F(50)),
        ("١٬٢٣٤٫٥", F(2469, 2)),
        ("½", F(1, 2)),
        ("1½", F(3, 2)),
        ("1 ½", F(3, 2)),
        ("-1½", F(-3, 2)),
        ("3⁄4", F(3, 4)),
        ("\\frac{3}{4}", F(3, 4)),
        ("-\\dfrac34", F(-3, 4)),
        ("1\\tfrac{1}{2}", F(3, 2)),
        ("US$5", F(5)),
        ("-US$5", F(-5)),
        ("5 €", F(5)),
        ("€\u00a05", F(5)),
        ("$-5$", F(-5)),
        ("$\\frac{1}{2}$", F(1, 2)),
        ("-5%", F(-5)),
    ],
)
def test_a_number_is_read_whole(written: str, value: F) -> None:
    assert readings(written) == [value] * 3


MINUS_SIGNS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d\u2796\u02d7\ufe58"
OTHER_DASHES = "\u2014\u2015\u2e3a\u2e3b\u301c\u3030\u30a0\u058a\u05be\u1806\u2e17\u2e1a\u2e40\ufe31\ufe32\u00ad\u207b"


@pytest.mark.parametrize("sign", MINUS_SIGNS)
def test_every_minus_sign_is_understood(sign: str) -> None:
    assert readings(f"{sign}5") == [F(-5)] * 3
    assert readings(f"{sign}$5.50") == [F(-11, 2)] * 3
    assert last_number(f"it was 5{sign}3") == 3  # the sign joins two numbers


@pytest.mark.parametrize("sign", OTHER_DASHES)
def test_a_dash_that_may_be_a_sign_leaves_no_number(sign: str) -> None:
    assert readings(f"{sign}5") == [None] * 3
    assert readings(f"{sign} 5") == [None] * 3


@pytest.mark.parametrize(
    "written",
    [
        # a sign that is doubled, apart, in words, or outside a bracket
        *(
            "- 5",
            "− 5",
            "- $5",
            "--5",
            "+-5",
            "-+5",
            "±5",
            "\\pm 5",
            "-(5)",
            "-{5}",
            "{-}5",
            "-**5**",
            "- **5**",
            "-'5'",
        ),
        *("minus 5", "negative $5", "-\u00a05", "-\\,5", "-√5", "负5", "5x10-3"),
        # numbers that can be read in more than one way
        *(
            "12 000",
            "1 234 567",
            "1.234,56",
            "1.234.567",
            "0,123",
            "12,5",
            "1,000,00",
            "1,00,00",
            "1''000",
            "5,000'000",
        ),
        *("5{,}00", "5{,}000,000", "5،00", "5·3", "1\\ 000"),
        # powers, other bases, roots, products
        *("1e5", "1E+5", "2.5e-3", "1e999999999", "2³", "2^3", "2^{3}", "2**3", "10⁻³", "1.5 × 10^3", "1.5 x 10^3"),
        *("1.5 \\times 10^{3}", "1.5·10³", "1.5 * 10**3", "0b101", "0x1F", "0o17", "101₂", "101_2", "101_{2}"),
        *("√5", "\\sqrt{5}", "\\sqrt[3]{8}", "5√2", "5\\sqrt{2}", "5π", "5\\pi", "5x", "\\log 5", "sin(30)", "0.(3)"),
        *("5(3)", "0.\\overline{3}", "0.333...", "0.33…", "5̅", "\\frac{x}{2}", "\\frac{\\sqrt{3}}{2}", "\\frac12\\pi"),
        # more than one number
        *(
            "2:30",
            "2 : 1",
            "1/2/2020",
            "2020-01-02",
            "1.2.3",
            "3/-4",
            "5/0",
            "5½/2",
            "½5",
            "1-1/2",
            "1  1/2",
            "5'10\"",
            "2h30",
        ),
        *("5 and 1/2", "5 and a half", "5...8"),
        # words of magnitude
        *(
            "5 million",
            "5-million",
            "5k",
            "5M",
            "$5B",
            "5 thousand",
            "5万",
            "5亿",
            "25‰",
            "25 ‰",
            "$5 M",
            "5 bn",
            "5\\text{ million}",
        ),
    ],
)
def test_no_part_of_something_else_is_read(written: str) -> None:
    assert readings(written) == [None] * 3


@pytest.mark.parametrize("word", ["H2O", "B12", "x5", "COVID-19", "v1.2", "No.5", "①", "Ⅷ", "x²"])
def test_digits_of_a_word_are_skipped(word: str) -> None:
    assert readings(word) == [None, F(4), None]


@pytest.mark.parametrize(
    "text", ["3-5", "10 - 2", "3 to 5", "5 or 6", "5, 6", "3 + 4", "3 × 4", "5 + ½", "5 ± 1", "12 13"]
)
def test_a_marker_before_two_numbers_marks_no_answer(text: str) -> None:
    assert marked_answer(f"#### {text}") is None


def test_the_last_numeral_decides_even_if_it_cannot_be_read() -> None:
    assert last_number("18 of them, at 2:30") is None
    assert last_number("18 of them, without H2O") == 18
    assert last_number("First 3, then\n-18") == -18


INTEGERS = st.integers(0, 10**9)
SEPARATORS = st.sampled_from([",", "{,}", "\\,", "\\!", "'", "’", "\u00a0", "\u2009", "\u202f", "~", "", " ", "_", "·"])
SIGNS = st.sampled_from(["", "", "+", *"-−–—‐－﹣", "- ", "--", "−\u00a0", "minus ", "-(", "±"])
CURRENCIES = st.sampled_from(["", "", "$", "€", "\\$", "US$", "£ "])
UNITS = st.sampled_from(
    ["", "", "%", "\\%", " €", " kg", "kg", ".", ", all told", " million", "k", "^2", "²", ")", "°"]
)
DIGITS = {"ascii": "0123456789", "full": "０１２３４５６７８９", "arabic": "٠١٢٣٤٥٦٧٨٩"}
SCALES = {" million": 10**6, "k": 10**3}


@st.composite
def numbers(draw: st.DrawFn) -> tuple[str, F]:
    """A number in one of the ways of writing it, with its value."""
    whole = draw(INTEGERS)
    separator = draw(SEPARATORS)
    text, value = f"{whole:,}".replace(",", separator), F(whole)
    kind = draw(st.sampled_from(["integer", "decimal", "fraction", "mixed", "vulgar", "latex", "scientific", "e"]))
    top, bottom = draw(st.integers(1, 99)), draw(st.integers(1, 99))
    if kind == "decimal":
        text, value = f"{text}.{top:02}", value + F(top, 100)
    elif kind == "fraction":
        text, value = f"{whole}{draw(st.sampled_from(['/', ' / ', '⁄']))}{bottom}", F(whole, bottom)
    elif kind == "mixed":
        text, value = f"{whole} {top}/{bottom}", whole + F(top, bottom)
    elif kind == "vulgar":
        text, value = f"{whole}{draw(st.sampled_from(['', ' ']))}¾", whole + F(3, 4)
    elif kind == "latex":
        text, value = f"\\frac{{{whole}}}{{{bottom}}}", F(whole, bottom)
    elif kind in ("scientific", "e"):
        power = draw(st.integers(-4, 6))
        times = (
            f"e{power}" if kind == "e" else draw(st.sampled_from([" × ", "x", " \\times ", "·", " * "])) + f"10^{power}"
        )
        text, value = f"{whole}{times}", F(whole) * F(10) ** power
    digits = draw(st.sampled_from(list(DIGITS.values())))
    text = text.translate(str.maketrans(DIGITS["ascii"], digits))
    sign, unit = draw(SIGNS), draw(UNITS)
    negative = sign not in ("", "+", "±")
    value *= SCALES.get(unit, 1)
    if unit in ("^2", "²"):
        value = value**2
    return f"{sign}{draw(CURRENCIES)}{text}{unit}", -value if negative else value


@settings(max_examples=400, deadline=None)
@given(numbers())
@example(("−5{,}000", F(-5000)))
def test_a_number_is_read_with_its_value_or_not_at_all(number: tuple[str, F]) -> None:
    text, value = number
    ambiguous = text.startswith("±") or (("^2" in text or "²" in text) and "-" in text)
    for found in readings(text):
        assert found in ((None,) if ambiguous else (None, value)), text


PLAIN_SIGNS = st.sampled_from(["", "-", "−", "–", "－"])


@settings(max_examples=200, deadline=None)
@given(
    PLAIN_SIGNS, st.sampled_from(["", "$", "€", "US$"]), INTEGERS, st.sampled_from([",", "{,}", "\\,", "’", "\u202f"])
)
def test_the_usual_ways_are_understood(sign: str, currency: str, whole: int, separator: str) -> None:
    text = f"{sign}{currency}" + f"{whole:,}".replace(",", separator)
    assert readings(text) == [F(-whole if sign else whole)] * 3


HOSTILE = [
    *("1 ", "1,", "9", "1/", "1:", "1-", "1e", "1\u00a0", "1\\,", "1 000", "1 1/2 ", "{,}", "5{,}", "\\,", "\u00a0"),
    *("１", "٥", "½"),
    *("\\frac", "\\frac{", "\\frac{1}", "-", "- ", "$", "$1", "e", "A", "A1", "(", "-(", "**", "#"),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for read in READERS.values():
        read(text)  # a pattern that backtracks without bound would take minutes here


def test_thousands_of_digits_do_not_raise() -> None:
    assert readings("9" * 100_000) == [None] * 3
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert readings("9" * 1000) == [None] * 3
        assert readings("-" + "9" * 60) == [F(-(10**60) + 1)] * 3
    finally:
        sys.set_int_max_str_digits(before)
