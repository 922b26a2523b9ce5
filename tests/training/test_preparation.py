"""What is refused before a run writes anything, and what of its settings a session takes."""

import pytest
import torch

from roundoff.config import ConfigError, Experiment, validate
from roundoff.experiments import load_experiment
from roundoff.training.preparation import prepare
from tests.training.test_loop import SameReward, run, with_algorithm, with_training


def test_ratio_one_makes_each_minibatch_a_batch_of_its_own(small):
    one = with_algorithm(load_experiment("quickstart-noise"), ratio="one")
    session, replayed = prepare(one, small, 0), prepare(load_experiment("quickstart-noise"), small, 0)
    inside, before = session.profile.training, small.training
    assert (inside.prompts_per_step, inside.minibatches) == (4, 1)
    assert (before.prompts_per_step, before.minibatches) == (8, 2)
    assert session.total_steps * inside.minibatches == replayed.total_steps * before.minibatches  # optimizer steps
    assert inside.evaluate_every * inside.prompts_per_step == before.evaluate_every * before.prompts_per_step


@pytest.mark.parametrize(
    ("experiment", "profile", "expected"),
    [
        ({}, {"minibatches": 9}, "minibatches must be at most prompts_per_step"),
        ({"algorithm": {"name": "GRPO", "ratio": "one"}}, {"minibatches": 3}, "must be a multiple of minibatches"),
        ({"algorithm": {"name": "DAPO", "oversampling": 3}}, {}, "oversampling = 3, but the task has only 16"),
        ({}, {"max_prompt_tokens": 3}, "max_prompt_tokens is 3, but 16 training prompts are longer"),
        ({}, {"max_prompt_tokens": 3, "long_prompts": "filter"}, "only 0 training prompts"),
        ({}, {"prompts_per_step": 17}, "only 16 training problems"),
        ({}, {"max_new_tokens": 10_000}, "max_new_tokens = 10000 do not fit into the .* positions of the model"),
        ({"hardware": {"precision": {"weight": "mxfp4"}, "exclude": ["*"]}}, {}, "no Linear"),
        ({"hardware": {"precision": {"weight": "mxfp4", "keep": [99]}}}, {}, "99"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, small, experiment, profile, expected):
    content = {**load_experiment("quickstart-clean").model_dump(exclude_none=True), **experiment}
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path, validate(Experiment, content, source="test"), with_training(small, **profile))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_prompts_that_are_too_long_are_left_out_where_that_is_set(small):
    prompts = [p.prompt for p in prepare(load_experiment("quickstart-clean"), small, 0).task.train()]
    limit = sorted(map(len, prompts))[8]  # the tokenizer is one of characters
    profile = with_training(small, max_prompt_tokens=limit, long_prompts="filter")
    kept = [p.prompt for p in prepare(load_experiment("quickstart-clean"), profile, 0).stream.problems]
    assert kept == [p for p in prompts if len(p) <= limit]
    assert 8 < len(kept) < 16


@pytest.mark.parametrize(("part", "message"), [("train", "has only 0 training problems"), ("test", "no test problems")])
def test_a_task_without_problems_is_refused(small, monkeypatch, part, message):
    task = prepare(load_experiment("quickstart-clean"), small, 0).task
    empty = SameReward(task, 1.0)
    setattr(empty, part, list)
    monkeypatch.setattr("roundoff.training.checks.make_task", lambda profile: empty)
    with pytest.raises(ConfigError, match=message):
        prepare(load_experiment("quickstart-clean"), small, 0)


def test_unknown_task_and_device_are_named(small):
    experiment = load_experiment("quickstart-clean")
    with pytest.raises(ConfigError, match=r"task\.name must be one of arithmetic"):
        prepare(experiment, small.model_copy(update={"task": small.task.model_copy(update={"name": "maths"})}), 0)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' is not there"):
            prepare(experiment, small.model_copy(update={"device": "cuda"}), 0)
