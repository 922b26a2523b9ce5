"""Phases inside trl's GRPOTrainer: rollouts, evaluations and all other passes compute on their own hardware."""

import copy
from types import SimpleNamespace

import pytest
import torch

from roundoff.aqn.noise import is_aqn_active
from roundoff.config import AQN, ConfigError, Hardware, validate
from roundoff.hardware import install, installed, uninstall
from roundoff.plugins.trl import (
    AqnCallback,
    PhaseCallback,
    check_gradient_checkpointing,
    install_in_trainer,
    uninstall_from_trainer,
)
from tests.families import build
from tests.plugins.real_trainer import real_trainer

CONSTANT = AQN(sigma_start=0.1, sigma_end=0.1, schedule="constant")
IDS = torch.arange(1, 6)[None]


def hardware(**settings):
    return validate(Hardware, settings, source="test")


THREE = hardware(
    rollout={"precision": {"weight": "nvfp4"}},
    training={"precision": {"weight": "hif8"}},
    evaluation={"precision": {"weight": "mxfp4"}},
)


class Trainer:
    """The parts of a trainer that the plugin sees: model, arguments, callbacks, and events around generation."""

    def __init__(self, callbacks=(), **arguments):
        self.model, self.ref_model, self.callbacks = build("qwen2"), None, list(callbacks)
        defaults = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": 1}
        self.args = SimpleNamespace(**defaults | arguments)
        self.state = SimpleNamespace(max_steps=4, global_step=0)
        self.rollout_func = None

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def remove_callback(self, kind):
        self.callbacks = [callback for callback in self.callbacks if type(callback) is not kind]

    def event(self, name):
        for callback in self.callbacks:
            getattr(callback, name)(self.args, self.state, None, model=self.model, train_dataloader=range(4))

    def generate(self, *, training, model=None):
        model = model or self.model
        model.train(training)
        with torch.no_grad():
            return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)


def watched(model):
    """Records, at each forward pass, the phase in force and whether AQN is."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append((installed(module).runtime.phase, is_aqn_active(module)))
    )
    return seen


def phases_of_each_pass(trainer, seen):
    """What a rollout, a training pass and an evaluation saw."""
    found = []
    for run in (
        lambda: trainer.generate(training=True),
        lambda: trainer.model(IDS),
        lambda: trainer.generate(training=False),
    ):
        seen.clear()
        run()
        found.append(set(seen))
    return found


def test_rollouts_and_evaluations_are_generated_on_their_own_hardware():
    trainer = Trainer()
    trainer.ref_model = build("qwen2")
    state = install_in_trainer(trainer, THREE, seed=0)
    assert "# training" in state.summary()
    seen = watched(trainer.model)
    expected = [{("rollout", False)}, {("training", False)}, {("evaluation", False)}]
    assert phases_of_each_pass(trainer, seen) == expected  # before train(): trainer.evaluate() may come first
    trainer.event("on_train_begin")
    assert phases_of_each_pass(trainer, seen) == expected
    trainer.event("on_step_end")
    assert installed(trainer.ref_model).runtime.phase == "training"
    assert state.runtime.blocks == []


def test_a_rollout_has_the_logits_of_a_model_on_the_hardware_of_rollouts():
    def logits(model, *, training):
        model.train(training)
        return model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        ).logits[0]  # fmt: skip

    trainer = Trainer()
    install_in_trainer(trainer, THREE, seed=0)
    alone = {}
    for phase in ("rollout", "training", "evaluation"):
        model = build("qwen2")
        install(model, THREE.of(phase), seed=0)
        alone[phase] = model(IDS).logits if phase == "training" else logits(model, training=True)
    assert torch.equal(logits(trainer.model, training=True), alone["rollout"])
    assert torch.equal(logits(trainer.model, training=False), alone["evaluation"])
    assert torch.equal(trainer.model(IDS).logits, alone["training"])
    assert not torch.equal(alone["rollout"], alone["evaluation"])
    assert not torch.allclose(alone["rollout"], alone["training"][:, -1], atol=1e-4)  # not a matter of rounding


@pytest.mark.parametrize("aqn_first", [False, True])
def test_phases_and_aqn_enclose_one_generate_in_either_order(aqn_first):
    trainer = Trainer()
    callback = AqnCallback(CONSTANT, seed=0)
    if aqn_first:
        trainer.callbacks.append(callback)
        trainer.event("on_train_begin")
        install_in_trainer(trainer, THREE, seed=0)
    else:
        install_in_trainer(trainer, THREE, seed=0)
        trainer.callbacks.insert(0, callback)
        trainer.event("on_train_begin")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = watched(trainer.model)
    noisy = [{("rollout", True)}, {("training", False)}, {("evaluation", False)}]
    assert phases_of_each_pass(trainer, seen) == noisy
    assert callback.sigmas == {1: 0.1}
    trainer.event("on_train_end")  # AQN ends with training, while the phases stay
    assert [phase for ((phase, active),) in phases_of_each_pass(trainer, seen) if not active] == [
        "rollout", "training", "evaluation",
    ]  # fmt: skip
    uninstall_from_trainer(trainer)
    assert "generate" not in vars(trainer.model)
    assert installed(trainer.model) is None
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_hardware_may_leave_while_aqn_stays():
    trainer = Trainer([AqnCallback(CONSTANT, seed=0)])
    install_in_trainer(trainer, THREE, seed=0)
    trainer.event("on_train_begin")
    uninstall_from_trainer(trainer)
    active = []
    trainer.model.register_forward_pre_hook(lambda module, _: active.append(is_aqn_active(module)))
    trainer.generate(training=True)
    assert set(active) == {True}
    trainer.event("on_train_end")
    assert "generate" not in vars(trainer.model)


def test_phases_that_agree_leave_generate_alone():
    trainer = Trainer(use_transformers_continuous_batching=True)
    for settings in (hardware(precision={"weight": "mxfp4"}), hardware(rollout={"precision": {"weight": "none"}})):
        install_in_trainer(trainer, settings, seed=0)
        assert "generate" not in vars(trainer.model)
        assert trainer.callbacks == []
        uninstall_from_trainer(trainer)


def test_an_exception_in_a_rollout_ends_its_phase():
    trainer = Trainer()
    state = install_in_trainer(trainer, THREE, seed=0)
    trainer.model.train()
    with pytest.raises(AttributeError):
        trainer.model.generate(object())
    assert state.runtime.phase == "training"
    assert state.runtime.blocks == []


def test_a_copy_of_the_model_generates_with_itself():
    trainer = Trainer()
    install_in_trainer(trainer, THREE, seed=0)
    copied = copy.deepcopy(trainer.model)
    seen, original = watched(copied), watched(trainer.model)
    trainer.generate(training=True, model=copied)
    assert {phase for phase, _ in seen} == {"rollout"}
    assert original == []


def test_vllm_is_refused_with_any_hardware():
    trainer = Trainer(use_vllm=True)
    for settings in (THREE, hardware(precision={"weight": "mxfp4"})):
        with pytest.raises(ConfigError, match="use_vllm = True generates in vLLM, which computes without the hardware"):
            install_in_trainer(trainer, settings, seed=0)
    assert installed(trainer.model) is None


@pytest.mark.parametrize("name", ["use_transformers_continuous_batching", "use_transformers_paged"])
def test_other_ways_to_generate_are_refused_before_anything_is_installed(name):
    trainer = Trainer(**{name: True})
    with pytest.raises(ConfigError, match=f"{name} = True generates without model.generate, where hardware.rollout"):
        install_in_trainer(trainer, THREE, seed=0)
    trainer = Trainer()
    trainer.rollout_func = print
    with pytest.raises(ConfigError, match="rollout_func generates in a way of its own"):
        install_in_trainer(trainer, THREE, seed=0)
    assert installed(trainer.model) is None
    install_in_trainer(trainer, hardware(precision={"weight": "mxfp4"}), seed=0)  # without phases it is no matter


def test_a_generate_that_somebody_else_replaced_is_refused():
    trainer = Trainer()
    trainer.model.generate = lambda *_: None
    with pytest.raises(ConfigError, match=r"replaced by function <lambda>, .*del model\.generate"):
        install_in_trainer(trainer, THREE, seed=0)
    assert installed(trainer.model) is None


def test_a_trainer_that_never_calls_generate_is_stopped_after_its_first_step():
    trainer = Trainer()
    install_in_trainer(trainer, THREE, seed=0)
    trainer.event("on_train_begin")
    trainer.generate(training=False)  # an evaluation is no rollout
    with pytest.raises(RuntimeError, match=r"hardware\.rollout was never in force"):
        trainer.event("on_step_end")


def test_installing_again_after_a_plain_uninstall_has_one_block():
    trainer = Trainer()
    install_in_trainer(trainer, THREE, seed=0)
    uninstall(trainer.model)
    trainer.generate(training=True)  # without hardware: plain
    install_in_trainer(trainer, THREE, seed=0)
    assert [type(callback) for callback in trainer.callbacks] == [PhaseCallback]
    assert phases_of_each_pass(trainer, watched(trainer.model))[0] == {("rollout", False)}
    uninstall(trainer.model)
    install_in_trainer(trainer, hardware(precision={"weight": "mxfp4"}), seed=0)
    assert trainer.callbacks == [] and "generate" not in vars(trainer.model)


def test_a_reference_that_cannot_be_installed_leaves_the_policy_as_it_was():
    trainer = Trainer()
    trainer.ref_model = torch.nn.LayerNorm(2)
    with pytest.raises(ConfigError, match="leaves no Linear to compute"):
        install_in_trainer(trainer, THREE, seed=0)
    assert installed(trainer.model) is None
    assert "generate" not in vars(trainer.model)


def test_the_wrapper_of_adapters_generates_in_its_phase():
    peft = pytest.importorskip("peft")
    trainer = Trainer()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer.model = peft.get_peft_model(trainer.model, config)
    install_in_trainer(trainer, THREE, seed=0)
    expected = [{("rollout", False)}, {("training", False)}, {("evaluation", False)}]
    assert phases_of_each_pass(trainer, watched(trainer.model.base_model.model)) == expected


def test_noise_of_rollouts_alone_goes_with_gradient_checkpointing():
    for settings, refused in [
        (hardware(matmul_noise={"relative_std": 0.1}, training={"matmul_noise": "none"}), False),
        (hardware(training={"matmul_noise": {"relative_std": 0.1}}), True),
    ]:
        model = build("qwen2")
        install(model, settings, seed=0)
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
        if refused:
            with pytest.raises(ConfigError, match="set gradient_checkpointing=False"):
                check_gradient_checkpointing(model)
        else:
            check_gradient_checkpointing(model)


@pytest.mark.slow
def test_inside_a_real_trainer_every_pass_has_its_phase(tmp_path):
    callback = AqnCallback(CONSTANT, seed=0)
    trainer = real_trainer(tmp_path, callback)
    install_in_trainer(trainer, THREE, seed=0)
    seen, of_reference = set(), set()

    def see(model, _):
        seen.add((model.training, torch.is_grad_enabled(), installed(model).runtime.phase, is_aqn_active(model)))

    trainer.model.register_forward_pre_hook(see)
    trainer.ref_model.register_forward_pre_hook(lambda model, _: of_reference.add(installed(model).runtime.phase))
    trainer.train()
    assert callback.sigmas == {1: 0.1, 2: 0.1}
    assert seen == {
        (True, True, "training", False),  # training passes
        (True, False, "rollout", True),  # rollouts
        (False, False, "evaluation", False),  # the score of an evaluation
        (False, False, "training", False),  # its loss
    }
    assert of_reference == {"training"}
    uninstall_from_trainer(trainer)
    assert "generate" not in vars(trainer.model)
    assert not any(isinstance(one, PhaseCallback) for one in trainer.callback_handler.callbacks)
