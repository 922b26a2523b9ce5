"""Rewards that fork or raise a bare `BaseException`: the run goes on in one process and counts an error."""

import asyncio
import os
import sys

import pytest

from tests.tasks.test_score import scored


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), SystemExit(3)])
def test_a_base_exception_is_an_error_of_the_reward_too(error):
    assert scored(error).errors == 1


@pytest.mark.parametrize("way", ["returns", "sys.exit", "raises"])
def test_a_process_that_a_reward_has_forked_ends_with_the_reward(way):
    first = os.getpid()

    def reward():
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return float(code == {"returns": 0, "sys.exit": 3, "raises": 1}[way])
        if way == "sys.exit":
            sys.exit(3)
        if way == "raises":
            raise KeyboardInterrupt
        return 1.0

    found = scored(reward)
    if os.getpid() != first:
        os._exit(9)  # the copy has returned
    assert found.rewards == (1.0,)
