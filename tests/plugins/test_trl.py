"""AQN inside trl's GRPOTrainer: it is in force in rollouts only, and it is an error if it never is."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from roundoff.aqn.noise import is_aqn_active
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import AQN, ConfigError, Hardware, LoRA, MatmulNoise, Precision
from roundoff.hardware import install, installed
from roundoff.models.lora import attach
from roundoff.numerics.rng import Key
from roundoff.plugins.trl import AqnCallback, install_in_trainer
from tests.families import build
from tests.plugins.real_trainer import real_trainer

SETTINGS = AQN(sigma_start=0.1, sigma_end=0.01, schedule="global", stages=4)
ROOT = Path(__file__).parents[2]


class Trainer:
    """The parts of a trainer that the callback sees: arguments, state, and events around generation."""

    def __init__(self, model, callback, **arguments):
        self.model, self.callback = model, callback
        defaults = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1, "use_vllm": False}
        self.args = SimpleNamespace(**defaults | arguments)
        self.state = SimpleNamespace(max_steps=4, global_step=0)

    def event(self, name):
        getattr(self.callback, name)(self.args, self.state, None, model=self.model, train_dataloader=range(4))

    def generate(self):
        ids = torch.arange(1, 6)[None]
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)

    def step(self):
        self.event("on_step_begin")
        self.model.train()
        self.generate()
        self.state.global_step += 1
        self.event("on_step_end")


def watched(model):
    """Records, at each forward pass, whether AQN is in force and the sum of the norm weights."""
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append((is_aqn_active(model), float(model.model.norm.weight.detach().sum())))
    )
    return seen


def test_noise_is_on_the_weights_in_rollouts_of_its_steps_alone():
    model = build("qwen2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clean = float(model.model.norm.weight.detach().sum())
    seen = watched(model)
    trainer = Trainer(model, AqnCallback(SETTINGS, seed=0))
    trainer.event("on_train_begin")
    sums = []
    for _ in range(4):
        seen.clear()
        trainer.step()
        assert len({value for _, value in seen}) == 1  # one draw for a rollout of two tokens
        sums.append(seen[0])
        seen.clear()
        model(torch.arange(1, 6)[None])  # a training pass
        model.eval()
        trainer.generate()  # an evaluation
        assert set(seen) == {(False, clean)}
    assert sums[0] == (False, clean)  # the silent interval
    assert all(active and value != clean for active, value in sums[1:])
    assert len({value for _, value in sums}) == 4
    assert [trainer.callback.sigmas[step] for step in (1, 2, 3, 4)] == sigma_curve(4, 4, SETTINGS)
    trainer.event("on_train_end")
    assert "generate" not in vars(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_same_seed_draws_the_same_noise():
    def sums(seed):
        model = build("qwen2")
        seen = watched(model)
        trainer = Trainer(model, AqnCallback(SETTINGS, seed=seed))
        trainer.event("on_train_begin")
        for _ in range(3):
            trainer.step()
        return seen

    assert sums(0) == sums(0)
    assert sums(0) != sums(1)


def test_multipliers_choose_the_layers():
    model = build("qwen2")
    weights = [layer.input_layernorm.weight for layer in model.model.layers]
    before = [w.detach().clone() for w in weights]
    changed = []
    model.register_forward_pre_hook(
        lambda *_: changed.append([not torch.equal(w, b) for w, b in zip(weights, before, strict=True)])
    )
    trainer = Trainer(model, AqnCallback(SETTINGS, seed=0, multipliers={0: 0.0, 1: 1.0}))
    trainer.event("on_train_begin")
    trainer.step()
    changed.clear()
    trainer.step()
    assert changed[0] == [False, True]


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_other_ways_to_generate_are_refused_at_once(name):
    trainer = Trainer(build("qwen2"), AqnCallback(SETTINGS, seed=0), **{name: True})
    with pytest.raises(ConfigError, match=f"{name} = True generates without model.generate"):
        trainer.event("on_train_begin")


def test_a_trainer_that_never_calls_generate_is_stopped_after_its_first_step():
    trainer = Trainer(build("qwen2"), AqnCallback(SETTINGS, seed=0))
    trainer.event("on_train_begin")
    trainer.event("on_step_begin")
    with pytest.raises(RuntimeError, match=r"without calling model\.generate"):
        trainer.event("on_step_end")
    assert "generate" not in vars(trainer.model)


def test_two_callbacks_on_one_model_are_refused():
    model = build("qwen2")
    Trainer(model, AqnCallback(SETTINGS, seed=0)).event("on_train_begin")
    with pytest.raises(ConfigError, match="wrapped already"):
        Trainer(model, AqnCallback(SETTINGS, seed=0)).event("on_train_begin")


def test_training_that_an_exception_ended_can_be_begun_again():
    model = build("qwen2")
    trainer = Trainer(model, AqnCallback(SETTINGS, seed=0))
    trainer.event("on_train_begin")
    trainer.step()
    plain = type(model).generate
    trainer.event("on_train_begin")  # as after Ctrl-C: on_train_end never came
    seen = watched(model)
    trainer.step()
    assert len({value for _, value in seen}) == 1
    trainer.event("on_train_end")
    assert "generate" not in vars(model)
    assert type(model).generate is plain


def test_an_exception_in_a_rollout_leaves_no_noise():
    model = build("qwen2")
    before = model.model.norm.weight.detach().clone()
    trainer = Trainer(model, AqnCallback(SETTINGS.model_copy(update={"schedule": "constant"}), seed=0))
    trainer.event("on_train_begin")
    trainer.event("on_step_begin")
    model.train()
    with pytest.raises(AttributeError):
        model.generate(object())
    assert trainer.callback.sigmas == {1: 0.1}
    assert torch.equal(model.model.norm.weight, before)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, 4),
        ({"num_train_epochs": 2.0}, 2),
        ({"num_train_epochs": 3.0, "max_steps": 4}, 4),  # trl's default of epochs plays no part: 4 batches are one
        ({"num_train_epochs": 3.0, "max_steps": 4, "gradient_accumulation_steps": 2}, 2),
    ],
)
def test_epochs_of_the_schedule_are_those_of_the_trainer(arguments, steps):
    aqn = AQN(sigma_start=0.1, sigma_end=0.01, schedule="epoch", stages=1)
    trainer = Trainer(build("qwen2"), AqnCallback(aqn, seed=0), **arguments)
    trainer.event("on_train_begin")
    for _ in range(4):
        trainer.step()
    assert list(trainer.callback.sigmas.values()) == sigma_curve(4, steps, aqn)


def test_a_step_on_the_rollouts_of_the_one_before_has_its_sigma():
    trainer = Trainer(build("qwen2"), AqnCallback(SETTINGS.model_copy(update={"schedule": "linear"}), seed=0))
    trainer.event("on_train_begin")
    trainer.step()
    trainer.event("on_step_begin")
    trainer.event("on_step_end")
    assert trainer.callback.sigmas == {1: 0.1, 2: 0.1}


def test_noisy_layers_that_are_computed_again_are_refused():
    for hardware, refused in [
        (Hardware(matmul_noise=MatmulNoise(relative_std=0.1)), True),
        (Hardware(precision=Precision(gradient="mxfp4", gradient_rounding="stochastic")), True),
        (Hardware(precision=Precision(weight="mxfp4", gradient="mxfp4")), False),
    ]:
        model = build("qwen2")
        install(model, hardware, seed=0)
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
        trainer = Trainer(model, AqnCallback(SETTINGS, seed=0))
        if refused:
            with pytest.raises(ConfigError, match="set gradient_checkpointing=False in GRPOConfig"):
                trainer.event("on_train_begin")
        else:
            trainer.event("on_train_begin")


def test_policy_and_reference_are_put_on_the_hardware():
    hardware = Hardware(precision=Precision(weight="mxfp4"))
    trainer = SimpleNamespace(model=build("qwen2"), ref_model=build("qwen2"))
    assert len(install_in_trainer(trainer, hardware, seed=0).entries) == 14
    assert installed(trainer.ref_model).hardware == hardware
    everything = SimpleNamespace(model=build("qwen2"), ref_model=None)
    with pytest.raises(ConfigError, match="trl computes log-probabilities past that module"):
        install_in_trainer(everything, hardware.model_copy(update={"exclude": ()}), seed=0)
    assert installed(everything.model) is None
    adapted = SimpleNamespace(model=build("qwen2"), ref_model=None)
    attach(adapted.model, LoRA(rank=2), Key.from_seed(0))
    names = [entry.name for entry in install_in_trainer(adapted, hardware, seed=0).entries]
    assert len(names) == 14
    assert all(name.endswith(".base_layer") for name in names)  # adapters stay in high precision


def test_a_config_copied_from_an_installed_model_is_an_error_that_says_so():
    model = build("qwen2")
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.1)), seed=0)
    other = type(model)(model.config)
    with pytest.raises(RuntimeError, match="install the hardware on this model, too"):
        other(torch.arange(1, 6)[None])


@pytest.mark.slow
def test_the_example_runs_two_steps():
    pytest.importorskip("trl", reason="trl is not installed here: pip install 'roundoff[trl]'")
    done = subprocess.run(
        [sys.executable, "examples/with_trl.py", "2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "42 modules: weight mxfp4" in done.stdout
    assert re.search(r"step 1: reward 0\.\d+, sigma 0\.0000\nstep 2: reward 0\.\d+, sigma 0\.0020\n", done.stdout)
    assert re.search(r"step 2: evaluation reward 0\.\d+", done.stdout)


@pytest.mark.slow
def test_inside_a_real_trainer_training_and_evaluation_never_see_the_noise(tmp_path):
    callback = AqnCallback(SETTINGS.model_copy(update={"schedule": "constant"}), seed=0)
    trainer = real_trainer(tmp_path, callback)
    install_in_trainer(trainer, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    assert len(installed(trainer.ref_model).entries) == len(installed(trainer.model).entries) == 42
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, *_: seen.append((model.training, torch.is_grad_enabled(), is_aqn_active(model)))
    )
    trainer.train()
    assert callback.sigmas == {1: 0.1, 2: 0.1}
    assert (True, True, False) in seen  # training passes
    assert (True, False, True) in seen  # rollouts
    assert (False, False, False) in seen  # evaluation
    assert {(training, grad) for training, grad, active in seen if active} == {(True, False)}
