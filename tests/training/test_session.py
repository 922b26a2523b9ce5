"""A session with adapters: what the optimizer moves, what the policy is compared with, what is saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from roundoff.actions.evaluate import score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.actions.export import export
from roundoff.config import ConfigError, LoRA
from roundoff.experiments import load_experiment
from roundoff.models.load import TINY_DIRECTORY
from roundoff.runs.checkpoint import Checkpoint, DamagedCheckpointError, load_checkpoint
from roundoff.runs.record import read_run
from roundoff.training.loop import sample_batch, take_step
from roundoff.training.policy import put_weights
from roundoff.training.preparation import prepare
from roundoff.training.update import before_update, split_into_minibatches
from tests.launch.test_survival import left
from tests.training.test_loop import run, with_algorithm, with_training

NOISE = load_experiment("quickstart-noise")


def with_lora(experiment=NOISE, **settings):
    return experiment.model_copy(update={"lora": LoRA(**{"rank": 4, **settings})})


def test_adapters_alone_are_moved_at_their_own_learning_rate(small):
    session = prepare(with_lora(), with_training(small, lora_learning_rate=0.01), 0)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    row = take_step(session, 1, None)
    assert row["learning_rate"] == 0.01
    assert row["trained"]
    moved = {name for name, p in session.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert len(session.optimizer.param_groups[0]["params"]) == 84


def test_the_reference_is_the_base_and_no_second_model(small):
    profile = with_training(small, lora_learning_rate=0.01)
    lora, full = prepare(with_lora(), profile, 0), prepare(NOISE, profile, 0)
    assert lora.reference is None
    assert full.reference is not None
    part = split_into_minibatches(full, sample_batch(full, 1))[0]
    for step in (1, 2):
        take_step(lora, step, None)  # the policy leaves its reference
    expected = before_update(full, 3, part, first=False)
    found = before_update(lora, 3, part, first=False)
    assert torch.equal(found.reference, expected.reference)  # same noise keys, same quantized weights
    assert not torch.equal(found.old, expected.old)
    assert torch.equal(expected.old, expected.reference)  # the full model has not been trained


def test_without_a_kl_penalty_there_is_no_reference_pass(small):
    session = prepare(with_algorithm(with_lora(), kl_coefficient=0.0), small, 0)
    part = split_into_minibatches(session, sample_batch(session, 1))[0]
    assert before_update(session, 1, part, first=True).reference is None


@pytest.mark.parametrize("ratio", ["replayed", "recomputed"])
def test_dropout_belongs_to_the_key_of_its_pass(small, ratio):
    experiment = with_algorithm(with_lora(load_experiment("quickstart-clean"), dropout=0.3), ratio=ratio)
    session = prepare(experiment, with_training(small, minibatches=1, lora_learning_rate=0.01), 0)
    first, second = (take_step(session, step, None) for step in (1, 2))
    assert (first["ratio_mean"], first["ratio_std"]) == (1.0, 0.0)  # B is zero: there is nothing to drop yet
    assert (second["ratio_std"] == 0.0) == (ratio == "replayed")


def test_dropout_does_not_depend_on_micro_batches(small):
    updated = []
    for micro_batch in (0, 12):
        profile = with_training(small, micro_batch=micro_batch, lora_learning_rate=0.01, minibatches=1)
        session = prepare(with_lora(load_experiment("quickstart-clean"), dropout=0.3), profile, 0)
        updated.append([take_step(session, step, None) for step in (1, 2)][1])
    # sums of float32 products in another order
    assert updated[0]["loss"] == pytest.approx(updated[1]["loss"], abs=1e-5)
    assert updated[0]["grad_norm"] == pytest.approx(updated[1]["grad_norm"], rel=1e-3)


def test_checkpoints_hold_adapters_alone_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path, small):
    experiment = with_lora(load_experiment("quickstart-noise-aqn"), dropout=0.1)
    whole = run(tmp_path / "whole", experiment, small)
    run(tmp_path / "parts", experiment, small, stop_after=1)
    resumed = run(tmp_path / "parts", experiment, small)
    assert left(resumed.path) == left(whole.path)
    checkpoint = load_checkpoint(whole.path / "checkpoints")
    assert len(checkpoint.tensors["model"]) == 84
    assert all(".lora_" in name for group in checkpoint.tensors.values() for name in group)
    assert sorted(p.name for p in (whole.path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_target_that_matches_nothing_is_refused_before_anything_is_written(tmp_path, small):
    with pytest.raises(ConfigError, match=r"lora\.targets names 'q_prj'.*did you mean 'q_proj'"):
        run(tmp_path, with_lora(targets=("q_prj",)), small)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_weights_of_another_model_are_refused_by_name(small):
    session = prepare(with_lora(), small, 0)
    weights = {name: p.detach().clone() for name, p in session.trainable.items()}
    name, value = next(iter(weights.items()))

    def put(given, base=session.policy.base):
        put_weights(session.policy, Checkpoint(0, {"model": given}, {"base": base}, ()))

    put(weights)
    with pytest.raises(DamagedCheckpointError, match=name):
        put({**weights, name: value[:1]})
    with pytest.raises(DamagedCheckpointError, match=name):
        put({n: w for n, w in weights.items() if n != name})
    with pytest.raises(ConfigError, match="model 'tiny' has changed"):
        put(weights, base="0")


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_changed_under_a_run_ends_it_and_not_its_full_score(tmp_path, small, lora):
    model = tmp_path / "model"
    shutil.copytree(TINY_DIRECTORY, model, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    profile = small.model_copy(update={"model": str(model)})
    experiment = with_lora() if lora else NOISE
    stopped = run(tmp_path / "runs", experiment, profile, stop_after=1)
    content = load_file(model / "model.safetensors")
    content["model.norm.weight"][0] += 1
    save_file(content, model / "model.safetensors", metadata={"format": "pt"})
    before = left(stopped.path)
    with pytest.raises(ConfigError, match="has changed since this run began"):
        run(tmp_path / "runs", experiment, profile)
    assert left(stopped.path) == before
    if lora:  # the adapters are worth nothing without their base; whole weights replace it
        with pytest.raises(ConfigError, match="has changed since this run began"):
            score_subject(open_subject(str(stopped.path)))
    else:
        assert score_subject(open_subject(str(stopped.path), step=0)).agrees


@pytest.mark.parametrize("change", ["seed", "experiment", "epochs"])
def test_a_checkpoint_of_another_run_of_the_same_model_is_refused(tmp_path, small, change):
    clean = load_experiment("quickstart-clean")
    others = {"experiment": NOISE, "epochs": clean.model_copy(update={"epochs": 2, "id": "longer"})}
    mine = run(tmp_path / "mine", clean, small, stop_after=1)
    other = run(tmp_path / "other", others.get(change, clean), small, seed=int(change == "seed"))
    shutil.copytree(other.path / "checkpoints", mine.path / "checkpoints", dirs_exist_ok=True)
    before = left(mine.path)
    with pytest.raises(ConfigError, match=r"was written by another run .*remove it from this run's checkpoints"):
        run(tmp_path / "mine", clean, small)
    assert left(mine.path) == before
    with pytest.raises(ConfigError, match="was written by another run"):
        open_subject(str(mine.path))
    with pytest.raises(ConfigError, match="was written by another run"):
        export(read_run(mine.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path, small):
    made = run(tmp_path, load_experiment("quickstart-clean"), small)
    checkpoints = made.path / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / "step-000009")
    with pytest.raises(DamagedCheckpointError, match="holds the state of step 2, not of the step it is named"):
        load_checkpoint(checkpoints, 9)
    assert load_checkpoint(checkpoints).step < 2
