"""What was never run without a GPU: bits, models, speed, runs and a kill on one device, in one table (docs/gpu.md).

    a  golden files, 10^8 bit patterns of every format, noise and draws: device against CPU, bit for bit
    b  seven model families on simulated hardware: logits and gradients against the CPU
    c  kernels against a copy; decode and training steps of Qwen2.5-1.5B's shape; host synchronisations
    d  the quickstart on the device, beside the CPU
    e  a run that is killed and resumed, bit for bit

Each part works in processes of its own (`benchmarks.device.worker`) for its share of the time: those that time nothing
all at once, since they wait for compilers and CPUs, then those of c one after the other, each with what is left over by
those before it. A part that fails, hangs or loses the device is shown, and the others go on. The table is printed as it
grows, and after every row the JSON file holds all that is known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks.device.results import EQUAL, FAILED, NOT_JUDGED, PREFIX, REACHED, SHOWN, Row
from roundoff.runs.files import write_atomic
from roundoff.runs.provenance import provenance

MACHINE = "machine"
"""Part of the row that describes the device."""
OUT = Path("gpu-results.json")
GRACE_SECONDS = 10.0
"""Between asking a part to end and killing it."""
DESCRIPTION_SHARE = 0.2
"""Of all the time, which the description of the device may take at most."""
IN_TIME = 0.8
"""Share of its time after which a part begins nothing new."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process: the letter of its part, what it is called, and where it begins."""

    letter: str
    name: str
    function: str


DESCRIPTION = Part(MACHINE, MACHINE, "benchmarks.device.worker:describe")
STAGES: tuple[tuple[float, tuple[Part, ...]], ...] = (
    (
        0.45,
        (
            Part("a", "bits", "benchmarks.device.bits:measure"),
            Part("b", "models", "benchmarks.device.models:measure"),
            Part("d", "quickstart", "benchmarks.device.runs:quickstart"),
            Part("e", "kill and resume", "benchmarks.device.runs:resume"),
        ),
    ),
    (0.15, (Part("c", "kernels", "benchmarks.device.kernels:measure"),)),
    (0.20, (Part("c", "decoding", "benchmarks.device.decoding:measure"),)),
    (0.20, (Part("c", "training", "benchmarks.device.training:measure"),)),
)
"""Shares of the time, and the parts that work at once."""
COMPARED = ("a", "b")
"""Parts of many like comparisons."""
GOOD = (EQUAL, REACHED, SHOWN, NOT_JUDGED)
HEAD = "| part | what | measured | goal | verdict |\n|---|---|---|---|---|"
LETTERS = tuple(sorted({part.letter for _, parts in STAGES for part in parts}))


@dataclass
class Table:
    """All rows so far, printed and written as they come."""

    out: Path
    content: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def add(self, row: Row) -> None:
        """Print a row and write the file anew."""
        with self._one_at_a_time:
            self._add(row)

    def _add(self, row: Row) -> None:
        if row.part == MACHINE and row.verdict != FAILED:
            self.content["machine"] = row.details
            print("".join(f"{name}: {value}\n" for name, value in row.details.items()), flush=True)
        else:
            if not self.rows:
                print(HEAD)
            self.rows.append(row)
            print(row.line(), flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        rows = sorted(self.rows, key=lambda row: row.part)
        content = {**self.content, "rows": [asdict(row) for row in rows]}
        write_atomic(self.out, json.dumps(content, indent=1) + "\n")

    def summary(self) -> Iterator[str]:
        """How many rows ended how, and once more those that are not as they should be."""
        counts = Counter(row.verdict.partition(" by ")[0] or "shown" for row in self.rows)
        yield f"{len(self.rows)} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        yield from (f"{r.verdict}: {r.part}, {r.what}: {r.measured}" for r in self.rows if r.verdict not in GOOD)

    def page(self) -> Iterator[str]:
        """The table by part in Markdown, for docs/gpu.md; comparisons that found nothing are one row for each part."""
        machine = self.content["machine"].items()
        yield "; ".join(f"{name} {value}" for name, value in machine) + f"; commit {self.content['source']['commit']}"
        yield f"\n{HEAD}"
        for letter in LETTERS:
            rows = [row for row in self.rows if row.part == letter]
            silent = [row for row in rows if letter in COMPARED and row.verdict in GOOD]
            if silent:
                yield f"| {letter} | {len(silent)} comparisons | as they should be | | |"
            yield from (row.line() for row in rows if row not in silent)


class Running:
    """A part at work in a process of its own; what it prints beside its rows goes to the log."""

    def __init__(self, part: Part, options: argparse.Namespace, seconds: float, table: Table, log: TextIO) -> None:
        self.part, self._table, self._log = part, table, log
        self.began = time.monotonic()
        self._ended: float | None = None
        arguments = [part.function, part.letter, options.device, f"{IN_TIME * seconds:.0f}"]
        arguments += ["small"] if options.small else []
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.device.worker", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                row = Row(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None
            except (ValueError, TypeError):  # cut off by the end of a process
                row = None
            if row is not None:
                self._table.add(row)
            elif line.strip():
                self._log.write(f"{self.part.letter}, {self.part.name}: {line}")
                self._log.flush()
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds until its output ended, or until now."""
        return (self._ended or time.monotonic()) - self.began

    def wait(self, until: float) -> str:
        """Wait for the end, but not beyond a moment (`time.monotonic`); returns how it ended."""
        late = False
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
        self.end()
        if late:
            return f"ended after {self.seconds:.0f} s, when its time was over"
        return "complete" if self._process.returncode == 0 else f"exit code {self._process.returncode}"

    def ask_to_end(self) -> None:
        """Ask the process to end, which ends its own runs first."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """End the process if it is still there: it is asked first, and then killed."""
        self.ask_to_end()
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it has left behind
        self._process.wait()
        self._reader.join(GRACE_SECONDS)


def run_stage(
    parts: Sequence[Part], options: argparse.Namespace, seconds: float, table: Table, log: TextIO
) -> dict[str, dict[str, Any]]:
    """Run parts at once for at most so long; returns how each ended, and after how many seconds."""
    until = time.monotonic() + seconds
    running = [Running(part, options, seconds, table, log) for part in parts]
    ended = {}
    try:
        for one in running:
            how = one.wait(until)
            ended[one.part.name] = {"ended": how, "seconds": round(one.seconds, 1)}
            if how != "complete":
                table.add(Row(one.part.letter, one.part.name, f"{how}; see {log.name}", "", FAILED))
    finally:
        for one in running:
            one.ask_to_end()
        for one in running:
            one.end()
    return ended


def letters(text: str) -> tuple[str, ...]:
    """Letters of parts, from a text such as `a,c`.

    Raises:
        argparse.ArgumentTypeError: if there is no such part.
    """
    wanted = tuple(letter.strip() for letter in text.split(","))
    if unknown := sorted(set(wanted) - set(LETTERS)):
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r} (known: {', '.join(LETTERS)})")
    return wanted


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, but is {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--device", default="cuda", choices=("cuda", "xpu", "npu", "cpu"))
    made.add_argument("--minutes", type=_minutes, default=8.0, help="time for all parts together [%(default)s]")
    made.add_argument("--parts", type=letters, default=LETTERS, metavar="a,c", help="only these parts [all]")
    made.add_argument("--small", action="store_true", help="a rehearsal: small sizes, and speeds are not judged")
    made.add_argument(
        "--out", type=Path, default=OUT, help="the JSON file; a page and a log lie beside it [%(default)s]"
    )
    return made


def main(options: argparse.Namespace | None = None) -> int:
    """Run the parts; returns 0 if each came to its end, whatever it measured, and 1 otherwise."""
    options = options or parser().parse_args([])
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the parts end, too
    try:
        return measure(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(options: argparse.Namespace) -> int:
    """What `main` does, where the parts are ended with it."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes
    until = time.monotonic() + seconds
    command = ["python", "-m", "benchmarks", *sys.argv[1:]]
    content = {"source": provenance(command), "small": options.small, "minutes": options.minutes, "parts": {}}
    table = Table(options.out, content)
    chosen = [(share, [part for part in parts if part.letter in options.parts]) for share, parts in STAGES]
    stages = [(share, parts) for share, parts in chosen if parts]
    with options.out.with_suffix(".log").open("w", encoding="utf-8") as log:
        run_stage([DESCRIPTION], options, DESCRIPTION_SHARE * seconds, table, log)
        if "machine" not in content:
            print(f"nothing can be measured on {options.device!r}; the log is {log.name}", file=sys.stderr)
            return 1
        for number, (share, parts) in enumerate(stages):
            left = max(1.0, until - time.monotonic())
            part_of_it = share / sum(later for later, _ in stages[number:])
            content["parts"] |= run_stage(parts, options, part_of_it * left, table, log)
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    table.write()
    write_atomic(options.out.with_suffix(".md"), "\n".join(table.page()) + "\n")
    print("\n" + "\n".join(table.summary()) + f"\nwritten: {options.out}")
    return int(any(row.verdict == FAILED for row in table.rows))


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
