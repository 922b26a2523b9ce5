"""The update of the policy on one batch: a loss and an optimizer step for each minibatch.

Log-probabilities before the update are computed first, with the hardware on and without AQN. `Algorithm.ratio` says
under which draws of the noise. `Algorithm.correction` says how the difference to the rollouts is corrected; what it
left out of a minibatch is known before its optimizer step, and nothing is trained where nothing is left.

**Devices.** Rollouts, advantages and everything that decides shapes are in host memory. An accelerator is waited for
once in an update, when the numbers that it reports are fetched (`roundoff.training.divergence`), and with a correction
once more: before the first optimizer step, or in bypass mode with a rejection before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.models.gradient_checkpointing import checkpointed
from roundoff.models.keyed_dropout import dropout_on
from roundoff.models.logprobs import token_logprobs
from roundoff.numerics.rng import Key
from roundoff.numerics.transfer import put
from roundoff.parallel.ranks import Ranks
from roundoff.sampling.rollouts import Rollouts
from roundoff.training.batch import Batch
from roundoff.training.correction import SUMS, correct, corrected, metrics_of, named
from roundoff.training.divergence import (
    METRICS,
    NonFiniteLossError,
    StepNumbers,
    Weights,
    check_now,
    checked,
    gradient_norms,
)
from roundoff.training.loss import (
    LossOutput,
    combine,
    loss_normalizer,
    policy_loss,
    truncated_weights,
    widest_float,
)
from roundoff.training.mismatch import mismatch_row
from roundoff.training.session import Session

__all__ = ["Minibatch", "NonFiniteLossError", "update"]


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The rollouts of one optimizer step, and what the loss compares them with; n rollouts of t response tokens.

    The first three are in host memory, the others on the model's device.
    """

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
    """[n, t] importance weights; None unless `algorithm.ratio` or `algorithm.correction` gives any."""
    kept: Tensor | None = None
    """[n, t] response tokens that no rejection left out; None without a correction that knows them before the pass."""
    sums: list[Tensor] = field(default_factory=list)
    """What corrections of the update's own pass (bypass mode) report, for each micro-batch."""


def update(session: Session, step: int, batch: Batch) -> dict[str, Any]:
    """Take the optimizer steps on one batch. Returns the metrics to log.

    Metrics are means over the optimizer steps, except those of the ratio, which are the first minibatch's. `trained` is
    among them, and false, where a correction has left nothing to train on.

    Raises:
        NonFiniteLossError: if training diverged.
    """
    whole = split_into_minibatches(session, batch)
    shares = [_share_of(session.ranks, minibatch) for minibatch in whole]
    before = [before_update(session, step, share, first=i == 0) for i, share in enumerate(shares)]
    minibatches, noted = corrected_batch(session, before)
    weights = Weights.of(session.trainable)
    taken: list[StepNumbers] = []
    correction = session.algorithm.correction
    passes: list[Tensor] = []
    for _ in range(session.algorithm.optimizer_epochs):
        for minibatch in minibatches:
            output, entropy, logprobs = minibatch_loss(session, step, minibatch)
            passes = passes or _passes(session, before, logprobs)
            if correction is not None and correction.rejects_in_pass and not output.tokens:
                session.optimizer.zero_grad(set_to_none=True)
                continue
            taken.append(_optimizer_step(session, output, entropy, weights))
    noted |= _noted_in_passes(session, minibatches)
    if not taken:
        return {**noted, "trained": False}
    numbers, passes = checked(weights, taken, passes)
    rows = [dict(zip((*METRICS, "entropy", "grad_norm"), row, strict=True)) for row in numbers]
    measured = [(minibatch.rollouts, logprobs) for minibatch, logprobs in zip(whole, passes, strict=False)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {
        "loss": mean["loss"],
        "kl": mean["kl"],
        "entropy": mean["entropy"],
        "clip_fraction": mean["clip_low_fraction"] + mean["clip_high_fraction"],
        **{name: rows[0][name] for name in ("ratio_mean", "ratio_std", "ratio_ess")},
        "grad_norm": mean["grad_norm"],
        **noted,
        **mismatch_row(session.ranks, measured, session.algorithm.tis_cap),
    }


def corrected_batch(session: Session, minibatches: Sequence[Minibatch]) -> tuple[list[Minibatch], dict[str, float]]:
    """The minibatches with the weights and rejections of `Algorithm.correction`, and what it reports.

    A minibatch of which nothing is left, on all ranks together, is left out. In bypass mode the update's own pass
    decides, so that nothing changes here.
    """
    algorithm, correction = session.algorithm, session.algorithm.correction
    if correction is None or correction.bypass_mode:
        return list(minibatches), {}
    parts = []
    for minibatch in minibatches:
        mask = put(minibatch.rollouts.response_mask, session.model.device)
        sampled = put(minibatch.rollouts.logprobs, mask.device)
        parts.append(corrected(sampled if minibatch.old is None else minibatch.old, sampled, mask, correction))
    parts, left, noted = correct(parts, correction, session.ranks.gather)
    found = []
    for minibatch, part, tokens in zip(minibatches, parts, left, strict=True):
        if correction.rollout_rs and algorithm.aggregation == "token-mean":
            minibatch = replace(minibatch, normalizer=minibatch.normalizer.new_tensor(max(1, tokens)))
        if tokens:
            found.append(replace(minibatch, weights=part.weights, kept=part.kept))
    return found, noted


def _noted_in_passes(session: Session, minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """What corrections of the update's own passes report."""
    correction = session.algorithm.correction
    if correction is None or not correction.bypass_mode:
        return {}
    sums = [one for minibatch in minibatches for one in minibatch.sums]
    own = torch.stack(sums).sum(dim=0).tolist() if sums else [0.0] * len(SUMS)
    return metrics_of(named([sum(column) for column in zip(*session.ranks.gather(own), strict=True)]), correction)


def _passes(session: Session, minibatches: Sequence[Minibatch], own: Tensor) -> list[Tensor]:
    """This rank's log-probabilities [n, t] of each minibatch in a training pass before the batch's first update.

    `own` are those of the first minibatch's own pass, which serve where there is no pass before it. Minibatches after
    it that have no pass before the update are left out, on every rank.
    """
    correction = session.algorithm.correction
    bypassed = correction is not None and correction.bypass_mode  # what is compared with are the rollouts' own
    first = own if bypassed or minibatches[0].old is None else minibatches[0].old
    if bypassed or not session.algorithm.ratio_rule.compares:
        return [first]
    return [first, *(own[:0] if m.old is None else m.old for m in minibatches[1:])]  # none where there are no rollouts


def _optimizer_step(session: Session, output: LossOutput, entropy: Tensor, weights: Weights) -> StepNumbers:
    """One step along the gradients that `output` left behind, clipped; returns what it reports.

    Raises:
        NonFiniteLossError: on a CPU, if the loss or the norm is not finite; no weight has moved then.
    """
    session.ranks.sum_gradients(session.optimizer.masters.values())
    moved = {name: p for name, p in session.optimizer.masters.items() if p.grad is not None}
    norms, norm = gradient_norms([p.grad for p in moved.values() if p.grad is not None])
    values = torch.cat([output.stacked(), torch.stack([entropy, norm.to(entropy.dtype)])])
    numbers = StepNumbers(values, tuple(moved), norms)
    if values.is_cpu:
        check_now(weights, numbers)
    torch.nn.utils.clip_grads_with_norm_(moved.values(), session.profile.training.gradient_clip, norm)
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    return numbers


def split_into_minibatches(session: Session, batch: Batch) -> list[Minibatch]:
    """The rollouts, advantages and normalizer of each minibatch, on all ranks together.

    A minibatch holds whole groups, in the order of the stream (a random one), cut to their own lengths. Rollouts whose
    output was not finite are left out. Without KL penalty and entropy bonus a rollout without advantage has no
    gradient: it counts in the normalizer, and no pass is made over it, unless a correction needs its tokens.
    """
    algorithm, training = session.algorithm, session.profile.training
    G, rollouts = algorithm.group_size, batch.rollouts
    numbers = torch.arange(len(batch.advantages))
    minibatches = []
    for groups in torch.tensor_split(numbers.view(-1, G), training.minibatches):
        members = groups.flatten()
        members = members[~rollouts.nonfinite[members]]
        normalizer = loss_normalizer(rollouts.response_mask[members], algorithm, training.max_new_tokens)
        whole = algorithm.correction is not None and algorithm.correction.concerns_whole_batch
        if algorithm.kl_coefficient == algorithm.entropy_coefficient == 0 and not whole:
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
        return torch.cat([keyed_logprobs(session, model, rollouts.part(r), old_key)[0] for r in rows])

    with torch.no_grad():
        old = None
        if rule.needs_old_pass(first_minibatch=first, optimizer_epochs=algorithm.optimizer_epochs):
            old = logprobs(session.model)
        elif rule.takes_rollouts:
            old = put(rollouts.logprobs, session.model.device)
        with session.reference_policy() as model:
            reference = None if model is None else logprobs(model)
        weights = None
        if rule.corrects_rollouts and old is not None:
            sampled, mask = (put(x, old.device) for x in (rollouts.logprobs, rollouts.response_mask))
            weights = truncated_weights(old, sampled, mask, algorithm)
    return replace(minibatch, old=old, reference=reference, weights=weights)


def minibatch_loss(session: Session, step: int, minibatch: Minibatch) -> tuple[LossOutput, Tensor, Tensor]:
    """Loss of one minibatch, summed over its micro-batches and ranks, and the mean entropy [] (nats).

    The third result holds this rank's log-probabilities [n, t], detached. The gradients left behind are those of this
    rank's rollouts; their sum over the ranks is that of the minibatch.
    """
    device = session.model.device
    outputs: list[LossOutput] = []
    passed = [torch.zeros(0, minibatch.rollouts.response_mask.shape[1], device=device)]
    nothing = LossOutput.nothing(device)
    entropy = nothing.loss.to(widest_float(nothing.loss))
    normalizer = put(minibatch.normalizer, device)
    for rows in _micro_batches(len(minibatch.advantages), session.profile.training.micro_batch):
        micro = minibatch.rollouts.part(rows)
        mask = put(micro.response_mask if minibatch.kept is None else minibatch.kept[rows], device)
        logprobs, entropies = keyed_logprobs(session, session.model, micro, session.key.fold("update", step))
        weights = None if minibatch.weights is None else minibatch.weights[rows]
        if (correction := session.algorithm.correction) is not None and correction.bypass_mode:
            part = corrected(logprobs, put(micro.logprobs, device), mask, correction)
            mask, weights = part.kept, part.weights
            minibatch.sums.append(part.sums)
        output = policy_loss(
            logprobs,
            logprobs.detach() if minibatch.old is None else minibatch.old[rows],
            None if minibatch.reference is None else minibatch.reference[rows],
            put(minibatch.advantages[rows], device),
            mask,
            session.algorithm,
            normalizer=normalizer,
            weights=weights,
            entropies=entropies,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        session.optimizer.collect()
        passed.append(logprobs.detach())
        outputs.append(replace(output, loss=output.loss.detach()))
        entropy = entropy + torch.where(mask, entropies.detach(), 0.0).sum()
    total = combine(outputs) if outputs else nothing
    if session.ranks.count > 1:
        ranks = session.ranks.stack(torch.cat([total.stacked(), entropy[None]])).unbind()
        total, entropy = combine([LossOutput(*row[:-1]) for row in ranks]), torch.stack([r[-1] for r in ranks]).sum()
    return total, entropy / total.tokens.clamp(min=1), torch.cat(passed)


def _micro_batches(count: int, size: int) -> list[slice]:
    return [slice(start, start + (size or count)) for start in range(0, count, size or count)] if count else []
