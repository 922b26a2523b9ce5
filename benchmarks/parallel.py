"""Samples per second of one run on two ranks, on two cores, beside one rank pinned to one core.

Between them stands what the machine has to give: two runs of one rank at once, one pinned to each core, that never wait
for each other. The processes are started in turn, several times. Set ROUNDOFF_BENCHMARK_MODEL to the directory of a
model to measure it, too (adapters on arithmetic chains); `make real` leaves SmolLM2-135M-Instruct in build/real/model.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.overhead import DEFAULT
from benchmarks.srdd import MODEL_VARIABLE
from roundoff.config import Profile
from roundoff.experiments import load_experiment, load_profile

GOAL = 1.6


@dataclass(frozen=True)
class Case:
    """One run that is measured."""

    experiment: str
    rounds: int
    steps: int
    """Measured, after one that is not."""
    real: bool = False
    """On the real model, with a batch that fits its size."""

    def profile(self) -> Profile:
        """What its runs are made on."""
        tiny = load_profile("tiny")
        if not self.real:
            return tiny
        training = tiny.training.model_copy(
            update={"prompts_per_step": 4, "minibatches": 1, "micro_batch": 32, "max_prompt_tokens": 64}
        )
        return tiny.model_copy(update={"model": os.environ.get(MODEL_VARIABLE, DEFAULT), "training": training})

    @property
    def samples(self) -> int:
        """Rollouts of a step."""
        return self.profile().training.prompts_per_step * load_experiment(self.experiment).algorithm.group_size


CASES = {
    "quickstart-clean": Case("quickstart-clean", rounds=3, steps=20),
    "quickstart-mxfp4": Case("quickstart-mxfp4", rounds=3, steps=20),
    "quickstart-noise": Case("quickstart-noise", rounds=3, steps=8),
    "E7a (LoRA), real model": Case("E7a", rounds=2, steps=2, real=True),
}


def measure(name: str) -> None:
    """Body of a rank: the first prints the samples per second of the median step."""
    from roundoff.parallel.ranks import joined
    from roundoff.training.loop import take_step
    from roundoff.training.preparation import prepare

    case = CASES[name]
    with joined("cpu") as ranks:
        session = prepare(load_experiment(case.experiment), case.profile(), 0)
        session.ranks = ranks
        seconds = []
        for step in range(1, case.steps + 2):
            ranks.gather(None)  # begin together
            began = time.perf_counter()
            if not take_step(session, step, None)["trained"]:  # type: ignore[arg-type]  (written to if training fails)
                raise SystemExit(f"{name}: step {step} had nothing to train on")
            seconds.append(max(ranks.gather(time.perf_counter() - began)))
        if ranks.leads:
            print(json.dumps(case.samples / statistics.median(seconds[1:])))


def start(name: str, cores: list[int]) -> subprocess.Popen[str]:
    """A run with as many ranks as cores."""
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", str(len(cores)), "-m", "benchmarks.parallel", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    )  # waited for in `rate`


def rate(runs: list[subprocess.Popen[str]]) -> float:
    """Samples per second of runs that were started at once, together."""
    found = 0.0
    for run in runs:
        output, errors = run.communicate()
        if run.returncode:
            raise SystemExit(errors)
        found += json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    print(f"load before: {os.getloadavg()[0]:.1f}\n")
    print("| run | rollouts a step | 1 rank, samples/s | two such runs at once | 2 ranks | 2 ranks / 1 rank | goal |")
    print("|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if case.real and not Path(case.profile().model).is_dir():
            print(f"(no {case.profile().model}: run `make real`, or set {MODEL_VARIABLE})", file=sys.stderr)
            continue
        turns = []
        for _ in range(case.rounds):
            alone = rate([start(name, cores[:1])])
            apart = rate([start(name, [core]) for core in cores])
            turns.append((alone, apart, rate([start(name, cores)])))
        alone, apart, two = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = f"{apart:.3g} ({apart / alone:.2f} x) | {two:.3g} | {two / alone:.2f}"
        print(f"| {name} | {case.samples} | {alone:.3g} | {ratios} | at least {GOAL} |", flush=True)
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    measure(sys.argv[1])
