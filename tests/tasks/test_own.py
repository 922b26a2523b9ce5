"""A user's own task, named as module:Class or file.py:Class."""

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import load_profile, with_overrides
from roundoff.tasks import Problem, TaskError, check_task, load_task, make_task

SOURCE = """
from roundoff.tasks import Problem, TaskError

class Mine:
    name = "mine"
    def __init__(self, settings):
        if set(settings) - {"wrong"}:
            raise TaskError("unknown setting")
        self.shared = settings.get("wrong")
    def train(self): return [Problem("mine/a", "1=", "1"), Problem("mine/b", "2=", "2")]
    def test(self): return [Problem("mine/a" if self.shared == "id" else "mine/c", "1=" if self.shared else "3=", "3")]
    def reward(self, problem, response): return float(response == problem.answer)
    def solution(self, problem): return None

class Half:
    def __init__(self, settings): pass
    def train(self): return []
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def test_a_class_is_found_in_a_file_and_in_a_module(file, monkeypatch):
    assert load_task(f"{file}:Mine", {}).test()[0].id == "mine/c"
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_task("mine:Mine", {}).train()[0] == Problem("mine/a", "1=", "1")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("{}:Min", {}, "has no class or function 'Min'"),
        ("{}x.py:Mine", {}, "there is no file"),
        ("no_such_module:Mine", {}, "no_such_module cannot be imported"),
        ("{}:Half", {}, "is not a task: it has no name, test, reward, solution"),
        ("{}:Mine", {"x": 1}, "unknown setting"),
        ("{}:Mine", {"wrong": "id"}, "1 ids name more than one problem, such as 'mine/a'"),
        ("{}:Mine", {"wrong": "prompt"}, "1 test problems are training problems"),
        ("arithmetics", {}, "did you mean 'arithmetic'"),
    ],
)
def test_an_unusable_task_is_refused_with_the_reason(file, name, settings, message):
    with pytest.raises(TaskError, match=message):
        load_task(name.format(file), settings)


def test_the_check_finds_every_fault(file):
    class Bad(type(load_task(f"{file}:Mine", {}))):
        def reward(self, problem, response):
            return 1.0 if response == "" else float(int(response))

        def solution(self, problem):
            return "0"

    found = check_task(Bad({}))
    assert "mine/a: its own solution '0' does not earn the reward 1.0" in found
    assert "mine/a: '' earns the full reward" in found
    assert "mine/a: reward raises ValueError on 'é'" in found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("None", "a reward must be a number, but is NoneType"),
        ("2.0", "at most 1.0, but is 2.0"),
        ("'1'", "is the text"),
    ],
)
def test_the_check_finds_values_that_are_not_rewards(tmp_path, value, message):
    (tmp_path / "odd.py").write_text(SOURCE.replace("float(response == problem.answer)", value))
    assert any(message in line for line in check_task(load_task(f"{tmp_path}/odd.py:Mine", {})))


def test_the_example_is_found_from_its_profile():
    profile = load_profile("examples/doubling.toml")
    assert profile.task.settings == {"largest": 48}  # without those of the task that it extends
    task = make_task(profile)
    assert (len(task.train()), len(task.test())) == (36, 12)
    assert check_task(task) == []
    with pytest.raises(ConfigError, match=r"task doubling\.py:Doubling: largest must be in 8 to 50"):
        make_task(with_overrides([], profile, ["profile.task.settings.largest=99"])[1])


def test_another_task_starts_without_the_settings_of_the_old_one():
    profile = with_overrides([], load_profile("tiny"), ["profile.task.name=gsm8k"])[1]
    assert profile.task.settings == {}
    kept = with_overrides([], load_profile("tiny"), ["profile.task.settings.max_value=20"])[1]
    assert kept.task.settings["train_problems"] == 2560
