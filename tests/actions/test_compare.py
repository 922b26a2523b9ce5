"""`roundoff compare`: what it refuses to compare."""

import pytest

from roundoff.actions.compare import compare
from roundoff.config import ConfigError
from roundoff.experiments import load_experiment
from tests.training.test_loop import run


def test_runs_are_not_compared_with_themselves(tmp_path, small):
    made = run(tmp_path, load_experiment("quickstart-noise"), small)
    other = run(tmp_path, load_experiment("quickstart-clean"), small)
    for same in ("quickstart-noise", str(made.path.parent), str(made.path)):
        with pytest.raises(ConfigError, match="are the same runs, or share some: name two different experiments"):
            compare("quickstart-noise", same, tmp_path)
    assert compare("quickstart-noise", str(other.path), tmp_path).comparison.problems == 32
