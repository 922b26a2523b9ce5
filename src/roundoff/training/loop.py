"""The only training loop: GRPO and DAPO on the arithmetic of the simulated chip.

One step: draw prompts; sample a group of rollouts of each with the hardware on and AQN in force; reward them; compute
log-probabilities before the update (hardware on, no AQN); take one optimizer step for each minibatch; evaluate and save
when either is due. The test set is scored before the first step and after the last one, whatever the settings.

Where the loop departs from the papers: old log-probabilities are by default evaluated under the noise draws of the
pass they are compared with (`ratio = "replayed"`); a batch with no usable group trains nothing and the run goes on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from roundoff.config import Experiment, Profile
from roundoff.errors import RoundoffWarning
from roundoff.models.device import resolve_device
from roundoff.models.weights import parameters_digest
from roundoff.numerics.backend import computed_by
from roundoff.numerics.torch_state import own_defaults, refuse_autocast
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.checkpoint import Checkpoint
from roundoff.runs.clock import Clock
from roundoff.runs.directory import RunDirectory
from roundoff.runs.files import DiskFullError, is_disk_full
from roundoff.runs.health import FailedRewardsError, NonFiniteOutputError
from roundoff.runs.outcomes import DamagedRunError, Evaluation
from roundoff.sampling.diagnosis import first_nonfinite
from roundoff.sampling.rollouts import Rollouts
from roundoff.sampling.sampler import sample
from roundoff.srdd import LayerScan
from roundoff.tasks import Problem
from roundoff.trackers import Ended, Tracker
from roundoff.training.batch import Batch, collect
from roundoff.training.before_first_step import measure_before
from roundoff.training.preparation import prepare
from roundoff.training.run_log import Metrics, RunLog
from roundoff.training.saving import restore
from roundoff.training.session import Session
from roundoff.training.update import NonFiniteLossError, update

FRUITLESS_STEPS = 3
"""A run stops after so many steps in a row without a rollout to train on, or after all its steps if it has fewer."""


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
    """Make a run, or resume it; the only training loop.

    Args:
        experiment: what is run.
        profile: how big it is.
        seed: the seed of every random number of the run.
        run_dir: the entered directory of this run. A run in it is resumed, and a complete one is returned as it is.
        open_tracker: opens the tracker, given the last step that is not logged again (-1 if there is none).
        provenance: what `provenance.json` records.
        should_stop: called after each step; where it returns True on any rank, the run is saved and left.
        ranks: the processes that make this run together; `run_dir` then writes on the first one alone.

    Returns:
        The evaluation after the last step, or None if the run was stopped before it and can be resumed.

    Raises:
        ConfigError: if the settings do not fit together, before anything is written.
        RuntimeError: under `torch.autocast`.
        DamagedCheckpointError: if there are checkpoints and none of them can be used.
        DiskFullError: if no space is left; the run can be resumed.
        NonFiniteLossError, NonFiniteOutputError: if training diverged, or nothing could be computed to begin with; the
            run is marked failed.
        FailedRewardsError: if the task's reward fails throughout; the run is marked failed.
    """
    refuse_autocast("training", torch.device(resolve_device(profile.device)))
    torch.set_num_threads(profile.threads)
    stored = run_dir.scan()
    scan = None if stored is None else LayerScan.from_json(stored)
    try:
        with own_defaults():
            session = ranks.everywhere(lambda: prepare(experiment, profile, seed, scan=scan, ranks=ranks))
            ranks.agree("the weights of the model", session.policy.base)
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
    """The steps of `train` once the session is ready."""
    total = session.total_steps
    checkpoint = run_dir.load_checkpoint()
    start = restore(session, checkpoint) if checkpoint else 0
    if session.ranks.count > 1 and (checkpoint or session.policy.adapters is not None):
        what = "the weights that are trained" if session.policy.adapters is None else "the weights of the adapters"
        session.ranks.agree(what, parameters_digest(session.trainable.items()))
    lost = [f"passed over a damaged checkpoint: {s}; went on from step {start}" for s in _skipped(checkpoint)]
    for line in lost:
        warnings.warn(line, RoundoffWarning, stacklevel=2)
    kept = start if checkpoint else -1
    run_dir.rewind(kept)
    status = run_dir.start({**provenance, "kernels": computed_by(next(session.model.parameters()))}, total, lost)
    if not checkpoint:
        status = measure_before(session, run_dir, status)
    log = RunLog(session, run_dir, open_tracker(kept), status, Clock(status.seconds))
    step, evaluation = start, None
    ended: Ended = "failed"
    try:
        if not checkpoint:
            evaluation = log.record(0, {"step": 0})
            log.save(0)
        for step in range(start + 1, total + 1):
            evaluation = log.record(step, take_step(session, step, run_dir))
            stop = session.ranks.any(should_stop()) and step < total
            if stop or step == total or step % session.profile.training.checkpoint_every == 0:
                log.save(step)
            if stop:
                log.end("interrupted", step, "stopped on request")
                ended = "interrupted"
                return None
        if start == total:  # it was stopped after its last checkpoint, or its last evaluation was lost
            try:
                evaluation = run_dir.evaluation(total)
            except DamagedRunError:
                evaluation = log.score(total)
        if session.policy.adapters is not None:
            run_dir.save_adapter(session.policy.adapters.save)
        ended = "untrained" if run_dir.health().untrained else "complete"
    except BaseException as error:
        resumable = isinstance(error, KeyboardInterrupt) or is_disk_full(error)
        ended = "interrupted" if resumable else "failed"
        with suppress(OSError):  # a disk that is full, or gone, must not hide what ended the run
            log.end(ended, step, f"step {step}: {type(error).__name__}: {error}")
        raise
    finally:
        log.tracker.close(ended)
    log.end("complete", total)
    return evaluation


def _skipped(checkpoint: Checkpoint | None) -> tuple[str, ...]:
    return checkpoint.skipped if checkpoint else ()


def take_step(session: Session, step: int, run_dir: RunDirectory) -> Metrics:
    """Take one step of the loop (numbered from 1): sample, reward, update. Returns the row to log."""
    training = session.profile.training
    began = time.perf_counter()
    batch = sample_batch(session, step)
    session.position += batch.prompts
    sampled = time.perf_counter()
    aqn = session.aqn.at(step)
    sigma_layers = aqn.by_layer()
    metrics: Metrics = {
        "step": step,
        "epoch": (step - 1) * session.experiment.epochs // session.total_steps,
        "reward": batch.reward,
        "accuracy": batch.accuracy,
        "mixed_groups": batch.mixed_groups,
        "prompts": batch.prompts,
        "response_tokens": batch.response_tokens,
        "truncated": batch.truncated,
        "empty": batch.empty,
        "reward_errors": batch.reward_errors,
        "nonfinite": batch.nonfinite,
        "sigma": aqn.sigma,
        **({} if sigma_layers is None else {"sigma_layers": sigma_layers}),
        "learning_rate": session.learning_rate * min(1.0, step / max(1, training.warmup_steps)),
        "trained": batch.teaches,
    }
    _check_usable(session, step, batch)
    if batch.teaches:
        for group in session.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        try:
            with own_defaults():  # a reward, too, may have changed torch's settings
                metrics |= update(session, step, batch)
        except NonFiniteLossError:
            session_state = {"step": step, "texts": batch.rollouts.texts, "advantages": batch.advantages.tolist()}
            run_dir.save_diagnostics(f"nonfinite-step-{step:06d}", session_state)
            raise
    ended = time.perf_counter()
    metrics |= {"seconds_rollout": sampled - began, "seconds_update": ended - sampled}
    return metrics


def _check_usable(session: Session, step: int, batch: Batch) -> None:
    """Stop a run that has gone `FRUITLESS_STEPS` in a row without a rollout that it could train on.

    Raises:
        NonFiniteOutputError: if no rollout could be computed; the message names the first module.
        FailedRewardsError: if the reward of every rollout failed.
    """
    failed = batch.sampled in (batch.nonfinite, batch.reward_errors)
    session.fruitless_steps = session.fruitless_steps + 1 if failed else 0
    if not failed or session.fruitless_steps < min(FRUITLESS_STEPS, session.total_steps):
        return
    steps = f"{session.fruitless_steps} step{'s' if session.fruitless_steps > 1 else ''} in a row"
    if batch.nonfinite == batch.sampled:
        with session.aqn.in_force(session.model, step, session.key):
            where = first_nonfinite(session.model, batch.rollouts)
        raise NonFiniteOutputError(
            f"no rollout of {steps} could be computed: the logits were not finite, first in {where}. Nothing can be "
            "trained: take a format of a wider range, keep that layer in high precision (hardware.precision.keep), or "
            "lower aqn.sigma_start"
        )
    raise FailedRewardsError(
        f"the reward of task {session.task.name!r} failed for every rollout of {steps} (it raised, or gave no finite "
        "number), so that there is nothing to train on: try task.reward on one response"
    )


def sample_batch(session: Session, step: int) -> Batch:
    """Sample the batch of a step (numbered from 1) with AQN in force."""
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

    with session.aqn.in_force(session.model, step, session.key):
        return collect(session.stream, session.position, sampler, session.task, algorithm, training, session.ranks)
