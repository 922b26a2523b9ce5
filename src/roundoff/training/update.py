"""The update of the policy on one batch: a loss and an optimizer step for each minibatch.

Log-probabilities before the update are computed first, with the hardware on and without AQN. `Algorithm.ratio` says
under which draws of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.errors import RoundoffError
from roundoff.models.gradient_checkpointing import checkpointed
from roundoff.models.keyed_dropout import dropout_on
from roundoff.models.logprobs import token_logprobs
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import Ranks
from roundoff.sampling.diagnosis import nonfinite_parameters
from roundoff.sampling.rollouts import Rollouts
from roundoff.training.batch import Batch
from roundoff.training.loss import LossOutput, combine, loss_normalizer, policy_loss, truncated_weights
from roundoff.training.session import Session


class NonFiniteLossError(RoundoffError, ArithmeticError):
    """The loss, the gradient or a weight after the optimizer step is not a finite number."""


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The rollouts of one optimizer step, and what the loss compares them with; n rollouts of t response tokens."""

    rollouts: Rollouts
    """This rank's rollouts of the minibatch."""
    advantages: Tensor
    """[n], one for each rollout."""
    normalizer: Tensor
    """[], what the loss of the whole minibatch is divided by, on every rank."""
    old: Tensor | None = None
    """[n, t] log-probabilities before this batch's first update; None where those of the update's own pass serve."""
    reference: Tensor | None = None
    """[n, t] log-probabilities under the reference policy; None without a KL penalty."""
    weights: Tensor | None = None
    """[n, t] truncated importance weights; None unless `algorithm.ratio` corrects rollouts."""


def update(session: Session, step: int, batch: Batch) -> dict[str, Any]:
    """Take the optimizer steps on one batch. Returns the metrics to log.

    Metrics are means over the optimizer steps, except those of the ratio, which are the first minibatch's.

    Raises:
        NonFiniteLossError: if training diverged.
    """
    shares = [_share_of(session.ranks, minibatch) for minibatch in split_into_minibatches(session, batch)]
    minibatches = [before_update(session, step, share, first=i == 0) for i, share in enumerate(shares)]
    before_step = nonfinite_parameters(session.trainable)
    outputs: list[LossOutput] = []
    norms: list[float] = []
    entropies: list[float] = []
    for _ in range(session.algorithm.optimizer_epochs):
        for minibatch in minibatches:
            output, entropy = minibatch_loss(session, step, minibatch)
            norms.append(_optimizer_step(session, output, before_step))
            outputs.append(output)
            entropies.append(entropy)
    if spoilt := _spoilt(session, before_step):
        raise NonFiniteLossError(spoilt)
    logged = [o.metrics() for o in outputs]
    mean = {name: sum(row[name] for row in logged) / len(logged) for name in logged[0]}
    return {
        "loss": mean["loss"],
        "kl": mean["kl"],
        "entropy": sum(entropies) / len(entropies),
        "clip_fraction": mean["clip_low_fraction"] + mean["clip_high_fraction"],
        **{name: logged[0][name] for name in ("ratio_mean", "ratio_std", "ratio_ess")},
        "grad_norm": sum(norms) / len(norms),
    }


def _optimizer_step(session: Session, output: LossOutput, before: Sequence[str]) -> float:
    """One step along the gradients that `output` left behind, clipped; returns their norm before clipping.

    Raises:
        NonFiniteLossError: if the loss or the norm is not finite; no weight has moved then.
    """
    moved = list(session.optimizer.masters.values())
    session.ranks.sum_gradients(moved)
    norm = torch.nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
    if not (torch.isfinite(output.loss) and torch.isfinite(norm)):
        raise NonFiniteLossError(_diverged(session, output, norm, before))
    torch.nn.utils.clip_grads_with_norm_(moved, session.profile.training.gradient_clip, norm)
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    return float(norm)


def _spoilt(session: Session, before: Sequence[str]) -> str:
    """A sentence about the weights that an optimizer step has made NaN or infinite; those in `before` already were."""
    bad = [name for name in nonfinite_parameters(session.trainable) if name not in before]
    if not bad:
        return ""
    return (
        f"after an optimizer step {len(bad)} of {len(session.trainable)} weights hold NaN or Inf "
        f"({', '.join(bad[:3])}): lower the learning rate, or train in a dtype of a wider range"
    )


def _diverged(session: Session, output: LossOutput, norm: Tensor, before: Sequence[str]) -> str:
    """A sentence about what was not finite first, in the order of the computation."""
    said = f"loss {output.loss.item()}, gradient norm {norm.item()}"
    if spoilt := _spoilt(session, before):
        return f"{said}: {spoilt}"
    if torch.isfinite(output.policy_loss) and not torch.isfinite(output.kl):
        return f"{said}: the KL to the reference model is not finite, nor therefore the loss"
    if torch.isfinite(output.loss):
        bad = [name for name, p in session.optimizer.masters.items() if p.grad is not None and not _finite(p.grad)]
        return f"{said}: the loss is finite, but the gradients of {len(bad)} weights are not ({', '.join(bad[:3])})"
    return f"{said}: the log-probabilities of the policy are not finite; a lower learning rate may help"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def split_into_minibatches(session: Session, batch: Batch) -> list[Minibatch]:
    """The rollouts, advantages and normalizer of each minibatch, on all ranks together.

    A minibatch holds whole groups, in the order of the stream (a random one), cut to their own lengths. Rollouts whose
    output was not finite are left out. Without KL penalty and entropy bonus a rollout without advantage has no
    gradient: it counts in the normalizer, and no pass is made over it.
    """
    algorithm, training = session.algorithm, session.profile.training
    G, rollouts = algorithm.group_size, batch.rollouts
    numbers = torch.arange(len(batch.advantages), device=batch.advantages.device)
    minibatches = []
    for groups in torch.tensor_split(numbers.view(-1, G), training.minibatches):
        members = groups.flatten()
        members = members[~rollouts.nonfinite[members]]
        normalizer = loss_normalizer(rollouts.response_mask[members], algorithm, training.max_new_tokens)
        if algorithm.kl_coefficient == algorithm.entropy_coefficient == 0:
            teaching = members[batch.advantages[members] != 0]
            members = teaching if len(teaching) else members[:G]  # the optimizer moves on all the same
        minibatches.append(Minibatch(rollouts.select(members), batch.advantages[members], normalizer))
    return [minibatch for minibatch in minibatches if len(minibatch.rollouts)]


def _share_of(ranks: Ranks, minibatch: Minibatch) -> Minibatch:
    """This rank's rollouts of a minibatch, at the width of the whole minibatch."""
    if ranks.count == 1:
        return minibatch
    count = len(minibatch.rollouts)
    rows = torch.arange(count)[ranks.share(count)]
    rollouts = minibatch.rollouts.select(rows, trim=False)
    return replace(minibatch, rollouts=rollouts, advantages=minibatch.advantages[rows])


def keyed_logprobs(session: Session, model: PreTrainedModel, part: Rollouts, key: Key) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [n, t] of the responses; `key` decides every draw of noise and dropout."""
    with dropout_on(model), checkpointed(model, session.profile.training.gradient_checkpointing):
        return token_logprobs(
            model,
            part.tokens,
            part.attention_mask,
            part.response_mask.shape[1],
            temperature=session.algorithm.temperature,
            rows=part.rows,
            key=key,
        )


def before_update(session: Session, step: int, minibatch: Minibatch, *, first: bool) -> Minibatch:
    """Add what the loss compares the rollouts with; under which noise is the whole point of `Algorithm.ratio`."""
    algorithm, rule, rollouts = session.algorithm, session.algorithm.ratio_rule, minibatch.rollouts
    if not len(rollouts):  # more ranks than rollouts
        return minibatch
    key = session.key.fold("update", step)
    old_key = key if rule.replays_noise else key.fold("old")

    def logprobs(model: PreTrainedModel) -> Tensor:  # in micro-batches of the update's shapes: other shapes, other bits
        rows = _micro_batches(len(rollouts), session.profile.training.micro_batch)
        return torch.cat([keyed_logprobs(session, model, rollouts.select(r, trim=False), old_key)[0] for r in rows])

    with torch.no_grad():
        old = None
        if rule.needs_old_pass(first_minibatch=first, optimizer_epochs=algorithm.optimizer_epochs):
            old = logprobs(session.model)
        with session.reference_policy() as model:
            reference = None if model is None else logprobs(model)
        weights = None
        if rule.corrects_rollouts and old is not None:
            weights = truncated_weights(old, rollouts.logprobs, rollouts.response_mask, algorithm)
    return replace(minibatch, old=old, reference=reference, weights=weights)


def minibatch_loss(session: Session, step: int, minibatch: Minibatch) -> tuple[LossOutput, float]:
    """Loss of one minibatch, summed over its micro-batches and ranks, and the mean entropy (nats).

    The gradients left behind are those of this rank's rollouts; their sum over the ranks is that of the minibatch.
    """
    outputs: list[LossOutput] = []
    entropy = 0.0
    for rows in _micro_batches(len(minibatch.advantages), session.profile.training.micro_batch):
        micro = minibatch.rollouts.select(rows, trim=False)
        logprobs, entropies = keyed_logprobs(session, session.model, micro, session.key.fold("update", step))
        output = policy_loss(
            logprobs,
            logprobs.detach() if minibatch.old is None else minibatch.old[rows],
            None if minibatch.reference is None else minibatch.reference[rows],
            minibatch.advantages[rows],
            micro.response_mask,
            session.algorithm,
            normalizer=minibatch.normalizer,
            weights=None if minibatch.weights is None else minibatch.weights[rows],
            entropies=entropies,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        session.optimizer.collect()
        outputs.append(replace(output, loss=output.loss.detach()))
        entropy += float(torch.where(micro.response_mask, entropies.detach(), 0.0).sum())
    total = combine(outputs) if outputs else LossOutput.nothing()
    if session.ranks.count > 1:
        own = [*total.metrics().values(), entropy]
        ranks = session.ranks.stack(torch.tensor(own, dtype=torch.float64)).unbind()
        total, entropy = combine([LossOutput(*row[:-1]) for row in ranks]), float(sum(row[-1] for row in ranks))
    return total, entropy / max(1, int(total.tokens))


def _micro_batches(count: int, size: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), size or count)) if count else []
