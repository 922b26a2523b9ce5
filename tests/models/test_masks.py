"""Models whose order of tokens is not that of our masks and positions are refused, unless they run as decoders."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    RobertaConfig,
    RobertaForCausalLM,
)

from roundoff.config import ConfigError
from roundoff.models.logprobs import token_logprobs
from tests.small_models import ROUNDING, draw, generated, make_tokenizer

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.4,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
REFUSED = {
    "attends to later tokens": [
        lambda: BertLMHeadModel(BertConfig(**SIZES)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA, use_bidirectional_attention=True)),
    ],
    "counts its positions from 1": [lambda: RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True))],
}


@pytest.mark.parametrize(("why", "make"), [(why, make) for why, makers in REFUSED.items() for make in makers])
def test_another_order_of_tokens_is_refused(why, make):
    model = make().eval()
    with pytest.raises(ConfigError, match=why):
        draw(model, make_tokenizer())
    tokens = torch.full((1, 4), 3)
    with pytest.raises(ConfigError, match=why):
        token_logprobs(model, tokens, torch.ones_like(tokens), 2, temperature=1.0)


def test_an_encoder_as_decoder_is_sampled_as_it_generates():
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval()
    prompts = ["12+3=", "9-9-9-9="]
    rollouts = draw(model, make_tokenizer(), prompts, group_size=1, temperature=0)
    assert rollouts.texts == generated(model, make_tokenizer(), prompts, 12)
    with torch.no_grad():
        again, _ = token_logprobs(
            model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
        )
    torch.testing.assert_close(again, rollouts.logprobs, **ROUNDING)
