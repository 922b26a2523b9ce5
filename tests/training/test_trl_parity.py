"""Losses and gradients equal trl's: its own GRPOTrainer computes them on the same rollouts of the same model.

trl is no dependency of roundoff. To run this: an environment with roundoff, `trl==1.16` and `datasets`, then
`python -m pytest -m slow tests/training/test_trl_parity.py`.
"""

import pytest
import torch

from roundoff.config import Algorithm
from roundoff.models.load import load_model
from roundoff.models.logprobs import token_logprobs
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample
from roundoff.training.correction import corrected
from roundoff.training.loss import loss_normalizer, policy_loss, truncated_weights

pytestmark = pytest.mark.slow

PROMPTS = ["12+7=", "40-3-25=", "9+8+7=", "31-30="]
GROUP, LIMIT, TEMPERATURE = 4, 12, 0.9
AGGREGATION_OF = {"grpo": "sequence-mean", "bnpo": "token-mean", "dapo": "token-mean", "dr_grpo": "dr_grpo"}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trl = pytest.importorskip("trl", reason="trl is not installed here: this test runs its GRPOTrainer (trl==1.16)")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed here: trl's trainer needs it")
    loaded = load_model("tiny")
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=len(PROMPTS) * GROUP,
        num_generations=GROUP,
        max_completion_length=LIMIT,
        temperature=TEMPERATURE,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_dropout=True,
        use_bias_correction_kl=False,  # True by default in trl 1.16; GRPO, DAPO and verl do not have it
    )
    return trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=lambda completions, **_: [0.0 for _ in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=loaded.tokenizer,
    )


@pytest.fixture(scope="module")
def batch(trainer):
    """Rollouts, advantages, and old, reference and sampler log-probabilities far enough off to reach every clip."""
    model = trainer.model.eval()
    rollouts = sample(
        model,
        load_model("tiny").tokenizer,
        PROMPTS,
        group_size=GROUP,
        max_new_tokens=LIMIT,
        temperature=TEMPERATURE,
        key=Key.from_seed(7),
    )
    generator = torch.Generator().manual_seed(0)
    off = [0.3 * torch.randn(rollouts.logprobs.shape, generator=generator) for _ in range(3)]
    old, reference, sampler = (torch.where(rollouts.response_mask, rollouts.logprobs + d, 0.0) for d in off)
    return rollouts, torch.randn(len(rollouts), generator=generator), old, reference, sampler


def trl_loss(trainer, batch, loss_type, beta, clip_high, weights=None):
    rollouts, advantages, old, reference, _ = batch
    P, mask = rollouts.prompt_length, rollouts.response_mask
    trainer.loss_type, trainer.beta, trainer.epsilon_high = loss_type, beta, clip_high
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = weights is not None  # trl corrects for the sampler's arithmetic on this path alone
    trainer.vllm_importance_sampling_correction = weights is not None
    inputs = {
        "prompt_ids": rollouts.tokens[:, :P],
        "prompt_mask": rollouts.attention_mask[:, :P].long(),
        "completion_ids": rollouts.tokens[:, P:],
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}, trainer._metrics


def our_loss(model, batch, algorithm, weights=None):
    rollouts, advantages, old, reference, _ = batch
    model.zero_grad()
    logprobs, entropies = token_logprobs(
        model,
        rollouts.tokens,
        rollouts.attention_mask,
        rollouts.response_mask.shape[1],
        temperature=TEMPERATURE,
    )
    mask = rollouts.response_mask
    normalizer = loss_normalizer(mask, algorithm, LIMIT)
    output = policy_loss(
        logprobs,
        old,
        reference,
        advantages,
        mask,
        algorithm,
        normalizer=normalizer,
        weights=weights,
        entropies=entropies,
    )
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_loss_and_gradients_are_those_of_trl(trainer, batch, loss_type, beta, clip_high, mode):
    algorithm = Algorithm(name="GRPO", aggregation=AGGREGATION_OF[loss_type], kl_coefficient=beta, clip_high=clip_high)
    trainer.model.train(mode == "train")
    check(trainer, batch, loss_type, algorithm)
    metrics = trainer._metrics[mode]
    output, _ = our_loss(trainer.model, batch, algorithm)
    assert 0 < output.clip_low_fraction.item() == pytest.approx(metrics["clip_ratio/low_mean"][-1])
    assert 0 < output.clip_high_fraction.item() == pytest.approx(metrics["clip_ratio/high_mean"][-1])
    if beta and AGGREGATION_OF[loss_type] == "token-mean":
        assert output.kl.item() == pytest.approx(metrics["kl"][-1], rel=1e-4)


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_truncated_importance_weights_are_those_of_trl(trainer, batch, loss_type):
    algorithm = Algorithm(
        name="GRPO", aggregation=AGGREGATION_OF[loss_type], kl_coefficient=0.04, ratio="rollout", tis_cap=1.2
    )
    rollouts, _, old, _, sampler = batch
    weights = truncated_weights(old, sampler, rollouts.response_mask, algorithm)
    cut = weights[rollouts.response_mask] == weights.max()
    assert weights.max().item() == pytest.approx(1.2)
    assert cut.any()
    assert not cut.all()
    trl_weights = (old - sampler).exp().clamp(max=1.2)  # vllm_importance_sampling_mode = "token_truncate"
    trainer.model.train()
    check(trainer, batch, loss_type, algorithm, weights, trl_weights)


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("token_mask", {"rollout_is": "token", "rollout_is_threshold": (0.8, 1.2)}),
        ("sequence_truncate", {"rollout_is": "sequence", "rollout_is_threshold": 1.2}),
        ("sequence_mask", {"rollout_is": "sequence", "rollout_is_threshold": (0.4, 2.5)}),
    ],
)
def test_corrections_are_those_of_trl(trainer, batch, loss_type, mode, settings):
    """trl computes these weights amid its generation; they are written out here as in its section on them."""
    algorithm = Algorithm(
        name="GRPO",
        aggregation=AGGREGATION_OF[loss_type],
        kl_coefficient=0.04,
        ratio="recomputed",
        correction=settings,
    )
    rollouts, _, old, _, sampler = batch
    weights = corrected(old, sampler, rollouts.response_mask, algorithm.correction).weights
    d = (old - sampler) * rollouts.response_mask
    ratio = (d.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else d).exp()
    lower, upper = algorithm.correction.bounds
    cut = ratio > upper if lower is None else (ratio < lower) | (ratio > upper)
    trl_weights = ratio.clamp(max=upper) if lower is None else ratio.masked_fill(cut, 0.0)
    assert cut.any() and not cut.all()
    trainer.model.train()
    check(trainer, batch, loss_type, algorithm, weights, trl_weights)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_gspo_is_that_of_trl(trainer, batch, loss_type, beta, monkeypatch):
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence")
    monkeypatch.setattr(trainer, "epsilon_low", 0.05)
    clip = {"gspo_clip_low": 0.05, "gspo_clip_high": 0.08}
    algorithm = Algorithm(
        name="GRPO", aggregation=AGGREGATION_OF[loss_type], kl_coefficient=beta, loss="gspo", clip_high=0.08, **clip
    )
    trainer.model.train()
    output = check(trainer, batch, loss_type, algorithm)
    assert output.clip_low_fraction > 0 and output.clip_high_fraction > 0


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_cispo_is_that_of_trl(trainer, batch, beta):
    """trl has no lower bound, and its upper one is that of the ratio itself."""
    algorithm = Algorithm(name="GRPO", kl_coefficient=beta, loss="cispo", clip_low=1 - 2**-20, clip_high=0.28)
    trainer.model.train()
    output = check(trainer, batch, "cispo", algorithm, clip_high=1.28)
    assert output.clip_high_fraction > 0


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_the_dual_clip_is_the_two_sided_clip_of_trl(trainer, batch, loss_type, monkeypatch):
    monkeypatch.setattr(trainer.args, "delta", 1.3)
    plain = Algorithm(name="GRPO", aggregation=AGGREGATION_OF[loss_type], kl_coefficient=0.0)
    trainer.model.train()
    output = check(trainer, batch, loss_type, plain.model_copy(update={"dual_clip": 1.3}))
    assert output.clip_low_fraction > our_loss(trainer.model, batch, plain)[0].clip_low_fraction


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])  # with the others trl averages the entropy over tokens
def test_the_entropy_bonus_is_that_of_trl(trainer, batch, loss_type, monkeypatch):
    monkeypatch.setattr(trainer, "entropy_coef", 0.05)
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", True)
    trainer.model.train()
    algorithm = Algorithm(name="GRPO", aggregation="token-mean", kl_coefficient=0.04, entropy_coefficient=0.05)
    check(trainer, batch, loss_type, algorithm)


def check(trainer, batch, loss_type, algorithm, weights=None, trl_weights=None, clip_high=None):
    clip_high = algorithm.clip_high if clip_high is None else clip_high
    expected, expected_gradients, _ = trl_loss(
        trainer, batch, loss_type, algorithm.kl_coefficient, clip_high, trl_weights
    )
    output, gradients = our_loss(trainer.model, batch, algorithm, weights)
    # Float32: sums of about 80 tokens of order 1, behind a forward pass whose two ways of masking round differently.
    torch.testing.assert_close(output.loss.detach(), expected, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        size = expected_gradients[name].abs().max().item()
        assert size > 0
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4 * size, rtol=0, msg=name)
    return output
