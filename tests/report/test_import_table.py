"""Scores from elsewhere: what can be concluded from them, and what is refused."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats as reference

from roundoff.config import ConfigError
from roundoff.report.import_table import imported_table, read_table

CSV = "id,score,n,baseline\nplain,76.88,1319,\nnoise,68.92,1319,plain\naqn,70.58,1319,noise\nopen,,,plain\n"
MARKDOWN = """# Scores

| Experiment | Accuracy | N | Baseline |
|---|---:|---|---|
| plain | **76.88 %** | 1,319 | |
| noise | 68.92 % | 1,319 | plain |
| aqn | 70.58 | 1,319 | noise |
| open | – | | plain |

| other | table |
|---|---|
"""


def written(tmp_path: Path, text: str, name: str = "scores.csv") -> Path:
    (tmp_path / name).write_text(text, "utf-8")
    return tmp_path / name


@pytest.mark.parametrize(("text", "name"), [(CSV, "scores.csv"), (MARKDOWN, "scores.md")])
def test_a_difference_of_eight_points_exceeds_the_error_and_one_of_two_does_not(
    tmp_path: Path, text: str, name: str
) -> None:
    table = read_table(written(tmp_path, text, name))
    assert [row.verdict for row in table.rows] == [
        "", "exceeds the error of the test set", "within its error", "no score"
    ]  # fmt: skip
    assert "1 of 2 published differences exceeds the error" in table.conclusion
    console = Console(width=120, record=True, file=StringIO())
    console.print(imported_table(table))
    assert ["noise", "68.9", "%", "[66.4,", "71.4]", "plain", "−8.0", "[−11.3,", "−4.6]"] in [
        line.split()[:9] for line in console.export_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["b,0.5,1000,a"], "The only published difference exceeds the error of the test set: b."),
        (["b,0.79,1000,a"], "The only published difference does not exceed the error of the test set."),
        (["b,0.79,1000,a", "c,0.81,1000,a"], "None of 2 published differences exceeds the error of the test set"),
        (["b,0.5,1000,a", "c,0.4,1000,a"], "2 of 2 published differences exceed the error of the test set"),
    ],
)
def test_the_conclusion_counts_in_the_right_number(tmp_path: Path, lines: list[str], expected: str) -> None:
    table = read_table(written(tmp_path, "\n".join(["id,score,n,baseline", "a,0.8,1000,", *lines])))
    assert table.conclusion.startswith(expected)


def test_intervals_against_published_values(tmp_path: Path) -> None:
    """Newcombe 1998, table II, method 10, 56/70 and 48/80: 0.2000 with 0.0524 to 0.3339."""
    table = read_table(written(tmp_path, "id,score,n,baseline\na,0.8,70,b\nb,0.6,80,\n"))
    change = table.rows[0].difference
    assert change is not None
    assert (change.low, change.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    chi_square = reference.chi2_contingency([[56, 14], [48, 32]], correction=False)
    assert change.p == pytest.approx(chi_square.pvalue)
    wilson = reference.binomtest(56, 70).proportion_ci(method="wilson")
    assert table.rows[0].score is not None
    assert (table.rows[0].score.low, table.rows[0].score.high) == pytest.approx((wilson.low, wilson.high))


def test_seed_limit_is_where_the_difference_is_just_explained(tmp_path: Path) -> None:
    change = read_table(written(tmp_path, CSV)).rows[1]
    assert change.difference is not None and change.seed_limit is not None
    half = change.difference.high - change.difference.estimate
    assert half**2 + 2 * (1.959964 * change.seed_limit) ** 2 == pytest.approx(change.difference.estimate**2)
    assert read_table(written(tmp_path, CSV)).rows[2].seed_limit is None


def test_number_of_problems_and_baseline_may_be_given_apart(tmp_path: Path) -> None:
    path = written(tmp_path, "name,score\na,0.7\nb,0.5\n")
    (first, second) = read_table(path, problems=1000, baseline="a").rows
    assert first.difference is None and second.difference is not None
    assert second.difference.estimate == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,score\na,70\n", "number of problems is missing"),
        ("id,grade\na,70\n", "no column score"),
        ("id,score,n\n", "holds no table"),
        ("id,score,n\na,seventy,10\n", "must be a number, but is 'seventy'"),
        ("id,score,n\na,170,10\n", "must be 0 to 100 %"),
        ("id,score,n\na,nan,10\n", "finite number"),
        ("id,score,n\na,70,10\na,71,10\n", "twice"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_table(written(tmp_path, text))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "absent.csv")


def test_a_percent_sign_makes_percent_of_small_scores_too(tmp_path: Path) -> None:
    first, second = read_table(written(tmp_path, "id,score,n\na,0.9 %,1000\nb,0.5 %,1000\n"), baseline="a").rows
    assert first.score is not None and second.difference is not None
    assert first.score.estimate == pytest.approx(0.009)
    assert second.difference.estimate == pytest.approx(-0.004)
