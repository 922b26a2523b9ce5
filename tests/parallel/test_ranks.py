"""Ranks: what they exchange, and that their number does not change a run."""

import math
import sys
from contextlib import nullcontext, suppress
from inspect import signature

import pytest
import torch

from roundoff.config import ConfigError, Experiment, validate
from roundoff.experiments import load_experiment
from roundoff.launch.led_run import LedRunDirectory
from roundoff.launch.ranks import check_agreement, state_on_disk
from roundoff.launch.request import RunRequest, execute
from roundoff.models.errors import ModelError
from roundoff.parallel import ranks as parallel
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.checkpoint import DamagedCheckpointError
from roundoff.runs.directory import RunDirectory, RunLockedError
from roundoff.runs.record import read_run
from roundoff.tasks import make_task
from roundoff.training.update import NonFiniteLossError
from tests.test_evaluation import AlwaysRight
from tests.thread_ranks import on_ranks


@pytest.mark.parametrize(("size", "count"), [(10, 3), (2, 3), (0, 2), (8, 1), (7, 7)])
def test_shares_cover_everything_once_and_differ_by_one_at_most(size, count):
    shares = [Ranks(i, count).share(size) for i in range(count)]
    assert [n for s in shares for n in range(size)[s]] == list(range(size))
    lengths = [len(range(size)[s]) for s in shares]
    assert max(lengths) - min(lengths) <= 1


def test_a_single_process_exchanges_nothing():
    value = object()
    assert ALONE.gather(value) == [value]
    assert ALONE.first(lambda: value) is value
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)


def test_values_come_in_the_order_of_the_ranks():
    assert (
        on_ranks(3, lambda ranks: ranks.gather((ranks.index, torch.tensor(ranks.index))))
        == [[(0, 0), (1, 1), (2, 2)]] * 3
    )
    assert on_ranks(3, lambda ranks: ranks.any(ranks.index == 1)) == [True] * 3
    assert on_ranks(3, lambda ranks: ranks.any(False)) == [False] * 3
    assert on_ranks(3, lambda ranks: ranks.first(lambda: ranks.index)) == [0] * 3


def test_tensors_are_stacked_in_the_order_of_the_ranks_not_numbers_included():
    own = [torch.tensor([1.0, math.nan]), torch.tensor([-0.5, math.inf]), torch.tensor([0.0, 3.0])]
    assert torch.equal(ALONE.stack(own[0])[0, :1], own[0][:1])
    for found in on_ranks(3, lambda ranks: ranks.stack(own[ranks.index])):
        torch.testing.assert_close(found, torch.stack(own), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("error", [DamagedCheckpointError("no good"), OSError(28, "No space left", "here")])
def test_an_error_of_the_first_rank_is_raised_on_every_rank(error):
    def fail():
        raise error

    def work(ranks):
        with pytest.raises(type(error)) as caught:
            ranks.first(fail if ranks.leads else lambda: pytest.fail("only the first rank makes it"))
        return str(caught.value)

    assert on_ranks(2, work) == [str(error)] * 2


def test_ranks_that_disagree_say_on_what():
    def work(ranks):
        ranks.agree("the weather", "fine")
        with pytest.raises(ConfigError, match=r"ranks disagree on the weather: rank 0 has fine, rank 2 has rain"):
            ranks.agree("the weather", "rain" if ranks.index == 2 else "fine")

    on_ranks(3, work)


def test_gradients_are_summed_and_none_counts_as_zero(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET_ELEMENTS", 5)

    def work(ranks):
        shapes = [(2, 2), (3,), (7,), (1,), (1,)]
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
        for p in parameters:
            p.grad = torch.full_like(p, 1 + ranks.index)
        parameters[1].grad = None  # on no rank
        if ranks.index == 1:
            parameters[2].grad = None  # on the first rank alone
        ranks.sum_gradients(parameters)
        assert [p.grad.dtype for p in parameters if p.grad is not None] == [torch.float32] * 4 + [torch.bfloat16]
        return [None if p.grad is None else p.grad.unique().tolist() for p in parameters]

    assert on_ranks(2, work) == [[[3.0], None, [1.0], [3.0], [3.0], [3.0]]] * 2


def dapo() -> Experiment:
    experiment = load_experiment("quickstart-clean")
    content = {**experiment.model_dump(), "algorithm": {"name": "DAPO", "group_size": 4}}
    return validate(Experiment, content, source="test")


def forward_noise() -> Experiment:
    """Noise on forward products alone: that of weight gradients is drawn for each product, so for each share."""
    content = load_experiment("quickstart-noise-aqn").model_dump()
    content["hardware"]["matmul_noise"]["backward"] = False
    return validate(Experiment, content, source="test")


def metrics(path) -> list[dict]:
    rows = read_run(path).metrics
    return [{k: v for k, v in row.items() if k not in ("time", "learning_rate") and "seconds" not in k} for row in rows]


def assert_same_to_rounding(one: list[dict], several: list[dict]) -> None:
    """Every metric, to what the order of float32 sums may change; counts and scores exactly."""
    assert [set(row) for row in one] == [set(row) for row in several]
    for a, b in zip(one, several, strict=True):
        for name, value in a.items():
            if isinstance(value, list) and name.startswith("mismatch_"):
                numbers = [[-1.0 if one is None else one for one in listed] for listed in (value, b[name])]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5), (a["step"], name)
            elif isinstance(value, float) and name not in ("reward", "accuracy", "deployed", "clean", "sigma"):
                # the loss is a difference of sums of about 1, and 1e-5 is a hundred roundings of those
                assert math.isclose(value, b[name], rel_tol=1e-4, abs_tol=1e-5), (a["step"], name, value, b[name])
            else:
                assert value == b[name], (a["step"], name)


@pytest.mark.parametrize(("make", "count"), [(dapo, 2), (forward_noise, 2)], ids=["dapo", "noise-aqn"])
def test_the_number_of_ranks_does_not_change_a_run(tmp_path, small, make, count):
    profile = small.model_copy(update={"training": small.training.model_copy(update={"micro_batch": 12})})
    alone, shared = (RunRequest(make(), profile, 0, tmp_path / n, {}, tracker="none") for n in ("one", "several"))
    execute(alone, lambda: False)
    assert on_ranks(count, lambda ranks: execute(shared, lambda: False, ranks)) == [("complete", "")] * count
    assert_same_to_rounding(metrics(alone.path), metrics(shared.path))
    before, after = (read_run(r.path).evaluation(2) for r in (alone, shared))
    assert [o.id for o in before.outcomes] == [o.id for o in after.outcomes]
    assert before == after


def test_micro_batches_do_not_change_a_run_either(tmp_path, small):
    parts = small.model_copy(update={"training": small.training.model_copy(update={"micro_batch": 5})})
    whole, split = (RunRequest(dapo(), p, 0, tmp_path, {}, tracker="none") for p in (small, parts))
    for request in (whole, split):
        execute(request, lambda: False)
    assert_same_to_rounding(metrics(whole.path), metrics(split.path))


def test_a_stop_on_one_rank_stops_all_after_the_same_step_and_one_process_goes_on(tmp_path, small):
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="none")
    outcomes = on_ranks(2, lambda ranks: execute(request, lambda: ranks.index == 1, ranks))
    assert [phase for phase, _ in outcomes] == ["interrupted"] * 2
    assert (read_run(request.path).status.state, read_run(request.path).status.step) == ("interrupted", 1)
    assert execute(request, lambda: False) == ("complete", "")
    assert [row["step"] for row in read_run(request.path).metrics] == [0, 1, 2]


def test_whatever_a_run_directory_does_the_first_rank_does_for_all(tmp_path, small):
    """Also a method that a later version adds: nothing but opening the directory may happen on every rank."""
    public = {name for name in vars(RunDirectory) if not name.startswith("_")}
    assert {"append_metrics", "save_checkpoint", "scan", "status"} < public

    class Held:
        """A directory whose every use is noted."""

        path, experiment, profile, seed = tmp_path / "a" / "b" / "seed-0", load_experiment("E12"), small, 0

        def __init__(self):
            self.used = []

        def __getattr__(self, name):
            self.used.append(name)
            return lambda *_, **__: None

    def work(ranks):
        held = Held()
        led = LedRunDirectory(held, ranks)
        for name in sorted(public - {"set_status"}):
            member = vars(LedRunDirectory)[name]
            function = member.fget if isinstance(member, property) else member
            with suppress(Exception):  # most methods go on to use what the fake returns
                function(led, *[None] * (len(signature(function).parameters) - 1))
        return bool(held.used)

    assert on_ranks(2, work) == [True, False]


def test_a_directory_that_is_held_is_refused_on_every_rank(tmp_path, small):
    arguments = (tmp_path, load_experiment("quickstart-clean"), small, 0)

    def work(ranks):
        with pytest.raises(RunLockedError), LedRunDirectory(RunDirectory(*arguments), ranks):
            pass

    with RunDirectory(*arguments):
        on_ranks(2, work)


def test_an_error_before_training_on_one_rank_ends_all_and_is_said_by_the_first(tmp_path, small):
    """Such as a model that the second machine lacks: the first must not wait for it, nor blame the connection."""
    missing = small.model_copy(update={"model": str(tmp_path / "nowhere")})

    def work(ranks):
        request = RunRequest(dapo(), missing if ranks.index else small, 0, tmp_path, {}, tracker="none")
        with pytest.raises((ConfigError, ModelError)) as caught:
            execute(request, lambda: False, ranks)
        return str(caught.value)

    first, second = on_ranks(2, work)
    assert "nowhere" in second
    assert first == f"rank 1: {second}"
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("lora", "place", "said"),
    [
        ({}, "prepare", "the weights of the adapters"),
        ({}, "restore", "the weights of the adapters"),
        (None, "restore", "the weights that are trained"),
    ],
)
def test_ranks_agree_on_every_weight_before_the_first_step(tmp_path, small, monkeypatch, lora, place, said):
    """The base is compared as it was loaded; adapters are drawn after it, and a checkpoint is put in later still."""
    loop = sys.modules["roundoff.training.loop"]  # the name itself is that of the function
    experiment = validate(Experiment, {**dapo().model_dump(), "lora": lora}, source="test")
    request = RunRequest(experiment, small, 0, tmp_path, {}, tracker="none")
    if place == "restore":
        execute(request, lambda: True)
    made = getattr(loop, place)

    def other_on_the_second_rank(first, *more, **options):
        found = made(first, *more, **options)
        session = first if place == "restore" else found
        if session.ranks.index == 1:
            with torch.no_grad():
                next(iter(session.trainable.values())).view(-1)[0] += 1e-3
        return found

    monkeypatch.setattr(loop, place, other_on_the_second_rank)
    with pytest.raises(ConfigError, match=f"ranks disagree on {said}"):
        on_ranks(2, lambda ranks: execute(request, lambda: False, ranks))
    if place == "prepare":
        assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_failure_of_one_rank_is_not_taken_by_the_others_for_what_they_wait_for(tmp_path, small, monkeypatch):
    class BrokenError(RuntimeError):
        pass

    train = sys.modules["roundoff.training.loop"]  # the name itself is that of the function
    plain = train.take_step

    def breaks(session, step, run_dir):
        if session.ranks.index == 1:
            raise BrokenError("out of memory")
        return plain(session, step, run_dir)

    monkeypatch.setattr(train, "take_step", breaks)
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="none")
    with pytest.raises(BrokenError):  # and no other error: the first rank's meeting was broken off
        on_ranks(2, lambda ranks: execute(request, lambda: False, ranks))
    status = read_run(request.path).status
    assert (status.state, status.reason.split(":")[1].strip()) == ("failed", "BrokenBarrierError")


@pytest.mark.parametrize(("ratio", "accepted"), [("replayed", True), ("one", False)])
def test_a_step_must_have_a_prompt_for_each_rank(tmp_path, small, ratio, accepted):
    training = small.training.model_copy(update={"prompts_per_step": 4, "minibatches": 2})
    content = {**dapo().model_dump(), "algorithm": {"name": "DAPO", "group_size": 4, "ratio": ratio}}
    profile = small.model_copy(update={"training": training})
    request = RunRequest(validate(Experiment, content, source="test"), profile, 0, tmp_path, {}, tracker="none")

    said = r"must be at least 3, the number of ranks, but is 2 \(algorithm\.ratio"

    def work(ranks):
        with nullcontext() if accepted else pytest.raises(ConfigError, match=said):
            check_agreement([request], ranks)

    on_ranks(3, work)


def test_what_is_not_finite_on_one_rank_stops_all_with_one_message(tmp_path, small, monkeypatch):
    """The gradients of one rank are NaN: their sum is so on every rank, and none waits for another."""
    update = sys.modules["roundoff.training.update"]
    plain = update.keyed_logprobs

    def spoilt(session, *arguments):
        logprobs, entropies = plain(session, *arguments)
        return (logprobs * math.nan if session.ranks.index == 1 else logprobs), entropies

    monkeypatch.setattr(update, "keyed_logprobs", spoilt)
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="none")

    def work(ranks):
        with pytest.raises(NonFiniteLossError) as caught:
            execute(request, lambda: False, ranks)
        return str(caught.value)

    said = on_ranks(2, work)
    assert said[0] == said[1]
    assert read_run(request.path).status.state == "failed"
    assert len(list((request.path / "diagnostics").iterdir())) == 1


def test_a_run_that_trains_nothing_says_so_on_every_rank(tmp_path, small, monkeypatch):
    task = AlwaysRight(make_task(small))
    monkeypatch.setattr("roundoff.training.checks.make_task", lambda profile: task)
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="none")
    (first, second) = on_ranks(2, lambda ranks: execute(request, lambda: False, ranks))
    assert first == second
    assert first[0] == "complete" and first[1].startswith("nothing was trained in 2 steps")
    assert state_on_disk(request) == ("complete", f"was complete; {first[1]}", False)
