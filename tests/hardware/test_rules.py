"""Rules for single modules, layers counted from the end, and what is refused."""

import pickle

import pytest
import torch

from roundoff.config import ConfigError, Hardware, pattern_matches, validate
from roundoff.hardware import install
from tests.families import Batch, build


def hardware(**settings):
    return validate(Hardware, settings, source="test")


def on_hardware(model):
    return {entry.name.removeprefix("model.layers."): entry for entry in model.hardware_installed.entries}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.0.*", "model.layers.0.mlp.up_proj", True),
        ("layers.0.*", "model.layers.10.mlp.up_proj", False),
        ("layers.1*", "model.layers.10.mlp.up_proj", True),
        ("*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("down_proj", "model.layers.3.mlp.down_proj", True),
        ("mlp", "model.layers.3.mlp.down_proj", True),
        ("own_proj", "model.layers.3.mlp.down_proj", False),
        ("mlp.*", "model.layers.3.mlp", False),
    ],
)
def test_a_pattern_matches_a_run_of_parts(pattern, name, expected):
    assert pattern_matches(pattern, name) is expected


def test_the_last_of_several_rules_wins_key_by_key():
    model = build()
    install(
        model,
        hardware(
            precision={"weight": "mxfp4", "activation": "mxfp4"},
            rules=[
                {"match": ["layers.0.*"], "precision": {"weight": "int8", "activation": "int8"}},
                {"match": ["*.down_proj", "*.up_proj"], "precision": {"activation": "none"}},
                {"match": ["layers.0.mlp.up_proj"], "precision": {"activation": "hif8"}},
                {"match": ["layers.1.self_attn"], "precision": "none"},
                {"match": ["layers.1.mlp.gate_proj"], "deadzone": {"threshold": 0.01}},
            ],
        ),
        seed=0,
    )
    found = {name: (entry.weight, entry.activation, entry.deadzone) for name, entry in on_hardware(model).items()}
    assert found["0.mlp.up_proj"] == ("int8", "hif8", 0.0)
    assert found["0.mlp.down_proj"] == ("int8", None, 0.0)
    assert found["0.self_attn.q_proj"] == ("int8", "int8", 0.0)
    assert found["1.mlp.down_proj"] == ("mxfp4", None, 0.0)
    assert found["1.mlp.gate_proj"] == ("mxfp4", "mxfp4", 0.01)
    assert "1.self_attn.q_proj" not in found and len(found) == 10


def test_a_rule_computes_what_the_same_settings_do_everywhere():
    everywhere, by_rule = build(), build()
    settings = {"precision": {"weight": "mxfp4", "activation": "nvfp4"}, "matmul_noise": {"relative_std": 0.1}}
    install(everywhere, hardware(**settings), seed=0)
    install(by_rule, hardware(rules=[{"match": ["*"], **settings}]), seed=0)
    logits = [model(**Batch().inputs()).logits for model in (everywhere, by_rule)]
    assert torch.equal(*logits)
    assert by_rule.hardware_installed.hardware.is_noisy and not by_rule.hardware_installed.hardware.changes_nothing


def test_a_rule_may_leave_one_attention_layer_without_noise():
    model = build()
    installed = install(
        model,
        hardware(matmul_noise={"relative_std": 0.1}, rules=[{"match": ["layers.1.self_attn"], "matmul_noise": "none"}]),
        seed=0,
    )
    assert list(installed.in_force.attention) == ["model.layers.0.self_attn"]
    assert "1.self_attn.q_proj" not in on_hardware(model) and "1.mlp.up_proj" in on_hardware(model)


def test_noise_by_rule_that_reaches_no_attention_leaves_attention_as_it_is():
    model, plain = build(), build()
    installed = install(model, hardware(rules=[{"match": ["o_proj"], "matmul_noise": {"relative_std": 0.1}}]), seed=0)
    assert not installed.in_force.attention
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert {entry.noise for entry in installed.entries} == {0.1} and len(installed.entries) == 2


def test_kept_layers_stay_in_high_precision_whatever_the_rules_say():
    model = build()
    rules = [{"match": ["*"], "precision": {"weight": "int8"}}]
    install(model, hardware(precision={"weight": "mxfp4", "keep": [-1]}, rules=rules), seed=0)
    assert {entry.layer for entry in on_hardware(model).values()} == {0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rules": [{"match": ["layers.7.*"], "precision": {"weight": "int8"}}]}, "rules.0.match names 'layers.7.*'"),
        ({"rules": [{"match": ["*", "x_proj"], "precision": {"weight": "int8"}}]}, "'x_proj', which matches no module"),
        ({"rules": [{"match": ["lm_head"], "precision": {"weight": "int8"}}]}, "'lm_head', which matches no module"),
        ({"precision": {"weight": "int8", "keep": [-3]}}, "keep names layer -3, which does not exist"),
    ],
)
def test_what_names_nothing_is_refused_at_install(settings, said):
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")):
        install(build(), hardware(**settings), seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rules": [{"match": [], "precision": {"weight": "int8"}}]}, "rules.0 match names no modules"),
        ({"rules": [{"match": ["*"]}]}, "rules.0 changes nothing for"),
        ({"rules": [{"precision": {"weight": "int8"}}]}, "rules.0.match is missing"),
        ({"rules": [{"match": ["*"], "precision": {"keep": [0]}}]}, "keep is not a setting"),
        ({"rules": [{"match": ["*"], "faults": []}]}, "rules.0.faults is not a setting"),
        ({"rules": [{"match": ["*"], "precision": {"hadamard": "dw"}}]}, "rules.0.precision.hadamard = 'dw' does"),
        ({"rules": [{"match": ["*"], "deadzone": {"threshold": 2}}]}, r"threshold must be in \(0, 1\)"),
        ({"rollout": {"precision": {"weigth": "int8"}}}, "rollout.precision.weigth is not a setting; did you mean"),
        ({"rollout": {"precision": {"weight": "int9"}}}, "rollout.precision.weight must be a number format"),
        ({"rollout": {"precision": {"gradient": "int8"}}}, "rollout.precision.gradient does nothing, because no"),
        ({"evaluation": {"precision": {"hadamard": "dw"}}}, "evaluation.precision.hadamard does nothing"),
        ({"training": {"precision": {"hadamard": "dw"}}}, "training.precision.hadamard = 'dw' does nothing without"),
        ({"rollout": {"deadzone": {"threshold": 0.1}}}, "rollout.deadzone.layers is missing"),
        ({"rollout": {"training": {}}}, "rollout.training is not a setting"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, said):
    with pytest.raises(ConfigError, match=said):
        hardware(**settings)


def test_a_change_takes_away_what_refined_it():
    full = {"weight": "nvfp4:2d", "gradient": "nvfp4:te", "gradient_rounding": "stochastic", "keep": [1]}
    settings = hardware(precision=full, rollout={"precision": {"gradient": "none"}}, training={"precision": "none"})
    assert settings.of("rollout").precision.model_dump(exclude_defaults=True) == {"weight": "nvfp4:2d", "keep": (1,)}
    assert settings.of("training").changes_nothing and settings.of("evaluation") == settings.of("rollout")
    only_weight = hardware(precision={"weight": "mxfp4", "keep": [1]}, training={"precision": {"weight": "none"}})
    assert only_weight.of("training").changes_nothing


def test_hardware_goes_through_json_and_toml_unchanged():
    settings = hardware(
        precision={"weight": "mxfp4"},
        rollout={"precision": {"weight": "none", "activation": {"element": "e2m1", "block": 24, "scale": "e8m0:ceil"}}},
        rules=[{"match": ["*.o_proj"], "precision": "none", "deadzone": {"threshold": 0.1}}],
    )
    for content in (settings.model_dump(mode="json"), settings.model_dump(mode="json", exclude_none=True)):
        assert validate(Hardware, content, source="again") == settings
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 (as it goes to worker processes)


def test_a_phase_may_have_rules_and_faults_of_its_own():
    settings = hardware(
        precision={"weight": "mxfp4"},
        faults=[{"kind": "gain", "layer": 0, "amount": 0.1}],
        rules=[{"match": ["*.down_proj"], "precision": {"weight": "int8"}}],
        rollout={"rules": [{"match": ["*.up_proj"], "precision": {"weight": "nvfp4"}}], "faults": []},
        evaluation={"rules": []},
    )
    assert settings.of("training").rules == settings.rules and len(settings.of("training").faults) == 1
    assert settings.of("rollout").faults == () and settings.of("evaluation").rules == ()  # a list is replaced whole
    assert Hardware.model_validate_json(settings.model_dump_json(exclude_none=True)) == settings
    entries = install(build(), settings, seed=0).phases["rollout"].entries
    found = {entry.name.rpartition(".")[2]: entry.weight for entry in entries}
    assert (found["up_proj"], found["down_proj"]) == ("nvfp4", "mxfp4")
    with pytest.raises(ConfigError, match=r"rollout\.faults\.0\.amount is missing"):
        hardware(rollout={"faults": [{"kind": "gain", "layer": 0}]})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"rules": [{"match": ["mlp"], "precision": {"kv_cache": "fp8_e4m3"}}]},
            r"hardware\.rules\.0\.precision\.kv_cache does nothing: \['mlp'\] matches no attention layer",
        ),
        (
            {"rollout": {"rules": [{"match": ["up_proj"], "precision": {"weight": "int8", "attention": "int8"}}]}},
            r"hardware\.rollout\.rules\.0\.precision\.attention does nothing",
        ),
        (
            {"rollout": {"rules": [{"match": ["nothing"], "precision": {"weight": "int8"}}]}},
            r"hardware\.rollout\.rules\.0\.match names 'nothing'",
        ),
        (
            {"rollout": {"precision": {"weight": "int8", "keep": [9]}}},
            r"hardware\.rollout\.precision\.keep names layer 9",
        ),
        (
            {"precision": {"weight": "int8"}, "training": {"exclude": ["*"]}},
            r"hardware\.training\.exclude = \['\*'\] leaves no Linear",
        ),
        (
            {"precision": {"weight": "int8", "keep": [9]}, "rollout": {"exclude": ["x"]}},
            r"^hardware\.precision\.keep names",
        ),
    ],
)
def test_what_reaches_nothing_is_refused_by_its_phase_and_rule(settings, said):
    with pytest.raises(ConfigError, match=said):
        install(build(), hardware(**settings), seed=0)


def reasons(phase="training", **settings):
    installed = install(build(), hardware(**settings), seed=0)
    return {s.reason for s in installed.phases[phase].skipped if "exclude" not in s.reason and "Linear" not in s.reason}


def test_each_reason_to_skip_a_module_names_the_setting_that_is_to_blame():
    int8 = {"precision": {"weight": "int8"}}
    assert reasons(rollout=int8) == {"this phase is in plain arithmetic"}
    assert reasons(precision={"weight": "int8", "keep": [0]}) == {"the settings change nothing here (precision.keep)"}
    taken = {"match": ["mlp"], "precision": "none"}
    assert reasons(**int8, rules=[taken]) == {"the settings change nothing here (rules.0)"}
    assert reasons(rules=[{"match": ["mlp"], **int8}]) == {"the settings concern other modules"}
    assert reasons(precision={"kv_cache": "fp8_e4m3"}) == {"the settings concern attention alone"}
