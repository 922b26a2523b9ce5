"""A session written to a checkpoint, and put back from one."""

from __future__ import annotations

from typing import Any

from roundoff.config import ConfigError
from roundoff.runs.checkpoint import Checkpoint, check_origin
from roundoff.runs.directory import RunDirectory
from roundoff.training.policy import check_base, put_weights
from roundoff.training.session import Session


def save(session: Session, run_dir: RunDirectory, step: int) -> None:
    """Save a checkpoint of everything that the next step depends on: weights, optimizer, place in the prompt stream."""
    trained = session.trainable
    tensors = {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": session.optimizer.tensors()}
    state: dict[str, Any] = {"position": session.position, "base": session.policy.base, "problems": session.problems}
    state["run"] = session.origin
    run_dir.save_checkpoint(step, tensors, state, keep=session.profile.training.keep_checkpoints)


def restore(session: Session, checkpoint: Checkpoint) -> int:
    """Restore the content of a checkpoint, bit for bit. Returns its step.

    Raises:
        ConfigError: if the profile's model or the task's problems have changed since the run began, or another run
            wrote the checkpoint.
        DamagedCheckpointError: if the checkpoint holds the weights of another model.
    """
    check_origin(checkpoint, session.origin, session.experiment.id)
    check_base(session.policy, checkpoint)
    if checkpoint.step > session.total_steps:
        raise ConfigError(
            f"there is a checkpoint of step {checkpoint.step}, but this run has {session.total_steps} steps: another "
            "run wrote it; remove it from this run's checkpoints/"
        )
    if checkpoint.state.get("problems", session.problems) != session.problems:
        raise ConfigError(
            f"the problems of task {session.task.name!r}, or how they are asked, have changed since this run began: "
            "bring the old data back to go on, or move the run's directory away to begin again"
        )
    put_weights(session.policy, checkpoint)
    session.optimizer.put(checkpoint.tensors["optimizer"])
    session.position = checkpoint.state["position"]
    return checkpoint.step
