"""One part in a process of its own: `python -m benchmarks.device.worker MODULE:FUNCTION PART DEVICE SECONDS [small]`.

Rows go to standard output, one JSON object a line after the word ROW; all else that is printed belongs to the log.
"""

from __future__ import annotations

import importlib
import signal
import sys

from benchmarks.device.machine import Device
from benchmarks.device.results import FAILED, DeviceLostError, Results, Row, one_line, write_row


def describe(device: Device, results: Results, *, small: bool) -> None:
    """What is measured on, as the details of one row."""
    results.shown("machine", device.name, **device.describe())


def main(function: str, part: str, device: str, seconds: str, size: str = "") -> int:
    """Measure; returns the exit code, 1 if the part did not come to its end."""
    small = size == "small"

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the runs that it started
    results = Results(part, float(seconds), is_judged=not small, write=write_row)
    try:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(Device.named(device), results, small=small)
    except DeviceLostError as error:
        results.row(name, f"the device does not compute any more {error}", "", FAILED)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Exception as error:  # whatever a part may raise becomes a row, and is raised again for the log
        write_row(Row(sys.argv[2], sys.argv[1], one_line(error), "", FAILED))
        raise
