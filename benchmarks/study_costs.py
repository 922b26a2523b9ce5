"""What each arm of the studies costs: time of a whole training step of `tiny` beside that of its baseline.

`python -m benchmarks study_costs` measures the families `remedies` and `mismatch`. The arms of one hardware take their
steps in turns, in one process and on one thread: rollouts, rewards, update. Times are for each prompt, because some
arms take two small steps where others take one. The learning rate is too small to change what the model writes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.mismatch_study import HARDWARE as ROLLOUTS
from benchmarks.remedies_study import HARDWARE
from roundoff.config import Experiment, Profile
from roundoff.experiments import families, load_experiment, load_profile
from roundoff.formats.table import get_format
from roundoff.runs.directory import RunDirectory
from roundoff.training.loop import take_step
from roundoff.training.preparation import prepare

PROMPTS, STEPS, WARM_UP = 32, 9, 2
LEARNING_RATE = 1e-7


def small_profile() -> Profile:
    """The profile `tiny` with smaller batches."""
    base = load_profile("tiny")
    task = base.task.model_copy(update={"settings": {**base.task.settings, "train_problems": 32 * PROMPTS}})
    changes = {"prompts_per_step": PROMPTS, "learning_rate": LEARNING_RATE}
    return base.model_copy(update={"task": task, "training": base.training.model_copy(update=changes)})


def seconds_of(experiments: list[Experiment]) -> dict[str, float]:
    """Median time of a step of each experiment, by id (seconds of the thread for each prompt)."""
    profile = small_profile()
    sessions = {e.id: prepare(e.model_copy(update={"epochs": 100}), profile, 0) for e in experiments}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    with tempfile.TemporaryDirectory() as directory:
        for step in range(1, STEPS + WARM_UP + 1):
            for name, session in sessions.items():
                began = time.thread_time()
                where = RunDirectory(Path(directory), session.experiment, session.profile, 0)
                metrics = take_step(session, step, where)
                if step > WARM_UP:
                    times[name].append((time.thread_time() - began) / float(metrics["prompts"]))
    return {name: statistics.median(values) for name, values in times.items()}


def weight_bits(experiment: Experiment) -> str:
    """Bits that a quantized weight takes in rollouts, and how many layers have none."""
    precision = experiment.hardware.of("rollout").precision
    if precision.weight is None:
        return "32"
    kept = f", {precision.keep} kept" if precision.keep else ""
    return f"{get_format(precision.weight).bits:g}{kept}"


def rows(family: str, hardware: str) -> Iterator[str]:
    """The table of one hardware."""
    prefix = f"{family}-{hardware}"
    ids = [name for name in families()[family] if name == prefix or name.startswith(f"{prefix}-")]
    experiments = [load_experiment(name) for name in ids]
    times = seconds_of([load_experiment(f"{family}-clean"), *experiments])
    clean = times[f"{family}-clean"]
    for experiment in experiments:
        base = times[experiment.baseline or experiment.id]
        mine = times[experiment.id]
        yield (
            f"| `{experiment.id}` | {weight_bits(experiment)} | {mine / base:.2f} | `{experiment.baseline}` | "
            f"{mine / clean:.2f} |"
        )


def main() -> None:
    """Print a table for each family."""
    torch.set_num_threads(1)
    for family, hardwares in (("remedies", HARDWARE), ("mismatch", ROLLOUTS)):
        print("| id | bits of a weight | x the step of | | x plain |\n|---|---|---|---|---|")
        for hardware in hardwares:
            for line in rows(family, hardware):
                print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
