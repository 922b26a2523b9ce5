"""The one definition of a row of `metrics.jsonl`: every name that a step may log, with title, unit and meaning.

A row is a JSON object. The loop writes it, `RunDirectory.append_metrics` refuses a name that is not defined here, and
trackers, reports and plots take their titles and units from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from roundoff.runs.health import FLAWS


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of a row."""

    title: str
    unit: str
    """Empty for a count, a name or a number without a unit."""
    meaning: str

    @property
    def label(self) -> str:
        """Title and unit, for the axis of a plot."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


_FLAW = {
    "nonfinite": "were not computed, because the logits were not finite",
    "reward_error": "have no reward, because the task's reward failed",
    "truncated": "were cut at the length limit",
    "empty": "ended without a text",
}


def _scores() -> dict[str, Metric]:
    """What an evaluation adds to the row of its step."""
    sides = {"deployed": "with the hardware on", "clean": "with the hardware off"}
    scores = {
        side: Metric(f"Accuracy {where}", "fraction", f"Share of the test problems that are solved {where}")
        for side, where in sides.items()
    }
    flaws = {
        f"{side}_{flaw}": Metric(f"Responses {where}: {flaw}", "share", f"Responses {where} that {_FLAW[flaw]}")
        for side, where in sides.items()
        for flaw in FLAWS
        if flaw
    }
    return {**scores, **flaws, "problems": Metric("Problems scored", "", "Number of test problems of the evaluation")}


def _correction() -> dict[str, Metric]:
    """What `algorithm.correction` adds to a step, under verl's names (`roundoff.training.correction`)."""
    weights, upper = "Weights of the correction", "the upper bound, at which or above which they are cut"
    return {
        "rollout_is_mean": Metric(f"{weights}: mean", "", "Mean over tokens after bounds, before normalization"),
        "rollout_is_eff_sample_size": Metric(
            f"{weights}: effective sample size", "share of tokens", "(sum w)^2 / (n * sum w^2) of these weights"
        ),
        "rollout_is_ratio_fraction_high": Metric(f"{weights}: cut above", "share", f"Weights above {upper}"),
        "rollout_is_ratio_fraction_low": Metric(
            f"{weights}: below", "share", "Weights below the band, or below the reciprocal of a single bound"
        ),
        "rollout_is_batch_norm_factor": Metric(f"{weights}: divided by", "", "Their mean over the batch"),
        "rollout_rs_masked_fraction": Metric("Tokens rejected", "share", "Response tokens that a rejection left out"),
        "rollout_rs_seq_masked_fraction": Metric(
            "Responses rejected", "share", "Responses of which a rejection left out a token or more"
        ),
    }


_REVERSED = "KL of training from rollout, from the same tokens, weighted to the training policy"


def _mismatch() -> dict[str, Metric]:
    """How far the training pass lies from the rollouts (`roundoff.training.mismatch`, which has the formulas)."""
    difference, weights = "Log-probability, training less rollout", "Importance weights of rollouts"
    kl, per_token = "KL of rollout from training", "nats per token"
    found = {
        "mean": Metric(f"{difference}: mean size", "nats", "Mean absolute difference over the response tokens"),
        "p99": Metric(f"{difference}: p99", "nats", "The absolute difference that 99 % of the tokens do not exceed"),
        "max": Metric(f"{difference}: largest", "nats", "Largest absolute difference"),
        "kl": Metric(f"{kl}, k1", per_token, f"{kl} by k1; verl's `rollout_corr/kl`"),
        "k3_kl": Metric(f"{kl}, k3", per_token, f"{kl} by k3; verl's `rollout_corr/k3_kl`"),
        "kl_reverse": Metric("KL of training from rollout, k1", per_token, f"{_REVERSED}, by k1"),
        "k3_kl_reverse": Metric("KL of training from rollout, k3", per_token, f"{_REVERSED}, by k3"),
        "training_ppl": Metric("Perplexity, training", "", "Mean over responses; verl's `rollout_corr/training_ppl`"),
        "rollout_ppl": Metric("Perplexity, rollout", "", "Mean over responses; verl's `rollout_corr/rollout_ppl`"),
        "ppl_ratio": Metric("Perplexity ratio", "", "Training by rollout, mean; verl's `rollout_corr/ppl_ratio`"),
        "chi2_token": Metric("Chi-square by token", "", "Mean squared weight less 1; verl's `rollout_corr/chi2_token`"),
        "chi2_seq": Metric("Chi-square by response", "", "The same of whole responses; verl's `rollout_corr/chi2_seq`"),
        "ess_token": Metric(f"{weights}: effective sample size", "share of tokens", "(sum w)^2 / (n * sum w^2)"),
        "ess_seq": Metric(
            f"{weights}: effective sample size by response", "share of responses", "The same of whole responses"
        ),
        "cut_token": Metric(f"{weights}: above the cap", "share of tokens", "Weights of tokens above `tis_cap`"),
        "cut_seq": Metric(f"{weights}: above the cap by response", "share of responses", "The same of whole responses"),
        "k3_kl_lengths": Metric(
            f"{kl} by length", per_token, "A list of `mismatch_k3_kl` for responses of 1, 2 to 3, 4 to 7, ... tokens"
        ),
        "ess_seq_lengths": Metric(
            f"{weights}: effective sample size by length", "share of responses", "The same list of `mismatch_ess_seq`"
        ),
    }
    return {f"mismatch_{name}": metric for name, metric in found.items()}


_RATIO = "Mean importance weight of the first minibatch's tokens; with `gspo`, of its responses"

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "step": Metric("Step", "", "Number of the training step; 0 is the model before training"),
        "epoch": Metric("Epoch", "", "Epoch that the step belongs to, from 0"),
        "reward": Metric("Mean reward of rollouts", "", "Mean over all rollouts sampled, penalties included"),
        "accuracy": Metric("Accuracy of rollouts", "fraction", "Mean of the task's own reward over all rollouts"),
        "mixed_groups": Metric("Groups of unequal reward", "share", "Groups sampled that hold two different rewards"),
        "prompts": Metric("Prompts sampled", "", "Number of prompts that were sampled in the step"),
        "response_tokens": Metric("Response length", "tokens", "Mean length over all rollouts sampled"),
        "truncated": Metric("Responses cut at the limit", "share", "Rollouts that were cut at `max_new_tokens`"),
        "empty": Metric("Responses without a text", "share", "Rollouts that ended without a text"),
        "reward_errors": Metric("Failed rewards", "", "Number of rollouts whose reward raised or was not finite"),
        "nonfinite": Metric("Rollouts not computed", "", "Number of rollouts that ended at logits that are not finite"),
        "sigma": Metric("Sigma of AQN", "", "Standard deviation of AQN's noise in the rollouts; 0 at silent steps"),
        "sigma_layers": Metric("Sigma of AQN by decoder layer", "", "A list, where the layers differ"),
        "learning_rate": Metric("Learning rate", "", "Learning rate of the step, with warm-up"),
        "trained": Metric(
            "Trained", "", "Whether any rollout had an advantage and was kept, so that the weights moved"
        ),
        "loss": Metric("Loss", "", "Mean over the optimizer steps"),
        "kl": Metric("KL to the reference", "nats per token", "Estimate, aggregated as the loss, without coefficient"),
        "entropy": Metric("Entropy", "nats per token", "Mean entropy of the policy over the response tokens"),
        "clip_fraction": Metric("Tokens clipped", "share", "Tokens whose gradient the clip range cuts"),
        "ratio_mean": Metric("Importance ratio: mean", "", _RATIO),
        "ratio_std": Metric("Importance ratio: standard deviation", "", "Their standard deviation"),
        "ratio_ess": Metric(
            "Importance ratio: effective sample size", "share", "(sum w)^2 / (n * sum w^2) of these weights"
        ),
        "grad_norm": Metric("Gradient norm", "", "Norm of the gradient before clipping, mean over the optimizer steps"),
        **_correction(),
        **_mismatch(),
        **_scores(),
        "seconds_rollout": Metric("Time of sampling", "s", "Wall time of sampling and rewards"),
        "seconds_update": Metric("Time of the update", "s", "Wall time of old log-probabilities and optimizer steps"),
        "seconds_evaluate": Metric("Time of the evaluation", "s", "Wall time of the evaluation after the step"),
        "seconds": Metric("Time of the step", "s", "Wall time since the row before"),
        "time": Metric("Time of day", "", "UTC, ISO 8601"),
    }
)
"""Every name that a row may have, in the order in which a step writes them."""


def check_row(row: Mapping[str, object]) -> None:
    """Refuse a row with a name that is not in `METRICS`, so that no reader meets what nothing defines.

    Raises:
        ValueError: naming what is unknown.
    """
    unknown = [name for name in row if name not in METRICS]
    if unknown:
        raise ValueError(
            f"a row of metrics.jsonl has no entry {', '.join(unknown)}: define it in roundoff.runs.metrics"
        )
