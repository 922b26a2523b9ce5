"""AdamW with float32 master weights under a bfloat16 model."""

import pytest
import torch
from torch import nn

from roundoff.config import LoRA, Training
from roundoff.experiments import load_experiment
from roundoff.runs.checkpoint import DamagedCheckpointError, load_checkpoint
from roundoff.training.loop import take_step
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.preparation import prepare
from tests.launch.test_survival import left
from tests.training.test_loop import run, with_training

TRAINING = Training(
    prompts_per_step=1,
    learning_rate=1e-3,
    lora_learning_rate=1e-3,
    max_prompt_tokens=1,
    max_new_tokens=1,
    evaluate_every=1,
    checkpoint_every=1,
    weight_decay=0.1,
)


def parameters(dtype, count=3):
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": nn.Parameter(torch.randn(4, 5, generator=generator).to(dtype)) for i in range(count)}


def gradient(step):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 + step)).bfloat16()


def test_float32_parameters_are_their_own_masters_and_move_as_under_adamw():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterAdamW(ours, 1e-3, TRAINING)
    plain = torch.optim.AdamW(list(theirs.values()), lr=1e-3, betas=TRAINING.betas, weight_decay=0.1, foreach=True)
    for step in range(3):
        for p in (*ours.values(), *theirs.values()):
            p.grad = gradient(step).float()
        optimizer.collect()
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
    for name, p in ours.items():
        assert optimizer.masters[name] is p
        assert torch.equal(p, theirs[name])
    assert set(optimizer.tensors()) == {f"{n}/{f}" for n in ours for f in ("step", "exp_avg", "exp_avg_sq")}


def test_bfloat16_parameters_follow_float32_masters():
    ours = parameters(torch.bfloat16)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in ours.items()}
    optimizer = MasterAdamW(ours, 1e-3, TRAINING)
    plain = torch.optim.AdamW(list(masters.values()), lr=1e-3, betas=TRAINING.betas, weight_decay=0.1, foreach=True)
    for step in range(3):
        for name, p in ours.items():
            p.grad, masters[name].grad = gradient(step), gradient(step).float()
        optimizer.collect()
        assert all(p.grad is None for p in ours.values())
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
    for name, p in ours.items():
        assert torch.equal(optimizer.masters[name], masters[name])
        assert torch.equal(p, masters[name].bfloat16())
    assert {t.dtype for t in optimizer.tensors().values()} == {torch.float32}


def test_a_step_that_a_bfloat16_weight_cannot_hold_is_not_lost():
    """20 steps of 2.5e-4 on a weight of 1 make 0.995. A bfloat16 weight by itself would stay at 1 (spacing 1/256)."""
    weight = {"w": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    lost = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    training = TRAINING.model_copy(update={"weight_decay": 0.0})
    optimizer = MasterAdamW(weight, 2.5e-4, training)
    plain = torch.optim.AdamW([lost], lr=2.5e-4, weight_decay=0.0)
    for _ in range(20):
        weight["w"].grad, lost.grad = torch.ones_like(lost), torch.ones_like(lost)
        optimizer.collect()
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
    assert optimizer.masters["w"].item() == pytest.approx(0.995, abs=1e-4)  # Adam's step is the learning rate
    assert weight["w"].item() == 0.99609375  # 0.995 to the nearest multiple of 1/256
    assert lost.item() == 1.0


def test_micro_batches_are_added_in_float32():
    """256 + 1 in bfloat16 is 256: of 8 gradients of 1 after one of 256, none would be left."""
    weight = {"w": nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(weight, 1e-3, TRAINING)
    for value in (256.0, *[1.0] * 8):
        weight["w"].grad = torch.full((1,), value, dtype=torch.bfloat16)
        optimizer.collect()
    assert optimizer.masters["w"].grad.item() == 264.0


def test_what_is_saved_is_put_back_to_the_bit():
    def stepped(optimizer, weights, steps):
        for step in steps:
            for p in weights.values():
                p.grad = gradient(step)
            optimizer.collect()
            optimizer.step()
            optimizer.zero_grad()

    whole = parameters(torch.bfloat16)
    stepped(MasterAdamW(whole, 1e-3, TRAINING), whole, range(4))
    first = parameters(torch.bfloat16)
    optimizer = MasterAdamW(first, 1e-3, TRAINING)
    stepped(optimizer, first, range(2))
    saved = {name: value.clone() for name, value in optimizer.tensors().items()}
    again = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    other = MasterAdamW(again, 1e-3, TRAINING)
    other.put(saved)
    stepped(other, again, range(2, 4))
    for name, p in whole.items():
        assert torch.equal(p, again[name])
    with pytest.raises(DamagedCheckpointError, match="no master weight of w1"):
        other.put({name: value for name, value in saved.items() if name != "w1/master"})


@pytest.fixture
def bf16(small):
    profile = with_training(small, learning_rate=1e-6, lora_learning_rate=1e-3)
    return profile.model_copy(update={"dtype": "bfloat16"})


def test_a_bfloat16_run_trains_in_float32_and_resumes_to_the_same_bits(tmp_path, bf16):
    experiment = load_experiment("quickstart-noise-aqn")
    whole = run(tmp_path / "whole", experiment, bf16)
    run(tmp_path / "parts", experiment, bf16, stop_after=1)
    resumed = run(tmp_path / "parts", experiment, bf16)
    assert left(resumed.path) == left(whole.path)
    tensors = load_checkpoint(whole.path / "checkpoints").tensors
    assert {t.dtype for t in tensors["model"].values()} == {torch.bfloat16}
    assert {t.dtype for t in tensors["optimizer"].values()} == {torch.float32}
    moved = [n for n, w in tensors["model"].items() if not torch.equal(tensors["optimizer"][f"{n}/master"], w.float())]
    assert len(moved) == len(tensors["model"])  # every master has left the grid of bfloat16
    for name, weight in tensors["model"].items():
        assert torch.equal(tensors["optimizer"][f"{name}/master"].bfloat16(), weight)


def test_adapters_over_a_bfloat16_base_are_float32(bf16):
    experiment = load_experiment("quickstart-mxfp4").model_copy(update={"lora": LoRA(rank=4)})
    session = prepare(experiment, bf16, 0)
    before = {name: p.detach().clone() for name, p in session.trainable.items()}
    take_step(session, 1, None)
    assert {p.dtype for p in session.trainable.values()} == {torch.float32}
    assert all(session.optimizer.masters[name] is p for name, p in session.trainable.items())
    assert any(not torch.equal(p, before[name]) for name, p in session.trainable.items())
    assert {p.dtype for name, p in session.model.named_parameters() if "lora" not in name} == {torch.bfloat16}
