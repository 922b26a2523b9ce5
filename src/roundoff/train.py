"""The only training loop: GRPO and DAPO on the arithmetic of the simulated chip.

One step: draw prompts; sample a group of rollouts of each with the hardware on and AQN in force; reward them; compute
log-probabilities before the update (hardware on, no AQN); take one optimizer step for each minibatch; evaluate and save
when due. The test set is scored before the first step and after the last one, whatever the settings.

Where the loop departs from the papers: old log-probabilities are by default evaluated under the noise draws of the
pass they are compared with (`ratio = "replayed"`); a batch with no usable group trains nothing and the run goes on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.algorithms.loss import LossOutput, combine, loss_normalizer, policy_loss, truncated_weights
from roundoff.batch import Batch, collect, share_of
from roundoff.checkpoint import Checkpoint, DiskFullError, is_disk_full
from roundoff.clock import Clock
from roundoff.config import Experiment, Profile
from roundoff.evaluate import evaluate
from roundoff.logprobs import token_logprobs
from roundoff.models.checkpointing import checkpointed
from roundoff.models.dropout import dropout_on
from roundoff.numerics.rng import Key
from roundoff.parallel import ALONE, Ranks
from roundoff.remedies import aqn_of_step, layer_sigmas, measure_before
from roundoff.rollouts import Rollouts
from roundoff.run_dir import DamagedRunError, Evaluation, RunDirectory
from roundoff.sampler import sample
from roundoff.session import Session, prepare, restore, save
from roundoff.srdd import LayerScan
from roundoff.tasks import Problem
from roundoff.trackers import Ended, Tracker, scalars

Metrics = dict[str, Any]


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient is not a number; the batch was saved."""


def train(
    experiment: Experiment,
    profile: Profile,
    seed: int,
    run_dir: RunDirectory,
    open_tracker: Callable[[int], Tracker],
    *,
    provenance: Metrics,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Evaluation after the last step, or None if the run was told to stop before it; then it can be resumed.

    Args:
        experiment: what is run.
        profile: how big.
        seed: of every random number of the run.
        run_dir: entered directory of this run; a run found in it is resumed, a complete one is returned as it is.
        open_tracker: makes the tracker, given the last step that is not logged again (-1: none).
        provenance: what `provenance.json` records.
        should_stop: asked after each step; True, on any rank, saves and leaves.
        ranks: the processes that make this run together; `run_dir` then writes on the first alone.

    Raises:
        ConfigError: if the settings do not fit together, before anything is written.
        DamagedCheckpointError: if there are checkpoints and none of them can be used.
        DiskFullError: if no space is left; the run can be resumed.
        NonFiniteLossError: if training diverged; the run is marked failed.
    """
    torch.set_num_threads(profile.threads)
    kept = run_dir.scan()
    scan = None if kept is None else LayerScan.from_json(kept)
    session = ranks.everywhere(lambda: prepare(experiment, profile, seed, scan=scan))
    session.ranks = ranks
    ranks.agree("the weights of the model", session.policy.base)
    try:
        return _train(session, run_dir, open_tracker, provenance, should_stop)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"no space is left for {run_dir.path}: free some, and the same command goes on from the last checkpoint"
        ) from error


def _train(
    session: Session,
    run_dir: RunDirectory,
    open_tracker: Callable[[int], Tracker],
    provenance: Metrics,
    should_stop: Callable[[], bool],
) -> Evaluation | None:
    """`train` with everything in memory."""
    total = len(session.sigmas)
    checkpoint = run_dir.load_checkpoint()
    start = restore(session, checkpoint) if checkpoint else 0
    lost = [f"passed over a damaged checkpoint: {s}; went on from step {start}" for s in _skipped(checkpoint)]
    for line in lost:
        warnings.warn(line, stacklevel=3)
    kept = start if checkpoint else -1
    run_dir.rewind(kept)
    status = run_dir.start(provenance, total, lost)
    if not checkpoint:
        status = measure_before(session, run_dir, status)
    tracker = open_tracker(kept)
    clock = Clock(status.seconds)
    step, evaluation = start, None
    ended: Ended = "failed"
    try:
        if not checkpoint:
            evaluation = _record(session, run_dir, tracker, 0, {"step": 0}, clock)
            save(session, run_dir, 0)
        for step in range(start + 1, total + 1):
            metrics = take_step(session, step, run_dir)
            evaluation = _record(session, run_dir, tracker, step, metrics, clock)
            stop = session.ranks.any(should_stop()) and step < total
            if stop or step == total or step % session.profile.training.checkpoint_every == 0:
                save(session, run_dir, step)
                run_dir.set_status(replace(status, step=step, seconds=clock.total()))
            if stop:
                run_dir.set_status(
                    replace(status, state="interrupted", step=step, reason="stopped on request", seconds=clock.total())
                )
                ended = "interrupted"
                return None
        if start == total:  # stopped between its last checkpoint and its end, or its last score was lost
            try:
                evaluation = run_dir.evaluation(total)
            except DamagedRunError:
                evaluation = _score(session, run_dir, total)
        if session.policy.adapters is not None:
            run_dir.save_adapter(session.policy.adapters.save)
        ended = "complete"
    except BaseException as error:
        resumable = isinstance(error, KeyboardInterrupt) or is_disk_full(error)
        ended = "interrupted" if resumable else "failed"
        reason = f"step {step}: {type(error).__name__}: {error}"
        with suppress(OSError):  # a disk that is full, or gone, must not hide what ended the run
            run_dir.set_status(replace(status, state=ended, step=step, reason=reason, seconds=clock.total()))
        raise
    finally:
        tracker.close(ended)
    run_dir.set_status(replace(status, state="complete", step=total, seconds=clock.total()))
    return evaluation


def _skipped(checkpoint: Checkpoint | None) -> tuple[str, ...]:
    return checkpoint.skipped if checkpoint else ()


def take_step(session: Session, step: int, run_dir: RunDirectory) -> Metrics:
    """One step of the loop (numbered from 1): sample, reward, update; returns what to log."""
    training = session.profile.training
    began = time.perf_counter()
    batch = _sample_batch(session, step)
    session.position += batch.prompts
    sampled = time.perf_counter()
    metrics: Metrics = {
        "step": step,
        "epoch": (step - 1) * session.experiment.epochs // len(session.sigmas),
        "reward": batch.reward,
        "accuracy": batch.accuracy,
        "mixed_groups": batch.mixed_groups,
        "prompts": batch.prompts,
        "response_tokens": batch.response_tokens,
        "truncated": batch.truncated,
        "reward_errors": batch.reward_errors,
        "nonfinite": batch.nonfinite,
        "sigma": session.sigmas[step - 1],
        **layer_sigmas(session, step),
        "learning_rate": session.learning_rate * min(1.0, step / max(1, training.warmup_steps)),
        "trained": batch.teaches,
    }
    if batch.teaches:
        for group in session.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        try:
            metrics |= _update(session, step, batch)
        except NonFiniteLossError:
            session_state = {"step": step, "texts": batch.rollouts.texts, "advantages": batch.advantages.tolist()}
            run_dir.save_diagnostics(f"nonfinite-step-{step:06d}", session_state)
            raise
    ended = time.perf_counter()
    metrics |= {"seconds_rollout": sampled - began, "seconds_update": ended - sampled}
    return metrics


def _sample_batch(session: Session, step: int) -> Batch:
    training, algorithm = session.profile.training, session.algorithm

    def sampler(prompts: Sequence[Problem], first_id: int) -> Rollouts:
        ids = torch.arange(first_id, first_id + len(prompts) * algorithm.group_size)
        return sample(
            session.model,
            session.tokenizer,
            prompts,
            group_size=algorithm.group_size,
            max_new_tokens=training.max_new_tokens,
            temperature=algorithm.temperature,
            top_p=algorithm.top_p,
            top_k=algorithm.top_k,
            key=session.key.fold("rollout", step),
            rollout_ids=ids,
        )

    with aqn_of_step(session, step):
        return collect(session.stream, session.position, sampler, session.task, algorithm, training, session.ranks)


def _update(session: Session, step: int, batch: Batch) -> Metrics:
    """Optimizer steps on one batch; metrics are means over them, the ratio's those of the first minibatch."""
    parts = [(*share_of(session.ranks, part, own), whole) for part, own, whole in _minibatches(session, batch)]
    old = [_before_update(session, step, part, first=i == 0) for i, (part, _, _) in enumerate(parts)]
    outputs: list[LossOutput] = []
    norms: list[float] = []
    entropies: list[float] = []
    for _ in range(session.algorithm.optimizer_epochs):
        for (part, advantages, normalizer), before in zip(parts, old, strict=True):
            output, entropy = _minibatch_loss(session, step, part, advantages, normalizer, before)
            moved = list(session.optimizer.masters.values())
            session.ranks.sum_gradients(moved)
            norm = torch.nn.utils.clip_grad_norm_(moved, session.profile.training.gradient_clip)
            if not (torch.isfinite(output.loss) and torch.isfinite(norm)):
                raise NonFiniteLossError(f"loss {output.loss.item()}, gradient norm {norm.item()}")
            session.optimizer.step()
            session.optimizer.zero_grad(set_to_none=True)
            outputs.append(output)
            norms.append(float(norm))
            entropies.append(entropy)
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


@dataclass(frozen=True, slots=True)
class _Before:
    """Log-probabilities [n, t] of a minibatch before this batch's first update."""

    old: Tensor | None
    reference: Tensor | None
    weights: Tensor | None


def _minibatches(session: Session, batch: Batch) -> list[tuple[Rollouts, Tensor, Tensor]]:
    """Rollouts, their advantages and the normalizer of the loss of each minibatch.

    Whole groups, in the order of the stream (a random one), cut to their own lengths; rollouts whose output was not
    finite are left out. Without KL penalty and entropy bonus a rollout without advantage has no gradient: it counts in
    the normalizer, and no pass is made over it.
    """
    algorithm, training = session.algorithm, session.profile.training
    G, rollouts = algorithm.group_size, batch.rollouts
    numbers = torch.arange(len(batch.advantages), device=batch.advantages.device)
    found = []
    for groups in torch.tensor_split(numbers.view(-1, G), training.minibatches):
        members = groups.flatten()
        members = members[~rollouts.nonfinite[members]]
        normalizer = loss_normalizer(rollouts.response_mask[members], algorithm, training.max_new_tokens)
        if algorithm.kl_coefficient == algorithm.entropy_coefficient == 0:
            teaching = members[batch.advantages[members] != 0]
            members = teaching if len(teaching) else members[:G]  # the optimizer moves on all the same
        found.append((rollouts.select(members), batch.advantages[members], normalizer))
    return [minibatch for minibatch in found if len(minibatch[0])]


def _logprobs(session: Session, model: PreTrainedModel, part: Rollouts, key: Key) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [n, t] of the responses, every matrix product and dropout mask drawn by `key`."""
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


def _before_update(session: Session, step: int, part: Rollouts, first: bool) -> _Before:
    """What the loss compares with; under which noise is the whole point of `Algorithm.ratio`.

    The first minibatch of a step meets the weights of the old policy. With replayed noise its own log-probabilities
    *are* the old ones, bit for bit, so that pass is not made twice.
    """
    algorithm = session.algorithm
    if not len(part):  # more ranks than rollouts
        return _Before(None, None, None)
    key = session.key.fold("update", step)
    old_key = key if algorithm.ratio == "replayed" else key.fold("old")
    same = algorithm.ratio == "one" or (algorithm.ratio == "replayed" and first and algorithm.optimizer_epochs == 1)

    def whole(model: PreTrainedModel) -> Tensor:  # in micro-batches of the update's shapes: other shapes, other bits
        rows = _micro_batches(len(part.texts), session.profile.training.micro_batch)
        return torch.cat([_logprobs(session, model, part.select(r, trim=False), old_key)[0] for r in rows])

    with torch.no_grad():
        old = None if same else whole(session.model)
        with session.reference_policy() as model:
            reference = None if model is None else whole(model)
        weights = None
        if algorithm.ratio == "rollout" and old is not None:
            weights = truncated_weights(old, part.logprobs, part.response_mask, algorithm)
    return _Before(old, reference, weights)


def _minibatch_loss(
    session: Session, step: int, part: Rollouts, advantages: Tensor, normalizer: Tensor, before: _Before
) -> tuple[LossOutput, float]:
    """Loss of one minibatch, summed over its micro-batches and ranks, and the mean entropy (nats).

    Gradients are those of this rank's rollouts; their sum over the ranks is that of the minibatch.
    """
    training, algorithm = session.profile.training, session.algorithm
    outputs: list[LossOutput] = []
    entropy = 0.0
    for rows in _micro_batches(len(advantages), training.micro_batch):
        micro = part.select(rows, trim=False)
        logprobs, entropies = _logprobs(session, session.model, micro, session.key.fold("update", step))
        output = policy_loss(
            logprobs,
            logprobs.detach() if before.old is None else before.old[rows],
            None if before.reference is None else before.reference[rows],
            advantages[rows],
            micro.response_mask,
            algorithm,
            normalizer=normalizer,
            weights=None if before.weights is None else before.weights[rows],
            entropies=entropies,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        session.optimizer.collect()
        outputs.append(replace(output, loss=output.loss.detach()))
        entropy += float(torch.where(micro.response_mask, entropies.detach(), 0.0).sum())
    whole = combine(outputs) if outputs else LossOutput.nothing()
    if session.ranks.count > 1:
        own = [*whole.metrics().values(), entropy]
        ranks = session.ranks.stack(torch.tensor(own, dtype=torch.float64)).unbind()
        whole, entropy = combine([LossOutput(*row[:-1]) for row in ranks]), float(sum(row[-1] for row in ranks))
    return whole, entropy / max(1, int(whole.tokens))


def _micro_batches(count: int, size: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), size or count)) if count else []


def _score(session: Session, run_dir: RunDirectory, step: int) -> Evaluation:
    """Evaluate the model as it is after `step`, and keep every outcome."""
    training = session.profile.training
    evaluation = evaluate(
        session.model,
        session.tokenizer,
        session.task,
        key=session.key,
        max_new_tokens=training.max_new_tokens,
        noise_draws=training.noise_draws,
        noisy=session.experiment.hardware.is_noisy,
        step=step,
        ranks=session.ranks,
    )
    run_dir.write_evaluation(evaluation)
    return evaluation


def _record(
    session: Session, run_dir: RunDirectory, tracker: Tracker, step: int, metrics: Metrics, clock: Clock
) -> Evaluation | None:
    """Evaluate if due (always at step 0 and the last), then log the step."""
    total = len(session.sigmas)
    evaluation = None
    if step in (0, total) or step % session.profile.training.evaluate_every == 0:
        began = time.perf_counter()
        evaluation = _score(session, run_dir, step)
        metrics |= {"deployed": evaluation.deployed, "clean": evaluation.clean}
        metrics["seconds_evaluate"] = time.perf_counter() - began
    metrics |= {"seconds": clock.lap(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    run_dir.append_metrics(metrics)
    tracker.log(step, scalars(metrics))
    return evaluation
