"""Small random models with a tokenizer of single characters, and rollouts of a few prompts."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample

KEY = Key.from_seed(3)
PROMPTS = ["12+7=", "9=", "40-3-25=", "12+7=", "1+1="]
CHARACTERS = "0123456789+-=>"
# Tolerance of log-probabilities between passes over different shapes: about 20 products deep in float32; at most 2e-5
# was measured on these models.
ROUNDING = {"atol": 1e-4, "rtol": 0}


def make_tokenizer():
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<eos>", *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make(kind="qwen2", seed=0, **changes):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.4,  # large weights: peaked, varied distributions, responses of varied length
    }
    torch.manual_seed(seed)
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    return model(config(**sizes | changes)).eval()


def draw(model, tokenizer, prompts=PROMPTS, **changes):
    settings = {"group_size": 4, "max_new_tokens": 12, "temperature": 1.0, "key": KEY}
    return sample(model, tokenizer, prompts, **settings | changes)


def same(a, b):
    assert a.texts == b.texts
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.response_mask, b.response_mask)
    torch.testing.assert_close(a.logprobs, b.logprobs, **ROUNDING)


def generated(model, tokenizer, prompts, count):
    """Greedy texts of `model.generate`, one prompt at a time, hence without padding."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        texts.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def plain_logprobs(model, rollouts, temperature):
    """Log-probabilities and entropies in plain torch, one rollout at a time without padding; differentiable."""
    P, T = rollouts.prompt_length, rollouts.response_mask.shape[1]
    logprobs, entropy = torch.zeros(len(rollouts), T), torch.zeros(len(rollouts), T)
    for n in range(len(rollouts)):
        left = int((~rollouts.attention_mask[n, :P]).sum())
        length = int(rollouts.lengths[n])
        ids = rollouts.tokens[n, left : P + length][None]
        full = torch.log_softmax(model(ids).logits[0] / temperature, dim=-1)[P - left - 1 : -1]
        logprobs[n, :length] = full.gather(1, ids[0, P - left :, None])[:, 0]
        entropy[n, :length] = -(full.exp() * full).sum(-1)
    return logprobs, entropy
