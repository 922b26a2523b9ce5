"""A report over 100 runs of 1,319 problems: time, memory and size of the page."""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tests.simulated import World, experiment, write_run

from roundoff.report.assemble import build_report
from roundoff.report.render import write_report
from roundoff.runs.record import find_runs

ARMS, SEEDS, PROBLEMS = 20, 5, 1319
RESPONSE_CHARACTERS = 900
"""Length of a response; a worked answer to a school problem has about this."""
GOALS = {"report (s)": 20.0, "peak memory (GiB)": 1.0, "report.html (MB)": 5.0}


def write_runs(root: Path) -> None:
    """20 arms of 5 seeds in 4 families: a plain one, hardware of it, and remedies of that."""
    rng, world = np.random.default_rng(0), World()
    difficulty = world.difficulty(rng, PROBLEMS)
    text = " step" * (RESPONSE_CHARACTERS // 5)
    for arm in range(ARMS):
        family, place = divmod(arm, 5)
        settings: dict[str, object] = {"family": f"family-{family}", "title": f"Family {family}, arm {place}"}
        if place:
            settings["baseline"] = f"f{family}-a{0 if place == 1 else 1}"
            settings["hardware"] = {"matmul_noise": {"relative_std": 0.05 + 0.01 * family}}
        if place > 1:
            settings["aqn"] = {"sigma_start": 0.01 * place, "sigma_end": 0.0001}
        deployed, clean = (world.arm(rng, difficulty, SEEDS, effect=e) for e in (-0.1 * place, 0.0))
        for seed in range(SEEDS):
            what = experiment(f"f{family}-a{place}", **settings)
            write_run(root, what, seed, deployed[seed], clean[seed], steps=60, text=text)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_runs(Path(scratch) / "runs")
        began = time.perf_counter()
        runs, skipped = find_runs([Path(scratch) / "runs"])
        report = build_report(runs, skipped)
        write_report(report, Path(scratch) / "out")
        seconds = time.perf_counter() - began
        size = (Path(scratch) / "out" / "report.html").stat().st_size / 1e6
        if len(sys.argv) == 3 and sys.argv[1] == "--keep":
            write_report(report, Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(runs)} runs of {PROBLEMS:,} problems\n\n| figure | measured | goal |\n|---|---|---|")
    for name, value in zip(GOALS, (seconds, peak, size), strict=True):
        print(f"| {name} | {value:.2f} | under {GOALS[name]:g} |")


if __name__ == "__main__":
    main()
