"""Samples per second of one run on two ranks, on two cores, beside one rank pinned to one core.

The processes are started in turn, several times. Beside the wall, the processor time of the busiest rank is given: what
the wall would show if no other process ran on these cores and no rank ever waited for another.
"""

import json
import os
import statistics
import subprocess
import sys
import time

GOAL = 1.6
ROUNDS, WARM, STEPS = 3, 1, 5
CASES = ("quickstart-clean", "quickstart-mxfp4")


def measure(name: str) -> None:
    """Body of a rank: print the seconds of each step, on the wall and of the busiest processor."""
    from roundoff.experiments import load_experiment, load_profile
    from roundoff.parallel import joined
    from roundoff.session import prepare
    from roundoff.train import take_step

    experiment, profile = load_experiment(name), load_profile("tiny")
    with joined("cpu") as ranks:
        session = prepare(experiment, profile, 0)
        session.ranks = ranks
        wall, busy = [], []
        for step in range(1, WARM + STEPS + 1):
            ranks.gather(None)  # begin together
            began, worked = time.perf_counter(), time.process_time()
            take_step(session, step, None)  # type: ignore[arg-type]  (written only where the loss is not finite)
            wall.append(max(ranks.gather(time.perf_counter() - began)))
            busy.append(max(ranks.gather(time.process_time() - worked)))
        if ranks.leads:
            print(json.dumps({"wall": wall[WARM:], "busy": busy[WARM:]}))


def launch(name: str, cores: list[int]) -> dict[str, float]:
    """Median seconds of a step with as many ranks as cores."""
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", str(len(cores)), "-m", "benchmarks.parallel", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {kind: statistics.median(values) for kind, values in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    print(f"load before: {os.getloadavg()[0]:.1f}\n")
    print("| run | rollouts a step | 1 rank, samples/s | 2 ranks | ratio | ratio of processor time | goal |")
    print("|---|---|---|---|---|---|---|")
    for name in CASES:
        found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for count in found:
                found[count].append(launch(name, cores[:count]))
        best = {
            count: {kind: statistics.median(row[kind] for row in rows) for kind in ("wall", "busy")}
            for count, rows in found.items()
        }
        from roundoff.experiments import load_experiment, load_profile

        samples = load_profile("tiny").training.prompts_per_step * load_experiment(name).algorithm.group_size
        one, two = (samples / best[count]["wall"] for count in (1, 2))
        busy = best[1]["busy"] / best[2]["busy"]
        print(f"| {name} | {samples} | {one:.0f} | {two:.0f} | {two / one:.2f} | {busy:.2f} | at least {GOAL} |")
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    measure(sys.argv[1])
