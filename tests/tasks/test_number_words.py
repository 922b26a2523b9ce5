"""Words, marks and units that change the number beside them, in several languages."""

import unicodedata

import pytest

from roundoff.tasks.answers import last_number, marked_answer, whole_number_text

MAGNITUDES = """
    hundred thousand million billion lakh crores Millionen Tsd. Mio. Mrd. tausend mille millions
    milliards mil millones mila milioni miliardi milhões bilhões miljoen miljard miljoner tusen tysięcy tys. mld
    тысяч тыс. миллионов млн млрд мільйонів milyon milyar ribu juta triệu tỷ nghìn हज़ार लाख करोड़ พัน ล้าน ألف مليون
    千 万 億 亿 천 만 억 조
"""


@pytest.mark.parametrize("word", MAGNITUDES.split())
def test_a_number_is_not_read_without_its_word_of_magnitude(word: str) -> None:
    for written in (f"5 {word}", f"5{word}", f"5\u00a0{word}"):
        assert last_number(f"so it is {written}") is None
        assert marked_answer(f"#### {written}") is None
        assert whole_number_text(written) is None
    assert last_number(f"so it is 5 {unicodedata.normalize('NFC', word)}") is None


@pytest.mark.parametrize(
    "words",
    [
        *("minus", "negative", "moins", "menos", "meno", "минус", "отрицательное число", "negativ", "eksi", "âm"),
        *("マイナス", "마이너스", "负", "負", "سالب"),
    ],
)
def test_a_sign_in_words_leaves_no_number(words: str) -> None:
    assert last_number(f"x {words.split()[0]} 5") is None
    assert last_number(f"x {words.split()[0]} $5") is None


@pytest.mark.parametrize("words", ["au moins", "al menos", "ao menos", "pelo menos", "por lo menos", "almeno"])
def test_at_least_is_not_a_sign(words: str) -> None:
    assert last_number(f"c'est {words} 5") == 5


@pytest.mark.parametrize(
    "written", ["5 miles", "5 milk cartons", "5 mills", "5 Crayons", "5 pies", "$5 markers", "5 m"]
)
def test_words_that_only_begin_like_a_magnitude_are_units(written: str) -> None:
    assert last_number(f"so it is {written}") == 5


@pytest.mark.parametrize(
    "written", ["$5m", "£5b", "$5 m", "€5\u00a0MM", "Rs 5 Cr", "2 thirds", "7 tenths", "5 pi", "5/x"]
)
def test_short_magnitudes_and_parts(written: str) -> None:
    assert last_number(f"so it is {written}") is None


def test_metres_in_latex_are_not_millions() -> None:
    assert last_number("so it is $5 m$") == 5


@pytest.mark.parametrize(
    "written",
    ["1 hour 30 minutes", "1 hour and 30 minutes", "5 ft 6 in", "2 days, 5 hours", "3 dollars and 20 cents", "1h 30m"],
)
def test_a_quantity_in_two_units_is_neither_of_its_numbers(written: str) -> None:
    assert last_number(f"that takes {written}") is None
    assert last_number(f"{written}.") is None
    assert marked_answer(f"#### {written}") is None


def test_units_that_are_not_one_quantity_are_read() -> None:
    assert last_number("in 5 days they work 30 hours") == 30
    assert marked_answer("#### 72 clips in 2 months") == 72


@pytest.mark.parametrize(
    "written",
    [
        *("42 times 2", "42 plus 2", "42 divided by 2", "42 over 2", "42 out of 50", "42 point 5", "42 R 3"),
        *("42 with a remainder of 3", "42 to the power of 2", "42 -> 43", "42 \u2192 43", "42 | 43", "42 vs. 43"),
    ],
)
def test_a_marker_before_two_numbers_joined_by_a_word_marks_no_answer(written: str) -> None:
    assert marked_answer(f"#### {written}") is None


@pytest.mark.parametrize(
    "written",
    [
        *("12, 000", "12 ,000", "12. 000", "$12$,$000$", "5&nbsp;000", "5&nbsp;123", "5&thinsp;000"),  # groups
        *(
            "|-5|",
            "\\left|-5\\right|",
            "\\lvert -5 \\rvert",
            "\\left\\lfloor 5.5\\right\\rfloor",
            "\\lfloor -5.5 \\rfloor",
        ),
        *("abs(-5)", "floor(5.5)", "\u230a5.5\u230b", "-\\left(5\\right)", "-\\left(\\frac{5}{2}\\right)"),
        *("-USD 5", "- USD 5", "-Rs. 5", "5<sup>2</sup>", "10<sup>5</sup>", "x<sub>5</sub>", "10<sup>-5</sup>"),
        *("&minus;5", "&#8722;5", "&#45;5", "5&times;10", "1&frac12;", "1 e5"),
    ],
)
def test_marks_around_a_number_are_part_of_it(written: str) -> None:
    assert last_number(f"so it is {written}") is None


@pytest.mark.parametrize(
    "written", ["\\left(5\\right)", "5<sup>th</sup>", "5&nbsp;km", "x =&nbsp;5", "USD 5", "| 5 |", "-> 5", "at 4, 5"]
)
def test_marks_that_change_nothing(written: str) -> None:
    assert last_number(f"so it is {written}") == 5
