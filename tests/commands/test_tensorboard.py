"""`roundoff tensorboard`: the command line that it runs, and once the board itself."""

import re
import subprocess
import sys
import urllib.request

import pytest

from roundoff.actions.tensorboard import command_line
from roundoff.config import ConfigError
from roundoff.trackers import open_trackers
from tests.trackers.runs import log_steps, tracked


@pytest.fixture
def runs(tmp_path):
    tracker = open_trackers("tensorboard", tracked(tmp_path / "noisy" / "seed-0"))
    log_steps(tracker, 0, 2)
    tracker.close("complete")
    return tmp_path


def test_it_is_the_tensorboard_of_this_python_on_these_runs(runs):
    command = command_line(runs, port=0, host="127.0.0.1")
    assert command[:3] == [sys.executable, "-m", "tensorboard.main"]
    assert command[3:] == ["--logdir", str(runs), "--port", "0", "--host", "127.0.0.1"]


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no TensorBoard files"):
        command_line(tmp_path, port=6006, host=None)


@pytest.mark.slow
def test_the_board_answers(runs):
    process = subprocess.Popen(
        [sys.executable, "-m", "roundoff", "tensorboard", str(runs), "--port", "0", "--host", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next(m[1] for line in process.stdout if (m := re.search(r"(http://127.0.0.1:\d+)/", line)))
        with urllib.request.urlopen(f"{address}/data/plugins_listing", timeout=60) as answer:
            assert "hparams" in answer.read().decode()
    finally:
        process.terminate()
        process.wait(30)
