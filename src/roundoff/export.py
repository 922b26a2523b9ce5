"""What `roundoff export` does: the model of a run as a Hugging Face directory, for any tool that reads one."""

from __future__ import annotations

from pathlib import Path

from roundoff.checkpoint import check_origin, load_checkpoint, run_origin, write_directory
from roundoff.config import ConfigError, Hardware
from roundoff.models.load import no_progress_bar
from roundoff.run_dir import Run
from roundoff.session import load_policy, put_weights

MERGED = (
    "the adapters are merged into the weights: quantized hardware rounds the sum, while in the run it rounded the base "
    "alone; the run's adapter/ keeps them apart"
)

ROUNDED = (
    "each sum is rounded to {}, so that the smallest of what the adapters add is lost: the scores of the two differ a "
    "little on plain arithmetic, too"
)


def export(run: Run, out: Path, *, step: int | None = None) -> tuple[str, ...]:
    """Write model and tokenizer after `step` (default: the last saved) to `out`; returns what is worth saying.

    The weights are the run's own in its dtype, neither quantized nor noisy: hardware is not part of a model.

    Raises:
        ConfigError: if `out` is there already, or another run wrote the checkpoint.
        DamagedCheckpointError: if there is no usable checkpoint.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a directory that does not")
    checkpoint = load_checkpoint(run.path / "checkpoints", step)
    check_origin(checkpoint, run_origin(run.experiment, run.profile, run.seed), run.experiment.id)
    plain = run.experiment.model_copy(update={"hardware": Hardware()})
    changes = {"device": "cpu", "chat": "auto"}  # the chat template is a part of what is written out
    policy = load_policy(plain, run.profile.model_copy(update=changes), run.seed)
    put_weights(policy, checkpoint)
    model = policy.model if policy.adapters is None else policy.adapters.merge()

    def fill(directory: Path) -> None:
        with no_progress_bar():
            model.save_pretrained(str(directory))
        policy.loaded.tokenizer.save_pretrained(str(directory))

    write_directory(out, fill)
    said = [f"passed over a damaged checkpoint: {line}" for line in checkpoint.skipped]
    said.append(f"wrote {out}: {run.experiment.id} seed {run.seed} after step {checkpoint.step}")
    if policy.adapters is not None:
        said.append(MERGED + (f"; {ROUNDED.format(run.profile.dtype)}" if run.profile.dtype != "float32" else ""))
    return tuple(said)
