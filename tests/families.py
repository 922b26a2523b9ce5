"""Small random models of every supported family, and batches with left padding."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=32)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE, head_dim=16)),
}


def build(family: str = "qwen2") -> PreTrainedModel:
    """A random model with the same weights at every call, with large enough weights to tell positions apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "embed" not in name:
                    parameter.mul_(4.0)
    return model


class Batch:
    """Three prompts of 7, 5 and 3 tokens, left-padded by `pad` more columns than needed."""

    def __init__(self, pad: int = 0, lengths: tuple[int, ...] = (7, 5, 3), first: int = 0) -> None:
        width = max(lengths) + pad
        self.ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        self.mask = torch.zeros_like(self.ids)
        for i, length in enumerate(lengths):
            self.ids[i, width - length :] = (torch.arange(length) * 7 + 3 * (i + first)) % 47 + 1
            self.mask[i, width - length :] = 1
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.rows = (torch.arange(first, first + len(lengths))[:, None] << 20) + self.positions

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
