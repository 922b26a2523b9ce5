"""The rules that every entry of `TASKS` must keep."""

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from roundoff.tasks import TASKS, Task, TaskError, check_task
from tests.tasks.problem_files import raw_files


def settings_of(name: str, directory: Path) -> Mapping[str, object]:
    """Settings of a small task; the tests of a task are skipped if a package that it needs is missing."""
    if name == "gsm8k":
        return raw_files(directory)
    if name == "reasoning-gym":
        pytest.importorskip("reasoning_gym")
        return {"dataset": "chain_sum", "train_problems": 40, "test_problems": 20}
    return {}


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    return TASKS[request.param](settings_of(request.param, tmp_path))


def test_the_name_of_a_task_is_its_key(task: Task, tmp_path: Path) -> None:
    assert isinstance(task, Task)
    assert TASKS[task.name](settings_of(task.name, tmp_path)).name == task.name


def test_a_task_can_be_trained_on_and_scored(task: Task) -> None:
    assert check_task(task) == []


def test_another_process_gets_the_same_problems(task: Task, tmp_path: Path) -> None:
    again = TASKS[task.name](settings_of(task.name, tmp_path))
    assert (list(again.train()), list(again.test())) == (list(task.train()), list(task.test()))
    assert all(problem.answer for problem in [*task.train(), *task.test()])


def test_solutions_earn_the_reward(task: Task) -> None:
    for problem in task.test():
        solution = task.solution(problem)
        assert solution is None or task.reward(problem, solution) == 1.0


@pytest.mark.parametrize("response", ["", " ", "\n", ">", "=", "-", "\x00", "\ud800", "é", "####", "1" * 10_000])
def test_odd_text_earns_nothing_and_does_not_raise(task: Task, response: str) -> None:
    assert task.reward(task.test()[0], response) == 0.0


def test_unknown_setting_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no_such_setting"):
        TASKS[task.name]({**settings_of(task.name, tmp_path), "no_such_setting": 1})


def test_importing_tasks_imports_no_torch() -> None:
    code = "import sys, roundoff.tasks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_tasks_imports_no_optional_package() -> None:
    optional = ("pyarrow", "math_verify", "reasoning_gym", "huggingface_hub")
    code = f"import sys, roundoff.tasks; sys.exit(any(name in sys.modules for name in {optional}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.util.find_spec("roundoff.tasks") is not None
