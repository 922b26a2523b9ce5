"""Parameter counts, checked against the models themselves and against the numbers that their publishers state."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from roundoff.config import ConfigError
from roundoff.planning.shape import model_shape

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 50}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("tiny", 224_832),
    ],
)
def test_known_models_have_the_stated_number_of_parameters(name, parameters):
    assert model_shape(name).parameters == parameters


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        LlamaConfig(**SMALL, num_key_value_heads=6, head_dim=16, attention_bias=False),
        Qwen2Config(**SMALL, num_key_value_heads=3, tie_word_embeddings=False),
    ],
)
def test_counts_are_those_of_the_model(tmp_path, config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert shape.linear == sum(m.weight.numel() for m in linears)
    assert shape.adapters(4) == sum(4 * (m.in_features + m.out_features) for m in linears)


def test_a_config_file_stands_in_for_a_model_that_is_not_here(tmp_path):
    file = tmp_path / "config.json"
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    assert model_shape("someone/unknown", file).layers == 3
    content = json.loads(file.read_text())
    del content["num_hidden_layers"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not say num_hidden_layers"):
        model_shape("someone/unknown", file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        model_shape("someone/unknown", file)


def test_an_unknown_model_is_an_error_that_says_what_to_give():
    with pytest.raises(ConfigError, match=r"did you mean 'Qwen/Qwen2.5-1.5B-Instruct'\?.*give --config"):
        model_shape("Qwen/Qwen2.5-1.5B-Instruc")


def test_a_mixture_of_experts_is_refused(tmp_path):
    # Counted as a dense model it would be ten times too small, and so would its plan.
    Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a mixture of experts \(.*: num_(local_)?experts = 8\)"):
        model_shape(str(tmp_path))
