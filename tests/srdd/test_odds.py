"""What fault finding misses, with which odds; and that healthy models raise no alarm, however short the text."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from roundoff.numerics.rng import Key
from roundoff.srdd import checks, find_faults
from roundoff.srdd.fault_report import FaultReport
from tests.srdd.damaged import plain_model, texts

SITE = "model.layers.2.mlp.up_proj"


def exchanged(y, i, j):
    y = y.clone()
    y[..., [i, j]] = y[..., [j, i]]
    return y


def copied(y, i, j):
    y = y.clone()
    y[..., i] = y[..., j]
    return y


def negated(y, i, j):
    y = y.clone()
    y[..., [i, j]] = -y[..., [i, j]]
    return y


def cancelling(y, i, j):
    y = y.clone()
    y[..., i] += 1e-2
    y[..., j] -= 1e-2
    return y


WRONG = {
    "two channels exchanged": exchanged,
    "a channel copied": copied,
    "two channels negated": negated,
    "two errors that cancel": cancelling,
    "channels shifted": lambda y, i, j: y.roll(1, dims=-1),
    "a tile permuted": lambda y, i, j: torch.cat([y[..., 8:16], y[..., :8], y[..., 16:]], dim=-1),
    "tokens exchanged": lambda y, i, j: torch.cat([y[:, 1:2], y[:, :1], y[:, 2:]], dim=1) if y.dim() == 3 else y,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("trial", range(4))
def test_a_wrong_place_is_found_like_a_wrong_value(name, trial):
    model = plain_model()
    module = model.get_submodule(SITE)
    plain = module.forward
    module.forward = lambda x: WRONG[name](plain(x), trial, trial + 7)
    assert find_faults(model, texts(), seed=trial).suspect.site == SITE


def test_exchanged_inputs_and_a_bias_on_the_wrong_channel_are_found():
    for change in (lambda m, x: nn.functional.linear(exchanged(x, 1, 4), m.weight, m.bias), _with_shifted_bias):
        model = plain_model()
        module = model.get_submodule("model.layers.1.self_attn.q_proj")
        if module.bias is None:
            module.bias = nn.Parameter(torch.linspace(-0.1, 0.1, module.out_features))
        module.forward = lambda x, module=module, change=change: change(module, x)
        assert find_faults(model, texts()).suspect.site == "model.layers.1.self_attn.q_proj"


def _with_shifted_bias(module, x):
    return nn.functional.linear(x, module.weight, module.bias.roll(1))


def test_odds_of_missing_an_error_are_those_of_the_docstring():
    """An error of size |d| = 10 limits in one token: each Gaussian checksum stays within the limit with p < 0.08."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 32, generator=generator), torch.randn(1, 32, generator=generator)
    y = x @ weight.T
    u = 2.0**-24
    unit = (u**2 * y.square().sum() + 32 * u**2 * (x.square() @ weight.square().T).sum()).sqrt()
    direction = torch.randn(64, generator=generator)
    d = direction / direction.norm() * 10 * checks.CHECKSUM_LIMIT * unit
    missed = 0
    for seed in range(400):
        error = d[torch.randperm(64, generator=generator)]
        missed += (
            checks.checksum_excess(x, weight, None, y.double() + error, Key.from_seed(seed)) <= checks.CHECKSUM_LIMIT
        )
    assert missed == 0  # expected 400 * 2e-8


def test_odds_of_an_intermittent_error():
    report = FaultReport((), (), (), calls=12)
    assert report.odds(0.01) == pytest.approx(1 - 0.99**12)
    found = find_faults(plain_model(), texts(), replays=4)
    assert found.calls == 5 * len(texts())
    with pytest.raises(ValueError, match="replays"):
        find_faults(plain_model(), texts(), replays=-1)


def test_more_replays_find_a_rare_error():
    model = plain_model()
    module = model.get_submodule(SITE)
    plain, calls = module.forward, []

    def rare(x):
        calls.append(None)
        y = plain(x)
        return y + 1e-3 if len(calls) == 30 else y

    module.forward = rare
    assert find_faults(model, texts(), replays=2).alarms == ()
    calls.clear()
    assert find_faults(model, texts(), replays=40).suspect.site == SITE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_and_repeating_texts_raise_no_alarm(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for count, length in ((1, 1), (1, 2), (2, 12), (3, 16), (4, 24), (8, 40)):
        ids = torch.randint(2, 512, (count, length), generator=generator)
        mask = torch.arange(length) >= torch.randint(0, length, (count, 1), generator=generator)
        batches += [(ids, mask), (ids[:1].expand(count, -1), mask[:1].expand(count, -1))]  # and all texts the same
        batches.append((torch.full_like(ids, 7), mask))  # one token again and again
    for seed, (ids, mask) in enumerate(batches):
        report = find_faults(model, [{"input_ids": ids, "attention_mask": mask.long()}], seed=seed)
        assert report.alarms == (), (dtype, ids.shape, report.alarms)


def test_limits_allow_chance_in_few_and_judge_many():
    assert checks.tie_limit(1) == 1.0
    # 19 tokens at 2 %: P(8 or more) = 1.7e-9 > 1e-9 >= P(9 or more)
    assert checks.tie_limit(19) == pytest.approx(8 / 19)
    assert 0.02 < checks.tie_limit(100_000) < 0.025
    assert checks.zero_limit(torch.float32, 64) > 0.05 and checks.zero_limit(torch.float32, 10**7) < 0.0011
