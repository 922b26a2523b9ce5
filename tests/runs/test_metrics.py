"""A row of metrics.jsonl has one definition, and what a run writes, what is read and what is documented follow it."""

import re
from pathlib import Path

import pytest

from roundoff.experiments import load_experiment
from roundoff.experiments.registry import with_overrides
from roundoff.runs.directory import RunDirectory
from roundoff.runs.metrics import METRICS, check_row
from tests.training.test_loop import run

ROOT = Path(__file__).parents[2]


def test_a_run_writes_every_metric_that_is_defined_and_no_other(tmp_path, small):
    finished = run(tmp_path, load_experiment("quickstart-noise-aqn"), small)
    written = {name for row in finished.metrics for name in row}
    of_corrections = {name for name in METRICS if name.startswith("rollout_")}
    assert written == set(METRICS) - of_corrections - {"sigma_layers"}  # which needs layers that differ
    chosen = ["algorithm.ratio='recomputed'", "algorithm.correction.rollout_is='token'"]
    chosen += ["algorithm.correction.rollout_is_batch_normalize=true", "algorithm.correction.rollout_rs='token_k2'"]
    chosen += ["algorithm.correction.rollout_rs_threshold=1.0"]
    (corrected,), _ = with_overrides([load_experiment("quickstart-clean")], small, chosen)
    rows = run(tmp_path / "corrected", corrected, small).metrics[1:]
    assert all(of_corrections <= set(row) for row in rows)


def test_a_row_with_a_name_that_is_not_defined_is_refused_and_not_written(tmp_path, small):
    with RunDirectory(tmp_path, load_experiment("quickstart-clean"), small, 0) as run_dir:
        with pytest.raises(ValueError, match="has no entry kl_divergence"):
            run_dir.append_metrics({"step": 1, "kl_divergence": 0.5})
        assert not (run_dir.path / "metrics.jsonl").exists()
    check_row({"step": 1, "kl": 0.5})


def test_every_metric_has_a_title_and_a_meaning():
    assert all(metric.title and metric.meaning for metric in METRICS.values())
    assert METRICS["kl"].label == "KL to the reference (nats per token)"
    assert METRICS["grad_norm"].label == "Gradient norm"


def test_the_documentation_lists_every_metric_as_it_is_defined():
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert rows == [(name, metric.unit, metric.meaning) for name, metric in METRICS.items()]
