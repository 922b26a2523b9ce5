"""`roundoff ...` as a shell sees it, without a process of its own: that would import torch for seconds."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from roundoff.cli import main


def roundoff(
    *arguments: str, cwd: Path, check: int = 0, stdout: TextIO | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the command prints and its exit code, which must be `check`.

    Args:
        arguments: what follows `roundoff`.
        cwd: the directory to be in.
        check: the exit code.
        stdout: where standard output goes; None: into what is returned.
        environment: variables to set meanwhile.
    """
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    kept = dict(os.environ), sys.argv
    os.environ.pop("FORCE_COLOR", None)
    os.environ.update({"COLUMNS": "160", **environment})
    sys.argv = ["roundoff", *arguments]
    code: int | str | None = 0
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(stdout or output),
            contextlib.redirect_stderr(errors),
        ):
            main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        variables, sys.argv = kept
        os.environ.clear()
        os.environ.update(variables)
    printed, said = (stream.buffer.getvalue().decode("utf-8") for stream in (output, errors))  # type: ignore[attr-defined]
    assert code == check, printed + said
    return subprocess.CompletedProcess(sys.argv, check, printed, said)
