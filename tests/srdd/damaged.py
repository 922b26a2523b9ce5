"""Small models with one layer that is known to be damaged most, and texts for them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.families import SIZES

LAYERS = 4


def plain_model(layers: int = LAYERS) -> PreTrainedModel:
    """Random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "embed" not in name:
                    parameter.mul_(4.0)
    return model


def with_outliers(layer: int, factor: float = 4096.0) -> PreTrainedModel:
    """The same function, but in one layer two input channels are large, one in each block of 32.

    Gains of both norms times `factor`, weight columns divided by it: powers of two, so that the clean model keeps its
    bits. The outliers set the scale of their blocks, so everything else in them falls into the deadzone.
    """
    model = plain_model()
    block = model.model.layers[layer]
    readers = {
        block.input_layernorm: (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
        block.post_attention_layernorm: (block.mlp.gate_proj, block.mlp.up_proj),
    }
    with torch.no_grad():
        for norm, linears in readers.items():
            for channel in (3, 40):
                norm.weight[channel] *= factor
                for linear in linears:
                    linear.weight[:, channel] /= factor
    return model


def texts(count: int = 8, length: int = 12, pad: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two batches of `count` random texts each, left-padded by `pad` columns."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (2, count, length), generator=generator)
    ids = torch.nn.functional.pad(ids, (pad, 0))
    mask = torch.ones_like(ids)
    mask[..., :pad] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
