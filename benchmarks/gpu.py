"""What was never run without a GPU: bits, models, speed, runs and a kill on one device, in one table (docs/gpu.md).

    a  golden files, 10^8 bit patterns of every format, noise and draws: device against CPU, bit for bit
    b  seven model families on simulated hardware: logits and gradients against the CPU
    c  kernels against a copy; decode and training steps of Qwen2.5-1.5B's shape; host synchronisations
    d  the quickstart on the device, beside the CPU
    e  a run that is killed and resumed, bit for bit

Each part works in a process of its own (`benchmarks.device.worker`) for its share of the time, and what it leaves over
goes to those after it. A part that fails, hangs or loses the device is shown, and the next one begins. The table is
printed as it grows, and after every row the JSON file holds all that is known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks.device.results import EQUAL, FAILED, NOT_JUDGED, REACHED, SHOWN, Row
from benchmarks.device.worker import PREFIX
from roundoff.runs.files import write_atomic
from roundoff.runs.provenance import provenance

MACHINE = "machine"
"""Part of the row that describes the device."""
OUT = Path("gpu-results.json")
GRACE_SECONDS = 10.0
"""Between asking a part to end and killing it."""
IN_TIME = 0.8
"""Share of its time after which a part begins nothing new."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process: the letter of its part, what it is called, where it begins, and its share of the time."""

    letter: str
    name: str
    function: str
    share: float


PARTS = (
    Part("a", "bits", "benchmarks.device.bits:measure", 0.20),
    Part("b", "models", "benchmarks.device.models:measure", 0.12),
    Part("c", "kernels", "benchmarks.device.kernels:measure", 0.13),
    Part("c", "decoding", "benchmarks.device.decoding:measure", 0.17),
    Part("c", "training", "benchmarks.device.training:measure", 0.17),
    Part("d", "quickstart", "benchmarks.device.runs:quickstart", 0.12),
    Part("e", "kill and resume", "benchmarks.device.runs:resume", 0.09),
)
DESCRIPTION = Part(MACHINE, MACHINE, "benchmarks.device.worker:describe", 0.2)


@dataclass
class Table:
    """All rows so far, printed and written as they come."""

    out: Path
    content: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Print a row and write the file anew."""
        if row.part == MACHINE and row.verdict != FAILED:
            self.content["machine"] = row.details
            print("".join(f"{name}: {value}\n" for name, value in row.details.items()), flush=True)
        else:
            if not self.rows:
                print("| part | what | measured | goal | verdict |\n|---|---|---|---|---|")
            self.rows.append(row)
            cells = (row.part, row.what, row.measured, row.goal, row.verdict)
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        content = {**self.content, "rows": [asdict(row) for row in self.rows]}
        write_atomic(self.out, json.dumps(content, indent=1) + "\n")

    def summary(self) -> Iterator[str]:
        """How many rows ended how, and once more those that are not as they should be."""
        counts = Counter(row.verdict.split(" ")[0] if row.verdict else "shown" for row in self.rows)
        yield f"{len(self.rows)} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        good = (EQUAL, REACHED, SHOWN, NOT_JUDGED)
        yield from (f"{r.verdict}: {r.part}, {r.what}: {r.measured}" for r in self.rows if r.verdict not in good)


def run_part(part: Part, options: argparse.Namespace, seconds: float, table: Table, log: TextIO) -> str:
    """Run one part in a process of its own for at most so long; returns how it ended.

    What it prints beside its rows goes to the log.
    """
    size = ["small"] if options.small else []
    arguments = [part.function, part.letter, options.device, f"{IN_TIME * seconds:.0f}", *size]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "benchmarks.device.worker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    print(f"\n## {part.letter}, {part.name}: at most {seconds:.0f} s", file=log, flush=True)
    reader = threading.Thread(target=_read, args=(process, table, log), daemon=True)
    reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"ended after its {seconds:.0f} s"
    finally:
        _end(process)
        reader.join(GRACE_SECONDS)
    return "complete" if process.returncode == 0 else f"exit code {process.returncode}"


def _read(process: subprocess.Popen[str], table: Table, log: TextIO) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(PREFIX):
            table.add(Row(**json.loads(line.removeprefix(PREFIX))))
        elif line.strip():
            print(line, end="", file=log, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """End a part: it is asked first, so that it ends its own runs, and then killed with its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def chosen_parts(letters: str) -> tuple[Part, ...]:
    """The parts with these letters, such as `a,c`, in their order.

    Raises:
        argparse.ArgumentTypeError: if there is no such part.
    """
    wanted = {letter.strip() for letter in letters.split(",")}
    known = {part.letter for part in PARTS}
    if unknown := sorted(wanted - known):
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r} (known: {', '.join(sorted(known))})")
    return tuple(part for part in PARTS if part.letter in wanted)


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
    made.add_argument("--parts", type=chosen_parts, default=PARTS, metavar="a,c", help="only these parts [all]")
    made.add_argument("--small", action="store_true", help="a rehearsal: small sizes, and speeds are not judged")
    made.add_argument("--out", type=Path, default=OUT, help="the JSON file; a log lies beside it [%(default)s]")
    return made


def main(options: argparse.Namespace | None = None) -> int:
    """Run the parts; returns 0 if each came to its end, whatever it measured, and 1 otherwise."""
    options = options or parser().parse_args([])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    content = {"source": provenance(), "small": options.small, "minutes": options.minutes, "machine": {}, "parts": {}}
    table = Table(options.out, content)
    with options.out.with_suffix(".log").open("w", encoding="utf-8") as log:
        if run_part(DESCRIPTION, options, 60 * options.minutes * DESCRIPTION.share, table, log) != "complete":
            print(f"nothing can be measured on {options.device!r}; the log is {log.name}", file=sys.stderr)
            return 1
        for number, part in enumerate(options.parts):
            later = sum(other.share for other in options.parts[number + 1 :])
            share = part.share / (part.share + later)
            began = time.monotonic()
            ended = run_part(part, options, max(1.0, share * (until - began)), table, log)
            if ended != "complete":
                table.add(Row(part.letter, part.name, f"{ended}; see {log.name}", "", FAILED))
            content["parts"][part.name] = {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
            table.write()
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    table.write()
    print("\n" + "\n".join(table.summary()) + f"\nwritten: {options.out}")
    return int(any(row.verdict == FAILED for row in table.rows))


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
