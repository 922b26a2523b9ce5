"""A complete run that is extended: its steps are not repeated, and it stays as it was."""

import shutil
from pathlib import Path

import pytest

from roundoff.actions.extend import begin_extension, differences, extended, runs_root
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import ConfigError, LoRA
from roundoff.experiments import load_experiment
from roundoff.runs.checkpoint import DamagedCheckpointError, checkpoint_path, read_checkpoint, save_checkpoint
from roundoff.runs.directory import run_path
from roundoff.runs.record import Run, Status, read_run
from tests.launch.test_survival import left
from tests.training.test_loop import reproducible, run, with_training


def content(path) -> dict:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def extend(parent, epochs, **options):
    experiment, root = begin_extension(parent, epochs, {"command": "test"})
    return run(root, experiment, parent.profile, seed=parent.seed, **options)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, dropout=0.1)])
def test_one_epoch_extended_is_two_from_scratch_to_the_bit(tmp_path, small, lora):
    experiment = load_experiment("quickstart-noise").model_copy(update={"lora": lora})
    task = small.task.model_copy(update={"settings": {**small.task.settings, "train_problems": 8, "test_problems": 16}})
    # The end of the first epoch, of two steps, is evaluated in both.
    profile = with_training(small.model_copy(update={"task": task}), prompts_per_step=4, evaluate_every=2)
    scratch = run(tmp_path / "scratch", experiment.model_copy(update={"epochs": 2}), profile)
    parent = run(tmp_path / "parts", experiment, profile)
    before = content(parent.path)
    longer = extend(parent, 2)
    assert content(parent.path) == before
    assert longer.is_final
    assert longer.path != parent.path
    assert longer.experiment.id == "quickstart-noise+epochs=1to2"
    assert left(longer.path) == left(scratch.path)
    assert differences(parent, 2) is None
    origin = longer.provenance["parent"]
    assert (origin["run"], origin["step"], origin["epochs"]) == (str(parent.path), 2, 1)


def test_a_parent_with_the_checkpoint_of_another_run_is_refused(tmp_path, small):
    parent = run(tmp_path / "runs", load_experiment("quickstart-clean"), small)
    other = run(tmp_path / "other", load_experiment("quickstart-clean"), small, seed=1)
    shutil.copytree(other.path / "checkpoints", parent.path / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="was written by another run"):
        begin_extension(parent, 2, {})
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["quickstart-clean"]


def test_what_was_made_is_not_made_again_and_a_stop_goes_on(tmp_path, small):
    parent = run(tmp_path, load_experiment("quickstart-clean"), small)
    stopped = extend(parent, 3, stop_after=1)
    assert (stopped.status.state, stopped.status.step) == ("interrupted", 3)
    assert stopped.metrics[: len(parent.metrics)] == parent.metrics  # their times too: they are copies
    finished = extend(parent, 3)
    assert finished.is_final
    assert [row["step"] for row in finished.metrics] == list(range(7))
    assert {row["epoch"] for row in finished.metrics[1:]} == {0, 1, 2}


@pytest.mark.parametrize(("schedule", "same"), [("epoch", False), ("linear", False), ("constant", True)])
def test_aqn_goes_on_with_the_sigma_of_the_longer_run_and_says_where_it_differs(tmp_path, small, schedule, same):
    settings = load_experiment("quickstart-noise-aqn")
    aqn = settings.aqn.model_copy(update={"schedule": schedule, "stages": 3})
    profile = with_training(small, prompts_per_step=4)  # four steps an epoch
    parent = run(tmp_path, settings.model_copy(update={"aqn": aqn}), profile)
    longer = extend(parent, 2)
    sigmas = [row["sigma"] for row in longer.metrics[1:]]
    assert sigmas[:4] == [row["sigma"] for row in parent.metrics[1:]]
    scratch = sigma_curve(8, 4, aqn)
    assert sigmas[4:] == scratch[4:]
    assert (sigmas == scratch) == same
    said = differences(parent, 2)
    assert (said is None) == same
    assert said is None or "steps 1 to 4 had the sigma of a run of 1 epoch " in said


def test_a_parent_that_was_made_anew_is_not_taken_for_the_old_one(tmp_path, small):
    experiment = load_experiment("quickstart-clean")
    parent = run(tmp_path, experiment, small)
    extend(parent, 2, stop_after=1)
    other = run(tmp_path / "other", experiment, with_training(small, learning_rate=1e-5))
    state, _ = read_checkpoint(checkpoint_path(parent.path / "checkpoints", 2))
    _, tensors = read_checkpoint(checkpoint_path(other.path / "checkpoints", 2))
    state = {name: value for name, value in state.items() if name not in ("step", "checksums")}
    save_checkpoint(parent.path / "checkpoints", 2, tensors, state, keep=1)  # of the same settings, by other code
    with pytest.raises(ConfigError, match="began with other weights than"):
        begin_extension(read_run(parent.path), 2, {})
    run(tmp_path, extended(experiment, 3), small)
    with pytest.raises(ConfigError, match="was not begun as an extension"):
        begin_extension(parent, 3, {})


def test_zones_belong_to_the_length_of_the_run(tmp_path, small):
    settings = load_experiment("quickstart-noise-aqn")
    aqn = settings.aqn.model_copy(update={"schedule": "constant", "layers": "zone"})
    status = Status("complete", 4, 4)
    parent = Run(tmp_path, settings.model_copy(update={"aqn": aqn}), small, 0, status, {}, ())
    assert "zones of AQN changed places in the middle of 4 steps, not of 8" in differences(parent, 2)


@pytest.mark.parametrize(
    ("place", "given"), [("x/p-1/seed-0", "."), ("x/p-1", "seed-0"), ("x/p-1/seed-1", "../seed-0")]
)
def test_a_run_named_from_within_its_directories_lies_below_the_same_root(tmp_path, monkeypatch, place, given):
    (tmp_path / "x" / "p-1" / "seed-0").mkdir(parents=True)
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    assert runs_root(Path(given)) == tmp_path
    assert runs_root(Path("runs/x/p-1/seed-0")) == Path("runs")


def test_id_title_and_baseline_say_from_where_to_where_a_run_was_extended():
    experiment = load_experiment("quickstart-noise")
    twice = extended(experiment, 2)
    assert (twice.id, twice.baseline) == ("quickstart-noise+epochs=1to2", "quickstart-clean+epochs=1to2")
    again = extended(twice, 4)
    assert (again.id, again.baseline) == ("quickstart-noise+epochs=1to2to4", "quickstart-clean+epochs=1to2to4")
    assert twice.title == f"{experiment.title} (1 to 2 epochs)"
    assert again.title == f"{experiment.title} (1 to 2 to 4 epochs)"
    untitled = experiment.model_copy(update={"title": ""})
    assert extended(untitled, 2).title == ""
    with pytest.raises(ConfigError, match="--epochs must be above the 4"):
        extended(again, 4)


def test_what_cannot_be_extended(tmp_path, small):
    experiment = load_experiment("quickstart-clean")
    stopped = run(tmp_path / "stopped", experiment, small, stop_after=1)
    with pytest.raises(ConfigError, match="is interrupted, not complete"):
        begin_extension(stopped, 2, {})
    parent = run(tmp_path / "damaged", experiment, small)
    victim = parent.path / "checkpoints" / "step-000002" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match="step-000002"):
        begin_extension(parent, 2, {})
    path = run_path(tmp_path / "damaged", extended(experiment, 2), small, 0)
    assert not (path / "status.json").exists()


def test_a_kill_while_the_directory_is_made_is_made_good(tmp_path, small, monkeypatch):
    parent = run(tmp_path, load_experiment("quickstart-clean"), small)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("roundoff.runs.directory.RunDirectory.set_status", die)
        with pytest.raises(KeyboardInterrupt):
            begin_extension(parent, 2, {})
    longer = extend(parent, 2)
    assert longer.is_final
    assert [row["step"] for row in reproducible(longer.path)] == list(range(5))
    assert read_run(parent.path).is_final
