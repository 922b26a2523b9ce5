"""The scorer: pass@k by hand, samples deployed and clean, no noise of a remedy in a score."""

import math
import re
from itertools import combinations

import pytest
import torch

from roundoff.aqn.noise import aqn_noise
from roundoff.config import AQN, ConfigError, Hardware
from roundoff.evaluation import evaluate, evaluate_samples, pass_at_k
from roundoff.experiments import load_experiment
from roundoff.models.errors import ModelError
from roundoff.numerics.rng import Key
from roundoff.runs.health import FailedRewardsError, NonFiniteOutputError
from roundoff.tasks import make_task
from roundoff.training.policy import load_policy
from tests.broken_models import broken_model, wide_model
from tests.thread_ranks import on_ranks


@pytest.mark.parametrize(
    ("samples", "solved", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs hold the solved one
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (5, 2, 4, 1.0),  # only 3 are unsolved
        (5, 0, 5, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(samples, solved, k, expected):
    assert pass_at_k(samples, solved, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_solved_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("samples", "solved", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_outside_its_range(samples, solved, k):
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        pass_at_k(samples, solved, k)


def sampled(policy, small, **options):
    return evaluate_samples(
        policy.model,
        policy.loaded.tokenizer,
        make_task(small),
        key=Key.from_seed(0),
        max_new_tokens=24,
        **{"samples": 4, "temperature": 1.0, **options},
    )


def test_samples_differ_from_each_other_and_under_noise_from_clean_ones(small):
    outcomes = sampled(load_policy(load_experiment("quickstart-noise"), small, 0), small)
    assert len(outcomes) == 32
    assert all(len(o.deployed) == len(o.clean) == 4 for o in outcomes)
    assert any(0 < sum(o.clean) < 4 for o in outcomes)
    assert any(o.deployed != o.clean for o in outcomes)
    assert [o.id for o in outcomes] == [p.id for p in make_task(small).test()]


def test_deployed_and_clean_samples_of_a_plain_model_are_the_same(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    assert all(o.deployed == o.clean for o in sampled(policy, small))


def test_at_a_temperature_near_zero_samples_are_the_greedy_answer(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    greedy = evaluate(
        policy.model, policy.loaded.tokenizer, make_task(small), key=Key.from_seed(0), max_new_tokens=24
    ).outcomes
    cold = sampled(policy, small, temperature=1e-3)
    assert [o.deployed for o in cold] == [(g.clean,) * 4 for g in greedy]


def test_a_score_under_aqn_is_refused(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    aqn = AQN(sigma_start=0.05, sigma_end=0.05, schedule="constant")
    with aqn_noise(policy.model, 0.05, None, Key(1), aqn):
        with pytest.raises(RuntimeError, match="noise of a remedy"):
            sampled(policy, small)
        with pytest.raises(RuntimeError, match="noise of a remedy"):
            evaluate(policy.model, policy.loaded.tokenizer, make_task(small), key=Key(0), max_new_tokens=4)


def scored(model_directory, small, hardware=None, **options):
    experiment = load_experiment("quickstart-clean")
    if hardware is not None:
        experiment = experiment.model_copy(update={"hardware": Hardware.model_validate(hardware)})
    profile = small.model_copy(update={"model": str(model_directory)})
    return scored_policy(load_policy(experiment, profile, 0), small, **options)


def scored_policy(policy, small, **options):
    task = options.pop("task", None) or make_task(small)
    score = evaluate_samples if "samples" in options else evaluate
    return score(policy.model, policy.loaded.tokenizer, task, key=Key.from_seed(0), max_new_tokens=24, **options)


FP16 = {"precision": {"activation": "fp16"}}
SAMPLED = {"samples": 2, "temperature": 1.0}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_nan_weights_has_no_score(small, options, value):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(NonFiniteOutputError, match=r"first in model\.layers\.1\.mlp\.up_proj, whose weights hold NaN"):
        scored_policy(policy, small, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_directory_with_nan_weights_is_not_loaded(tmp_path, small, value):
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        scored(broken_model(tmp_path / "model", value=value), small)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_hardware_that_computes_nothing_has_no_score_and_names_the_layer(tmp_path, small, options):
    said = r"with the hardware on: .* first in model\.layers\.1\.mlp\.\w+.*; with the hardware off all were"
    with pytest.raises(NonFiniteOutputError, match=said):
        scored(wide_model(tmp_path / "model"), small, FP16, **options)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_hardware_does_not_compute_is_counted_and_solves_nothing(small, options):
    """The output after a "7" is not finite, but only with the hardware on."""
    experiment = load_experiment("quickstart-noise")
    policy = load_policy(experiment, small, 0)
    model, seven = policy.model, policy.loaded.tokenizer("7")["input_ids"][0]

    def spoil(module, inputs, output):
        if policy.installed.is_on:
            output[inputs[0] == seven] = math.nan
        return output

    model.model.embed_tokens.register_forward_hook(spoil)
    score = evaluate_samples if options else evaluate
    found = score(
        model, policy.loaded.tokenizer, AlwaysRight(make_task(small)), key=Key(0), max_new_tokens=24, **options
    )
    outcomes = found if options else found.outcomes
    flaws = [flaw for outcome in outcomes for flaw in outcome.flaws]
    bad = flaws.count("nonfinite")
    assert 0 < bad < len(flaws)
    solved = [one for outcome in outcomes for one in outcome.deployed]
    assert [one == 0 for one in solved] == [flaw == "nonfinite" for flaw in flaws]  # right by its text, but no answer
    if not options:
        assert found.deployed == 1 - bad / len(flaws)
        assert found.deployed_tally.nonfinite == bad
        assert found.nonfinite_at == "model.embed_tokens"
        assert found.clean == 1.0
    else:
        assert not any("nonfinite" in outcome.clean_flaws for outcome in outcomes)


class AlwaysRight:
    def __init__(self, task, reward=1.0):
        self.name, self.train, self.test, self._reward = task.name, task.train, task.test, reward

    def reward(self, problem, response):
        return self._reward(problem) if callable(self._reward) else self._reward


def test_a_reward_that_fails_for_some_is_counted_and_for_all_is_no_score(small):
    task = make_task(small)
    half = {problem.id for problem in task.test()[:16]}
    found = scored("tiny", small, task=AlwaysRight(task, lambda problem: math.nan if problem.id in half else 1.0))
    assert (found.deployed, found.clean, found.deployed_tally.reward_error) == (0.5, 0.5, 16)
    assert found.clean_tally.failures() == ("16 of 32 rewards could not be computed and count as 0",)
    with pytest.raises(FailedRewardsError, match="failed for every one of 32 responses"):
        scored("tiny", small, task=AlwaysRight(task, math.nan))


def test_problems_that_share_an_id_are_refused(small):
    task = AlwaysRight(make_task(small))
    problems = task.test()
    task.test = lambda: [*problems, problems[3]]
    with pytest.raises(ConfigError, match=f"has test problems that share an id .{re.escape(problems[3].id)}"):
        scored("tiny", small, task=task)


@pytest.mark.parametrize(("problems", "count"), [(32, 2), (2, 3)])
def test_ranks_agree_on_what_was_not_computed_even_with_more_ranks_than_problems(tmp_path, small, problems, count):
    settings = {**small.task.settings, "test_problems": problems}
    few = small.model_copy(update={"task": small.task.model_copy(update={"settings": settings})})
    model = wide_model(tmp_path / "model")

    def work(ranks):
        with pytest.raises(NonFiniteOutputError) as caught:
            scored(model, few, FP16, ranks=ranks)
        return str(caught.value)

    said = on_ranks(count, work)
    assert len(set(said)) == 1
    assert "model.layers.1" in said[0]
