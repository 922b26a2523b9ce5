"""The main job as a user starts it: time, memory, rise of the clean run, equal bits, start-up."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from roundoff.runs.record import find_runs

SEEDS = "0-2"
GOALS = {
    "run quickstart (s)": 360,
    "peak memory (GiB)": 3,
    "rise, every seed (points)": 10,
    "--help (s)": 0.5,
    "list (s)": 1,
}


def timed(*arguments: str, cwd: Path) -> float:
    """Seconds of wall time of one command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "roundoff", *arguments], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def resident_bytes(root: int) -> int:
    """Memory of a process and all its descendants (proportional set size, so that shared pages count once)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text("utf-8").rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family, added = {root}, True
    while added:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        added, family = bool(more), family | more
    total = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measure_quickstart(cwd: Path) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of `roundoff run quickstart`."""
    peak, finished = 0, threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not finished.wait(0.5):
            peak = max(peak, resident_bytes(pid))

    began = time.perf_counter()
    command = [sys.executable, "-m", "roundoff", "run", "quickstart", "--seeds", SEEDS]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=watch, args=(process.pid,))
    watcher.start()
    code = process.wait()
    finished.set()
    watcher.join()
    if code:
        raise SystemExit(f"run quickstart failed with exit code {code}")
    return time.perf_counter() - began, peak / 2**30


def same_bits(first: Path, second: Path) -> bool:
    """Whether every metrics.jsonl of two directories of runs agrees in all but times."""

    def rows(root: Path) -> dict[str, list[dict[str, object]]]:
        return {
            str(path.relative_to(root)): [
                {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("seconds")}
                for line in path.read_text("utf-8").splitlines()
            ]
            for path in sorted(root.rglob("metrics.jsonl"))
        }

    return rows(first) == rows(second) and bool(rows(first))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "first", Path(scratch) / "second"
        first.mkdir()
        second.mkdir()
        seconds, memory = measure_quickstart(first)
        measure_quickstart(second)
        runs, _ = find_runs([first])
        rises = [
            100 * (run.metrics[-1]["deployed"] - run.metrics[0]["deployed"])
            for run in runs
            if run.experiment.id == "quickstart-clean"
        ]
        rows = {
            "run quickstart (s)": seconds,
            "peak memory (GiB)": memory,
            "rise, every seed (points)": min(rises),
            "--help (s)": min(timed("--help", cwd=first) for _ in range(5)),
            "list (s)": min(timed("list", cwd=first) for _ in range(5)),
        }
        print(f"cores: {len(os.sched_getaffinity(0))}\n")
        print("| figure | measured | goal |\n|---|---|---|")
        for name, value in rows.items():
            sign = "at least" if "rise" in name else "under"
            print(f"| {name} | {value:.2f} | {sign} {GOALS[name]} |")
        print(f"| same command twice, same bits apart from times | {same_bits(first, second)} | True |")
        print("\n| run | start | deployed | clean | seconds |\n|---|---|---|---|---|")
        for run in runs:
            at = run.metrics[0]["deployed"], run.metrics[-1]["deployed"], run.metrics[-1]["clean"]
            print(
                f"| {run.experiment.id} seed {run.seed} | "
                + " | ".join(f"{v:.3f}" for v in at)
                + f" | {run.status.seconds:.0f} |"
            )


if __name__ == "__main__":
    main()
