"""AQN noise on weights: what it perturbs, how much, and that every bit comes back."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from roundoff.aqn.noise import aqn_noise, aqn_targets, is_aqn_active
from roundoff.config import AQN, ConfigError, Hardware, Precision
from roundoff.hardware import install
from roundoff.numerics.rng import Key
from tests.families import Batch, build, every_family

KEY = Key.from_seed(5)
ABSOLUTE = AQN(sigma_start=0.1, sigma_end=0.1)
RELATIVE = AQN(sigma_start=0.1, sigma_end=0.1, noise="relative")
LINEAR = AQN(sigma_start=0.1, sigma_end=0.1, target="linear")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_targets_of_qwen2_are_its_five_norms():
    names = [t.name for t in aqn_targets(build(), ABSOLUTE)]
    layer = ["input_layernorm", "post_attention_layernorm"]
    assert names == [f"model.layers.{i}.{n}" for i in (0, 1) for n in layer] + ["model.norm"]


def test_targets_include_query_and_key_norms():
    names = {t.name.rpartition(".")[2] for t in aqn_targets(build("qwen3"), ABSOLUTE)}
    assert {"q_norm", "k_norm"} <= names


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_norms_before_a_router_are_left_out_by_default(family):
    model = build(family)
    names = {t.name for t in aqn_targets(model, ABSOLUTE)}
    assert "model.layers.0.input_layernorm" in names
    assert "model.layers.0.post_attention_layernorm" not in names
    assert "model.layers.0.post_attention_layernorm" in {
        t.name for t in aqn_targets(model, ABSOLUTE, router_norms=True)
    }


def test_linear_targets_are_the_linears_of_the_layers():
    names = [t.name for t in aqn_targets(build(), LINEAR)]
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)


@every_family
def test_only_targets_change_and_every_bit_comes_back(family):
    model = build(family)
    before = weights(model)
    for aqn in (ABSOLUTE, RELATIVE, LINEAR):
        expected = {f"{t.name}.weight" for t in aqn_targets(model, aqn)}
        with aqn_noise(model, 0.05, None, KEY, aqn):
            assert changed(before, weights(model)) == expected
        assert changed(before, weights(model)) == set()


def test_every_bit_comes_back_after_an_exception():
    model = build()
    before = weights(model)
    with pytest.raises(KeyError, match="stop"), aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
        raise KeyError("stop")
    assert changed(before, weights(model)) == set()


def test_same_key_same_noise_and_another_key_other_noise():
    model = build()

    def noisy(key):
        with aqn_noise(model, 0.05, None, key, ABSOLUTE):
            return weights(model)

    first = noisy(KEY)
    assert changed(first, noisy(KEY)) == set()
    assert len(changed(first, noisy(KEY.fold(1)))) == 5


def test_draws_of_two_norms_differ():
    model = build()  # every norm weight is 1, so the noisy weights show the draws
    with aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
        after = weights(model)
    assert not torch.equal(after["model.layers.0.input_layernorm.weight"], after["model.norm.weight"])


def wide_norm(weight):
    """One RMSNorm of 2**16 channels in place of the final norm, for statistics."""
    model = build()
    model.model.norm.weight = torch.nn.Parameter(weight)
    return model


def test_absolute_noise_has_the_standard_deviation_asked_for():
    n, sigma = 1 << 16, 0.05
    model = wide_norm(torch.linspace(0.1, 3.0, n))
    before = model.model.norm.weight.detach().clone()
    with aqn_noise(model, sigma, None, KEY, ABSOLUTE):
        eps = (model.model.norm.weight.detach() - before) / sigma
    # 4.5 standard errors: a false alarm once in 150,000 keys. Mean: 1/sqrt(n); variance: sqrt(2/n).
    assert abs(eps.mean()) < 4.5 / n**0.5
    assert abs(eps.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs(torch.corrcoef(torch.stack([eps, before]))[0, 1]) < 4.5 / n**0.5


def test_relative_noise_is_proportional_to_the_weight():
    model = wide_norm(torch.linspace(0.1, 3.0, 64))
    before = model.model.norm.weight.detach().clone()
    with aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
        absolute = model.model.norm.weight.detach() - before
    with aqn_noise(model, 0.05, None, KEY, RELATIVE):
        relative = model.model.norm.weight.detach() - before
    # The same draw, times w; float32 sums near 3 round to 2.4e-7.
    torch.testing.assert_close(relative, absolute * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_relative_noise_acts_on_gemmas_one_plus_w(family):
    model = build(family)
    model.model.norm.weight.data.fill_(-0.5)  # gain 0.5
    with aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
        absolute = model.model.norm.weight.detach() + 0.5
    with aqn_noise(model, 0.05, None, KEY, RELATIVE):
        relative = model.model.norm.weight.detach() + 0.5
    torch.testing.assert_close(relative, absolute * 0.5, rtol=1e-4, atol=1e-7)


def test_a_norm_with_another_gain_refuses_relative_noise():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * 3.0 * self.weight

    model = torch.nn.Sequential(OddRMSNorm())
    before = weights(model)
    with pytest.raises(ConfigError, match="neither by w nor by 1"), aqn_noise(model, 0.1, None, KEY, RELATIVE):
        pass
    assert changed(before, weights(model)) == set()


def test_multipliers_scale_layers_and_leave_the_final_norm():
    model = build()
    with aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
        full = weights(model)
    with aqn_noise(model, 0.05, {0: 0.0, 1: 2.0}, KEY, ABSOLUTE):
        scaled = weights(model)
    assert bool((scaled["model.layers.0.input_layernorm.weight"] == 1).all())
    name = "model.layers.1.input_layernorm.weight"
    torch.testing.assert_close(scaled[name] - 1, 2 * (full[name] - 1), rtol=1e-4, atol=1e-6)
    assert torch.equal(scaled["model.norm.weight"], full["model.norm.weight"])


@pytest.mark.parametrize("sigma", [0.0, -0.1, float("nan"), float("inf")])
def test_an_unusable_sigma_is_an_error(sigma):
    with pytest.raises(ConfigError, match="sigma of AQN"), aqn_noise(build(), sigma, None, KEY, ABSOLUTE):
        pass


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [({0: float("nan")}, "finite"), ({0: -1.0}, "not negative"), ({7: 1.0}, r"layers \[7\]")],
)
def test_unusable_multipliers_are_errors(multipliers, message):
    model = build()
    before = weights(model)
    with pytest.raises(ConfigError, match=message), aqn_noise(model, 0.1, multipliers, KEY, ABSOLUTE):
        pass
    assert changed(before, weights(model)) == set()


def test_multipliers_that_silence_everything_are_an_error():
    with (
        pytest.raises(ConfigError, match="every multiplier"),
        aqn_noise(build(), 0.1, {0: 0.0, 1: 0.0}, KEY, LINEAR),
    ):
        pass


def test_a_model_without_targets_is_an_error():
    with pytest.raises(ConfigError, match=r"matches no module.*Linear"):
        aqn_targets(torch.nn.Sequential(torch.nn.Linear(4, 4)), ABSOLUTE)


def test_noise_on_norms_costs_no_quantization_and_noise_on_weights_is_seen():
    model, batch = build(), Batch()
    installed = install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    with torch.no_grad():
        plain = model(**batch.inputs()).logits
        count = installed.quantizations()
        assert count == 14
        with aqn_noise(model, 0.05, None, KEY, ABSOLUTE):
            assert not torch.equal(model(**batch.inputs()).logits, plain)
        assert installed.quantizations() == count
        with aqn_noise(model, 0.05, None, KEY, LINEAR):
            assert not torch.equal(model(**batch.inputs()).logits, plain)
            assert installed.quantizations() == 2 * count
        assert torch.equal(model(**batch.inputs()).logits, plain)


def test_adapters_change_no_draw():
    from peft import LoraConfig, get_peft_model

    model = build()
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], r=4))
    for aqn in (ABSOLUTE, LINEAR):
        with aqn_noise(model, 0.05, None, KEY, aqn):
            expected = {t.name: t.weight.detach().clone() for t in aqn_targets(model, aqn)}
        with aqn_noise(wrapped, 0.05, None, KEY, aqn):
            found = {t.name: t.weight.detach().clone() for t in aqn_targets(wrapped, aqn)}
        assert found.keys() == expected.keys()
        assert changed(expected, found) == set()


def test_a_weight_that_two_modules_share_gets_the_noise_of_one():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(2))})
    model["layers"][1].weight = model["layers"][0].weight
    assert [t.name for t in aqn_targets(model, LINEAR)] == ["layers.0"]
    before = model["layers"][0].weight.detach().clone()
    with aqn_noise(model, 0.05, None, KEY, LINEAR):
        eps = (model["layers"][1].weight.detach() - before) / 0.05
    assert abs(eps.var() - 1) < 4.5 * (2 / eps.numel()) ** 0.5  # standard errors of the variance
    assert torch.equal(model["layers"][0].weight.detach(), before)


@pytest.mark.parametrize("outer", [True, False])
def test_the_noise_is_seen_through_every_wrapper_and_part(outer):
    model = build()
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with aqn_noise(wrapper if outer else model, 0.5, None, KEY, AQN(sigma_start=0.5, sigma_end=0.1)):
        assert all(map(is_aqn_active, (model, wrapper, model.model, model.model.layers[0], nn.Sequential(model))))
        assert is_aqn_active(copy.deepcopy(model))  # a copy keeps the noise
        sharing = nn.Module()
        sharing.weight = model.model.norm.weight
        assert is_aqn_active(sharing)
    assert not any(map(is_aqn_active, (model, wrapper, model.model, sharing)))


def test_the_mark_outlives_an_inner_block_and_not_an_exception():
    model, aqn = build(), AQN(sigma_start=0.5, sigma_end=0.1)
    with pytest.raises(KeyError), aqn_noise(model, 0.5, None, KEY, aqn):
        with aqn_noise(model, 0.1, None, KEY, aqn):
            pass
        assert is_aqn_active(model)
        raise KeyError
    assert not is_aqn_active(model)
    assert all("_roundoff_aqn_active" not in parameter.__dict__ for parameter in model.parameters())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_blocks_may_be_left_in_any_order(first):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [
        aqn_noise(model, 0.1, None, Key.from_seed(seed), AQN(sigma_start=0.1, sigma_end=0.01)) for seed in range(3)
    ]
    for block in blocks:
        block.__enter__()
    blocks.pop(first).__exit__(None, None, None)
    blocks.pop(0).__exit__(None, None, None)
    assert is_aqn_active(model) and not torch.equal(model.model.norm.weight, before["model.norm.weight"])
    blocks.pop(0).__exit__(None, None, None)
    assert not is_aqn_active(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_inside_would_be_lost_and_is_refused(fused):
    model = build()
    before = model.model.norm.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    aqn = AQN(sigma_start=0.1, sigma_end=0.01)
    with (
        pytest.raises(RuntimeError, match="written to inside aqn_noise"),
        aqn_noise(model, 0.1, None, Key.from_seed(1), aqn),
    ):
        model(**Batch().inputs()).logits.square().sum().backward()
        optimizer.step()
    assert torch.equal(model.model.norm.weight, before) and not is_aqn_active(model)
