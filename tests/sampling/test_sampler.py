"""The sampler: its text is that of `generate`, its draws depend on the key alone, and bad input is refused."""

import copy
import math

import pytest
import torch
import transformers

from roundoff.config import ConfigError, Hardware, MatmulNoise
from roundoff.hardware import install
from roundoff.models.logprobs import token_logprobs
from roundoff.sampling.rollouts import concatenate
from roundoff.sampling.sampler import check_sampling
from tests.small_models import KEY, PROMPTS, ROUNDING, draw, generated, make, plain_logprobs, same


@pytest.fixture(scope="module", params=[32, 64], ids=["own pass", "fused pass"])
def model(request):
    """Heads of 8 numbers are sampled by the model's own pass, heads of 16 by the fused one."""
    return make(hidden_size=request.param)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),  # layers of both kinds
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("qwen2", {"hidden_size": 64}),
        ("llama", {"hidden_size": 128, "num_key_value_heads": 4, "attention_bias": True}),
        ("qwen2", {"hidden_size": 64, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ],
)
def test_greedy_text_is_that_of_generate(tokenizer, kind, changes):
    model = make(kind, **changes)
    rollouts = draw(model, tokenizer, group_size=1, temperature=0.0)
    assert rollouts.texts == generated(model, tokenizer, PROMPTS, 12)
    assert len({*rollouts.texts}) > 2
    logprobs, _ = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
    )
    torch.testing.assert_close(logprobs, rollouts.logprobs, **ROUNDING)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},  # learned positions
    "OPT": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.4},  # learned positions with an offset
    "GPTNeoX": SIZES,
    "Mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 5},
    "Gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},  # both kinds, capped logits
    "Phi3": {**SIZES, "num_key_value_heads": 2},
    "Qwen3Moe": {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": {  # attention sinks
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
    "Granite": SIZES,
    "Cohere2": {**SIZES, "sliding_window": 5},
    "DeepseekV3": {  # keys and values of different sizes
        **SIZES,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sampled_as_generate_does(tokenizer, family):
    torch.manual_seed(0)
    special = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "initializer_range": 0.4}
    config = getattr(transformers, f"{family}Config")(**{"max_position_embeddings": 64} | special | FAMILIES[family])
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    rollouts = draw(model, tokenizer, group_size=1, temperature=0.0)
    assert rollouts.texts == generated(model, tokenizer, PROMPTS, 12)
    logprobs, _ = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
    )
    torch.testing.assert_close(logprobs, rollouts.logprobs, **ROUNDING)


def test_frequencies_are_those_of_the_distribution(model, tokenizer):
    rollouts = draw(model, tokenizer, ["9="], group_size=4000, max_new_tokens=1, temperature=0.7)
    ids = torch.tensor([tokenizer("9=")["input_ids"]])
    expected = torch.softmax(model(ids).logits[0, -1] / 0.7, dim=-1)
    counts = torch.bincount(rollouts.tokens[:, -1], minlength=16)
    # Each count is binomial: within 5 standard deviations with probability 1 - 6e-7, plus one for small counts.
    assert (counts - 4000 * expected).abs().le(5 * (4000 * expected * (1 - expected)).sqrt() + 1).all()
    chosen = expected[rollouts.tokens[:, -1]].log()
    torch.testing.assert_close(rollouts.logprobs[:, 0], chosen, **ROUNDING)


def test_responses_end_with_the_end_token_or_at_the_limit(model, tokenizer):
    rollouts = draw(model, tokenizer, group_size=16)
    P = rollouts.prompt_length
    lengths = rollouts.lengths.tolist()
    assert 0 < int(rollouts.truncated.sum()) < len(rollouts)  # both cases occur
    assert len({*lengths}) > 4
    for n, length in enumerate(lengths):
        response = rollouts.tokens[n, P : P + length].tolist()
        assert 1 not in response[:-1]
        assert (response[-1] == 1) is not bool(rollouts.truncated[n])
        assert bool(rollouts.truncated[n]) <= (length == 12)
        assert rollouts.texts[n] == tokenizer.decode(response, skip_special_tokens=True)
        prompt = tokenizer(PROMPTS[n // 16])["input_ids"]
        assert rollouts.tokens[n].tolist() == [0] * (P - len(prompt)) + prompt + response + [0] * (12 - length)
        assert rollouts.attention_mask[n].sum() == len(prompt) + length
        # Row ids count positions from the first token of the prompt.
        first = P - len(prompt)
        assert rollouts.rows[n, first:].tolist() == [n * 2**20 + p for p in range(len(prompt) + 12)]
    assert not rollouts.nonfinite.any()
    assert rollouts.logprobs[~rollouts.response_mask].eq(0).all()


def test_end_tokens_of_the_generation_config_count_too(model, tokenizer):
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [1, 5]
    try:
        rollouts = draw(model, tokenizer, group_size=16)
    finally:
        model.generation_config.eos_token_id = before
    last = rollouts.tokens.gather(1, (rollouts.prompt_length + rollouts.lengths - 1)[:, None])[:, 0]
    assert {1, 5} <= {*last[~rollouts.truncated].tolist()} <= {1, 5}


def test_the_same_key_gives_the_same_rollouts_and_another_one_others(model, tokenizer):
    same(draw(model, tokenizer), draw(model, tokenizer))
    assert draw(model, tokenizer).texts != draw(model, tokenizer, key=KEY.fold(1)).texts


@pytest.mark.parametrize("size", [32, 64], ids=["own pass", "fused pass"])
@pytest.mark.parametrize("noisy", [False, True])
def test_a_batch_split_sorted_or_thinned_out_differently_gives_the_same_text(tokenizer, noisy, size, monkeypatch):
    model = make(hidden_size=size)
    if noisy:
        install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    whole = draw(model, tokenizer)
    assert len({*whole.texts}) > 10
    same(draw(model, tokenizer, max_rows=3), whole)
    for share in (0.0, 1.1):  # leave the batch at once / never
        monkeypatch.setattr("roundoff.sampling.decoding.COMPACT_SHARE", share)
        same(draw(model, tokenizer), whole)
    ids = torch.arange(20).view(5, 4)
    alone = [draw(model, tokenizer, [PROMPTS[i]], rollout_ids=ids[i]) for i in (0, 1, 2, 3, 4)]
    same(concatenate(alone), whole)
    backwards = draw(model, tokenizer, PROMPTS[::-1], rollout_ids=ids.flip(0).flatten())
    assert backwards.select(ids.flip(0).flatten()).texts == whole.texts


def test_equal_prompts_share_a_prefill_and_still_differ(tokenizer):
    model, seen = make(), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    try:
        rollouts = draw(model, tokenizer)
    finally:
        handle.remove()
    assert seen[0] == (4, rollouts.prompt_length)  # 5 prompts, two of them equal, 4 rollouts each
    assert seen[1][1] == 1
    assert len({*rollouts.texts[:4]}) > 1
    assert rollouts.texts[:4] != rollouts.texts[12:16]


@pytest.mark.parametrize("prompts", [["12+7=", "9=", "40-3-25="], PROMPTS])
def test_shared_prefills_give_the_log_probabilities_of_a_plain_pass(model, tokenizer, prompts):
    rollouts = draw(model, tokenizer, prompts)
    with torch.no_grad():
        torch.testing.assert_close(plain_logprobs(model, rollouts, 1.0)[0], rollouts.logprobs, **ROUNDING)


def test_ended_rollouts_leave_the_batch(tokenizer):
    model, rows = make(), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    try:
        rollouts = draw(model, tokenizer, group_size=16)
    finally:
        handle.remove()
    running = [int((rollouts.lengths > t).sum()) for t in range(1, 12)]
    assert rows[1:] == sorted(rows[1:], reverse=True)
    # No step computes an eighth more than what still runs.
    assert all(run <= row < run / (1 - 0.125) + 1 for run, row in zip(running, rows[1:], strict=False))


def test_rollouts_of_one_prompt_meet_noise_of_their_own(tokenizer):
    model = make()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    greedy = draw(model, tokenizer, ["9="], group_size=8, temperature=0.0, max_new_tokens=1)
    assert len({*greedy.logprobs.flatten().tolist()}) > 1


def test_the_models_mode_is_restored_and_dropout_is_off(tokenizer):
    model = make(attention_dropout=0.5)
    expected = draw(model, tokenizer).texts
    model.train()
    model.lm_head.eval()
    assert draw(model, tokenizer).texts == expected
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_top_k_of_one_is_greedy(model, tokenizer):
    greedy = draw(model, tokenizer, temperature=0.0)
    assert draw(model, tokenizer, top_k=1).texts == greedy.texts
    assert draw(model, tokenizer, top_p=1e-6).texts == greedy.texts


@pytest.mark.parametrize("size", [32, 64], ids=["own pass", "fused pass"])
def test_output_that_is_not_finite_ends_that_rollout_only(tokenizer, size):
    model = make(hidden_size=size)
    healthy = draw(model, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = math.nan  # the token "6": a rollout that writes it is lost
    rollouts = draw(model, tokenizer)
    bad = rollouts.nonfinite
    assert 0 < int(bad.sum()) < len(rollouts)
    assert rollouts.truncated[bad].all()
    for n in range(len(rollouts)):
        if bad[n]:  # ends right after the "6", which was drawn from a healthy distribution
            assert rollouts.texts[n].endswith("6")
            assert healthy.texts[n].startswith(rollouts.texts[n])
        else:
            assert rollouts.texts[n] == healthy.texts[n]
    assert rollouts.logprobs.isfinite().all()


def test_a_rollout_may_end_before_its_first_token(tokenizer):
    model = make()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    rollouts = draw(model, tokenizer)
    assert rollouts.nonfinite.all()
    assert rollouts.texts == [""] * 20
    assert rollouts.lengths.sum() == 0
    logprobs, entropy = token_logprobs(model, rollouts.tokens, rollouts.attention_mask, 1, temperature=1.0)
    assert logprobs.eq(0).all()
    assert entropy.eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be one or more texts"),
        ({"prompts": "1+1="}, "prompts must be one or more texts"),
        ({"prompts": ["1=", ""]}, "prompt 1 must encode to at least one token"),
        ({"prompts": ["1" * 60]}, "prompt 0 has 60 tokens.*does not fit into the 64 positions"),
        ({"group_size": 0}, "group_size and max_rows must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"rollout_ids": [1, 2]}, "rollout_ids must be 20 whole numbers"),
        ({"rollout_ids": [-1] * 20}, "rollout_ids must be 20 whole numbers"),
    ],
)
def test_arguments_out_of_range_are_refused(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(model, tokenizer, **changes)


@pytest.mark.parametrize(("name", "message"), [("pad_token", "must have a pad token"), ("eos_token", "an end token")])
def test_a_tokenizer_without_special_tokens_is_refused(tokenizer, name, message):
    model, broken = make(), copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    setattr(broken, name, None)
    with pytest.raises(ValueError, match=message):
        draw(model, broken)


def test_what_cannot_be_sampled_is_refused_before_sampling(tokenizer):
    model = make()
    check_sampling(model, tokenizer, [1, 52], 12)  # 64 positions
    with pytest.raises(ConfigError, match=r"a prompt of 53 tokens and .*max_new_tokens = 12 do not fit into the 64"):
        check_sampling(model, tokenizer, [1, 53], 12)
    with pytest.raises(ConfigError, match="encodes to no token at all"):
        check_sampling(model, tokenizer, [1, 0], 12)
    broken = copy.deepcopy(tokenizer)
    broken.eos_token, model.generation_config.eos_token_id = None, None
    with pytest.raises(ConfigError, match="an end token"):
        check_sampling(model, broken, [1], 12)


def test_models_with_other_attention_are_refused(tokenizer):
    model = make()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="qwen2 has linear_attention"):
        draw(model, tokenizer)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1))
    bloom.generation_config.eos_token_id = 1
    with pytest.raises(ValueError, match="bloom builds its own masks"):
        draw(bloom, tokenizer)
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        draw(model, tokenizer)


def test_token_ids_are_taken_as_they_are(tokenizer, model):
    tokens = tokenizer(PROMPTS, padding=False)["input_ids"]
    by_text = draw(model, tokenizer, PROMPTS)
    by_tokens = draw(model, tokenizer, tokens)
    torch.testing.assert_close(by_tokens.tokens, by_text.tokens, rtol=0, atol=0)
    assert by_tokens.texts == by_text.texts
    with pytest.raises(ValueError, match="all be lists of token ids"):
        draw(model, tokenizer, [PROMPTS[0], tokens[0]])
