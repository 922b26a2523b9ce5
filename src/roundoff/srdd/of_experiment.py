"""The scan that an experiment uses: on its task's training texts, under the hardware that its `[srdd]` table names."""

from __future__ import annotations

from roundoff.config import SRDD, Experiment
from roundoff.models.calibration import SCAN_BATCHES, calibration_batches, calibration_texts
from roundoff.models.load import LoadedModel
from roundoff.models.prompts import check_asked
from roundoff.srdd.layer_scan import LayerScan
from roundoff.srdd.scanning import scan
from roundoff.tasks import Task


def layer_multipliers(experiment: Experiment, layer_scan: LayerScan | None, progress: float) -> dict[int, float] | None:
    """The factor on AQN's sigma of each decoder layer, at a fraction `progress` of the run; None if all are 1.

    Raises:
        ConfigError: if the scan does not allow the mode that `aqn.layers` names.
    """
    aqn = experiment.aqn
    if aqn is None or aqn.layers == "all" or layer_scan is None:
        return None
    return layer_scan.multipliers(aqn.layers, direction=(experiment.srdd or SRDD()).direction, progress=progress)


def experiment_scan(experiment: Experiment, loaded: LoadedModel, task: Task, seed: int) -> LayerScan:
    """Scan a plain model as the experiment's `[srdd]` table asks; equal arguments give equal scans.

    Raises:
        ConfigError: if the model has no decoder layers, the texts hold no token, or the hardware changes nothing.
        ModelError: if the tokenizer cannot read the task's texts.
    """
    settings = experiment.srdd or SRDD()
    texts = calibration_texts(task)
    check_asked(loaded, texts[: settings.tokens])  # every text holds at least one token, so no more are needed
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=settings.tokens, batches=SCAN_BATCHES)
    return scan(
        loaded.model,
        batches,
        settings.format or experiment.hardware,
        exact=settings.metric == "exact",
        rank_by=settings.metric,
        seed=seed,
    )
