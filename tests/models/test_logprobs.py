"""`token_logprobs` agrees with plain torch and with what the sampler recorded; rollouts are trimmed and joined."""

import peft
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from roundoff.config import Accumulator, Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.models.logprobs import PROBED, token_logprobs
from roundoff.sampling.rollouts import concatenate
from tests.small_models import KEY, ROUNDING, draw, make, plain_logprobs, same


@pytest.fixture(scope="module")
def model():
    return make()


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


def test_adapters_that_do_nothing_change_nothing(tokenizer):
    model = make()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    expected = draw(model, tokenizer)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    rollouts = draw(adapted, tokenizer)
    same(rollouts, expected)
    T = rollouts.response_mask.shape[1]
    logprobs, _ = token_logprobs(
        adapted,
        rollouts.tokens,
        rollouts.attention_mask,
        T,
        temperature=1.0,
        rows=rollouts.rows,
        key=rollouts.noise_key,
    )
    torch.testing.assert_close(logprobs, rollouts.logprobs, **ROUNDING)
    assert logprobs.requires_grad


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


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05, scale="operands", gain_std=0.05)),
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05, scale="row", attention=False, adc_bits=8)),
        Hardware(accumulator=Accumulator(bits=13)),
        Hardware(accumulator=Accumulator(bits=5, rounding="nearest")),
    ],
    ids=["operands and gain", "row and converter", "align", "nearest"],
)
def test_other_errors_and_sums_are_sampled_as_they_train(tokenizer, hardware):
    model = make()
    plain = draw(model, tokenizer)
    install(model, hardware, seed=0)
    rollouts = draw(model, tokenizer)
    T = rollouts.response_mask.shape[1]
    logprobs, _ = token_logprobs(
        model,
        rollouts.tokens,
        rollouts.attention_mask,
        T,
        temperature=1.0,
        rows=rollouts.rows,
        key=rollouts.noise_key,
    )
    difference = (logprobs - rollouts.logprobs).abs()
    # A rounding difference of 1e-7 can move an input of a cut, a rounding or a converter over a boundary.
    assert difference.median() < 1e-4 and difference.max() < 0.1
    assert not torch.equal(rollouts.logprobs, plain.logprobs)


@pytest.mark.parametrize("chunk", [7, None])
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
    (found * weights + 0.7 * entropy * weights.roll(1)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, expected_entropy = plain_logprobs(model, rollouts, 0.8)
    (expected * weights + 0.7 * expected_entropy * weights.roll(1)).sum().backward()
    torch.testing.assert_close(found, expected, **ROUNDING)
    torch.testing.assert_close(entropy, expected_entropy, **ROUNDING)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        # Sums of a few hundred terms in another order: relative to the largest element of the tensor.
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4 * parameter.grad.abs().max().item(), rtol=0)


def test_logits_are_computed_for_response_tokens_only(model, tokenizer):
    rollouts = draw(model, tokenizer, group_size=1)
    T = rollouts.response_mask.shape[1]
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    try:
        token_logprobs(model, rollouts.tokens, rollouts.attention_mask, T, temperature=1.0)
        assert seen.pop() == (5, T, 16)
        token_logprobs(model, rollouts.tokens, rollouts.attention_mask, T, temperature=1.0, chunk=9)
        assert seen.pop(0) == (PROBED, 1, 16)  # the trial, by the model and then by its output layer alone
        assert seen.pop(0) == (PROBED, 1, 16)
        assert seen == [*[(9, 16)] * (5 * T // 9), *([(5 * T % 9, 16)] if 5 * T % 9 else [])]
    finally:
        handle.remove()


def test_logits_that_are_capped_are_never_computed_in_parts(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=16, initializer_range=0.4, final_logit_softcapping=2.0
    )
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    rollouts = draw(model, tokenizer)
    arguments = model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1]
    whole, parts = (token_logprobs(*arguments, temperature=1.0, chunk=chunk)[0] for chunk in (None, 7))
    torch.testing.assert_close(whole, parts, **ROUNDING)
    tokens = torch.tensor([[3, 15, 5, 0, 0, 0, 0, 0], [4, 15, 5, 6, 7, 8, 9, 3]])  # the first row ends in padding
    padded = model, tokens, tokens > 0, 6
    whole_padded, parts = (token_logprobs(*padded, temperature=1.0, chunk=chunk)[0] for chunk in (None, 3))
    torch.testing.assert_close(whole_padded, parts, **ROUNDING)
    config.final_logit_softcapping = None
    assert (token_logprobs(*arguments, temperature=1.0)[0] - whole).abs().max() > 1e-3  # the cap has an effect


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
def test_arguments_that_do_not_fit_are_refused(model, tokenizer, changes, message):
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
