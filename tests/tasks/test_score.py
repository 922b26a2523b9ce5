"""Rewards: which values are valid, what is an error, and that a reward which hangs ends the run."""

import math
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from roundoff.tasks import Problem
from roundoff.tasks.base import RewardError
from roundoff.tasks.score import checked_reward, score_responses
from roundoff.tasks.watchdog import RewardTimeoutError

PROBLEM = Problem("mine/a", "1=", "1")


class Giving:
    """A task whose reward returns a given value, or raises it."""

    name = "giving"
    reward_seconds: float | None = 60.0

    def __init__(self, value):
        self.value = value

    def train(self):
        return [PROBLEM]

    test = train

    def reward(self, problem, response):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value() if callable(self.value) else self.value

    def solution(self, problem):
        return None


def scored(value):
    return score_responses(Giving(value), [PROBLEM], ["a"])


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1.0, 1.0),
        (1, 1.0),
        (0.25, 0.25),
        (-0.5, -0.5),  # a penalty
        (True, 1.0),
        (False, 0.0),
        (np.float32(1.0), 1.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (Fraction(1, 2), 0.5),
    ],
)
def test_numbers_of_at_most_one_are_rewards(value, reward):
    assert (scored(value).rewards, scored(value).errors) == ((reward,), 0)
    assert checked_reward(Giving(value), PROBLEM, "a") == reward


def test_a_tensor_of_one_element_is_a_reward():
    import torch

    assert scored(torch.tensor([1.0])).rewards == (1.0,)
    assert scored(torch.ones(2)).errors == 1


@pytest.mark.parametrize(
    "value",
    [
        *(math.nan, math.inf, -math.inf, 1.5, 2, 100, None, "1.0", b"1", [], 1j, {"score": 1.0}, 10**400, np.ones(2)),
        *(ValueError("x"), MemoryError(), RecursionError(), SystemExit(0), StopIteration(), AssertionError()),
    ],
    ids=repr,
)
def test_a_value_that_is_not_a_reward_is_an_error_and_counts_as_zero(value):
    assert (scored(value).rewards, scored(value).errors) == ((0.0,), 1)
    with pytest.raises(RewardError):
        checked_reward(Giving(value), PROBLEM, "a")


def test_an_interrupt_is_not_an_error_of_the_reward():
    with pytest.raises(KeyboardInterrupt):
        scored(KeyboardInterrupt())


def test_each_response_has_its_own_outcome():
    values = iter([1.0, None, 0.5, math.nan])
    result = score_responses(Giving(lambda: next(values)), [PROBLEM] * 4, ["a"] * 4)
    assert (result.rewards, result.errors) == ((1.0, 0.0, 0.5, 0.0), 2)


def endless():
    while True:
        pass


def asleep():
    threading.Event().wait(60)


def stubborn():
    """A reward that swallows every `Exception`, as a package might."""
    while True:
        try:
            endless()
        except Exception:
            continue


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
@pytest.mark.parametrize("stuck", [endless, asleep, stubborn])
def test_a_reward_that_hangs_ends_the_run_and_names_the_problem(stuck):
    task, before = Giving(stuck), signal.getsignal(signal.SIGUSR1)
    task.reward_seconds = 0.2
    with pytest.raises(RewardTimeoutError, match=r"task giving: the reward of problem 'mine/a' took more than 0.2 s"):
        score_responses(task, [PROBLEM], ["5" * 500])
    assert signal.getsignal(signal.SIGUSR1) == before


def test_without_a_limit_nothing_watches():
    task = Giving(None)
    task.reward_seconds = None
    count = threading.active_count()
    seen = []
    task.value = lambda: seen.append(threading.active_count()) or 1.0
    assert score_responses(task, [PROBLEM], ["a"]).rewards == (1.0,)
    assert seen == [count]


SCRIPT = """
import sys, threading
import roundoff.tasks.watchdog as watchdog
from roundoff.tasks import Problem
from roundoff.tasks.score import score_responses
watchdog.GRACE_SECONDS = 0.3
class Mine:
    name, reward_seconds = "mine", 0.3
    def reward(self, problem, response):
        if "{how}" == "c":
            10 ** (10 ** 10)  # one call into C that holds the lock
        try:
            threading.Event().wait(60)
        except BaseException:
            threading.Event().wait(60)
work = lambda: score_responses(Mine(), [Problem("mine/a", "1=", "1")], ["the response"])
if "{how}" == "thread":
    thread = threading.Thread(target=work); thread.start(); thread.join()
else:
    work()
print("went on")
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [("thread", "problem 'mine/a'"), ("swallowed", "problem 'mine/a'"), ("c", "in reward")],
)
def test_a_reward_that_nothing_can_stop_ends_the_process(tmp_path: Path, how: str, said: str):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{how}", how))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert said in done.stderr
