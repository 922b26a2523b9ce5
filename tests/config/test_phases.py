"""Phases and rules of hardware as settings: what "none" takes away, what is refused, and how messages name it."""

import pytest

from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision, validate
from roundoff.experiments import load_experiment, load_profile, with_overrides

W4A4 = {"weight": "mxfp4", "activation": "mxfp4"}
NOISE = {"relative_std": 0.1}


def hardware(**content: object) -> Hardware:
    return validate(Hardware, content, source="file", within="hardware.")


@pytest.mark.parametrize("phase", ["rollout", "training", "evaluation"])
def test_none_takes_a_whole_phase_away(phase: str) -> None:
    chip = hardware(
        precision=W4A4,
        matmul_noise=NOISE,
        deadzone={"threshold": 0.1, "layers": [0]},
        faults=[{"kind": "noise", "layer": 0, "amount": 0.1}],
        rules=[{"match": ["mlp"], "precision": {"weight": "nvfp4"}}],
        accumulator={"bits": 13},
        **{phase: "none"},
    )
    assert chip.of(phase).changes_nothing
    other = "training" if phase == "rollout" else "rollout"
    assert not chip.of(other).changes_nothing
    assert Hardware.model_validate(chip.model_dump(exclude_none=True)) == chip


def test_none_takes_tables_away_at_the_top_as_in_a_phase() -> None:
    none = dict.fromkeys(("precision", "matmul_noise", "deadzone", "accumulator"), "none")
    assert hardware(**none) == Hardware()


@pytest.mark.parametrize(
    ("base", "change", "gone"),
    [
        ({"adc_bits": 8, "adc_range": 4.0}, {"adc_bits": "none"}, MatmulNoise()),
        ({"relative_std": 0.1, "scale": "operands"}, {"relative_std": 0.0}, MatmulNoise()),
        (
            {"relative_std": 0.1, "scale": "operands"},
            {"relative_std": 0.2},
            MatmulNoise(relative_std=0.2, scale="operands"),
        ),
    ],
)
def test_what_refined_a_setting_goes_with_it(base: dict, change: dict, gone: MatmulNoise) -> None:
    assert hardware(matmul_noise=base, rollout={"matmul_noise": change}).of("rollout").matmul_noise == gone


def test_a_refinement_that_is_written_where_it_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware\.rollout\.matmul_noise\.adc_range = 4 does nothing"):
        hardware(matmul_noise={"adc_bits": 8}, rollout={"matmul_noise": {"adc_bits": "none", "adc_range": 4.0}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rules": [{"match": "mlp", "precision": W4A4}]}, 'hardware.rules.0.match must be a list, such as ["mlp"]'),
        ({"rollout": {"exclude": "mlp"}}, 'hardware.rollout.exclude must be a list, such as ["mlp"], but is "mlp"'),
        ({"rollout": 3}, "hardware.rollout must be a table of settings, but is 3"),
        ({"precision": "mxfp4"}, 'hardware.precision must be a table of settings, but is "mxfp4"'),
        ({"precision": {"keep": [-1]}}, "hardware.precision.keep = [-1] does nothing without a format"),
        ({"rollout": {"weight": "mxfp4"}}, "did you mean 'hardware.rollout.precision.weight'?"),
        ({"rules": [{"match": ["mlp"], "weight": "mxfp4"}]}, "did you mean 'hardware.rules.0.precision.weight'?"),
        ({"rules": [{"match": ["mlp"], "precision": {"keep": [1]}}]}, "did you mean 'hardware.precision.keep'?"),
        (
            {"rollout": {"rules": [{"match": ["mlp"], "precision": {"hadamard": "dw"}}]}},
            "hardware.rollout.rules.0.precision.hadamard = 'dw' does nothing",
        ),
        (
            {"rollout": {"rules": [{"match": ["mlp"], "precision": {"gradient": "mxfp4"}}]}},
            "hardware.rollout.rules.0.precision.gradient does nothing, because no gradient is computed in that phase",
        ),
        (
            {"evaluation": {"matmul_noise": {"relative_std": 0.1, "forward": False}}},
            "hardware.evaluation.matmul_noise.forward = false leaves noise on gradients alone",
        ),
    ],
)
def test_messages_name_the_setting_in_full(content: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        hardware(**content)
    assert str(error.value).startswith("file: hardware.")
    assert message in str(error.value)


def test_settings_from_python_can_stand_in_a_phase() -> None:
    chip = Hardware(precision=Precision(weight="nvfp4"), rollout={"precision": Precision(weight="mxfp4")})
    assert chip.of("rollout").precision == Precision(weight="mxfp4")
    taken = Hardware(
        precision=Precision(weight="nvfp4", activation="nvfp4"), rollout={"precision": Precision(weight=None)}
    )
    assert taken.of("rollout").precision == Precision(activation="nvfp4")
    assert Hardware(rollout=Hardware(matmul_noise=MatmulNoise(relative_std=0.1))).of("rollout").is_noisy


@pytest.mark.parametrize(
    ("rollout", "differ"),
    [
        ({"matmul_noise": {"gain_std": 0.02}}, False),
        ({"matmul_noise": {"adc_bits": 8}}, False),
        ({"matmul_noise": {"backward": False}}, False),
        ({"exclude": ["lm_head", "embed_tokens"]}, False),
        ({"precision": W4A4}, False),
        ({"rules": [{"match": ["mlp"], "matmul_noise": {"gain_std": 0.02}}]}, False),
        ({"rules": [{"match": ["mlp"], "precision": W4A4}]}, False),
        ({"rules": [{"match": ["mlp"], "matmul_noise": {"relative_std": 0.2}}]}, True),
        ({"rules": [{"match": ["mlp"], "matmul_noise": "none"}]}, True),
        ({"matmul_noise": {"relative_std": 0.2}}, True),
        ({"matmul_noise": {"scale": "operands"}}, True),
        ({"matmul_noise": {"attention": False}}, True),
        ({"exclude": ["lm_head"]}, True),
        ({"lora": True}, True),
        ("none", True),
    ],
)
def test_draws_differ_only_where_noise_does(rollout: object, differ: bool) -> None:
    assert hardware(matmul_noise=NOISE, rollout=rollout).draws_differ == differ


def test_without_noise_no_draw_differs() -> None:
    assert not hardware(precision=W4A4, rollout={"lora": True, "exclude": ["lm_head"]}).draws_differ


def test_changes_of_two_phases_have_two_names() -> None:
    experiments, profile = [load_experiment("quickstart-mxfp4")], load_profile("tiny")

    def named(*assignments: str) -> str:
        return with_overrides(experiments, profile, assignments)[0][0].id

    assert named("hardware.training.precision=none") == "quickstart-mxfp4+training.precision=none"
    assert named("hardware.evaluation.precision=none") == "quickstart-mxfp4+evaluation.precision=none"
    assert named("hardware.rollout.precision.weight=nvfp4") == "quickstart-mxfp4+rollout.weight=nvfp4"
    assert named('hardware.rollout={precision="none"}') == "quickstart-mxfp4+rollout.precision=none"
    assert named("hardware.training=none") == "quickstart-mxfp4+training=none"
    assert named("hardware.precision.weight=nvfp4") == "quickstart-mxfp4+weight=nvfp4"
