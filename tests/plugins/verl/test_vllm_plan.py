"""What vLLM's layers compute in rollouts and evaluation, and what is refused; needs neither verl nor vLLM."""

import pytest

from roundoff.config import ConfigError, Hardware, validate
from roundoff.plugins.verl.vllm_limits import check_vllm
from roundoff.plugins.verl.vllm_plan import LayerArithmetic, plan

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(3)
    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]
PLAIN = LayerArithmetic()
EXACT_ATTENTION = {"attention": False}


def hardware(**settings):
    return validate(Hardware, settings, source="test")


def test_each_phase_has_its_arithmetic_and_training_plays_no_part():
    found = plan(
        hardware(
            precision={"weight": "mxfp4", "activation": "mxfp4"},
            matmul_noise={"relative_std": 0.1, "attention": False},
            training={"precision": {"weight": "none", "activation": "none"}, "matmul_noise": {"attention": True}},
            evaluation={"precision": {"activation": "none"}, "matmul_noise": "none"},
        ),
        NAMES,
    )
    assert list(found.layers) == NAMES
    assert {tuple(layer.items()) for layer in found.layers.values()} == {
        (("rollout", LayerArithmetic("mxfp4", 0.1)), ("evaluation", PLAIN))
    }
    assert found.weight_format("model.layers.0.self_attn.q_proj.weight") == "mxfp4"


def test_evaluation_follows_rollouts_unless_it_is_written():
    found = plan(hardware(rollout={"precision": {"activation": "nvfp4"}}), NAMES)
    assert {layer["evaluation"] for layer in found.layers.values()} == {LayerArithmetic("nvfp4")}


def test_backward_noise_does_nothing_in_vllm():
    found = plan(hardware(matmul_noise={"relative_std": 0.1, "forward": False}), NAMES)
    assert found.layers[NAMES[0]] == {"rollout": PLAIN, "evaluation": PLAIN}


def test_rules_reach_the_parts_of_a_fused_weight_and_whole_layers():
    found = plan(
        hardware(
            precision={"weight": "mxfp4", "activation": "mxfp4"},
            rules=[
                {"match": ["layers.0.*"], "precision": {"activation": "hif8"}},
                {"match": ["v_proj"], "precision": {"weight": "int8"}},
                {
                    "match": ["mlp.down_proj"],
                    "precision": "none",
                    "matmul_noise": {"relative_std": 0.2} | EXACT_ATTENTION,
                },
            ],
        ),
        NAMES,
    )
    assert found.layers["model.layers.0.self_attn.qkv_proj"]["rollout"] == LayerArithmetic("hif8")
    assert found.layers["model.layers.1.self_attn.qkv_proj"]["rollout"] == LayerArithmetic("mxfp4")
    assert found.layers["model.layers.2.mlp.down_proj"]["rollout"] == LayerArithmetic(None, 0.2)
    formats = {part: found.weight_format(f"model.layers.1.self_attn.{part}.weight") for part in ("q_proj", "v_proj")}
    assert formats == {"q_proj": "mxfp4", "v_proj": "int8"}
    assert found.weight_format("model.layers.1.mlp.down_proj.weight") is None


def test_kept_layers_are_counted_from_the_end_as_install_does():
    found = plan(hardware(precision={"weight": "mxfp4", "activation": "mxfp4", "keep": [0, -1]}), NAMES)
    formats = [found.weight_format(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)]
    assert formats == [None, "mxfp4", None]
    inputs = [found.layers[f"model.layers.{layer}.mlp.down_proj"]["rollout"].activation for layer in range(3)]
    assert inputs == [None, "mxfp4", None]


def test_parameters_that_are_no_weights_of_a_linear_on_hardware_are_left_alone():
    found = plan(hardware(precision={"weight": "mxfp4"}, exclude=["embed_tokens", "lm_head", "o_proj"]), NAMES)
    assert "model.layers.0.self_attn.o_proj" not in found.layers
    for name in (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ):
        assert found.weight_format(name) is None


def test_a_layer_that_one_phase_excludes_is_plain_in_it():
    excluded = {"exclude": ["embed_tokens", "lm_head", "down_proj"]}
    found = plan(hardware(precision={"activation": "mxfp4"}, evaluation=excluded), NAMES)
    assert found.layers["model.layers.0.mlp.down_proj"] == {"rollout": LayerArithmetic("mxfp4"), "evaluation": PLAIN}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matmul_noise": {"relative_std": 0.1}}, "^hardware.matmul_noise.attention = true cannot be simulated"),
        (
            {"rollout": {"matmul_noise": {"relative_std": 0.1}}},
            r"--set hardware\.rollout\.matmul_noise\.attention=false",
        ),
        ({"evaluation": {"matmul_noise": {"relative_std": 0.1}}}, r"^hardware\.evaluation\.matmul_noise\.attention"),
        (
            {"rules": [{"match": ["down_proj"], "matmul_noise": {"relative_std": 0.1}}]},
            "^hardware.matmul_noise.attention = true",
        ),
        ({"rollout": {"deadzone": {"threshold": 0.1, "layers": [0]}}}, "^hardware.rollout.deadzone is not simulated"),
        ({"rules": [{"match": ["down_proj"], "deadzone": {"threshold": 0.1}}]}, "^hardware.deadzone is not simulated"),
        ({"faults": [{"kind": "stuck", "layer": 0, "amount": 1.0}]}, "^hardware.faults is not simulated in vLLM"),
        (
            {"rollout": {"precision": {"kv_cache": "fp8_e4m3"}}},
            r"^hardware\.rollout\.precision\.kv_cache is not simulated",
        ),
        ({"precision": {"attention": "fp8_e4m3"}}, r"^hardware\.precision\.attention is not simulated"),
        ({"evaluation": {"accumulator": {"bits": 13}}}, r"^hardware\.evaluation\.accumulator is not simulated"),
        (
            {"rules": [{"match": ["down_proj"], "matmul_noise": {"gain_std": 0.1, "attention": False}}]},
            r"^hardware\.matmul_noise\.gain_std is not simulated",
        ),
        ({"precision": {"weight": "mxfp4"}, "exclude": []}, "leaves lm_head on the hardware"),
        (
            {"rollout": {"precision": {"weight": "mxfp4"}}, "evaluation": {"precision": {"weight": "nvfp4"}}},
            "one phase",
        ),
        ({"precision": {"weight": "mxfp4"}, "evaluation": {"precision": "none"}}, "holds the quantized weights of one"),
        ({"precision": {"weight": "mxfp4"}, "evaluation": {"precision": {"keep": [0]}}}, "of one phase"),
        (
            {
                "precision": {"weight": "mxfp4"},
                "evaluation": {"rules": [{"match": ["down_proj"], "precision": {"weight": "none"}}]},
            },
            "of one phase",
        ),
    ],
)
def test_what_vllm_cannot_simulate_is_refused_from_the_settings_alone(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_vllm(hardware(**settings))
    with pytest.raises(ConfigError, match=message):
        plan(hardware(**settings), NAMES)


@pytest.mark.parametrize(
    "settings",
    [
        {"training": {"matmul_noise": {"relative_std": 0.1}}},  # attention in the actor alone
        {"training": {"precision": {"kv_cache": "fp8_e4m3"}, "accumulator": {"bits": 13}}},
        {"training": {"deadzone": {"threshold": 0.1, "layers": [0]}}},
        {"precision": {"weight": "mxfp4"}, "training": {"precision": {"weight": "nvfp4"}}},
        {"precision": {"weight": "mxfp4"}, "evaluation": {"precision": {"activation": "mxfp4"}}},
        {
            "precision": {"weight": "mxfp4"},
            "evaluation": {"rules": [{"match": ["down_proj"], "precision": {"activation": "mxfp4"}}]},
        },
        {"exclude": []},  # plain arithmetic
    ],
)
def test_what_vllm_can_simulate_is_not(settings):
    check_vllm(hardware(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rules": [{"match": ["k_proj"], "precision": {"activation": "hif8"}}]},
            "hardware.rules set inputs or noise of",
        ),
        ({"exclude": ["lm_head", "k_proj"]}, "hardware.exclude takes out a part of model.layers.0.self_attn.qkv_proj"),
        ({"rules": [{"match": ["fc1"], "precision": {"activation": "hif8"}}]}, "names 'fc1', which matches no module"),
        ({"rollout": {"precision": {"keep": [7]}}}, r"keep \(of rollout\) names layer 7"),
        ({"precision": {"activation": "mxfp4", "keep": [-4]}}, "names layer -4"),
        ({"exclude": ["*"]}, "no Linear layer of vLLM's model is left"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(hardware(**{"precision": {"activation": "mxfp4"}} | settings), NAMES)
