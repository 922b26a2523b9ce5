"""The path of `make real` on a small random chat model: template, bfloat16 or float32, LoRA, MXFP4, AQN, resume."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from roundoff.actions.evaluate import score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.experiments import load_experiment, load_profile
from tests.launch.test_survival import left
from tests.tasks.problem_files import raw_files
from tests.training.test_loop import run, with_training

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16})}


def save_model(directory, family):
    """A random model on bytes, with the chat tokens of Qwen and SmolLM and digits that are likely."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(("<|im_end|>", "<|im_start|>", *alphabet))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    built = model(config(**SIZES, **more, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0))
    with torch.no_grad():
        built.lm_head.weight[2:] *= 0.1  # the end token is likely, so that responses differ in length
    built.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(params=[("llama", "float32"), ("qwen3", "bfloat16")], ids="-".join)
def profile(tmp_path, request):
    """The profile of `make real` on that model and a handful of problems."""
    family, dtype = request.param
    (tmp_path / "data").mkdir()
    raw_files(tmp_path / "data")
    real = load_profile("benchmarks/settings/real-profile.toml")
    settings = {**real.task.settings, "path": str(tmp_path / "data"), "train_problems": 0, "test_problems": 0}
    task = real.task.model_copy(update={"settings": settings})
    real = real.model_copy(update={"model": save_model(tmp_path / "model", family), "task": task, "dtype": dtype})
    # 5 training problems, of which a step draws 2 (oversampling): two steps
    real = with_training(real, gradient_checkpointing=dtype == "bfloat16", lora_learning_rate=1e-3)
    return with_training(real, prompts_per_step=1, evaluate_every=2, checkpoint_every=1)


def test_two_steps_train_score_and_resume(tmp_path, profile):
    experiment = load_experiment("benchmarks/settings/real.toml")
    done = run(tmp_path / "whole", experiment, profile)
    assert [row["step"] for row in done.metrics] == [0, 1, 2]
    assert any(row.get("trained") for row in done.metrics)
    outcomes = done.evaluation(2).outcomes
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert outcome.id.startswith("gsm8k/")
        assert outcome.prompt.startswith("<|im_start|>user\n")
        assert outcome.prompt.endswith(" Reply with the final number alone.<|im_end|>\n<|im_start|>assistant\n")
    assert score_subject(open_subject(str(done.path))).agrees
    run(tmp_path / "parts", experiment, profile, stop_after=1)
    assert left(run(tmp_path / "parts", experiment, profile).path) == left(done.path)
