"""Lines of outcomes: what is read back, what of older versions is, and what is refused."""

import json
from dataclasses import replace

import pytest

from roundoff.runs.health import Tally
from roundoff.runs.outcomes import (
    DamagedRunError,
    Evaluation,
    Outcome,
    evaluation_file,
    evaluation_lines,
    read_evaluation,
)

OUTCOMES = (
    Outcome("a", "1+1=", "2", (1, 0), 1, "2", "2", flaws=("", "nonfinite")),
    Outcome("b", "2+2=", "4", (0, 0), 0, "", "4", truncated=True, flaws=("nonfinite", "truncated"), clean_flaw="empty"),
)


def written(path, text: str):
    file = evaluation_file(path, 3)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return path


def test_flaws_come_back_and_are_tallied(tmp_path):
    evaluation = read_evaluation(written(tmp_path, evaluation_lines(Evaluation(3, OUTCOMES))), 3)
    assert [o.flaws for o in evaluation.outcomes] == [o.flaws for o in OUTCOMES]
    assert evaluation.deployed_tally == Tally(4, nonfinite=2, truncated=1)
    assert evaluation.clean_tally == Tally(2, empty=1)
    numbers = evaluation.numbers()
    assert (numbers["deployed"], numbers["deployed_nonfinite"], numbers["clean_empty"]) == (0.25, 0.5, 0.5)
    assert numbers["problems"] == 2


def test_files_of_the_first_version_are_read_and_equal_what_a_newer_one_writes(tmp_path):
    rows = [json.loads(line) for line in evaluation_lines(Evaluation(3, OUTCOMES)).splitlines()]
    for row in rows:
        del row["flaws"], row["clean_flaw"]
    evaluation = read_evaluation(written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)), 3)
    assert evaluation == Evaluation(3, OUTCOMES)
    assert evaluation.deployed_tally == Tally(2, truncated=1)  # of first draws, as far as can be told


@pytest.mark.parametrize(
    ("outcomes", "problems", "reason"),
    [
        (OUTCOMES[:1], 2, "holds 1 outcomes, but 2 problems were scored"),
        ((OUTCOMES[0], OUTCOMES[0]), None, "a problem was scored twice"),
        ((replace(OUTCOMES[0], flaws=("",)),), None, "a flaw .* for each draw"),
        ((replace(OUTCOMES[0], flaws=("", "broken")),), None, "a flaw must be one of nonfinite, reward_error"),
    ],
)
def test_half_of_an_evaluation_is_none(tmp_path, outcomes, problems, reason):
    run = written(tmp_path, evaluation_lines(Evaluation(3, outcomes)))
    with pytest.raises(DamagedRunError, match=reason):
        read_evaluation(run, 3, problems)
