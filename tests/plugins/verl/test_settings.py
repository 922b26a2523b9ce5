"""What the environment tells the plugin, and what it refuses; needs no verl."""

import pytest

from roundoff.config import ConfigError
from roundoff.plugins.verl.settings import VARIABLE, PluginSettings, forwarded, from_environment

ON = {"VERL_NOISY_OPS_ENABLED": "1"}


def test_what_every_process_of_a_run_must_have():
    entry = "roundoff.plugins.verl.entry"
    assert forwarded({**ON, "PATH": "/bin", "VERL_PLATFORM": "cpu"}) == {
        **ON, "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": entry
    }  # fmt: skip
    assert forwarded({"VERL_USE_EXTERNAL_MODULES": "mine"})["VERL_USE_EXTERNAL_MODULES"] == f"mine,{entry}"
    assert forwarded({"VERL_USE_EXTERNAL_MODULES": entry}) == {"VERL_USE_EXTERNAL_MODULES": entry}


def test_without_its_variables_the_plugin_has_no_settings():
    assert from_environment({"PATH": "/bin", "VERL_PLATFORM": "cpu"}) is None
    assert from_environment({"VERL_NOISY_OPS_ENABLED": "0", "VERL_NOISY_OPS_SCALE": "5e-2"}) is None


def test_variables_of_older_scripts_are_understood():
    settings = from_environment({**ON, "VERL_NOISY_OPS_SCALE": "5e-2", "VERL_NOISY_OPS_TYPE": "relative_gaussian"})
    noise = settings.hardware.matmul_noise
    assert (noise.relative_std, noise.forward, noise.backward, noise.attention) == (0.05, True, True, False)
    assert settings.ratio == "recomputed"
    assert settings.hardware.precision.weight is None


def test_scale_defaults_to_that_of_the_older_scripts():
    assert from_environment(ON).hardware.matmul_noise.relative_std == 1e-4


def test_forward_only_turns_backward_noise_off():
    settings = from_environment({"VERL_NOISY_OPS_ENABLED": "true", "VERL_NOISY_OPS_FORWARD_ONLY": "yes"})
    assert settings.hardware.matmul_noise.forward
    assert not settings.hardware.matmul_noise.backward


def test_all_ops_is_attention_too_and_says_what_stays_exact():
    with pytest.warns(UserWarning, match="softmax, activations and norms stay exact"):
        settings = from_environment({**ON, "VERL_NOISY_OPS_ALL_OPS": "1"})
    assert settings.hardware.matmul_noise.attention


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**ON, "VERL_NOISY_OPS_TYPE": "uniform"}, "TYPE must be 'relative_gaussian'"),
        ({**ON, "VERL_NOISY_OPS_SCALE": "five"}, "SCALE must be a number"),
        ({**ON, "VERL_NOISY_OPS_SCALE": "5"}, r"must be in \[0, 1\)"),
        ({**ON, "VERL_NOISY_OPS_SCALE": "0"}, "would do nothing"),
        ({"VERL_NOISY_OPS_ENABLED": "on"}, "ENABLED must be one of"),
        ({**ON, "VERL_NOISY_OPS_TRAINING_ONLY": "1"}, "VERL_NOISY_OPS_TRAINING_ONLY is not a variable"),
        ({"VERL_NOISY_OPS_ENABLE": "1"}, "did you mean 'VERL_NOISY_OPS_ENABLED'"),
        ({**ON, VARIABLE: "{}"}, "set one of them"),
        ({VARIABLE: "{hardware}"}, "must be JSON"),
        ({VARIABLE: "[]"}, "must be a JSON object"),
        ({VARIABLE: '{"hardware": {"precison": {}}}'}, "did you mean 'precision'"),
        ({VARIABLE: "{}"}, "hardware is missing"),
        ({VARIABLE: '{"hardware": {"precision": {"weight": "mxfp4", "keep": "srdd:2"}}}'}, "needs a scan"),
        (
            {VARIABLE: '{"hardware": {}, "aqn": {"sigma_start": 1, "sigma_end": 1, "layers": "targeted"}}'},
            "aqn.layers = 'targeted' needs a scan",
        ),
    ],
)
def test_what_cannot_be_carried_out_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        from_environment(environment)


def test_settings_survive_the_environment():
    text = '{"experiment": "x", "hardware": {"matmul_noise": {"relative_std": 0.1}}, "seed": 3}'
    settings = from_environment({VARIABLE: text})
    assert from_environment({VARIABLE: settings.model_dump_json()}) == settings
    assert settings.fingerprint == from_environment({VARIABLE: settings.model_dump_json()}).fingerprint


def test_the_fingerprint_covers_every_setting():
    base = PluginSettings(hardware={"matmul_noise": {"relative_std": 0.1}})
    others = [
        base.model_copy(update={"seed": 1}),
        base.model_copy(update={"ratio": "recomputed"}),
        PluginSettings(hardware={"matmul_noise": {"relative_std": 0.1, "attention": False}}),
    ]
    assert len({s.fingerprint for s in (base, *others)}) == 4
