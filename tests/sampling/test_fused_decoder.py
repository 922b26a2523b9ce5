"""The fused pass compared with the model's own: where it is used, what it computes, when it is refused."""

import logging

import peft
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from roundoff.config import Fault, Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.models.load import load_model
from roundoff.numerics.backend import kernels_for, use_backend
from roundoff.sampling import fused_decoder
from roundoff.sampling.fused_decoder import FusedDecoder
from roundoff.sampling.kv_cache import KVCache, SharedCache
from tests.small_models import PROMPTS, ROUNDING, draw, make, same

pytestmark = pytest.mark.skipif(kernels_for(torch.ones(1)) is None, reason="the fused pass is compiled")

MODELS = {
    "heads of 16": ("qwen2", {"hidden_size": 64}),
    "heads of 32": ("llama", {"hidden_size": 128}),
    "heads of 64": ("llama", {"hidden_size": 128, "num_attention_heads": 2, "mlp_bias": True}),
    "heads of 128": ("qwen2", {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "odd sizes": ("llama", {"hidden_size": 48, "head_dim": 16, "intermediate_size": 50}),
    "a window": ("qwen2", {"hidden_size": 64, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "scaled positions": (
        "llama",
        {"hidden_size": 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ),
}


def small(**changes):
    return make(**{"hidden_size": 64} | changes)


def used(calls):
    """Whether the fused pass sampled. The trial calls it twice, or once if the passes disagree."""
    return len(calls) > 2


def by_both(monkeypatch, model, tokenizer, **changes):
    """Rollouts by the fused pass and by the model's own, and the calls of the fused one, trial included."""
    calls = []
    logits = FusedDecoder.logits

    def counted(self, tokens, *arguments):
        calls.append(tuple(tokens.shape))
        return logits(self, tokens, *arguments)

    monkeypatch.setattr(FusedDecoder, "logits", counted)
    fused = draw(model, tokenizer, **changes)
    count = len(calls)
    with use_backend("torch"):  # without kernels the model's own pass is used
        own = draw(model, tokenizer, **changes)
    assert len(calls) == count
    monkeypatch.undo()
    return fused, own, calls


@pytest.mark.parametrize("name", MODELS)
def test_rollouts_are_those_of_the_models_own_pass(monkeypatch, tokenizer, name):
    kind, changes = MODELS[name]
    fused, own, calls = by_both(monkeypatch, make(kind, **changes), tokenizer)
    assert used(calls)
    same(fused, own)


@pytest.mark.parametrize("window", [5, 7, None])  # the trial's six columns do not show a window of seven
def test_rollouts_of_mistral_are_those_of_its_own_pass(monkeypatch, tokenizer, window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, pad_token_id=0, eos_token_id=1, initializer_range=0.4,
    )  # fmt: skip
    fused, own, calls = by_both(monkeypatch, MistralForCausalLM(config).eval(), tokenizer)
    assert used(calls)
    same(fused, own)


def test_a_window_that_the_model_does_not_have_is_none(monkeypatch, tokenizer):
    model = small(kind="llama")
    whole = draw(model, tokenizer)
    model.config.sliding_window = 4  # as a config.json may say; Llama does not read it
    fused, own, _ = by_both(monkeypatch, model, tokenizer)
    same(fused, whole)
    same(own, whole)


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(precision=Precision(weight="mxfp4")),
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05, attention=False)),
        Hardware(faults=(Fault(kind="gain", layer=1, amount=0.2),)),
    ],
)
def test_hardware_has_the_same_effect_in_both_passes(monkeypatch, tokenizer, hardware):
    model = small()
    clean = draw(model, tokenizer)
    install(model, hardware, seed=0)
    fused, own, calls = by_both(monkeypatch, model, tokenizer)
    assert used(calls)
    same(fused, own)
    assert fused.texts != clean.texts


def test_quantized_activations_have_the_same_effect_in_both_passes(monkeypatch, tokenizer):
    model = small()
    install(model, Hardware(precision=Precision(weight="mxfp4", activation="mxfp8_e4m3")), seed=0)
    fused, own, calls = by_both(monkeypatch, model, tokenizer)
    assert used(calls)
    # A rounding difference of 1e-7 can move an activation to the next step of its format: most tokens agree.
    width = min(fused.logprobs.shape[1], own.logprobs.shape[1])
    assert (fused.logprobs[:, :width] - own.logprobs[:, :width]).abs().median() < 1e-4


def test_the_fused_pass_calls_the_adapters(monkeypatch, tokenizer):
    model = small()
    before = draw(model, tokenizer)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    fused, own, calls = by_both(monkeypatch, adapted.eval(), tokenizer)
    assert used(calls)
    same(fused, own)
    assert fused.texts != before.texts


def test_rows_are_distinct_texts(monkeypatch, tokenizer):
    model = small()
    rollouts, _, calls = by_both(monkeypatch, model, tokenizer, group_size=16)
    P = rollouts.prompt_length
    assert calls[0] == (2, 5)  # the trial of both passes, a prompt and a step
    assert calls[2] == (4, P)  # four distinct prompts... of which one stands twice, but apart
    for t, (rows, columns) in enumerate(calls[3:], start=1):
        texts = {
            (PROMPTS[n // 16], tuple(rollouts.tokens[n, P : P + t].tolist()))
            for n in range(len(rollouts))
            if rollouts.lengths[n] > t
        }
        assert (rows, columns) == (len(texts), 1)


def test_a_shared_row_is_copied_where_texts_part():
    own = KVCache(1, 3)
    own.stack[0].lazy_initialization(torch.zeros(4, 1, 0, 2))
    own.stack[0].keys[:2, :, 0] = torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    own.stack[0].length = 1
    cache = SharedCache(KVCache(1, 1), own, 4, torch.tensor([5, 6]), torch.tensor([0, 1]))
    cache.descend(torch.tensor([0, 0, 1]))
    assert cache.own_row.tolist() == [0, 2, 1]  # the first to follow takes the row over, the other a free one
    assert cache.prompt_row.tolist() == [5, 5, 6]
    assert own.stack[0].keys[[0, 2, 1], 0, 0, 0].tolist() == [1.0, 1.0, 2.0]
    cache.descend(torch.tensor([2, 2, 2]))  # rows 0 and 2 are free again
    assert cache.own_row.tolist() == [1, 0, 2]
    assert own.stack[0].keys[:3, 0, 0, 0].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 8},  # heads of 8
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
    ],
)
def test_an_unknown_kind_of_model_uses_its_own_pass(tokenizer, changes):
    assert FusedDecoder.of(small(), 20) is not None
    assert FusedDecoder.of(small(**changes), 20) is None
    draw(small(**changes), tokenizer)


def test_a_model_with_hooks_or_in_bfloat16_uses_its_own_pass():
    model = small()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert FusedDecoder.of(model, 20) is None
    handle.remove()
    assert FusedDecoder.of(model, 20) is not None
    assert FusedDecoder.of(model.bfloat16(), 20) is None


def test_a_pass_that_disagrees_is_never_used(monkeypatch, tokenizer, caplog):
    model = small()
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 1.01 * plain(x)  # as a patch of the user's would
    with caplog.at_level(logging.WARNING, logger="roundoff"):
        fused, own, calls = by_both(monkeypatch, model, tokenizer)
    assert "does not compute what Qwen2ForCausalLM computes" in caplog.text
    assert len(calls) == 1  # the trial alone
    assert torch.equal(fused.logprobs, own.logprobs)


def test_long_prompts_are_read_by_the_models_own_pass(monkeypatch, tokenizer):
    monkeypatch.setattr(fused_decoder, "MOST_COLUMNS", 4)
    seen = []
    logits = FusedDecoder.logits
    model = small()
    expected = draw(model, tokenizer)

    def counted(self, tokens, *arguments):
        seen.append(tokens.shape[1])
        return logits(self, tokens, *arguments)

    monkeypatch.setattr(FusedDecoder, "logits", counted)
    same(draw(model, tokenizer), expected)
    assert {*seen} == {1}


def test_the_embedded_model_is_sampled_by_the_fused_pass():
    loaded = load_model("tiny")
    assert FusedDecoder.of(loaded.model, 40) is not None
    tokens = torch.tensor([[4, 12, 5, 15, 3]])
    fused = FusedDecoder.of(loaded.model, 5)
    with torch.no_grad():
        found = fused.logits(tokens, torch.zeros(1, dtype=torch.int64), KVCache(6, 5), None)
        torch.testing.assert_close(found, loaded.model(tokens).logits[:, -1], **ROUNDING)
