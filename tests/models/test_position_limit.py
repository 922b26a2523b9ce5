"""Rotary embeddings that can depend on the batch are used only up to the length where they do not, or are refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from roundoff.config import ConfigError
from roundoff.models.logprobs import token_logprobs
from roundoff.models.position_limit import position_limit
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import check_sampling, sample
from tests.small_models import generated, make_tokenizer

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": LONG,
}


def build(parameters):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(parameters))).eval()
    with torch.no_grad():
        model.lm_head.weight[:2].mul_(0.05)  # end and padding are unlikely
    return model


def draw(model, prompts, count=8):
    return sample(
        model, make_tokenizer(), prompts, group_size=1, max_new_tokens=count, temperature=0, key=Key.from_seed(0)
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_text_and_log_probabilities_do_not_depend_on_the_batch(kind):
    model, tokenizer = build(KINDS[kind]), make_tokenizer()
    prompts = ["12+3=", "9-9-9-9-9-1=", "4="]
    together = draw(model, prompts)
    assert together.texts == [draw(model, [prompt]).texts[0] for prompt in prompts]
    assert together.texts == generated(model, tokenizer, prompts, 8)
    with torch.no_grad():
        again, _ = token_logprobs(
            model, together.tokens, together.attention_mask, together.response_mask.shape[1], temperature=1.0
        )
    assert float((again - together.logprobs).abs().max()) < 1e-4  # float32 rounding


@pytest.mark.parametrize(("kind", "limit"), [("default", 64), ("dynamic", 64), ("longrope", 24)])
def test_the_limit_is_where_frequencies_begin_to_change(kind, limit):
    model, tokenizer = build(KINDS[kind]), make_tokenizer()
    assert position_limit(model)[0] == limit
    longest = "1" * (limit - 8)
    draw(model, [longest])
    for attempt in (
        lambda: draw(model, ["1" + longest]),
        lambda: check_sampling(model, tokenizer, [limit - 7], 8),
    ):
        with pytest.raises(ConfigError, match=str(limit)):
            attempt()


def test_a_training_pass_beyond_the_switch_is_refused():
    model = build(LONG)
    tokens, mask = torch.full((2, 25), 3), torch.ones(2, 25, dtype=torch.int64)
    token_logprobs(model, tokens[:, :24], mask[:, :24], 4, temperature=1.0)
    with pytest.raises(ConfigError, match="longrope"):
        token_logprobs(model, tokens, mask, 4, temperature=1.0)


def test_phi3_says_where_its_switch_is_in_the_config_itself():
    parameters = {name: value for name, value in LONG.items() if name != "original_max_position_embeddings"}
    config = Phi3Config(**SIZES, rope_parameters=parameters, original_max_position_embeddings=24)
    assert position_limit(Phi3ForCausalLM(config))[0] == 24


@pytest.mark.parametrize("nested", [False, True])
def test_an_unknown_kind_is_refused_by_name(nested):
    model = build(KINDS["default"])
    odd = {"rope_type": "spiral", "rope_theta": 1.0}
    model.config.rope_parameters = {"full_attention": KINDS["default"], "sliding_attention": odd} if nested else odd
    with pytest.raises(ConfigError, match="spiral"):
        draw(model, ["1="])
