"""TensorBoard itself reads back the final scores beside the settings, with the seeds of an experiment as one group."""

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from roundoff.trackers import open_trackers
from tests.trackers.runs import log_steps, tracked


def track(path, first=0, last=4, ended="complete", **more):
    tracker = open_trackers("tensorboard", tracked(path, **more))
    log_steps(tracker, first, last)
    tracker.close(ended)


@pytest.fixture
def board(tmp_path):
    """Reads the runs below `tmp_path` as the HParams dashboard does."""

    def read():
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
        provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
        context = backend_context.Context(TBContext(logdir=str(tmp_path), data_provider=provider))
        metadata = context.hparams_metadata(RequestContext(), "")
        experiment = context.experiment_from_metadata(RequestContext(), "", True, metadata, [])
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=10,
            aggregation_type=api_pb2.AGGREGATION_AVG,
            allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
            col_params=[
                *(api_pb2.ColParams(metric=info.name, include_in_result=True) for info in experiment.metric_infos),
                *(api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos),
            ],
        )
        handler = list_session_groups.Handler(RequestContext(), context, "", request)
        return experiment, list(handler.run().session_groups), multiplexer

    return read


def test_seeds_are_one_group_with_their_mean_final_score(tmp_path, board):
    track(tmp_path / "noisy" / "seed-0", last=4)
    track(tmp_path / "noisy" / "seed-1", last=6, seed=1)
    track(tmp_path / "aqn" / "seed-0", aqn={"sigma_start": 0.05, "sigma_end": 0.01})
    experiment, groups, _ = board()
    assert [metric.name.tag for metric in experiment.metric_infos] == ["deployed", "clean", "reward"]
    assert "aqn.sigma_start" in [info.name for info in experiment.hparam_infos]
    assert len(groups) == 2
    noisy, aqn = sorted(groups, key=lambda group: -len(group.sessions))
    assert [session.status for session in noisy.sessions] == [api_pb2.STATUS_SUCCESS] * 2
    means = {value.name.tag: value.value for value in noisy.metric_values}
    assert means["deployed"] == pytest.approx(0.5)  # (0.4 + 0.6) / 2, the last values
    assert noisy.hparams["hardware.matmul_noise.relative_std"].number_value == 0.1
    assert aqn.hparams["aqn.sigma_start"].number_value == 0.05
    assert not noisy.hparams["aqn.sigma_start"].number_value


def test_a_resumed_run_is_one_run_without_repeated_steps(tmp_path, board):
    track(tmp_path / "seed-0", last=3, ended="interrupted")
    _, (group,), _ = board()
    assert group.sessions[0].status == api_pb2.STATUS_UNKNOWN
    track(tmp_path / "seed-0", first=3, last=5, resumed_from=2)
    _, (group,), multiplexer = board()
    assert group.sessions[0].status == api_pb2.STATUS_SUCCESS
    assert group.metric_values[0].value == pytest.approx(0.5)
    (run,) = multiplexer.Runs()
    assert [event.step for event in multiplexer.Tensors(run, "deployed")] == [0, 1, 2, 3, 4, 5]
