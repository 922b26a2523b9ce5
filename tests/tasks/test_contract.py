"""What every entry of `TASKS` must keep to."""

import subprocess
import sys

import pytest

from roundoff.tasks import TASKS, Problem, Task, TaskError


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]({})


def test_name_is_the_key(task: Task) -> None:
    assert isinstance(task, Task)
    assert TASKS[task.name]({}).name == task.name


def test_problems_are_deterministic_unique_and_disjoint(task: Task) -> None:
    train, test = task.train(), task.test()
    assert train and test
    assert list(train) == list(task.train())
    assert list(test) == list(task.test())
    ids = [problem.id for problem in [*train, *test]]
    assert len(set(ids)) == len(ids)
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in test}
    assert all(problem.prompt and problem.answer for problem in [*train, *test])


def test_solutions_earn_the_reward(task: Task) -> None:
    for problem in task.test():
        solution = task.solution(problem)
        assert solution is None or task.reward(problem, solution) == 1.0


@pytest.mark.parametrize("response", ["", " ", "\n", ">", "=", "-", "\x00", "\ud800", "é", "####", "1" * 10_000])
def test_odd_text_has_no_reward_and_raises_nothing(task: Task, response: str) -> None:
    problem: Problem = task.test()[0]
    assert task.reward(problem, response) == 0.0


def test_unknown_setting_is_refused(task: Task) -> None:
    with pytest.raises(TaskError, match="no_such_setting"):
        TASKS[task.name]({"no_such_setting": 1})


def test_importing_tasks_imports_no_torch() -> None:
    code = "import sys, roundoff.tasks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
