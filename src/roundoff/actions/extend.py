"""What `roundoff extend` does: takes a complete run further, as a new run that names it; the first is only read.

The new run begins with copies of the first one's metrics, evaluations and last checkpoint, and goes on like a run that
was stopped there: same seed, next prompts, optimizer state and noise keys. So it equals a longer run from scratch to
the bit, except where a setting depends on the length of the whole run: AQN's sigma and zones (`differences`
says whether they do), and the step at which the first run ended, which is evaluated whatever `evaluate_every` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundoff.aqn.schedule import sigma_curve
from roundoff.config import ConfigError, Experiment
from roundoff.runs.checkpoint import check_origin, load_checkpoint, run_origin
from roundoff.runs.directory import RunDirectory, checkpoint_checksums, run_path
from roundoff.runs.record import Run, read_run


def extended(experiment: Experiment, epochs: int) -> Experiment:
    """The experiment with more epochs, under an id that says where it began (`name+epochs=1to2`).

    Its baseline is extended alike: a longer run is compared with a longer one.

    Raises:
        ConfigError: if that is not more.
    """
    if epochs <= experiment.epochs:
        raise ConfigError(f"--epochs must be above the {experiment.epochs} of {experiment.id}, but is {epochs}")

    def name(old: str) -> str:
        chain = re.search(rf"\+epochs=(\d+to)*{experiment.epochs}$", old)
        return f"{old}to{epochs}" if chain else f"{old}+epochs={experiment.epochs}to{epochs}"

    baseline = name(experiment.baseline) if experiment.baseline else None
    return experiment.model_copy(update={"id": name(experiment.id), "baseline": baseline, "epochs": epochs})


def begin_extension(parent: Run, epochs: int, provenance: Mapping[str, Any]) -> tuple[Experiment, Path]:
    """Make the new run's directory beside the parent's if it is not there; returns its experiment and its root.

    Raises:
        ConfigError: if the parent is not complete, has as many epochs already, has changed since it was extended, or
            holds a checkpoint of another run.
        DamagedCheckpointError: if the parent's last checkpoint cannot be used.
    """
    if not parent.is_final:
        raise ConfigError(f"{parent.path} is {parent.status.state}, not complete: finish it before extending it")
    experiment = extended(parent.experiment, epochs)
    last = load_checkpoint(parent.path / "checkpoints", parent.status.total_steps)
    check_origin(last, run_origin(parent.experiment, parent.profile, parent.seed), parent.experiment.id)
    root = _root(parent.path)
    path = run_path(root, experiment, parent.profile, parent.seed)
    if (path / "status.json").exists():
        _check_parent(path, parent)
    else:
        total = parent.status.total_steps // parent.experiment.epochs * epochs
        with RunDirectory(root, experiment, parent.profile, parent.seed) as directory:
            directory.take_over(parent, provenance, total)
    return experiment, root


def _root(path: Path) -> Path:
    """The directory of all runs that the run in `path`, `<root>/<experiment>/<profile>-<hash>/seed-<n>`, lies in."""
    whole = len(path.parts) > 3 and ".." not in path.parts[-3:]  # else it begins inside of the root
    return (path if whole else path.resolve()).parents[2]


def _check_parent(path: Path, parent: Run) -> None:
    """Raise if the run in `path` began from another parent than this, or from one that has changed since."""
    origin = read_run(path).provenance.get("parent")
    if origin is None or origin["checksums"] != checkpoint_checksums(parent):
        began = (
            "was not begun as an extension" if origin is None else f"began with other weights than {parent.path} has"
        )
        raise ConfigError(f"{path} {began}: move it away to extend the run as it is now")


def differences(parent: Run, epochs: int) -> str | None:
    """How the extended run differs from one of `epochs` epochs from scratch; None if in nothing."""
    aqn, done = parent.experiment.aqn, parent.status.total_steps
    if aqn is None:
        return None
    per_epoch = done // parent.experiment.epochs
    made = sigma_curve(done, per_epoch, aqn)
    scratch = sigma_curve(per_epoch * epochs, per_epoch, aqn)
    where = f"{parent.experiment.id} seed {parent.seed}"
    if made == scratch[:done]:
        moved = f"{where}: the zones of AQN changed places in the middle of {done} steps, not of {len(scratch)}"
        return moved if aqn.layers == "zone" else None
    return (
        f"{where}: steps 1 to {done} had the sigma of a run of "
        f"{parent.experiment.epochs} epochs (to {made[-1]:.2g}); steps {done + 1} to {len(scratch)} have that of one "
        f"of {epochs} ({scratch[done]:.2g}, at most {max(scratch[done:]):.2g}, then down to {scratch[-1]:.2g})"
    )
