"""How often a training step waits for its device: in a rollout and in an update, for every kind of hardware."""

from importlib import import_module

import pytest
import torch

from roundoff.config import Deadzone, Fault, Hardware, LoRA, MatmulNoise, Precision
from roundoff.errors import RoundoffWarning
from roundoff.experiments import load_experiment
from roundoff.hardware import install
from roundoff.training.loop import sample_batch
from roundoff.training.preparation import prepare
from roundoff.training.update import NonFiniteLossError, update
from tests.pretend_device import pretended, waits
from tests.small_models import make
from tests.training.test_loop import with_algorithm, with_training

W4A4 = Precision(weight="mxfp4", activation="mxfp4")
HARDWARE = {
    "plain": Hardware(),
    "W4A4": Hardware(precision=W4A4),
    "NVFP4": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "noise": Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
    "noise on one layer": Hardware(
        matmul_noise=MatmulNoise(relative_std=0.05), exclude=("embed_tokens", "lm_head", "model.layers.[1-9].*")
    ),
    "deadzone": Hardware(precision=W4A4, deadzone=Deadzone(threshold=0.01, layers=(0, 1))),
    "faults": Hardware(
        faults=(
            Fault(kind="stuck", layer=0, module="mlp.up_proj", amount=0.01, share=0.02),
            Fault(kind="bitflip", layer=1, amount=1.0, bit=3, share=0.01),
            Fault(kind="noise", layer=1, amount=0.02),
        )
    ),
}
LORA = LoRA(rank=4, dropout=0.1)


def session_on(monkeypatch, profile, experiment, **training):
    for module in ("policy", "checks"):
        monkeypatch.setattr(import_module(f"roundoff.training.{module}"), "resolve_device", lambda _: "cuda")
    settings = {"prompts_per_step": 4, "max_new_tokens": 17, "minibatches": 2} | training
    return prepare(experiment, with_training(profile, **settings), 0)


def waits_of(session, step=1):
    """The waits of a rollout, and those of an update."""
    for group in session.optimizer.param_groups:
        group["lr"] = 1e-4
    with waits() as rollout:
        batch = sample_batch(session, step)
    batch.advantages[::2], batch.advantages[1::2] = 1.0, -1.0  # as if every other rollout were right
    with waits() as updating:
        metrics = update(session, step, batch)
    assert metrics["grad_norm"] > 0
    return rollout, updating


@pytest.mark.parametrize(
    ("hardware", "lora", "ratio"),
    [
        ("plain", None, "replayed"),
        ("W4A4", None, "replayed"),
        ("noise on one layer", None, "replayed"),
        pytest.param("noise", None, "replayed", marks=pytest.mark.slow),
        ("deadzone", None, "replayed"),
        ("faults", None, "replayed"),
        ("W4A4", LORA, "recomputed"),
        pytest.param("noise", LORA, "rollout", marks=pytest.mark.slow),
        pytest.param("NVFP4", None, "rollout", marks=pytest.mark.slow),
        pytest.param("noise", None, "recomputed", marks=pytest.mark.slow),
        pytest.param("noise", None, "one", marks=pytest.mark.slow),
        pytest.param("faults", LORA, "replayed", marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_where_the_documentation_says(monkeypatch, small, hardware, lora, ratio):
    experiment = with_algorithm(load_experiment("quickstart-clean"), ratio=ratio, group_size=2)
    experiment = experiment.model_copy(update={"hardware": HARDWARE[hardware], "lora": lora})
    with pretended():
        session = session_on(monkeypatch, small, experiment, micro_batch=2, prompts_per_step=2)
        rollout, updating = waits_of(session)
    assert len(rollout) == 2, rollout  # which have ended after 16 of 17 tokens, and the rollouts
    assert len(updating) == 1, updating  # the metrics


def test_aqn_and_a_reference_model_wait_once_more_in_a_rollout(monkeypatch, small):
    experiment = with_algorithm(load_experiment("quickstart-noise-aqn"), kl_coefficient=0.01, group_size=2)
    aqn = experiment.aqn.model_copy(update={"schedule": "constant", "noise": "relative"})
    experiment = experiment.model_copy(update={"aqn": aqn, "hardware": HARDWARE["plain"]})
    with pretended():
        session = session_on(monkeypatch, small, experiment, prompts_per_step=2)
        (first, updating), (second, _) = waits_of(session, 1), waits_of(session, 2)
    assert len(first) == 4, first  # once for the whole run: whether the norms multiply by w or by 1 + w
    assert len(second) == 3, second  # whether the weights were written to inside the block
    assert len(updating) == 1, updating


def test_a_step_that_is_not_finite_is_found_at_the_end_of_the_update(monkeypatch, small):
    with pretended():
        session = session_on(monkeypatch, small, load_experiment("quickstart-clean"))
        batch = sample_batch(session, 1)
        collect, calls = session.optimizer.collect, []

        def poisoned():
            collect()
            calls.append(1)
            if len(calls) == 1:
                session.model.model.norm.weight.grad[0] = torch.inf

        monkeypatch.setattr(session.optimizer, "collect", poisoned)
        with (
            waits() as waited,
            pytest.raises(NonFiniteLossError, match=r"gradients of 1 weights are not \(model.norm.weight\)"),
        ):
            update(session, 1, batch)
    assert len(calls) == 2  # the second step was taken, too
    assert len(waited) == 1


def test_a_weight_that_a_step_on_a_device_makes_nan_stops_the_run(monkeypatch, small):
    with pretended():
        session = session_on(monkeypatch, small, load_experiment("quickstart-clean"))
        batch, step, calls = sample_batch(session, 1), session.optimizer.step, []

        def poisoned(*arguments):
            step(*arguments)
            calls.append(1)
            if len(calls) == 2:
                with torch.no_grad():
                    session.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan

        monkeypatch.setattr(session.optimizer, "step", poisoned)
        with pytest.raises(NonFiniteLossError, match=r"weights hold NaN or Inf \(model.layers.1.mlp.up_proj.weight"):
            update(session, 1, batch)


@pytest.mark.parametrize("tokens", [16, 2048])
def test_a_write_that_torch_does_not_count_is_noticed_a_pass_later_on_a_device(tokens):
    with pretended() as device:
        model = make().to(device)
        hardware = install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
        passes = 1 if tokens == 2048 else 256  # small passes read the weights every 256th time
        mlp, x = model.model.layers[1].mlp, torch.ones(tokens, 32, device=device)
        with torch.no_grad():
            mlp(x)
            count = hardware.quantizations()
            mlp.up_proj.weight.data.mul_(1.5)
            with waits(refused=True):
                for _ in range(passes):
                    mlp(x)
                assert hardware.quantizations() == count
                with pytest.warns(RoundoffWarning, match=r"1 weights on hardware were written to .* call refresh\(\)"):
                    for _ in range(passes):
                        mlp(x)
        assert hardware.quantizations() == count + 1
