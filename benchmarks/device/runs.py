"""Parts d and e: whole runs by the public command, on the device.

Part d makes runs of the quickstart on the device and on the CPU, with the same seed. Before training both score the
same weights, so the scores are nearly equal; after it they have gone different ways, and only their level compares.
Part e kills a run with SIGKILL halfway, resumes it, and compares all that it left with what two undisturbed runs left.
Those two tell a device that does not repeat itself from a resumption that is at fault.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.device.machine import Device
from benchmarks.device.results import FAILED, MISSED, REACHED, Results
from roundoff.runs.record import Run, find_runs

EXPERIMENTS = ("quickstart-clean", "quickstart-mxfp4", "quickstart-noise")
KILLED = "quickstart-noise"
SIZE = {
    "profile.task.settings.train_problems": 1280,
    "profile.task.settings.test_problems": 512,
    "profile.training.evaluate_every": 10,
    "profile.training.checkpoint_every": 4,
}
"""Of the runs of part d: 20 steps, half of the quickstart."""
SMALL = {**SIZE, "profile.task.settings.train_problems": 128, "profile.task.settings.test_problems": 64}
SHORT = {**SIZE, "profile.task.settings.train_problems": 768, "profile.task.settings.test_problems": 128}
"""Of the runs of part e: 12 steps."""
SMALL_SHORT = {
    **SHORT,
    "profile.task.settings.train_problems": 64,
    "profile.task.settings.test_problems": 16,
    "profile.training.prompts_per_step": 8,
    "profile.training.checkpoint_every": 3,
}
START_BOUND, END_BOUND = 2.0, 10.0
"""Points by which the scores of both devices may differ before and after training. Of 512 problems about one in a
hundred has a token within rounding of another; seeds of the quickstart differ by 3 points at its end, and half as many
problems and steps are noisier."""


class Command:
    """`roundoff run` in processes of its own, which end with it."""

    def __init__(self, root: Path, names: tuple[str, ...], device: str, settings: dict[str, int]) -> None:
        assignments = {**settings, "profile.device": device}
        sets = [word for path, value in assignments.items() for word in ("--set", f"{path}={value}")]
        command = [sys.executable, "-m", "roundoff", "run", *names, "--seeds", "0", "--runs", str(root)]
        command += ["--tracker", "none", "--workers", str(len(names)), *sets]
        self.root = root
        self.began = time.monotonic()
        self._log = root.with_suffix(".log").open("ab+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()

    @property
    def has_ended(self) -> bool:
        """Whether the command has returned."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> float:
        """Wait for the end; returns the seconds that it took.

        Raises:
            RuntimeError: if it fails or takes longer; the message ends with what it said.
        """
        try:
            code = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"it did not end within {seconds:.0f} s; {self.said()}") from None
        if code:
            raise RuntimeError(f"it ended with exit code {code}; {self.said()}")
        return time.monotonic() - self.began

    def kill(self) -> None:
        """SIGKILL to the command and to every process that it started."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def said(self) -> str:
        """The end of what it printed, in one line."""
        self._log.seek(0)
        return "it said: " + " ".join(self._log.read().decode("utf-8", "replace").split())[-200:]


def runs_of(root: Path) -> dict[str, Run]:
    """The runs in a directory, by experiment."""
    return {run.experiment.id: run for run in find_runs([root])[0]}


def scores(run: Run, row: int) -> tuple[float, float]:
    """Deployed and clean score of an evaluated step (percent): the first for 0, the last for -1."""
    found = [step for step in run.metrics if "deployed" in step][row]
    return 100 * found["deployed"], 100 * found["clean"]


def quickstart(device: Device, results: Results, *, small: bool) -> None:
    """Part d."""
    size = SMALL if small else SIZE
    with tempfile.TemporaryDirectory() as scratch, results.attempt("quickstart", device):
        here, there = Path(scratch) / "cpu", Path(scratch) / "device"
        with Command(here, EXPERIMENTS, "cpu", size) as ours, Command(there, EXPERIMENTS, device.name, size) as theirs:
            taken = theirs.wait(results.seconds_left()), ours.wait(results.seconds_left())
        both = runs_of(here), runs_of(there)
        for name in EXPERIMENTS:
            compare(results, name, *(found[name] for found in both))
        results.shown(
            "quickstart, 3 runs at a time beside the other parts",
            f"{device.name} {taken[0]:.0f} s, cpu {taken[1]:.0f} s",
        )


def compare(results: Results, name: str, here: Run, there: Run) -> None:
    """Write the scores of one experiment on both devices, before and after training."""
    for when, row, bound in (("before training", 0, START_BOUND), ("at the end", -1, END_BOUND)):
        ours, theirs = scores(here, row), scores(there, row)
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        shown = f"deployed {theirs[0]:.1f} % (cpu {ours[0]:.1f}), clean {theirs[1]:.1f} % (cpu {ours[1]:.1f})"
        verdict = REACHED if apart <= bound else MISSED
        results.row(f"{name} {when}", shown, f"<= {bound:g} points apart", verdict, device=theirs, cpu=ours)
    kernels = there.provenance.get("kernels")
    results.shown(f"{name}, steps", f"{there.status.step} of {there.status.total_steps}, by {kernels}")


def left_by(root: Path) -> dict[str, object]:
    """All that the runs in a directory left, without times: metrics by step, evaluations and checkpoints as bytes."""
    left: dict[str, object] = {}
    for path in sorted(root.rglob("metrics.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            timeless = {k: v for k, v in row.items() if k != "time" and not k.startswith("seconds")}
            left[f"metrics of step {row['step']:03d}"] = timeless
    for folder in ("evaluations", "checkpoints"):
        for path in sorted(root.rglob(f"{folder}/**/*")):
            if path.is_file():
                left[f"{folder}/{path.relative_to(next(root.rglob(folder)))}"] = path.read_bytes()
    return left


def differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Names of what only one of them left, or which differs."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def lines_of_metrics(root: Path) -> int:
    """Steps logged so far."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in root.rglob("metrics.jsonl"))


def kill_halfway(command: Command, steps: int, seconds: float) -> int:
    """SIGKILL a command once half of its steps are logged; returns how many were.

    Raises:
        RuntimeError: if it ended before, or did not come that far.
    """
    until = time.monotonic() + seconds
    while lines_of_metrics(command.root) <= steps // 2:
        if command.has_ended:
            raise RuntimeError(f"it ended before it could be killed halfway; {command.said()}")
        if time.monotonic() > until:
            raise RuntimeError(f"it was not halfway within {seconds:.0f} s, so give more --minutes; {command.said()}")
        time.sleep(0.02)
    command.kill()
    return lines_of_metrics(command.root) - 1


def resume(device: Device, results: Results, *, small: bool) -> None:
    """Part e."""
    size = SMALL_SHORT if small else SHORT
    steps = size["profile.task.settings.train_problems"] // size.get("profile.training.prompts_per_step", 64)
    with tempfile.TemporaryDirectory() as scratch, results.attempt(f"{KILLED} killed and resumed", device):
        first, second, killed = (Path(scratch) / name for name in ("first", "second", "killed"))
        names = (KILLED,)
        with (
            Command(first, names, device.name, size) as one,
            Command(second, names, device.name, size) as two,
        ):
            with Command(killed, names, device.name, size) as victim:
                at = kill_halfway(victim, steps, results.seconds_left() / 2)
            with Command(killed, names, device.name, size) as again:
                again.wait(results.seconds_left())
            for command in (one, two):
                command.wait(results.seconds_left())
        whole, repeated, resumed = (left_by(root) for root in (first, second, killed))
        run = runs_of(killed)[KILLED]
        if not (run.is_final and run.status.total_steps == steps and 0 < at < steps):
            results.row(f"{KILLED} killed at step {at}", f"ended as {run.status.state}", "", FAILED)
            return
        rows: list[tuple[str, dict[str, object]]] = [("the same run twice", repeated)]
        rows.append((f"killed at step {at} of {steps} and resumed", resumed))
        for what, other in rows:
            found = differing(whole, other)
            results.equal(f"{KILLED}, {what}", f"{len(whole)} rows and files", len(found), ", ".join(found[:2]))
