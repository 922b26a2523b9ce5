"""Packed rows give the log-probabilities, entropies and gradients of the plain layout, with fewer tokens."""

import pytest
import torch
import transformers

from roundoff.config import Deadzone, Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.models import packing
from roundoff.models.logprobs import token_logprobs
from roundoff.models.masks import AttentionPattern
from tests.sampling.test_sampler import FAMILIES
from tests.small_models import ROUNDING, draw, make


@pytest.fixture(scope="module")
def model():
    return make()


def batch(tokenizer, prompts, responses):
    """Tokens and mask [rollouts, columns] of prompts and responses given as text, each followed by the end token."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    written = [[*tokenizer(response)["input_ids"], 1] for response in responses]
    P, T = max(map(len, encoded)), max(map(len, written))
    tokens = [[0] * (P - len(p)) + p + r + [0] * (T - len(r)) for p, r in zip(encoded, written, strict=True)]
    mask = [
        [0] * (P - len(p)) + [1] * (len(p) + len(r)) + [0] * (T - len(r)) for p, r in zip(encoded, written, strict=True)
    ]
    return torch.tensor(tokens), torch.tensor(mask).bool(), T


def test_the_layout_of_the_documented_example(tokenizer, model):
    prompts = ["40-3=", *["3-1="] * 4]
    tokens, mask, T = batch(tokenizer, prompts, ["37", "2", "12", "13", "2"])
    layout = packing.packed(tokens, mask, T, AttentionPattern.of(model), torch.float32, 4096, model.device)
    three, minus, one, equals, two = (tokenizer(c)["input_ids"][0] for c in "3-1=2")
    assert layout.tokens[1].tolist() == [0, three, minus, one, equals, two, one, two, one, three]
    assert layout.position[1].tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 4, 5]
    seen = layout.masks[1, 0] == 0
    prompt = {1, 2, 3, 4}
    expected = [set(), {1}, {1, 2}, {1, 2, 3}, prompt]
    expected += [prompt | own for own in ({5}, {6}, {6, 7}, {8}, {8, 9})]
    assert [{*row.nonzero()[:, 0].tolist()} for row in seen] == expected
    assert layout.kept == 6  # the last token of the prompt, then 5 columns of responses
    # Row 1 begins at logit 6: first tokens come from it, "2" of a and d from column 5, "2" and end of b from 6, 7, ...
    per_rollout = [layout.source[layout.rollout == n].tolist() for n in range(5)]
    assert per_rollout == [[0, 1, 2], [6, 7], [6, 8, 9], [6, 10, 11], [6, 7]]


def test_long_groups_are_split_and_short_prompts_stay_plain():
    is_new = [True, *[False] * 7]
    texts = packing.DistinctTexts.of([(n,) * 10 for n in range(8)], is_new)
    filled = packing.fill_rows(texts, 25)
    assert (filled.row, filled.offset, filled.extra) == ([0, 0, 1, 1, 2, 2, 3, 3], [0, 10] * 4, 20)
    # A prompt of 1,000 tokens is worth sharing by all 8; one of a single token by none, as packing only adds pairs.
    assert packing.plan_rows(texts, 1000, 1010, 64).row == [0] * 8
    long = packing.DistinctTexts.of([(n,) * 1000 for n in range(8)], is_new)
    assert packing.plan_rows(long, 1, 1001, 64) is None


def test_equal_responses_to_one_prompt_appear_once_even_if_not_adjacent():
    texts = packing.DistinctTexts.of([(1, 2), (3,), (1, 2), (1, 2), ()], [True, False, False, True, False])
    assert texts == packing.DistinctTexts([0, 1, 0, 2, 3], [0, 1, 3, 4], [2, 1, 2, 0], [True, False, True, False])
    assert packing.fill_rows(texts, 2) == packing.RowPlan([0, 1, 2, 2], [0, 0, 0, 2], 2)


def both(monkeypatch, model, rollouts, chunk=None):
    """Log-probabilities, entropies and gradients, packed and plain, and the rows of both passes."""
    found, rows = [], []
    weights = torch.randn(rollouts.response_mask.shape, generator=torch.Generator().manual_seed(0))
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: rows.append(len(output)))
    for most_pairs in (packing.MOST_PAIRS, 0.0):  # no packed layout has no pairs
        monkeypatch.setattr(packing, "MOST_PAIRS", most_pairs)
        model.zero_grad()
        logprobs, entropy = token_logprobs(
            model,
            rollouts.tokens,
            rollouts.attention_mask,
            rollouts.response_mask.shape[1],
            temperature=0.8,
            chunk=chunk,
            rows=rollouts.rows,
            key=rollouts.noise_key,
        )
        (logprobs * weights + 0.3 * entropy * weights.flip(1)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logprobs.detach(), entropy.detach(), gradients))
    hook.remove()
    monkeypatch.undo()
    return found, rows


def check_equal(found):
    (packed, packed_entropy, packed_gradients), (plain, entropy, gradients) = found
    torch.testing.assert_close(packed, plain, **ROUNDING)
    torch.testing.assert_close(packed_entropy, entropy, **ROUNDING)
    assert packed_gradients.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Sums of a few hundred float32 terms in another order, relative to the largest element of the tensor; and of
        # the model, as some gradients are zero but for rounding (a bias on keys moves all scores of a row alike).
        tolerance = 2e-4 * float(gradient.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(packed_gradients[name], gradient, atol=tolerance, rtol=0)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),  # layers of both kinds
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
def test_packed_rows_change_nothing(monkeypatch, tokenizer, kind, changes, chunk):
    model = make(kind, **changes)
    found, rows = both(monkeypatch, model, draw(model, tokenizer, group_size=6), chunk)
    check_equal(found)
    assert rows[0] < rows[-1] == 30


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_change_nothing_in_any_family(monkeypatch, tokenizer, family):
    torch.manual_seed(0)
    special = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "initializer_range": 0.4}
    config = getattr(transformers, f"{family}Config")(**{"max_position_embeddings": 64} | special | FAMILIES[family])
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for chunk in (None, 7):  # 7: the output layer in parts, unless the model does more to its logits
        found, rows = both(monkeypatch, model, draw(model, tokenizer, group_size=6), chunk)
        check_equal(found)
        assert rows[0] < rows[-1] == 30


def test_quantized_hardware_packs(monkeypatch, tokenizer):
    model = make()
    hardware = Hardware(precision=Precision(weight="mxfp4"), deadzone=Deadzone(threshold=0.01, layers=(0,)))
    install(model, hardware, seed=0)
    found, rows = both(monkeypatch, model, draw(model, tokenizer))
    check_equal(found)
    assert rows[0] < rows[1] == 20


def test_noisy_hardware_does_not_pack(monkeypatch, tokenizer):
    model = make()
    for noise in (MatmulNoise(relative_std=0.05), MatmulNoise(relative_std=0.05, forward=False)):
        noisy = make()
        noisy.load_state_dict(model.state_dict())
        install(noisy, Hardware(matmul_noise=noise), seed=0)
        found, rows = both(monkeypatch, noisy, draw(noisy, tokenizer))
        assert rows == [20, 20]
        assert torch.equal(found[0][0], found[1][0])


def test_responses_with_gaps_stay_plain(model, tokenizer):
    tokens, mask, T = batch(tokenizer, ["3-1="] * 3, ["12", "13", "14"])
    assert packing.packed(tokens, mask, T, AttentionPattern.of(model), torch.float32, 64, model.device) is not None
    mask[1, -2] = False
    assert packing.packed(tokens, mask, T, AttentionPattern.of(model), torch.float32, 64, model.device) is None
