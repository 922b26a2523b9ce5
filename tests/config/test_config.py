"""Error messages for wrong settings (path, rule, value, nearest key), and the settings that the hash covers."""

import pytest

from roundoff.config import (
    ALGORITHMS,
    AQN,
    Algorithm,
    ConfigError,
    Experiment,
    Hardware,
    Profile,
    result_hash,
    validate,
)
from roundoff.experiments import load_experiment, load_profile

GRPO = {"name": "GRPO"}


def message(**settings) -> str:
    with pytest.raises(ConfigError) as error:
        validate(Experiment, {"id": "x", "algorithm": GRPO, **settings}, source="x.toml")
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"hardware": {"matmul_noise": {"relative_std": 5.0}}},
            "x.toml: hardware.matmul_noise.relative_std must be in [0, 1) (5 % is 0.05), but is 5.0",
        ),
        (
            {"hardware": {"matmul_noise": {"relative_std": -0.1}}},
            "x.toml: hardware.matmul_noise.relative_std must be in [0, 1) (5 % is 0.05), but is -0.1",
        ),
        (
            {"hardware": {"matmul_noise": {"relativ_std": 0.1}}},
            "x.toml: hardware.matmul_noise.relativ_std is not a setting; did you mean 'relative_std'?",
        ),
        (
            {"aqn": {"sigma_start": 0.1, "sigma_end": 0.2}},
            "x.toml: aqn sigma_end (0.2) must not be above sigma_start (0.1)",
        ),
        ({"aqn": {"sigma_start": 0.1}}, "x.toml: aqn.sigma_end is missing: it must be set"),
        ({"epochs": 0}, "x.toml: epochs must be a whole number of at least 1, but is 0"),
        (
            {"hardware": {"precision": {"keep": "sdd:3"}}},
            "x.toml: hardware.precision.keep must be a list of layer indices (from 0, or from -1 for the last one), or "
            "'srdd:k' with k of at least 1, but is 'sdd:3'",
        ),
        (
            {"hardware": {"precision": {"keep": [1]}, "matmul_noise": {"relative_std": 0.1}}},
            "x.toml: hardware.precision.keep = [1] does nothing without a format: set weight or activation",
        ),
        (
            {"algorithm": {"name": "GRPO", "oversampling": 2}},
            "x.toml: algorithm.oversampling = 2 draws prompts that nothing uses without dynamic sampling: "
            "set dynamic_sampling = true, or oversampling = 1",
        ),
        (
            {"algorithm": {"name": "GRPO", "ratio": "one", "optimizer_epochs": 2}},
            "x.toml: algorithm.ratio = 'one' allows a single optimizer step per batch: set optimizer_epochs = 1",
        ),
        ({"baseline": "x"}, "x.toml: baseline must be another experiment, but is 'x' itself"),
        (
            {"algorithm": {"name": "GRPO", "group_size": 1}},
            "x.toml: algorithm.group_size must be at least 2: one rollout has no group to compare with, but is 1",
        ),
    ],
)
def test_each_wrong_setting_has_its_message(settings, expected):
    assert message(**settings) == expected


def test_unknown_format_names_the_nearest():
    text = message(hardware={"precision": {"weight": "mxfp5"}})
    assert text.startswith("x.toml: hardware.precision.weight must be a number format; did you mean 'mxfp4'?")


def test_one_error_names_every_wrong_setting():
    text = message(epochs=0, hardware={"exlude": ["lm_head"]})
    assert text.splitlines() == [
        "x.toml: epochs must be a whole number of at least 1, but is 0",
        "x.toml: hardware.exlude is not a setting; did you mean 'exclude'?",
    ]


def test_noise_that_perturbs_nothing_is_an_error():
    assert "perturbs nothing" in message(
        hardware={"matmul_noise": {"relative_std": 0.1, "forward": False, "backward": False}}
    )


def test_global_schedule_of_one_stage_is_an_error():
    assert "would never inject noise" in message(
        aqn={"sigma_start": 0.1, "sigma_end": 0.1, "schedule": "global", "stages": 1}
    )


def test_named_algorithms_have_the_published_values():
    grpo = Algorithm.model_validate(ALGORITHMS["GRPO"])
    assert (grpo.clip_low, grpo.clip_high, grpo.kl_coefficient, grpo.group_size) == (0.2, 0.2, 0.001, 5)
    dapo = Algorithm.model_validate({"name": "DAPO", "group_size": 4})
    assert (dapo.clip_low, dapo.clip_high, dapo.kl_coefficient, dapo.group_size) == (0.2, 0.28, 0, 4)
    assert (dapo.dynamic_sampling, dapo.max_sampling_batches, dapo.overlong_buffer, dapo.overlong_factor) == (
        True,
        5,
        0.25,
        0.5,
    )


@pytest.fixture
def profile() -> Profile:
    return load_profile("tiny")


def test_hash_covers_results_and_not_names(profile):
    plain = Experiment(id="a", algorithm=Algorithm.model_validate(GRPO))
    renamed = plain.model_copy(update={"id": "b", "title": "t", "family": "f", "baseline": "c"})
    assert result_hash(plain, profile) == result_hash(renamed, profile)
    other = plain.model_copy(update={"epochs": 2})
    assert result_hash(plain, profile) != result_hash(other, profile)
    smaller = profile.model_copy(update={"training": profile.training.model_copy(update={"learning_rate": 1e-5})})
    assert result_hash(plain, profile) != result_hash(plain, smaller)


@pytest.mark.parametrize(
    ("name", "expected"), [("quickstart-clean", "7fa72ae9"), ("quickstart-mxfp4", "db08a6a4"), ("E13n", "c509ed76")]
)
def test_settings_that_came_later_leave_the_hashes_of_earlier_runs(profile, name, expected):
    # The hashes were printed before `gradient` and its companions existed.
    experiment = load_experiment(name)
    assert result_hash(experiment, profile) == expected
    precision = experiment.hardware.precision.model_copy(update={"gradient": "mxfp4"})
    hardware = experiment.hardware.model_copy(update={"precision": precision})
    assert result_hash(experiment.model_copy(update={"hardware": hardware}), profile) != expected


def test_settings_are_frozen():
    hardware = Hardware()
    with pytest.raises(ValueError, match="frozen"):
        hardware.exclude = ()


def test_plain_hardware_changes_nothing():
    assert Hardware().changes_nothing
    assert not Hardware.model_validate({"precision": {"weight": "mxfp4"}}).changes_nothing
    assert not Hardware.model_validate({"matmul_noise": {"relative_std": 0.1}}).changes_nothing
    assert not Hardware.model_validate({"deadzone": {"threshold": 0.1, "layers": [0]}}).changes_nothing
    assert not Hardware.model_validate({"accumulator": {"bits": 13}}).changes_nothing
    assert not Hardware.model_validate({"matmul_noise": {"gain_std": 0.1}}).changes_nothing
    assert not Hardware.model_validate({"matmul_noise": {"adc_bits": 8}}).changes_nothing


def test_backward_noise_alone_leaves_evaluations_deterministic():
    assert not Hardware.model_validate({"matmul_noise": {"relative_std": 0.1, "forward": False}}).is_noisy
    assert Hardware.model_validate({"matmul_noise": {"relative_std": 0.1}}).is_noisy


def test_aqn_defaults_are_the_published_ones():
    aqn = AQN(sigma_start=0.01, sigma_end=0.0001)
    assert (aqn.schedule, aqn.target, aqn.noise, aqn.layers) == ("epoch", "rmsnorm", "absolute", "all")


@pytest.mark.parametrize(
    ("hardware", "concerned"),
    [
        ({"precision": {"weight": "mxfp4"}}, False),
        ({"precision": {"kv_cache": "mxfp4"}}, True),
        ({"precision": {"attention": "int8"}}, True),
        ({"matmul_noise": {"relative_std": 0.1}}, True),
        ({"matmul_noise": {"relative_std": 0.1, "attention": False}}, False),
    ],
)
def test_what_concerns_attention(hardware, concerned):
    settings = Hardware.model_validate(hardware)
    assert settings.concerns_attention == concerned
    assert not settings.changes_nothing


@pytest.mark.parametrize(
    ("hardware", "draws", "separates"),
    [
        ({}, False, False),
        ({"precision": {"weight": "mxfp4", "activation": "mxfp4"}}, False, False),
        ({"precision": {"gradient": "mxfp4"}}, False, True),
        ({"precision": {"kv_cache": "mxfp4", "attention": "int8"}}, False, False),
        ({"precision": {"gradient": "mxfp4", "gradient_rounding": "stochastic"}}, True, True),
        ({"matmul_noise": {"relative_std": 0.1, "forward": False}}, True, True),
        ({"matmul_noise": {"relative_std": 0.1, "scale": "operands"}}, True, True),
        ({"matmul_noise": {"gain_std": 0.1, "adc_bits": 8}}, False, False),
        ({"accumulator": {"bits": 13}}, False, True),
        ({"matmul_noise": {"relative_std": 0.1}}, True, True),
    ],
)
def test_what_a_training_pass_needs(hardware, draws, separates):
    settings = Hardware.model_validate(hardware)
    assert (settings.draws_in_training, settings.separates_rollouts) == (draws, separates)
