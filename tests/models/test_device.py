"""A run on a pretended accelerator: all of its tensors are there, and none stays on the CPU."""

from importlib import import_module

import pytest
import torch

from roundoff.config import LoRA
from roundoff.experiments import load_experiment
from tests.pretend_device import MixedDevicesError, pretended, side
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
