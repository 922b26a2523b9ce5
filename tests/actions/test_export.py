"""Exported models: the run's weights to the bit, read by plain transformers, scored alike."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roundoff.actions.evaluate import score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.actions.export import ORIGIN, export
from roundoff.config import ConfigError, LoRA
from roundoff.experiments import load_experiment
from roundoff.models.load import load_model
from roundoff.runs.checkpoint import load_checkpoint
from tests.training.test_loop import run, with_training


def test_an_exported_model_is_the_run_s_to_the_bit_and_scores_alike(tmp_path, small):
    made = run(tmp_path / "runs", load_experiment("quickstart-noise"), small)
    (said,) = export(made, tmp_path / "out")
    assert "after step 2" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = load_checkpoint(made.path / "checkpoints").tensors["model"]
    found = dict(model.named_parameters())
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    before = load_model("tiny").tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("12+3=")["input_ids"] == before("12+3=")["input_ids"]
    subject = open_subject(str(tmp_path / "out"))  # which knows its run: task, lengths, draws and hardware
    assert score_subject(subject).evaluation == made.evaluation(2)
    (tmp_path / "out" / ORIGIN).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not as `roundoff export` writes it"):
        open_subject(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="exists"):
        export(made, tmp_path / "out")
    export(made, tmp_path / "first", step=1)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert not torch.equal(dict(first.named_parameters())["model.norm.weight"], found["model.norm.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "out", "runs"]


def test_adapters_are_merged_and_it_is_said(tmp_path, small):
    experiment = load_experiment("quickstart-noise").model_copy(update={"lora": LoRA(rank=4)})
    made = run(tmp_path / "runs", experiment, with_training(small, lora_learning_rate=0.02))
    said = export(made, tmp_path / "out")
    assert "merged" in said[-1]
    model = load_model(str(tmp_path / "out")).model
    assert not any("lora" in name for name, _ in model.named_parameters())
    tensors = load_checkpoint(made.path / "checkpoints").tensors["model"]
    name = "model.layers.0.mlp.up_proj"
    a, b = (tensors[f"{name}.lora_{m}.default.weight"] for m in "AB")
    assert bool(b.any())
    base = load_model("tiny").model.get_submodule(name).weight
    # W + (alpha / rank) B A with alpha 16, rank 4; sums of 4 float32 products
    expected = base.detach() + 4.0 * (b @ a)
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, rtol=0, atol=1e-6)
