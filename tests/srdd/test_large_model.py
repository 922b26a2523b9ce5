"""The scan and fault finding on a real model of 135 M parameters; see docs/srdd.md for how to get it."""

import os
import time
from pathlib import Path

import pytest
from benchmarks.srdd import HARDWARE, MODEL_VARIABLE, TEXTS_VARIABLE, calibration_texts

from roundoff.models.calibration import calibration_batches
from roundoff.models.load import load_model
from roundoff.srdd import find_faults, rank_correlation, scan

DIRECTORY = os.environ.get(MODEL_VARIABLE, "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(DIRECTORY, "config.json").is_file() and TEXTS_VARIABLE in os.environ),
        reason=f"{MODEL_VARIABLE} must name SmolLM2-135M-Instruct's directory, {TEXTS_VARIABLE} GSM8K as JSON lines",
    ),
]


@pytest.fixture(scope="module")
def loaded():
    return load_model(DIRECTORY)


def test_the_default_ranking_is_that_of_exact_sensitivity(loaded):
    texts = calibration_texts(DIRECTORY)
    first, other = (calibration_batches(loaded.tokenizer, part, batches=4) for part in (texts, texts[20:]))
    began = time.process_time()
    found = scan(loaded.model, first, HARDWARE["MXFP4 W4A4"])
    assert time.process_time() - began < 60  # the goal of 30 s is for an idle core
    exact = scan(loaded.model, other, HARDWARE["MXFP4 W4A4"], gradient=False, exact=True)
    assert rank_correlation(list(found.damage().values()), list(exact.damage("exact").values())) >= 0.8
    assert found.most_sensitive(1) == (29,)


def test_healthy_scans_raise_no_alarm(loaded):
    for batch in calibration_batches(loaded.tokenizer, calibration_texts(DIRECTORY), max_tokens=96, batches=3):
        assert find_faults(loaded.model, [batch]).alarms == ()
