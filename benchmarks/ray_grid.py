"""Eight short runs on a Ray cluster of this machine beside the same eight as local processes, two at a time.

Start-up ends when both workers have a run whose status is written: until then Ray starts its servers and two processes,
and all import torch. Both ways are taken in turn; runs must come out with the same bits.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from roundoff.experiments import load_experiment, load_profile
from roundoff.launch.local import run_grid
from roundoff.launch.ray.cluster import RayOptions
from roundoff.launch.ray.grid import run_on_ray
from roundoff.launch.request import Job, RunRequest
from roundoff.runs.record import read_metrics

GOAL = 1.10
ROUNDS, WORKERS, SEEDS = 3, 2, 8


def requests_in(root: Path) -> list[RunRequest]:
    """Eight runs of ten steps."""
    profile = load_profile("tiny")
    settings = {**profile.task.settings, "train_problems": 640, "test_problems": 256}
    task = profile.task.model_copy(update={"settings": settings})
    profile = profile.model_copy(update={"name": "short", "task": task})
    experiment = load_experiment("quickstart-clean")
    return [RunRequest(experiment, profile, seed, root, {}, tracker="none") for seed in range(SEEDS)]


def timed(way: str, root: Path) -> dict[str, float]:
    """Seconds of start-up, of the rest, and of steps on each of the two workers."""
    requests = requests_in(root)
    started: list[float] = []

    def watch(jobs: Sequence[Job]) -> None:
        if not started and len(list(root.glob("*/*/*/status.json"))) >= WORKERS:
            started.append(time.perf_counter())

    began = time.perf_counter()
    if way == "ray":
        jobs = run_on_ray(requests, RayOptions(), workers=WORKERS, watch=watch)
    else:
        jobs = run_grid(requests, workers=WORKERS, watch=watch)
    ended = time.perf_counter()
    if any(job.phase != "complete" for job in jobs):
        raise SystemExit(f"{way}: {[(job.phase, job.message) for job in jobs]}")
    made = [sum(row["seconds"] for row in read_metrics(request.path)) for request in requests]
    return {"start": started[0] - began, "rest": ended - started[0], "in steps": sum(made) / WORKERS}


def rows(root: Path) -> list[list[dict[str, object]]]:
    """Metrics of every run without times."""
    return [
        [
            {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("seconds")}
            for line in path.read_text("utf-8").splitlines()
        ]
        for path in sorted(root.rglob("metrics.jsonl"))
    ]


def main() -> None:
    print(f"load before: {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}
        for turn in range(ROUNDS):
            for way, times in found.items():
                times.append(timed(way, Path(scratch) / f"{way}-{turn}"))
                shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times[-1].items())
                print(f"{way}, turn {turn + 1}: {shown}", flush=True)
        same = rows(Path(scratch) / "local-0") == rows(Path(scratch) / "ray-0")
    middle = {w: {k: statistics.median(t[k] for t in times) for k in times[0]} for w, times in found.items()}
    print("\n| way | start-up (s) | eight runs after it (s) | of which in steps, a worker (s) |")
    print("|---|---|---|---|")
    for way, times in middle.items():
        print(f"| {way} | {times['start']:.1f} | {times['rest']:.1f} | {times['in steps']:.1f} |")
    ratio = middle["ray"]["rest"] / middle["local"]["rest"]
    print(f"\nRay / local after start-up: {ratio:.2f} (goal: at most {GOAL}); the same bits: {same}")
    outside = {way: times["rest"] - times["in steps"] for way, times in middle.items()}
    print(f"time outside of steps after start-up, a worker: local {outside['local']:.1f} s, Ray {outside['ray']:.1f} s")
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
