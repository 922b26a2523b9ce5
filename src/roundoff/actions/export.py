"""What `roundoff export` does: writes a run's model as a Hugging Face directory, for any tool that reads one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundoff.config import ConfigError, Experiment, Hardware, Profile, validate
from roundoff.models.load import no_progress_bar
from roundoff.runs.checkpoint import check_origin, load_checkpoint, run_origin
from roundoff.runs.files import write_directory
from roundoff.runs.record import Run
from roundoff.srdd import LayerScan, resolve_keep
from roundoff.training.policy import load_policy, put_weights

ORIGIN = "roundoff.json"
"""File in an exported directory that names the run it came from."""
MERGED = (
    "the adapters are merged into the weights: quantized hardware rounds the sum, while in the run it rounded the base "
    "alone; the run's adapter/ keeps them apart"
)
"""Printed after an export with adapters."""
ROUNDED = (
    "each sum is rounded to {}, so that the smallest of what the adapters add is lost: the scores of the two differ a "
    "little on plain arithmetic, too"
)
"""Added to that in a dtype below float32."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The run that an exported model came from."""

    experiment: Experiment
    profile: Profile
    seed: int
    step: int
    """Training steps that the model has taken."""


def read_origin(directory: Path) -> Origin:
    """The run that an exported model came from.

    Raises:
        ConfigError: if the file that names it cannot be read.
    """
    path = directory / ORIGIN
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        experiment, profile = content["experiment"], content["profile"]
        seed, step = int(content["seed"]), int(content["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not as `roundoff export` writes it ({error}): export again") from None
    return Origin(
        validate(Experiment, experiment, source=str(path)), validate(Profile, profile, source=str(path)), seed, step
    )


def export(run: Run, out: Path, *, step: int | None = None) -> tuple[str, ...]:
    """Write model and tokenizer after `step` (default: the last checkpoint) to `out`; returns lines to print.

    The weights are the run's own in its dtype, neither quantized nor noisy, because hardware is not part of a model.

    Raises:
        ConfigError: if `out` exists, or another run wrote the checkpoint.
        DamagedCheckpointError: if there is no usable checkpoint.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a directory that does not")
    checkpoint = load_checkpoint(run.path / "checkpoints", step)
    check_origin(checkpoint, run_origin(run.experiment, run.profile, run.seed), run.experiment.id)
    plain = run.experiment.model_copy(update={"hardware": Hardware()})
    changes = {"device": "cpu", "chat": "auto"}  # the tokenizer is written with its chat template
    policy = load_policy(plain, run.profile.model_copy(update=changes), run.seed)
    put_weights(policy, checkpoint)
    model = policy.model if policy.adapters is None else policy.adapters.merge()

    def fill(directory: Path) -> None:
        with no_progress_bar():
            model.save_pretrained(str(directory))
        policy.loaded.tokenizer.save_pretrained(str(directory))
        (directory / ORIGIN).write_text(json.dumps(_origin(run, checkpoint.step), indent=1) + "\n", encoding="utf-8")

    write_directory(out, fill)
    lines = [f"passed over a damaged checkpoint: {line}" for line in checkpoint.skipped]
    lines.append(f"wrote {out}: {run.experiment.id} seed {run.seed} after step {checkpoint.step}")
    if policy.adapters is not None:
        lines.append(MERGED + (f"; {ROUNDED.format(run.profile.dtype)}" if run.profile.dtype != "float32" else ""))
    return tuple(lines)


def _origin(run: Run, step: int) -> dict[str, Any]:
    """What `read_origin` reads. The layers that the run's scan chose are written out, as the scan is not exported."""
    experiment = run.experiment
    if run.scan is not None:
        hardware = resolve_keep(experiment.hardware, LayerScan.from_json(run.scan))
        experiment = experiment.model_copy(update={"hardware": hardware, "aqn": None, "srdd": None})
    return {
        "experiment": experiment.model_dump(mode="json", exclude_none=True),
        "profile": run.profile.model_dump(mode="json", exclude_none=True),
        "seed": run.seed,
        "step": step,
    }
