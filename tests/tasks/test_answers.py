"""Reading final answers; every expected value was derived by hand."""

from fractions import Fraction

import pytest

from roundoff.tasks.answers import last_number, marked_answer, whole_number_text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("72", "72"),
        ("1,080", "1080"),
        ("1,234,567.5", "2469135/2"),
        ("-5", "-5"),
        ("+5", "5"),
        ("−5", "-5"),  # U+2212
        ("$5", "5"),
        ("-$5.50", "-11/2"),
        ("$-5.50", "-11/2"),
        ("\\$12", "12"),
        ("€7", "7"),
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 1/2", "3/2"),
        ("6 / 8", "3/4"),
        (".5", "1/2"),
        ("0.75", "3/4"),
        ("18.", "18"),
        ("18.00", "18"),
        ("25%", "25"),  # a unit, never 0.25
        ("5€", "5"),
        ("007", "7"),
        ("0", "0"),
    ],
)
def test_a_number_is_read_alone_after_a_marker_and_at_the_end(written: str, value: str) -> None:
    expected = Fraction(value)
    assert whole_number_text(written) == expected
    assert marked_answer(f"so\n#### {written}") == expected
    assert marked_answer(f"so ####{written}\n") == expected
    assert last_number(f"at 4 we have {written}") == expected
    assert last_number(f"4 = {written} dollars.") == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "x",
        "1,08",
        "1.2.3",
        "1e5",
        "12,5",
        "1/2/2020",
        "5/0",
        "9" * 5000,
        "B12",
        "H2O",
        "1_000",
        "2^3",
        "0x1F",
        "1.e5",
    ],
)
def test_no_part_of_something_else_is_an_answer(written: str) -> None:
    assert whole_number_text(written) is None
    assert marked_answer(f"#### {written}") is None
    assert last_number(written) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 5 and #### 7", 7),  # the last marker counts
        ("#### 5 ####", None),
        ("#### 18 dollars", 18),
        ("#### dollars: 18", None),
        ("#### **18**", None),
        ("the answer is 18", None),
        ("### 18", None),
    ],
)
def test_the_number_after_the_last_marker_is_the_strict_answer(text: str, value: int | None) -> None:
    assert marked_answer(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10-7=3", 3),
        ("it was 5-3", 3),  # a minus sign after a digit subtracts
        ("it is (-4)", -4),
        ("x=-5", -5),
        ("on 3-5", 5),
        ("10 - 2", 2),
        ("wait...18", 18),
        ("in 2020, 1,000,000", 1_000_000),
        ("$12/hour", 12),
        ("<<24+48=72>>72", 72),
        ("$x = 18$", 18),
        ("no number", None),
    ],
)
def test_the_last_number_is_the_flexible_answer(text: str, value: int | None) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize("text", ["72 dollars", "about 72", "72 73", "7x"])
def test_a_text_with_more_than_a_number_is_not_a_number(text: str) -> None:
    assert whole_number_text(text) is None


@pytest.mark.parametrize("unit", ["1 ", "1,", "9", "$", "1/", "####", "1,111", "-", "1.", " "])
def test_reading_takes_linear_time(unit: str) -> None:
    """A broken model repeats itself for thousands of tokens, on which a backtracking pattern would hang."""
    text = unit * 50_000
    marked_answer(text)
    last_number(text)
    whole_number_text(text)
