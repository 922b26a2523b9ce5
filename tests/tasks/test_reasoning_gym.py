"""Generators of reasoning-gym as a task."""

import importlib
import math
import sys
from types import SimpleNamespace

import pytest

from roundoff.config import ConfigError
from roundoff.tasks import TASKS, TaskError, check_task
from roundoff.tasks.reasoning_gym import ReasoningGymSettings, ReasoningGymTask
from roundoff.tasks.score import Scored, score_responses

SMALL = {"train_problems": 24, "test_problems": 12}


def make(**settings):
    pytest.importorskip("reasoning_gym")
    return TASKS["reasoning-gym"]({**SMALL, **settings})


@pytest.mark.parametrize("dataset", ["gsm_symbolic", "chain_sum", "leg_counting", "propositional_logic"])
def test_generators_make_tasks(dataset):
    task = make(dataset=dataset)
    assert check_task(task) == []
    assert (len(task.train()), len(task.test())) == (24, 12)
    assert task.train() == make(dataset=dataset).train()
    assert task.train() != make(dataset=dataset, seed=1).train()
    assert task.test() == make(dataset=dataset, train_problems=5).test()


def test_train_and_test_are_disjoint_though_a_generator_repeats_itself():
    task = make(dataset="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert not {p.prompt for p in task.train()} & {p.prompt for p in task.test()}
    with pytest.raises(TaskError, match=r"train_problems is 2000, but chain_sum gave only \d+ different ones in 8000"):
        make(
            dataset="chain_sum",
            config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            train_problems=2000,
        )


@pytest.mark.parametrize(
    ("answer", "form", "wrong"),
    [("strict", "it is #### {}", "it is {}"), ("tags", "so <answer>{}</answer>", "so {}"), ("whole", " {}\n", "no")],
)
def test_the_scorer_is_given_the_final_answer(answer, form, wrong):
    task = make(dataset="chain_sum", answer=answer)
    problem = task.test()[0]
    assert task.reward(problem, form.format(problem.answer)) == 1.0
    assert task.reward(problem, wrong.format(problem.answer)) < 1.0
    assert problem.messages[0].content.endswith(
        "=" if answer == "whole" else ('####".' if answer == "strict" else "</answer>.")
    )


def test_partial_rewards_are_the_packages_own():
    task = make(dataset="gsm_symbolic")
    problem = task.test()[0]
    assert task.reward(problem, f"#### {float(problem.answer) + 1}") == 0.01  # its reward for any number
    assert task.reward(problem, "#### none") == 0.0


class FakeGenerator:
    """Replaces a generator of reasoning-gym, so that the package is not needed; item i is the sum `i+0=`."""

    def __init__(self, scorer, seed: int, size: int) -> None:
        self.score_answer, self.seed, self.size = scorer, seed, size

    def __getitem__(self, index: int):
        return {"question": f"{self.seed + index}+0=", "answer": str(self.seed + index)}


def with_scorer(monkeypatch, scorer) -> ReasoningGymTask:
    """A task whose generator scores with this function of the answer and the entry."""
    package = SimpleNamespace(
        DATASETS={"chain_sum": None},
        create_dataset=lambda name, seed, size: FakeGenerator(scorer, seed, size),
    )
    monkeypatch.setattr("roundoff.tasks.reasoning_gym.require", lambda module, extra: package)
    return ReasoningGymTask(ReasoningGymSettings(dataset="chain_sum", train_problems=2, test_problems=2))


def test_an_error_of_the_scorer_is_recorded_and_not_raised(monkeypatch):
    task = with_scorer(monkeypatch, lambda answer, entry: 1 / 0)
    assert math.isnan(task.reward(task.test()[0], "#### 5"))


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, 1.5, -0.5, None, "1.0", ValueError("x"), SystemExit(0)], ids=repr
)
def test_a_value_that_is_not_a_score_is_a_reward_error(score, monkeypatch):
    def scorer(answer, entry):
        if isinstance(score, BaseException):
            raise score
        return score

    task = with_scorer(monkeypatch, scorer)
    problem = task.test()[0]
    assert math.isnan(task.reward(problem, "#### 5"))
    assert score_responses(task, [problem], ["#### 5"]) == Scored((0.0,), 1)
    assert score_responses(task, [problem], ["no answer"]) == Scored((0.0,), 0)


def test_a_score_may_be_a_truth_value(monkeypatch):
    task = with_scorer(monkeypatch, lambda answer, entry: answer == entry["answer"])
    problem = task.test()[0]
    assert task.reward(problem, f"#### {problem.answer}") == 1.0
    assert task.reward(problem, "#### 5") == 0.0


def test_a_generator_that_does_not_repeat_itself_is_refused(monkeypatch):
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    count = iter(range(10_000))
    monkeypatch.setattr(ChainSumDataset, "__getitem__", lambda self, i: {"question": str(next(count)), "answer": "1"})
    with pytest.raises(TaskError, match="chain_sum gives different problems for the same seed"):
        make(dataset="chain_sum")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "chain_sun"}, "dataset must be a generator of reasoning-gym; did you mean 'chain_sum'?"),
        ({"dataset": "chain_sum", "config": {"terms": 2}}, "config does not suit chain_sum: TypeError"),
        (
            {"dataset": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}},
            "config does not suit chain_sum: Assert",
        ),
        ({"config": {"seed": 2}}, "config.seed is set by the task's own"),
        ({"answer": "boxed"}, "answer: input should be"),
    ],
)
def test_impossible_settings_say_what_is_wrong(settings, message):
    with pytest.raises(TaskError, match=message.replace("?", r"\?")):
        make(**settings)


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = importlib.import_module

    def hidden(name, package=None):
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError("no", name="reasoning_gym")
        return real(name, package)

    monkeypatch.setattr("importlib.import_module", hidden)
    for name in [n for n in sys.modules if n.startswith("reasoning_gym")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"pip install 'roundoff\[reasoning-gym\]'"):
        TASKS["reasoning-gym"]({})
