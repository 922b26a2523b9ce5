"""Checkpoints are whole or absent, and a damaged one is passed over."""

import pytest
import torch

from roundoff.runs.checkpoint import DamagedCheckpointError, load_checkpoint, load_latest, save_checkpoint


def save(directory, step: int, **options) -> None:
    tensors = {"model": {"w": torch.full((3, 2), float(step))}, "optimizer": {"m": torch.arange(4) + step}}
    save_checkpoint(directory, step, tensors, {"position": 10 * step}, keep=options.get("keep", 2))


def test_read_back_to_the_bit(tmp_path):
    save(tmp_path, 7)
    found = load_latest(tmp_path)
    assert (found.step, found.state["position"], found.skipped) == (7, 70, ())
    assert torch.equal(found.tensors["model"]["w"], torch.full((3, 2), 7.0))
    assert torch.equal(found.tensors["optimizer"]["m"], torch.arange(4) + 7)


def test_none_where_there_is_none(tmp_path):
    assert load_latest(tmp_path / "checkpoints") is None


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut, flip, remove])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, victim, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-000002" / victim)
    found = load_latest(tmp_path)
    assert found.step == 1
    assert len(found.skipped) == 1
    assert "step-000002" in found.skipped[0]


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-{step:06d}" / "model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"(?s)no usable checkpoint.*step-000002.*step-000001"):
        load_latest(tmp_path)


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load_latest(tmp_path).step == 1


def test_a_step_without_a_checkpoint_is_named_with_those_that_are_kept(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, keep=2)
    with pytest.raises(DamagedCheckpointError, match=r"keeps no checkpoint of step 3 \(kept: 2, 4\)"):
        load_checkpoint(tmp_path, 3)
