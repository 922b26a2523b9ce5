"""A run on a pretended accelerator: all of its tensors are there, and none stays on the CPU."""

import contextlib
from importlib import import_module

import pytest
import torch

from roundoff.config import LoRA
from roundoff.experiments import load_experiment
from tests.pretend_device import MixedDevicesError, WaitError, pretended, side, waits
from tests.training.test_loop import run, with_training


def small_run(monkeypatch, tmp_path, profile, name, *, lora=None, **training):
    asked = []
    for module in ("policy", "checks", "loop"):
        monkeypatch.setattr(
            import_module(f"roundoff.training.{module}"),
            "resolve_device",
            lambda wanted: asked.append(wanted) or "cuda",
        )
    experiment = load_experiment(name).model_copy(update={"epochs": 1, "lora": lora})
    if experiment.aqn is not None:
        experiment = experiment.model_copy(update={"aqn": experiment.aqn.model_copy(update={"schedule": "constant"})})
    settings = {**profile.task.settings, "test_problems": 8}
    profile = with_training(profile, **{"prompts_per_step": 4, "max_new_tokens": 8} | training)
    profile = profile.model_copy(update={"task": profile.task.model_copy(update={"settings": settings})})
    finished = run(tmp_path, experiment, profile)
    assert asked
    return finished


def test_the_pretence_is_noticed_where_it_should_be():
    with pretended() as device:
        there, here = torch.ones(2, device=device), torch.ones(2)
        assert there.device.type == "cuda"
        assert not there.is_cpu
        assert here.is_cpu
        assert side(there + 1) == side(there * torch.tensor(2.0)) == "cuda"  # a number may come from the CPU
        assert side(there[torch.tensor([0])]) == "cuda"
        assert (there.cpu() + here).tolist() == [2.0, 2.0]
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there > 0],
            lambda: here * there.sum(),
            lambda: there.numpy(),
        ):
            with pytest.raises(MixedDevicesError):
                mixed()


def test_waits_are_noticed_where_they_should_be():
    with pretended() as device:
        there, here = torch.ones(2, device=device), torch.ones(2)
        mask, index = there > 0, torch.tensor([0]).pin_memory().to(device, non_blocking=True)
        for waiting in (
            lambda: there.sum().item(),
            lambda: bool(mask.any()),
            lambda: float(there[index]),
            lambda: int(index),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: there.to("cpu"),
            lambda: there.nonzero(),
            lambda: torch.where(mask),
            lambda: there[mask],
            lambda: there[torch.tensor([0])],
            lambda: there[[0, 1]],
            lambda: there.repeat_interleave(index + 1),
            lambda: torch.equal(there, there),
            lambda: torch.unique(there),
            lambda: torch.tensor([1.0], device=device),
            lambda: torch.as_tensor([1.0], device=device),
            lambda: here.to(device),
            lambda: here.to(device, non_blocking=True),  # not from pinned memory
            lambda: there.copy_(here),
            lambda: here.copy_(there),
        ):
            with waits() as waited, contextlib.suppress(RuntimeError):
                waiting()
            assert len(waited) == 1, waited
            with waits(refused=True), pytest.raises(WaitError):
                waiting()
        with waits(refused=True):
            torch.full((2,), 3, device=device)
            torch.arange(2, device=device)
            here.pin_memory().to(device, non_blocking=True)
            there.to("cpu", non_blocking=True)
            there.index_put_((index,), there[index] * 2.0)
            there.repeat_interleave(torch.cat([index, index + 1]), output_size=1)
            torch.where(mask, there, 0.0)


@pytest.mark.parametrize("name", ["quickstart-clean", "Baseline"])
def test_a_run_stays_on_its_device(monkeypatch, tmp_path, small, name):
    with pretended():
        assert small_run(monkeypatch, tmp_path, small, name).is_final


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("quickstart-noise-aqn", {}),
        ("quickstart-mxfp4", {"lora": LoRA(rank=4, dropout=0.1)}),
        ("E3b", {"prompts_per_step": 2}),
        ("E9b", {}),
        ("ratio-noise-rollout", {"prompts_per_step": 2, "micro_batch": 8}),
        ("ratio-clean-one", {}),
    ],
)
def test_a_run_with_every_option_stays_on_its_device(monkeypatch, tmp_path, small, name, changes):
    with pretended():
        assert small_run(monkeypatch, tmp_path, small, name, **changes).is_final
