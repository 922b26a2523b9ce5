"""Settings of corrections and losses: verl's forms are understood; what does nothing or means nothing is refused."""

import pytest

from roundoff.config import Algorithm, ConfigError, result_hash, validate
from roundoff.experiments import load_experiment, load_profile
from roundoff.experiments.registry import with_overrides


def algorithm(ratio="recomputed", **changes):
    return validate(Algorithm, {"name": "GRPO", "ratio": ratio, **changes}, source="settings")


def with_correction(**settings):
    return algorithm(correction=settings).correction


@pytest.mark.parametrize(
    ("verl", "plain"),
    [
        ({"rollout_is_threshold": "0.5_5.0"}, {"rollout_is_threshold": [0.5, 5.0]}),
        ({"rollout_is_threshold": "3"}, {"rollout_is_threshold": 3.0}),
        (
            {"rollout_rs": "token_k1, seq_max_k2", "rollout_rs_threshold": "0.5_2.0,0.1"},
            {"rollout_rs": ["token_k1", "seq_max_k2"], "rollout_rs_threshold": [[0.5, 2.0], 0.1]},
        ),
        (
            {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.999_1.001"},
            {"rollout_rs": ["seq_mean_k1"], "rollout_rs_threshold": [0.999, 1.001]},
        ),
    ],
)
def test_verls_strings_and_lists_mean_the_same(verl, plain):
    one, other = (with_correction(rollout_is="token", **settings) for settings in (verl, plain))
    assert one == other
    assert type(one).model_validate(one.model_dump(mode="json")) == one


def test_a_single_bound_of_k1_has_its_reciprocal_below_and_one_bound_serves_all():
    found = with_correction(rollout_rs="token_k1,seq_sum_k1", rollout_rs_threshold=2)
    assert found.rejections == (("token_k1", 0.5, 2.0), ("seq_sum_k1", 0.5, 2.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "correction corrects nothing"),
        (
            {"rollout_is": "token", "rollout_is_threshold": [5.0, 0.5]},
            r"_is_threshold has its bounds reversed: .*0.5, 5",
        ),
        ({"rollout_is": "token", "rollout_is_threshold": "5_0.5"}, "_is_threshold has its bounds reversed"),
        ({"rollout_is": "token", "rollout_is_threshold": [2.0, 5.0]}, r"must contain 1, the weight of what"),
        ({"rollout_is": "token", "rollout_is_threshold": -1}, "rollout_is_threshold must be above 0"),
        ({"rollout_is": "token", "rollout_is_threshold": "a_b"}, "rollout_is_threshold must be a number"),
        (
            {"rollout_is_threshold": 3.0, "rollout_rs": "token_k2", "rollout_rs_threshold": 1},
            "does nothing without wei",
        ),
        ({"rollout_is_batch_normalize": True}, "rollout_is_batch_normalize does nothing without weights"),
        ({"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": [1.1, 0.9]}, "seq_mean_k1 has its bounds reversed: 1.1"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 0.5}, "token_k1 has its bounds reversed"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": [1.1, 2.0]}, "token_k1 must contain 1"),
        ({"rollout_rs": "seq_max_k2", "rollout_rs_threshold": [0.1, 0.9]}, "seq_max_k2 must be one number"),
        ({"rollout_rs": "token_k1"}, "one for each of the 1 rejections, but has 0"),
        ({"rollout_rs": "token_k2,token_k3", "rollout_rs_threshold": [1, 2, 3]}, "2 rejections, but has 3"),
        ({"rollout_rs": "token_k2,token_k2", "rollout_rs_threshold": 1}, "names a rejection twice"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": -1}, "rollout_rs_threshold must be above 0"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2}, r"rollout_rs\.0 .*'seq_max_k3', but is 'seq_max_k1'"),
        ({"rollout_is": "token", "rollout_rs_threshold": 2}, "does nothing without rollout_rs"),
        ({"rollout_is": "token", "loss_type": "reinforce"}, "loss_type is that of bypass mode"),
        ({"bypass_mode": True, "rollout_is": "token"}, "rollout_is does nothing in bypass mode"),
        (
            {"bypass_mode": True, "loss_type": "reinforce", "rollout_is": "token", "rollout_is_batch_normalize": True},
            "would be that of a micro-batch",
        ),
    ],
    ids=str,
)
def test_corrections_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        with_correction(**settings)


@pytest.mark.parametrize("ratio", ["replayed", "one"])
def test_a_correction_beside_a_ratio_that_compares_nothing_is_refused(ratio):
    with pytest.raises(
        ConfigError, match=f"ratio = '{ratio}'.*set ratio = 'recomputed', also where rollouts and train"
    ):
        algorithm(ratio, correction={"rollout_is": "token"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": "rollout", "correction": {"rollout_is": "token"}}, "ratio = 'rollout' is itself a correction"),
        ({"correction": {"bypass_mode": True}, "optimizer_epochs": 2}, "bypass_mode allows a single pass"),
        ({"correction": {"bypass_mode": True}, "loss": "gspo"}, "loss = 'gspo' does nothing in bypass mode"),
        ({"loss": "reinforce", "optimizer_epochs": 2}, "'reinforce' compares with no policy before"),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip does nothing with loss = 'gspo'"),
        (
            {"correction": {"bypass_mode": True, "loss_type": "reinforce"}, "dual_clip": 3.0},
            "dual_clip does nothing with loss = 'reinforce'",
        ),
        ({"dual_clip": 1.1}, r"dual_clip = 1.1 must be above 1 \+ clip_high \(1.2\)"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"loss": "ppo"}, "loss .*'clip', 'gspo', 'cispo' or 'reinforce'"),
    ],
    ids=str,
)
def test_losses_and_modes_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        algorithm(**changes)


def changed(*assignments):
    return with_overrides([load_experiment("quickstart-clean")], load_profile("tiny"), assignments)[0][0]


def test_defaults_leave_the_hash_of_earlier_versions_and_settings_enter_it():
    profile = load_profile("tiny")
    plain = result_hash(load_experiment("quickstart-clean"), profile)
    assert result_hash(changed("algorithm.loss='clip'", "algorithm.gspo_clip_low=3e-4"), profile) == plain
    others = [
        changed("algorithm.ratio='recomputed'", *more)
        for more in (
            [],
            ["algorithm.correction.rollout_is='token'"],
            ["algorithm.correction.rollout_is='token'", "algorithm.correction.rollout_is_threshold=[0.5, 5.0]"],
            ["algorithm.loss='gspo'"],
            ["algorithm.dual_clip=3.0"],
        )
    ]
    assert len({plain, *(result_hash(one, profile) for one in others)}) == len(others) + 1
