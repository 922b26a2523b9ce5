"""What `roundoff extend` does: trains a complete run further, as a new run that names it; the first is only read.

The new run begins with copies of the first one's metrics, evaluations and last checkpoint, and continues like a run
that was stopped there: same seed, next prompts, same optimizer state and noise keys. It therefore equals a longer run
from scratch to the bit, with two exceptions: settings that depend on the length of the whole run, which are AQN's sigma
and zones (`differences` says whether they differ), and the step at which the first run ended, which is evaluated
whatever `evaluate_every` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roundoff.aqn.schedule import sigma_curve
from roundoff.config import ConfigError, Experiment
from roundoff.launch.request import RunRequest
from roundoff.runs.checkpoint import check_origin, load_checkpoint, run_origin
from roundoff.runs.directory import RunDirectory, checkpoint_checksums, run_path
from roundoff.runs.provenance import provenance
from roundoff.runs.record import Run, find_runs, read_run
from roundoff.trackers import WandbSettings


def runs_to_extend(paths: Sequence[Path]) -> list[Run]:
    """Every run in or below `paths`.

    Raises:
        ConfigError: if there is none, or one cannot be read.
    """
    parents, skipped = find_runs(paths)
    if not parents or skipped:
        raise ConfigError("\n".join(skipped) or f"there is no run in {', '.join(map(str, paths))}")
    return parents


def extension_requests(
    parents: Sequence[Run], epochs: int, tracker: str, wandb: WandbSettings
) -> tuple[list[RunRequest], list[str]]:
    """Begin the extension of each run; returns what to make, and how those differ from runs from scratch.

    Raises:
        ConfigError: if a run cannot be extended (see `begin_extension`).
    """
    source = provenance()
    requests = []
    for parent in parents:
        experiment, root = begin_extension(parent, epochs, source)
        requests.append(RunRequest(experiment, parent.profile, parent.seed, root, source, tracker, wandb))
    return requests, [text for parent in parents if (text := differences(parent, epochs)) is not None]


def extended(experiment: Experiment, epochs: int) -> Experiment:
    """The experiment with more epochs, under an id and a title that say where it began (`name+epochs=1to2`).

    Its baseline is extended too, so that a longer run is compared with a longer one.

    Raises:
        ConfigError: if `epochs` is not above the experiment's own.
    """
    before = experiment.epochs
    if epochs <= before:
        raise ConfigError(f"--epochs must be above the {before} of {experiment.id}, but is {epochs}")

    def name(old: str) -> str:
        chain = re.search(rf"\+epochs=(\d+to)*{before}$", old)
        return f"{old}to{epochs}" if chain else f"{old}+epochs={before}to{epochs}"

    baseline = name(experiment.baseline) if experiment.baseline else None
    title = re.sub(rf" \((\d+ to )+{before} epochs\)$", "", experiment.title)
    if title:
        steps = name(experiment.id).rpartition("=")[2].replace("to", " to ")
        title += f" ({steps} epochs)"
    changes = {"id": name(experiment.id), "title": title, "baseline": baseline, "epochs": epochs}
    return experiment.model_copy(update=changes)


def begin_extension(parent: Run, epochs: int, provenance: Mapping[str, Any]) -> tuple[Experiment, Path]:
    """Make the new run's directory beside the parent's unless it is there; returns its experiment and its root.

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
    root = runs_root(parent.path)
    path = run_path(root, experiment, parent.profile, parent.seed)
    if (path / "status.json").exists():
        _check_parent(path, parent)
    else:
        total = parent.status.total_steps // parent.experiment.epochs * epochs
        with RunDirectory(root, experiment, parent.profile, parent.seed) as directory:
            directory.take_over(parent, provenance, total)
    return experiment, root


def runs_root(path: Path) -> Path:
    """The directory of all runs above the run in `path`, which is `<root>/<experiment>/<profile>-<hash>/seed-<n>`."""
    begins_above_root = len(path.parts) > 3 and ".." not in path.parts[-3:]
    return (path if begins_above_root else path.resolve()).parents[2]


def _check_parent(path: Path, parent: Run) -> None:
    """Raise if the run in `path` began from another parent than this, or from one that has changed since."""
    origin = read_run(path).provenance.get("parent")
    if origin is None or origin["checksums"] != checkpoint_checksums(parent):
        began = (
            "was not begun as an extension" if origin is None else f"began with other weights than {parent.path} has"
        )
        raise ConfigError(f"{path} {began}: move it away to extend the run as it is now")


def differences(parent: Run, epochs: int) -> str | None:
    """How the extended run differs from one of `epochs` epochs from scratch; None if it does not."""
    aqn, done, epochs_before = parent.experiment.aqn, parent.status.total_steps, parent.experiment.epochs
    if aqn is None:
        return None
    per_epoch = done // epochs_before
    taken = sigma_curve(done, per_epoch, aqn)
    scratch = sigma_curve(per_epoch * epochs, per_epoch, aqn)
    where = f"{parent.experiment.id} seed {parent.seed}"
    if taken == scratch[:done]:
        moved = f"{where}: the zones of AQN changed places in the middle of {done} steps, not of {len(scratch)}"
        return moved if aqn.layers == "zone" else None
    short_run = f"{epochs_before} epoch{'s' if epochs_before > 1 else ''}"
    return (
        f"{where}: steps 1 to {done} had the sigma of a run of {short_run} (to {taken[-1]:.2g}); steps {done + 1} to "
        f"{len(scratch)} have that of one of {epochs} ({scratch[done]:.2g}, at most {max(scratch[done:]):.2g}, then "
        f"down to {scratch[-1]:.2g})"
    )
