"""Noise on attention: computed by hand, and replayed with caches and padding in every family of models."""

import pytest
import torch

from roundoff.config import ConfigError, Hardware, MatmulNoise
from roundoff.hardware import hardware_off, install, noise_key, uninstall
from roundoff.hardware.attention import STATE, AttentionState, attention_forward
from roundoff.hardware.draw import Draw
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key
from tests.families import Batch, build, every_family

KEY = Key.from_seed(21)
ATTENTION_ONLY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1), exclude=("embed_tokens", "lm_head", "*_proj"))
NOISY = Hardware(matmul_noise=MatmulNoise(relative_std=0.1))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module_with(forward, backward, rows):
    module = torch.nn.Module()
    runtime = Runtime(Key.from_seed(0), draw=Draw(KEY, rows))
    module.__dict__[STATE] = AttentionState("a", runtime, forward, backward)
    return module


def test_products_and_gradients_match_those_by_hand():
    # 1 prompt, 4 heads that share 2 key heads, and 3 tokens of rollout 2 after 1 column of padding.
    heads, groups, size, std, scaling = 4, 2, 8, 0.1, 0.25
    rows = torch.tensor([[0, 0, 1, 2]]) + (2 << 20)
    q, k, v, do = (normal(1, n, 4, size, seed=i) for i, n in enumerate((heads, groups, groups, heads)))
    leaves = [t.clone().requires_grad_(True) for t in (q, k, v)]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 1:, 0] = False
    out, weights = attention_forward(module_with(std, std, rows), *leaves, mask, scaling=scaling)
    out.transpose(1, 2).backward(do)

    fold = {name: KEY.fold("a", name) for name in ("scores", "scores_dq", "scores_dk", "mix", "mix_dp", "mix_dv")}
    start = rows % (1 << 20) - torch.arange(4)  # logical position of column 0
    for head in range(heads):
        g = head // 2
        own = rows * heads + head
        s = matmul_noise(q[:, head] @ k[:, g].mT, std, fold["scores"], rows=own, column_start=start) * scaling
        p = s.masked_fill(~mask[0], torch.finfo(s.dtype).min).softmax(-1)
        torch.testing.assert_close(weights[:, head].detach(), p)
        torch.testing.assert_close(out[:, :, head].detach(), matmul_noise(p @ v[:, g], std, fold["mix"], rows=own))

    def packed(t):  # [1, 4, ...] with the two heads that share a key head one below the other
        return t.reshape(1, groups, 8, -1)

    p, query_rows = weights.detach(), packed(rows[:, None] * heads + torch.arange(heads)[:, None]).squeeze(-1)
    key_rows = rows[:, None] * groups + torch.arange(groups)[:, None]
    starts = packed(start[:, None].expand(1, heads, 4)).squeeze(-1)
    dv = matmul_noise(packed(p).mT @ packed(do), std, fold["mix_dv"], rows=key_rows)
    dp = matmul_noise(packed(do) @ v.mT, std, fold["mix_dp"], rows=query_rows, column_start=starts)
    ds = packed(p) * (dp - (dp * packed(p)).sum(-1, keepdim=True)) * scaling
    dk = matmul_noise(ds.mT @ packed(q), std, fold["scores_dk"], rows=key_rows)
    dq = matmul_noise(ds @ k, std, fold["scores_dq"], rows=query_rows).reshape(q.shape)
    for leaf, expected in zip(leaves, (dq, dk, dv), strict=True):
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
def test_without_noise_it_is_eager_attention(masked):
    q, k, v = (normal(2, n, 5, 8, seed=i) for i, n in enumerate((4, 2, 2)))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {"none": None, "bool": allowed, "additive": torch.zeros(5, 5).masked_fill(~allowed, -1e30)}[masked]
    out, _ = attention_forward(module_with(0.0, 0.0, None), q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_attention_that_is_not_simulated_is_an_error(name):
    q = normal(1, 2, 3, 8, seed=0)
    with pytest.raises(NotImplementedError, match=f"{name}.*attention = false"):
        attention_forward(module_with(0.1, 0.1, None), q, q, q, None, **{name: torch.ones(2)})


def test_noise_on_attention_has_the_requested_size():
    # The values are ones and the attention weights sum to 1, so PV is exactly 1 before the noise.
    q, k, v = (normal(8, 4, 16, 32, seed=i) for i in range(3))
    out, _ = attention_forward(module_with(0.1, 0.0, None), q, k, torch.ones_like(v), None)
    eps = (out - 1) / 0.1
    n = eps.numel()  # 16,384; 4.5 standard errors
    assert abs(eps.mean()) < 4.5 / n**0.5
    assert abs(eps.var() - 1) < 4.5 * (2 / n) ** 0.5


@every_family
def test_clean_without_noise_and_noisy_with_it(family):
    model, plain, batch = build(family), build(family), Batch()
    expected = plain(**batch.inputs()).logits
    implementation = model.config._attn_implementation
    installed = install(model, ATTENTION_ONLY.model_copy(update={"exclude": ("embed_tokens",)}), seed=0)
    assert len(installed.in_force.attention) == 2
    assert model.config._attn_implementation == "roundoff"
    with hardware_off(model):
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(**batch.inputs()).logits, expected)
    assert not torch.equal(model(**batch.inputs()).logits, expected)
    uninstall(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch.inputs()).logits, expected)


@every_family
def test_a_tokens_noise_does_not_depend_on_padding_or_batch_split(family):
    model, batch, padded = build(family), Batch(), Batch(pad=3)
    install(model, NOISY, seed=0)

    def logits(b, rows=slice(None)):
        inputs = {name: value[rows] for name, value in b.inputs().items()}
        with noise_key(model, KEY, b.rows[rows]), torch.no_grad():
            return model(**inputs).logits[:, -7:]

    whole, real = logits(batch), batch.mask.bool()
    with noise_key(model, KEY.fold(1), batch.rows), torch.no_grad():
        other = model(**batch.inputs()).logits
    assert (other - whole)[real].abs().max() > 1e-3
    # Sums over other shapes differ by rounding, 1e-6 for logits of size 1. Other draws differ by over 1e-2.
    torch.testing.assert_close(logits(padded)[real], whole[real], rtol=0, atol=2e-5)
    for rows in (slice(0, 1), slice(1, 3)):
        torch.testing.assert_close(logits(batch, rows)[real[rows]], whole[rows][real[rows]], rtol=0, atol=2e-5)


@every_family
def test_decoding_with_a_cache_replays_the_pass_without_one(family):
    model, batch = build(family), Batch(pad=1)
    install(model, NOISY, seed=0)
    real = batch.mask.bool()
    with torch.no_grad():
        with noise_key(model, KEY, batch.rows):
            whole = model(**batch.inputs()).logits
        cache, parts = None, []
        for columns in (slice(0, 5), slice(5, 6), slice(6, 8)):
            with noise_key(model, KEY, batch.rows[:, columns]):
                out = model(
                    input_ids=batch.ids[:, columns],
                    position_ids=batch.positions[:, columns],
                    attention_mask=batch.mask[:, : columns.stop],
                    past_key_values=cache,
                    use_cache=True,
                )
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=2e-5)


def test_gradients_of_a_cached_pass_draw_by_the_keys_logical_position():
    rows = torch.tensor([[0, 0, 0, 1, 2, 3]]) + (7 << 20)
    draw = Draw(KEY, rows[:, 4:])
    ids = draw.attention_rows("a", torch.Size([1, 2, 2, 8]), torch.Size([1, 1, 6, 8]))
    assert ids.key.tolist() == [[[(7 << 20) + p for p in (-2, -1, 0, 1, 2, 3)]]]
    assert ids.column_start.tolist() == [[[-2, -2, -2, -2]]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_sees_the_same_draws(reentrant):
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    model.train()
    labels = batch.ids.masked_fill(batch.mask == 0, -100)

    def gradients():
        model.zero_grad()
        with noise_key(model, KEY, batch.rows):
            loss = model(**batch.inputs(), labels=labels, use_cache=False).loss
            loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_a_recomputation_outside_of_the_block_is_an_error():
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with noise_key(model, KEY, batch.rows):
        loss = model(**batch.inputs(), use_cache=False).logits.sum()
    with pytest.raises(RuntimeError, match="keep noise_key open until backward"):
        loss.backward()


def test_a_recomputation_under_another_key_is_an_error():
    model, batch = build(), Batch()
    install(model, NOISY, seed=0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with noise_key(model, KEY, batch.rows):
        loss = model(**batch.inputs(), use_cache=False).logits.sum()
    with pytest.raises(RuntimeError, match="inside another noise_key"), noise_key(model, KEY.fold(1), batch.rows):
        loss.backward()


def test_a_config_shared_by_two_models_is_switched_for_one_only():
    from transformers import Qwen2ForCausalLM

    model, batch = build(), Batch()
    twin = Qwen2ForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    expected = twin(**batch.inputs()).logits
    install(model, NOISY, seed=0)
    assert twin.config._attn_implementation != "roundoff"
    assert torch.equal(twin(**batch.inputs()).logits, expected)


def test_excluded_attention_stays_clean():
    model, plain, batch = build(), build(), Batch()
    hardware = Hardware(matmul_noise=MatmulNoise(relative_std=0.1), exclude=("lm_head", "self_attn"))
    installation = install(model, hardware, seed=0)
    assert {e.name.split(".")[3] for e in installation.entries} == {"mlp"}
    layer = model.model.layers[0]
    x = normal(2, 7, 64, seed=0)
    inputs = model.model.rotary_emb(x, batch.positions[:2])
    with torch.no_grad():
        result = layer.self_attn(x, position_embeddings=inputs, attention_mask=None)[0]
        expected = plain.model.layers[0].self_attn(x, position_embeddings=inputs, attention_mask=None)[0]
    torch.testing.assert_close(result, expected)


def test_a_model_without_the_attention_interface_is_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"hardware\.matmul_noise\.attention = false"):
        install(model, NOISY, seed=0)


def test_generate_runs_and_is_noisy():
    model, batch = build(), Batch()

    def generate():
        return model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=8, do_sample=False, pad_token_id=0)

    clean = generate()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.5)), seed=0)
    assert not torch.equal(generate(), clean)
    with hardware_off(model):
        assert torch.equal(generate(), clean)
