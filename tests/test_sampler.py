import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.numerics.rng import Key
from roundoff.sampler import choose, concatenate, sample, token_logprobs

KEY = Key.from_seed(3)
PROMPTS = ["12+7=", "9=", "40-3-25=", "12+7=", "1+1="]
CHARACTERS = "0123456789+-=>"
# Log-probabilities of a pass over other shapes: about 20 products deep, float32, measured at most 2e-5 on this model.
ROUNDING = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def tokenizer():
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


@pytest.fixture(scope="module")
def model():
    return make()


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


# --- what is sampled ---


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),  # layers of both kinds
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
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


# --- one rollout depends on its key and id alone ---


def test_the_same_key_gives_the_same_rollouts_and_another_one_others(model, tokenizer):
    same(draw(model, tokenizer), draw(model, tokenizer))
    assert draw(model, tokenizer).texts != draw(model, tokenizer, key=KEY.fold(1)).texts


@pytest.mark.parametrize("noisy", [False, True])
def test_a_batch_split_sorted_or_thinned_out_differently_gives_the_same_text(tokenizer, noisy, monkeypatch):
    model = make()
    if noisy:
        install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    whole = draw(model, tokenizer)
    assert len({*whole.texts}) > 10
    same(draw(model, tokenizer, max_rows=3), whole)
    for share in (0.0, 1.1):  # leave the batch at once / never
        monkeypatch.setattr("roundoff.sampler.COMPACT_SHARE", share)
        same(draw(model, tokenizer), whole)
    ids = torch.arange(20).view(5, 4)
    alone = [draw(model, tokenizer, [PROMPTS[i]], rollout_ids=ids[i]) for i in (0, 1, 2, 3, 4)]
    same(concatenate(alone), whole)
    backwards = draw(model, tokenizer, PROMPTS[::-1], rollout_ids=ids.flip(0).flatten())
    assert backwards.select(ids.flip(0).flatten()).texts == whole.texts


def test_equal_prompts_share_a_prefill_and_still_differ(model, tokenizer):
    seen = []
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


def test_ended_rollouts_leave_the_batch(model, tokenizer):
    rows = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    try:
        rollouts = draw(model, tokenizer, group_size=16)
    finally:
        handle.remove()
    running = [int((rollouts.lengths > t).sum()) for t in range(1, 12)]
    assert rows[1:] == sorted(rows[1:], reverse=True)
    # No step computes an eighth more than what still runs.
    assert all(run <= row < run / (1 - 0.125) + 1 for run, row in zip(running, rows[1:], strict=False))


# --- on hardware ---


def test_replaying_the_noise_gives_the_log_probabilities_of_sampling(tokenizer):
    model = make()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    rollouts = draw(model, tokenizer)
    T = rollouts.response_mask.shape[1]

    def again(key):
        return token_logprobs(
            model, rollouts.tokens, rollouts.attention_mask, T, temperature=1.0, rows=rollouts.rows, key=key
        )[0]

    torch.testing.assert_close(again(rollouts.noise_key), rollouts.logprobs, **ROUNDING)
    assert (again(KEY) - rollouts.logprobs).abs().max() > 0.1  # another key: other noise


def test_rollouts_of_one_prompt_meet_noise_of_their_own(tokenizer):
    model = make()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    greedy = draw(model, tokenizer, ["9="], group_size=8, temperature=0.0, max_new_tokens=1)
    assert len({*greedy.logprobs.flatten().tolist()}) > 1


def test_quantized_hardware_is_sampled_as_it_trains(tokenizer):
    model = make()
    plain = draw(model, tokenizer)
    install(model, Hardware(precision=Precision(weight="mxfp4", activation="mxfp8_e4m3")), seed=0)
    rollouts = draw(model, tokenizer)
    assert rollouts.texts != plain.texts
    logprobs, _ = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
    )
    # A rounding difference of 1e-7 can move an activation to the next step of its format, so only most tokens agree.
    assert (logprobs - rollouts.logprobs).abs().median() < 1e-4


def test_the_models_mode_is_restored_and_dropout_is_off(tokenizer):
    model = make(attention_dropout=0.5)
    expected = draw(model, tokenizer).texts
    model.train()
    model.lm_head.eval()
    assert draw(model, tokenizer).texts == expected
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


# --- choosing a token ---


def chosen(probabilities, uniforms, **changes):
    from roundoff.sampler import _Settings

    settings = _Settings(
        **{"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | changes, end_tokens=(), pad_token=0
    )
    logits = torch.tensor(probabilities).log().expand(len(uniforms), -1)
    tokens, logprobs = choose(logits, torch.tensor(uniforms), settings)
    return tokens.tolist(), logprobs.exp()


def test_inverse_transform():
    # Cumulative 0.2, 0.2, 0.7, 1.0; a token of probability 0 is never chosen, not even at u = 0.2 or the largest u.
    uniforms = [0.0, 0.19, 0.2001, 0.69, 0.71, 1 - 2**-24]
    tokens, probabilities = chosen([0.2, 0.0, 0.5, 0.3], uniforms)
    assert tokens == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(probabilities, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))
    assert chosen([0.5, 0.5, 0.0], [1 - 2**-24])[0] == [1]


def test_top_k_and_top_p_cut_before_the_draw_but_not_the_log_probability():
    p = [0.1, 0.4, 0.2, 0.3]
    # Top 2: tokens 1 and 3, of 4/7 and 3/7 of what is left: the boundary lies at 0.571.
    assert chosen(p, [0.0, 0.57, 0.58, 0.99], top_k=2)[0] == [1, 1, 3, 3]
    # Top-p 0.5: token 1 holds 0.4, so token 3 is needed: the same set. Top-p 0.39: token 1 alone.
    assert chosen(p, [0.0, 0.57, 0.58, 0.99], top_p=0.5)[0] == [1, 1, 3, 3]
    assert chosen(p, [0.0, 0.99], top_p=0.39)[0] == [1, 1]
    # Top-k first, then top-p of what is left: of 4/9, 3/9, 2/9 the first two hold 7/9 >= 0.7.
    assert chosen(p, [0.0, 0.571, 0.572, 0.99], top_k=3, top_p=0.7)[0] == [1, 1, 3, 3]
    assert chosen(p, [0.99], top_k=1)[1].item() == pytest.approx(0.4)


def test_top_k_of_one_is_greedy(model, tokenizer):
    greedy = draw(model, tokenizer, temperature=0.0)
    assert draw(model, tokenizer, top_k=1).texts == greedy.texts
    assert draw(model, tokenizer, top_p=1e-6).texts == greedy.texts


# --- token_logprobs ---


def plain_logprobs(model, rollouts, temperature):
    """One rollout at a time, without padding, in plain torch; entropy differentiable."""
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


@pytest.mark.parametrize("chunk", [7, 4096])
def test_log_probabilities_entropy_and_gradients_are_those_of_plain_torch(tokenizer, chunk):
    model = make()
    rollouts = draw(model, tokenizer, temperature=0.8)
    weights = torch.randn(rollouts.response_mask.shape, generator=torch.Generator().manual_seed(0))
    found, entropy = token_logprobs(
        model,
        rollouts.tokens,
        rollouts.attention_mask,
        rollouts.response_mask.shape[1],
        temperature=0.8,
        chunk=chunk,
    )
    (found * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, expected_entropy = plain_logprobs(model, rollouts, 0.8)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, **ROUNDING)
    torch.testing.assert_close(entropy, expected_entropy.detach(), **ROUNDING)
    assert not entropy.requires_grad
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        # Sums of a few hundred terms in another order: relative to the largest element of the tensor.
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4 * parameter.grad.abs().max().item(), rtol=0)


def test_logits_are_computed_for_response_tokens_alone(model, tokenizer):
    rollouts = draw(model, tokenizer)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    try:
        token_logprobs(model, rollouts.tokens, rollouts.attention_mask, 12, temperature=1.0)
    finally:
        handle.remove()
    assert seen == [(20, 12, 16)]


def test_columns_that_are_padding_throughout_are_skipped_and_come_back_as_zeros(model, tokenizer):
    whole = draw(model, tokenizer, group_size=16)
    short = (whole.lengths <= 3).nonzero()[:, 0]
    assert 1 < len(short) < len(whole)
    wide, trimmed = whole.select(short, trim=False), whole.select(short)
    assert trimmed.tokens.shape[1] < wide.tokens.shape[1]
    assert trimmed.texts == [whole.texts[i] for i in short.tolist()]

    def of(part):
        width = part.response_mask.shape[1]
        return token_logprobs(model, part.tokens, part.attention_mask, width, temperature=1.0)[0]

    assert torch.equal(of(wide)[:, : trimmed.response_mask.shape[1]], of(trimmed))
    assert of(wide)[:, trimmed.response_mask.shape[1] :].eq(0).all()


def test_selected_rollouts_lose_the_columns_they_do_not_need(model, tokenizer):
    whole = draw(model, tokenizer)
    part = whole.select([4, 5, 7])  # of the prompt "9="
    assert part.prompt_length == 2
    assert part.tokens[:, :2].tolist() == [tokenizer("9=")["input_ids"]] * 3
    assert part.response_mask.shape[1] == whole.lengths[[4, 5, 7]].max()
    assert part.rows[:, 0].tolist() == [4 * 2**20, 5 * 2**20, 7 * 2**20]
    for name in ("tokens", "attention_mask", "rows"):
        assert getattr(part, name).shape == (3, 2 + part.response_mask.shape[1])
    torch.testing.assert_close(plain_logprobs(model, part, 1.0)[0], part.logprobs, **ROUNDING)
    same(concatenate([part, whole.select([0, 2])]), whole.select([4, 5, 7, 0, 2]))


# --- bad input ---


def test_output_that_is_not_finite_ends_the_rollout_and_nothing_else(tokenizer):
    model = make()
    healthy = draw(model, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = math.nan  # the token "6": whoever writes it is lost
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
    import copy

    model, broken = make(), copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    setattr(broken, name, None)
    with pytest.raises(ValueError, match=message):
        draw(model, broken)


def test_models_with_other_attention_are_refused(tokenizer):
    model = make()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="qwen2 has linear_attention"):
        draw(model, tokenizer)
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        draw(model, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"response_length": 0}, "response_length must be in"),
        ({"response_length": 99}, "response_length must be in"),
        ({"attention_mask": torch.ones(1, 1)}, "must be of one shape"),
        ({"key": KEY}, "rows must be given with key"),
    ],
)
def test_log_probabilities_of_what_does_not_fit_are_refused(model, tokenizer, changes, message):
    rollouts = draw(model, tokenizer)
    arguments = {"attention_mask": rollouts.attention_mask, "response_length": 12, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        token_logprobs(model, rollouts.tokens, **arguments | changes)


def test_only_parts_of_one_batch_are_joined(model, tokenizer):
    one, other = draw(model, tokenizer), draw(model, tokenizer, key=KEY.fold(1))
    with pytest.raises(ValueError, match="sampled under one key"):
        concatenate([one, other])
    with pytest.raises(ValueError, match="one or more"):
        concatenate([])
