"""TensorBoard: scalars, settings, and the HParams dashboard with the final scores of every run.

TensorBoard names a run by its path below the log directory, which consists of the experiment's id, the profile, the
hash of the settings and the seed. In the HParams dashboard the seeds of one experiment form one group.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from roundoff.config import flatten
from roundoff.trackers.base import Ended, TrackedRun, hyper_parameters

DIRECTORY = "tensorboard"
METRICS = {
    "deployed": "accuracy with the hardware on (fraction); the last value is the final score",
    "clean": "accuracy with the hardware off (fraction)",
    "reward": "mean reward of rollouts",
}
"""Scalars that the HParams dashboard shows beside the settings, each with its meaning."""


class TensorBoardTracker:
    """Scalars and hyper-parameters as TensorBoard event files."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Every session states its first step: TensorBoard then drops older events from that step on, but only if the
        # previous session stated its own.
        self._writer = SummaryWriter(str(run.path / DIRECTORY), purge_step=run.resumed_from + 1)
        text = "\n".join(f"    {name} = {value}" for name, value in flatten(run.settings).items())
        self._writer.add_text("settings", text, max(0, run.resumed_from))
        # TensorBoard uses the first of each that it reads. These are the same however often the run is resumed, and the
        # description of the columns is the same in every run.
        settings = hyper_parameters(run.experiment, run.profile)
        self._add(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=_columns(settings)))
        self._add(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=_session(run, settings)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ended: Ended) -> None:
        """Flush and close the event file; on the board, a run that can be resumed stays open."""
        if ended in ("complete", "untrained"):
            ending = SessionEndInfo(status=api_pb2.STATUS_SUCCESS if ended == "complete" else api_pb2.STATUS_FAILURE)
            self._add(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=ending))
        self._writer.close()

    def _add(self, tag: str, content: HParamsPluginData) -> None:
        about = metadata.create_summary_metadata(content)
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        file = self._writer.file_writer
        assert file is not None
        file.add_summary(Summary(value=[value]))


def _columns(settings: Mapping[str, float | str | bool | None]) -> api_pb2.Experiment:
    """The columns of the dashboard: every setting, then `METRICS`."""
    types = {bool: api_pb2.DATA_TYPE_BOOL, int: api_pb2.DATA_TYPE_FLOAT64, float: api_pb2.DATA_TYPE_FLOAT64}
    hparams = [
        api_pb2.HParamInfo(name=name, type=types.get(type(value), api_pb2.DATA_TYPE_STRING))
        for name, value in settings.items()
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag, description=text)
        for tag, text in METRICS.items()
    ]
    return api_pb2.Experiment(hparam_infos=hparams, metric_infos=metrics)


def _session(run: TrackedRun, settings: Mapping[str, float | str | bool | None]) -> SessionStartInfo:
    """The run's group and settings for the dashboard; a setting of None is left out."""
    session = SessionStartInfo(group_name=run.group)
    for name, value in settings.items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            session.hparams[name].number_value = value
        elif value is not None:
            session.hparams[name].string_value = value
    return session
