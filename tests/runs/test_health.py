"""What was no normal answer: counted once, and put into words."""

import pytest

from roundoff.runs.health import Tally, flaw_of, health_of


@pytest.mark.parametrize(
    ("text", "nonfinite", "reward_error", "truncated", "expected"),
    [
        ("7", False, False, False, ""),
        ("7", False, False, True, "truncated"),
        (" \n", False, False, False, "empty"),
        ("", False, False, True, "truncated"),
        ("", False, True, True, "reward_error"),
        ("7", True, True, True, "nonfinite"),
    ],
)
def test_the_first_flaw_that_holds_counts(text, nonfinite, reward_error, truncated, expected):
    assert flaw_of(text, nonfinite=nonfinite, reward_error=reward_error, truncated=truncated) == expected


def test_a_tally_in_words_and_shares():
    tally = Tally.of(["nonfinite"] * 13 + ["truncated", "empty", ""])
    assert tally.failures() == ("13 of 16 responses were not computed: the logits were not finite",)
    assert tally.words()[1:] == (
        "1 of 16 responses reached the length limit without an end",
        "1 of 16 responses had no text",
    )
    assert tally.shares() == {"nonfinite": 13 / 16, "reward_error": 0.0, "truncated": 1 / 16, "empty": 1 / 16}
    assert tally.notes() == tally.failures()
    assert Tally.of(["truncated", "truncated", ""]).notes() == (
        "2 of 3 responses reached the length limit without an end",
    )
    assert Tally.of(["empty", ""]).notes() == ("1 of 2 responses had no text",)
    assert Tally.of([""] * 9).words() == Tally.of([""] * 9).notes() == Tally.of([]).notes() == ()
    assert Tally.of(["reward_error", ""]).failures() == ("1 of 2 rewards could not be computed and count as 0",)


def row(step: int, **values) -> dict:
    return {"step": step, "prompts": 4, "trained": False, "nonfinite": 0, "reward_errors": 0, **values}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "nothing was trained in 2 steps: the rewards within each group were equal"),
        ({"nonfinite": 8}, "none of the 16 rollouts could be computed, for the logits were not finite"),
        ({"reward_errors": 8}, "the reward of every one of the 16 rollouts failed"),
        ({"empty": 1.0}, "every one of the 16 rollouts was empty"),
        ({"truncated": 1.0}, "were equal, and every rollout reached the length limit without an end"),
        ({"nonfinite": 3}, "6 of 16 rollouts were not computed"),
    ],
)
def test_why_nothing_was_trained(values, said):
    health = health_of([{"step": 0}, row(1, **values), row(2, **values)], group_size=2)
    assert health.untrained.startswith("nothing was trained in 2 steps: ")
    assert said in health.untrained
    assert health.notes() == (health.untrained,)


def test_one_step_that_trains_is_enough_and_the_others_are_counted():
    rows = [row(step) for step in range(1, 4)] + [row(4, trained=True, nonfinite=2, reward_errors=1)]
    health = health_of(rows, group_size=2)
    assert health.untrained == ""
    assert health.notes() == (
        "2 of 32 rollouts were not computed (the logits were not finite) and were left out of training",
        "the rewards of 1 of 32 rollouts failed and count as 0",
        "only 1 of 4 steps trained anything: no group had unequal rewards",
    )


def test_rows_that_do_not_say_accuse_nobody():
    assert health_of([{"step": 0}, {"step": 1, "reward": 0.5}], group_size=2).notes() == ()
    assert health_of([], group_size=2).notes() == ()


def test_an_ordinary_run_has_nothing_to_note():
    assert health_of([row(1, trained=True), row(2, trained=True)], group_size=2).notes() == ()
