"""Formats of the key-value cache and of attention's operands: by hand, straight through, and where they are refused."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision, validate
from roundoff.hardware import attention, hardware_off, install, uninstall
from roundoff.hardware.attention import STATE, AttentionState, attention_forward, cache_formats, cached_attention
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from tests.families import Batch, build, every_family

FP8_CACHE = Hardware(precision=Precision(kv_cache="fp8_e4m3"))
FORMATS = [
    ("fp8_e4m3", None),
    ("mxfp4", None),  # heads of 40 end in a block of 8
    ("nvfp4", None),  # a block scale and a row scale
    (None, "fp8_e4m3"),
    (None, "int8"),
    ("mxfp4", "fp8_e4m3"),
    ("int8:full", "int8:full"),  # one rounding of keys and values, not two
]


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module_with(cache, operands, groups=1):
    module = torch.nn.Module()
    formats = AttentionFormats(cache, operands)
    module.__dict__[STATE] = AttentionState("a", Runtime(Key.from_seed(0)), 0.0, 0.0, formats=formats)
    module.num_key_value_groups = groups
    return module


def rows(x, fmt):
    """Each row of the last axis in a format, one at a time."""
    if fmt is None:
        return x
    flat = [quantize(row, fmt, tensor_scale="row") for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(flat).reshape(x.shape)


def by_hand(q, k, v, do, mask, cache, operands):
    """Output and the gradients of q, k and v, in float64 between the roundings; k and v are shared by two heads."""
    dtype, size = q.dtype, q.shape[-1]
    k, v = (rows(x, cache) for x in (k, v))
    if operands != cache:
        k, v = (rows(x, operands) for x in (k, v))
    q = rows(q, operands)
    q, k, v, do = (x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), do))
    p = (q @ k.mT * size**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    rounded = rows(p.float().to(dtype), operands).double()
    dp = do @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * size**-0.5

    def of_key_heads(x):
        return x.unflatten(1, (-1, 2)).sum(2)

    return rounded @ v, ds @ k, of_key_heads(ds.mT @ q), of_key_heads(rounded.mT @ do)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cache", "operands"), FORMATS)
def test_output_and_gradients_are_those_by_hand(cache, operands, dtype):
    shapes = (2, 4, 6, 40), (2, 2, 6, 40), (2, 2, 6, 40), (2, 4, 6, 40)
    q, k, v, do = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    module = module_with(cache, operands, groups=2)
    functions = [attention_forward] if operands else [attention_forward, cached_attention]
    for function in functions:
        out, _ = function(module, *leaves, mask[None, None])
        gradients = torch.autograd.grad(out.transpose(1, 2), leaves, do)
        expected = by_hand(q, k, v, do, mask, cache, operands)
        # A weight that float32 rounds otherwise may fall on the next step of a format: 2^-4 of it in fp8_e4m3, 1/127 of
        # the largest in int8. In bfloat16 every product is rounded to 2^-9 besides.
        tolerance = 0.02 if dtype is torch.bfloat16 else 2e-3 if operands else 1e-5
        for name, found, by in zip(
            ("output", "dQ", "dK", "dV"), (out.transpose(1, 2), *gradients), expected, strict=True
        ):
            error = (found.double() - by).norm() / by.norm()
            assert error < tolerance, (function.__name__, name, float(error))


@pytest.mark.parametrize(("cache", "operands"), FORMATS)
def test_formats_change_the_output_by_more_than_the_tolerance_above(cache, operands):
    q, k, v = (normal(2, n, 6, 40, seed=i) for i, n in enumerate((4, 2, 2)))
    plain, _ = attention_forward(module_with(None, None), q, k, v, None)
    for formats in {(cache, operands), (cache, None), (None, operands)} - {(None, None)}:
        out, _ = attention_forward(module_with(*formats), q, k, v, None)
        assert (out - plain).norm() > 4e-3 * plain.norm(), formats


def test_a_tokens_keys_and_values_do_not_depend_on_the_other_tokens():
    x = normal(3, 2, 9, 16, seed=0) * torch.logspace(-3, 3, 9)[:, None]
    for fmt in ("fp8_e4m3", "nvfp4", "mxfp4", "int8"):
        formats = AttentionFormats(fmt)
        whole = formats.in_cache(x)
        parts = [formats.in_cache(x[i : i + 1, :, t : t + 1]) for i in range(3) for t in range(9)]
        assert torch.equal(whole, torch.cat(parts).view(3, 9, 2, 16).transpose(1, 2))


def test_the_weights_of_a_query_do_not_depend_on_hidden_keys():
    q, k, v = (normal(2, 2, n, 16, seed=i) for i, n in enumerate((1, 5, 5)))
    module = module_with("fp8_e4m3", "int8")
    expected, weights = attention_forward(module, q, k, v, None)
    hidden = 50 * normal(2, 2, 3, 16, seed=9)
    seen = torch.tensor([False, True, True, False, True, True, True, False])[None, None, None]
    places = seen.flatten().nonzero().flatten()
    keys, values = (torch.zeros(2, 2, 8, 16).index_copy(2, places, x) for x in (k, v))
    for x in (keys, values):
        x[:, :, [0, 3, 7]] = hidden
    found, wide = attention_forward(module, q, keys, values, seen)
    torch.testing.assert_close(wide[..., places], weights, rtol=1e-6, atol=0)  # a softmax over more columns
    assert (found - expected).abs().max() < 1e-6


def test_what_a_cache_hands_over_is_not_rounded_again():
    k, v = (normal(1, 2, 5, 16, seed=i) for i in range(2))
    formats = AttentionFormats("int8:full")
    stored = formats.in_cache(k), formats.in_cache(v)
    assert not torch.equal(formats.in_cache(stored[0]), stored[0])  # a second rounding is another number
    assert all(a is b for a, b in zip(formats.read_back(*formats.hand_over(*stored)), stored, strict=True))
    assert torch.equal(formats.read_back(k, v)[0], stored[0])  # the hand-over was for one call
    formats.hand_over(*stored)
    with pytest.raises(RuntimeError, match="changes keys or values between its cache and attention"):
        formats.read_back(stored[0].clone(), stored[1])


@every_family
@pytest.mark.parametrize("precision", [{"kv_cache": "fp8_e4m3"}, {"attention": "fp8_e4m3"}])
def test_off_and_uninstalled_the_model_is_plain(family, precision):
    model, plain, batch = build(family), build(family), Batch()
    expected = plain(**batch.inputs()).logits
    implementation = model.config._attn_implementation
    installed = install(model, Hardware(precision=precision), seed=0)
    by_sdpa = implementation == "sdpa" and "kv_cache" in precision
    assert model.config._attn_implementation == (attention.CACHE_NAME if by_sdpa else attention.NAME)
    assert f"2 attention layers: {'cache' if 'kv_cache' in precision else 'operands'} fp8_e4m3" in installed.summary()
    difference = (model(**batch.inputs()).logits - expected)[batch.mask.bool()]
    assert 1e-4 < difference.abs().max() < 2
    with hardware_off(model):
        assert torch.equal(model(**batch.inputs()).logits, expected)
    uninstall(model)
    assert torch.equal(model(**batch.inputs()).logits, expected)


@every_family
@pytest.mark.parametrize("precision", [{"kv_cache": "mxfp4"}, {"kv_cache": "fp8_e4m3", "attention": "int8"}])
def test_padding_batch_split_and_a_cache_of_transformers_change_nothing(family, precision):
    model, batch, padded = build(family), Batch(), Batch(pad=3)
    install(model, Hardware(precision=precision), seed=0)
    real = batch.mask.bool()
    # Rounding of sums moves few numbers across a step of a format, so the logits of most tokens agree.
    with torch.no_grad():
        whole = model(**batch.inputs()).logits[real]
        other = model(**padded.inputs()).logits[:, 3:][real]
        assert ((whole - other).abs() < 1e-4).float().mean() > 0.75
        for n in range(3):
            alone = model(**{name: value[n : n + 1] for name, value in batch.inputs().items()}).logits
            assert ((alone[real[n : n + 1]] - whole[real.nonzero()[:, 0] == n]).abs() < 1e-4).float().mean() > 0.75
        cache, parts = None, []
        for columns in (slice(0, 4), slice(4, 5), slice(5, 7)):
            out = model(
                input_ids=batch.ids[:, columns],
                position_ids=batch.positions[:, columns],
                attention_mask=batch.mask[:, : columns.stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache, parts = out.past_key_values, [*parts, out.logits]
    assert ((torch.cat(parts, 1)[real] - whole).abs() < 1e-4).float().mean() > 0.75


@pytest.mark.parametrize("precision", [{"kv_cache": "mxfp4"}, {"attention": "fp8_e4m3"}])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_computes_the_same(precision, lora):
    model, batch = build(), Batch()
    install(model, Hardware(precision=precision), seed=0)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    model.train()
    labels = batch.ids.masked_fill(batch.mask == 0, -100)

    def gradients():
        model.zero_grad()
        loss = model(**batch.inputs(), labels=labels, use_cache=False).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    with hardware_off(model):
        assert not torch.equal(gradients()[1], expected[1])


def test_kept_and_excluded_layers_are_plain():
    for hardware in (
        Hardware(precision=Precision(kv_cache="fp8_e4m3", attention="int8", keep=(1,))),
        Hardware(
            precision=Precision(kv_cache="fp8_e4m3", attention="int8"),
            exclude=("embed_tokens", "lm_head", "model.layers.1.self_attn"),
        ),
    ):
        model = build()
        installed = install(model, hardware, seed=0)
        states = [layer.self_attn.__dict__[STATE] for layer in model.model.layers]
        assert [bool(state.formats) for state in states] == [True, False]
        assert "1 attention layers: cache fp8_e4m3, operands int8" in installed.summary()
        assert {*cache_formats(model)} == {0}
        with hardware_off(model):
            assert not cache_formats(model)


def test_kept_layers_still_have_noise():
    model = build()
    hardware = Hardware(precision=Precision(kv_cache="int8", keep=(0,)), matmul_noise=MatmulNoise(relative_std=0.1))
    summary = install(model, hardware, seed=0).summary()
    assert "1 attention layers: noise 0.1 on QK^T and PV\n" in summary
    assert "1 attention layers: noise 0.1 on QK^T and PV, cache int8" in summary


def test_a_copy_of_the_model_computes_the_same():
    model, batch = build(), Batch()
    install(model, Hardware(precision=Precision(kv_cache="mxfp4")), seed=0)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch.inputs()).logits, model(**batch.inputs()).logits)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"kv_cache": "nvfp4:2d"}, "precision.kv_cache must be a format whose blocks lie within a token"),
        ({"kv_cache": "fp8"}, "precision.kv_cache must be a number format"),
        ({"attention": "mxfp8_e4m3"}, "precision.attention must be a format without blocks, such as fp8_e4m3"),
        ({"attention": "nvfp4"}, "precision.attention must be a format without blocks"),
        ({"attention": "nvfp4:2d"}, "precision.attention must be a format whose blocks lie within a token"),
    ],
)
def test_formats_that_cannot_be_used_are_errors(precision, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(Hardware, {"precision": precision}, source="hardware")


def test_models_that_cannot_be_simulated_are_errors():
    with pytest.raises(ConfigError, match=r"precision.kv_cache = 'fp8_e4m3', but this model has no attention"):
        install(torch.nn.Sequential(torch.nn.Linear(4, 4)), FP8_CACHE, seed=0)
    config = GptOssConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"has attention sinks.*leave out hardware.precision.kv_cache"):
        install(GptOssForCausalLM(config), FP8_CACHE, seed=0)
    with pytest.raises(ConfigError, match="keeps every layer in high precision"):
        install(build(), Hardware(precision=Precision(kv_cache="fp8_e4m3", keep=(0, 1))), seed=0)
