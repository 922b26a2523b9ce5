"""The quantized key-value cache in every pass: what it stores, to the bit, and the log-probabilities that follow."""

import peft
import pytest
import torch

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.formats.table import get_format
from roundoff.hardware import attention, hardware_off, install
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.models import packing
from roundoff.models.logprobs import token_logprobs
from roundoff.models.masks import AttentionPattern, positions
from roundoff.numerics.backend import kernels_for, use_backend
from roundoff.numerics.quantize import quantize
from roundoff.sampling import static_decoder
from roundoff.sampling.fused_decoder import FusedDecoder
from roundoff.sampling.kv_cache import KVCache
from tests.pretend_graphs import RecordedGraphs
from tests.small_models import PROMPTS, draw, make, same

compiled = pytest.mark.skipif(kernels_for(torch.ones(1)) is None, reason="the fused pass is compiled")
CACHES = ["fp8_e4m3", "mxfp4", "nvfp4:te", "int8", "hif8", "hif4"]
LEFT = torch.tensor([0, 2, 1])
TOKENS = torch.arange(21).view(3, 7) * 7919 % 14 + 2


def on_hardware(precision, **changes):
    model = make(**{"hidden_size": 64, "num_hidden_layers": 2} | changes)
    install(model, Hardware(precision=precision), seed=0)
    return model


def exact_model(fmt):
    """One layer whose keys and values before their rotation are sums without rounding, so that all passes agree."""
    model = make(hidden_size=64, num_hidden_layers=1, rms_norm_eps=0.0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        layer = model.model.layers[0].self_attn
        for p in (layer.k_proj.weight, layer.v_proj.weight, layer.k_proj.bias, layer.v_proj.bias):
            p.copy_(torch.randint(-8, 9, p.shape, generator=generator) / 16)
        embedding = model.model.embed_tokens.weight  # of magnitude 1, so that the norm is exactly 1
        embedding.copy_(torch.randint(0, 2, embedding.shape, generator=generator) * 2.0 - 1)
    if fmt is not None:
        install(model, Hardware(precision=Precision(kv_cache=fmt)), seed=0)
    return model


@torch.no_grad()
def cached(model, *, fused, parts=(4, 5, 7)):
    """Keys and values [2, rollouts, heads, columns, size] after reading `TOKENS` part by part."""
    cache = KVCache(1, 7, attention.cache_formats(model))
    decoder, pattern, start = FusedDecoder.of(model, 8) if fused else None, AttentionPattern.of(model), 0
    for end in parts:
        masks = pattern.masks(torch.arange(start, end), LEFT, end, model.dtype)
        tokens = TOKENS[:, start:end].contiguous()
        if fused:
            decoder.logits(tokens, LEFT, cache, masks)
        else:
            position = positions(LEFT, end)[:, start:]
            model(tokens, attention_mask=masks, position_ids=position, past_key_values=cache, use_cache=True)
        start = end
    return torch.stack([cache.stack[0].keys, cache.stack[0].values])


@compiled
@pytest.mark.parametrize("fmt", CACHES)
def test_every_pass_stores_the_same_bits(monkeypatch, fmt):
    plain, model = exact_model(None), exact_model(fmt)
    expected = quantize(cached(plain, fused=False), fmt, tensor_scale="row")
    real = torch.arange(7) >= LEFT[:, None]
    assert (expected - cached(plain, fused=False)).abs().max() > 0.01
    for fused in (True, False):
        for parts in ((4, 5, 7), (7,)):
            found = cached(model, fused=fused, parts=parts)
            for rollout in range(3):
                assert torch.equal(found[:, rollout, :, real[rollout]], expected[:, rollout, :, real[rollout]])
    read = []
    kept = AttentionFormats.read_back

    def seen(self, keys, values):
        read.append(torch.stack(kept(self, keys, values)).detach())
        return torch.stack(kept(self, keys, values)).unbind()

    monkeypatch.setattr(AttentionFormats, "read_back", seen)
    mask = real.clone()
    mask[:, -1] = False  # the last column predicts nothing, and is no input
    token_logprobs(model, TOKENS, mask, 3, temperature=1.0)
    (training,) = read
    for rollout in range(3):
        columns = (real[rollout, :5]).nonzero()[:, 0]
        found = training[:, rollout].index_select(2, columns)
        assert torch.equal(found, expected[:, rollout].index_select(2, columns))


def test_every_token_is_quantized_once(monkeypatch):
    model, rows = on_hardware(Precision(kv_cache="fp8_e4m3"), num_hidden_layers=1), []
    kept = AttentionFormats.in_cache
    monkeypatch.setattr(AttentionFormats, "in_cache", lambda self, x, out=None: rows.append(x) or kept(self, x, out))
    with monkeypatch.context() as patch:  # nothing is quantized when attention reads the cache
        patch.setattr("roundoff.hardware.attention_formats.straight_through", None)
        cached(model, fused=False)
    assert [x.shape[2] for x in rows] == [4, 4, 1, 1, 2, 2]


def close(found, expected):
    """Equal up to rounding for most tokens: few numbers lie so near a boundary that rounding moves them across."""
    difference = (found - expected).abs()
    assert difference.median() < 1e-5
    assert (difference < 1e-4).float().mean() > 0.9


SETTINGS = {
    "fp8 cache": Precision(kv_cache="fp8_e4m3"),
    "mxfp4 cache": Precision(kv_cache="mxfp4"),  # heads of 16 in blocks of 32
    "fp8 attention": Precision(attention="fp8_e4m3"),
    "both": Precision(kv_cache="mxfp4", attention="fp8_e4m3"),
    "with weights": Precision(kv_cache="fp8_e4m3", weight="mxfp4"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=str)
def test_log_probabilities_of_sampler_and_training_agree(monkeypatch, tokenizer, name, changes):
    model = on_hardware(SETTINGS[name], **changes)
    layouts = []
    planned = packing.packed
    monkeypatch.setattr("roundoff.models.logprobs.packed", lambda *a: layouts.append(planned(*a)) or layouts[-1])
    for backend in ("auto", "torch"):  # without kernels, the model's own pass samples
        with use_backend(backend):
            rollouts = draw(model, tokenizer, max_rows=9)
            length = rollouts.response_mask.shape[1]
            arguments = rollouts.tokens, rollouts.attention_mask, length
            shared, _ = token_logprobs(model, *arguments, temperature=1.0)
            with monkeypatch.context() as patch:
                patch.setattr("roundoff.models.logprobs.packed", lambda *_: None)
                alone, _ = token_logprobs(model, *arguments, temperature=1.0)
        inside = rollouts.response_mask
        close(shared[inside], rollouts.logprobs[inside])
        close(alone[inside], rollouts.logprobs[inside])
        with hardware_off(model):
            plain, _ = token_logprobs(model, *arguments, temperature=1.0)
        assert (plain - rollouts.logprobs)[inside].abs().median() > 1e-3
    assert all(layout is not None for layout in layouts)


@compiled
@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}])
@pytest.mark.parametrize("fmt", ["fp8_e4m3", "hif4"])
def test_the_fused_pass_draws_what_the_models_own_does(tokenizer, fmt, changes):
    model = on_hardware(Precision(kv_cache=fmt), **changes)
    assert FusedDecoder.of(model, 20) is not None
    fused = draw(model, tokenizer)
    with use_backend("torch"):
        own = draw(model, tokenizer)
    width = min(fused.logprobs.shape[1], own.logprobs.shape[1])
    close(fused.logprobs[:, :width], own.logprobs[:, :width])


@compiled
@pytest.mark.parametrize("fmt", ["bf16", "e2m1/8/e8m0:ceil"])
def test_a_format_without_a_kernel_is_sampled_by_the_models_own_pass(tokenizer, fmt):
    assert not get_format(fmt).has_kernel
    model = on_hardware(Precision(kv_cache=fmt))
    assert FusedDecoder.of(model, 20) is None
    rollouts = draw(model, tokenizer)
    logprobs, _ = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0
    )
    close(logprobs[rollouts.response_mask], rollouts.logprobs[rollouts.response_mask])


def test_noise_comes_on_top_and_is_replayed(tokenizer):
    model = make(hidden_size=64, num_hidden_layers=2)
    noise = MatmulNoise(relative_std=0.05)
    install(model, Hardware(precision=Precision(kv_cache="fp8_e4m3", attention="int8"), matmul_noise=noise), seed=0)
    rollouts = draw(model, tokenizer)
    logprobs, _ = token_logprobs(
        model, rollouts.tokens, rollouts.attention_mask, rollouts.response_mask.shape[1], temperature=1.0,
        rows=rollouts.rows, key=rollouts.noise_key,
    )  # fmt: skip
    close(logprobs[rollouts.response_mask], rollouts.logprobs[rollouts.response_mask])


@pytest.mark.parametrize("precision", [Precision(kv_cache="fp8_e4m3"), Precision(attention="fp8_e4m3")])
def test_adapters_and_padding(tokenizer, precision):
    model = on_hardware(precision)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    rollouts = draw(adapted, tokenizer)
    response = rollouts.response_mask.shape[1]
    padding = torch.zeros(len(rollouts), 3, dtype=torch.int64)
    wide = torch.cat([padding, rollouts.tokens], 1), torch.cat([padding.bool(), rollouts.attention_mask], 1)
    logprobs, _ = token_logprobs(adapted, *wide, response, temperature=1.0)
    close(logprobs[rollouts.response_mask], rollouts.logprobs[rollouts.response_mask])
    logprobs.sum().backward()
    found = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert found and all(bool(gradient.isfinite().all()) for gradient in found)


@pytest.mark.parametrize("precision", [Precision(kv_cache="int8"), Precision(kv_cache="fp8_e4m3", attention="int8")])
def test_static_buffers_hold_the_quantized_cache(monkeypatch, tokenizer, precision):
    model, graphs = on_hardware(precision), RecordedGraphs()
    with use_backend("torch"):
        eager = draw(model, tokenizer, prompts=PROMPTS[:2])
        monkeypatch.setattr(static_decoder, "graphs_for", lambda device: graphs)
        static = draw(model, tokenizer, prompts=PROMPTS[:2])
    assert graphs.replays
    close(static.logprobs[:, : eager.logprobs.shape[1]], eager.logprobs[:, : static.logprobs.shape[1]])
    keys = model.__dict__[static_decoder.MARK].buffers.keys[0]
    assert torch.equal(quantize(keys, precision.kv_cache, tensor_scale="row"), keys)  # int8, FP8: of stored numbers


def test_without_a_format_nothing_changes(tokenizer):
    model, plain = make(hidden_size=64), make(hidden_size=64)
    install(model, Hardware(precision=Precision(kv_cache="fp8_e4m3")), seed=0)
    expected = draw(plain, tokenizer)
    with hardware_off(model):
        found = draw(model, tokenizer)
    same(found, expected)
    assert torch.equal(found.logprobs, expected.logprobs)
