"""The scan that an experiment rests on: its task's training texts, on the hardware that its `[srdd]` table names."""

from __future__ import annotations

from roundoff.config import SRDD, Experiment
from roundoff.models.calibration import calibration_batches, calibration_texts
from roundoff.models.load import LoadedModel
from roundoff.models.prompts import check_asked
from roundoff.srdd.layer_scan import LayerScan
from roundoff.srdd.scanning import scan
from roundoff.tasks import Task

BATCHES = 4


def layer_multipliers(experiment: Experiment, found: LayerScan | None, progress: float) -> dict[int, float] | None:
    """Factors on AQN's sigma by decoder layer after a fraction `progress` of the run; None where all are 1.

    Raises:
        ConfigError: if the scan does not allow the mode that `aqn.layers` names.
    """
    aqn = experiment.aqn
    if aqn is None or aqn.layers == "all" or found is None:
        return None
    return found.multipliers(aqn.layers, direction=(experiment.srdd or SRDD()).direction, progress=progress)


def experiment_scan(experiment: Experiment, loaded: LoadedModel, task: Task, seed: int) -> LayerScan:
    """Damage of every layer of a plain model, as the experiment's `[srdd]` asks; the same for the same arguments.

    Raises:
        ConfigError: if the model has no decoder layers, the texts hold no token, or the hardware changes nothing.
        ModelError: if the tokenizer cannot read the task's texts.
    """
    settings = experiment.srdd or SRDD()
    texts = calibration_texts(task)
    check_asked(loaded, texts[: settings.tokens])  # a text holds at least one token
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=settings.tokens, batches=BATCHES)
    return scan(
        loaded.model,
        batches,
        settings.format or experiment.hardware,
        exact=settings.metric == "exact",
        rank_by=settings.metric,
        seed=seed,
    )
