"""The recipe of the embedded models `tiny` and `tiny-long`: a supervised warm start that is stopped midway.

The model is a Qwen2 (`ARCHITECTURE`) with a character-level tokenizer. It learns to write the worked solutions of the
`arithmetic` task from an endless stream of training problems, which never contains a test problem. The loss is the
cross-entropy of the response and the end token; prompt tokens do not count.

The two differ in the chains that they learn, and so in the length of their responses, and in where training stops
(`RECIPES`). Training stops on the steep part of the learning curve, and the learning rate is never lowered. Both leave
room for reinforcement learning: lowering the rate would raise the score at once, but would lead to weights that the
updates of reinforcement learning then destroy (docs/tiny-model.md has the measurements).

Training uses one thread and an explicit seed. On one machine type and one version of torch, the same call gives the
same bits; elsewhere it gives a similar score (docs/tiny-model.md).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from roundoff.models.embedded import LONG, TINY
from roundoff.models.errors import ModelError
from roundoff.tasks import Problem
from roundoff.tasks.arithmetic import ArithmeticSettings, ArithmeticTask

SEED = 0
BATCH = 128  # problems per step
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100  # the learning rate rises linearly over these steps, then stays constant
WEIGHT_DECAY = 0.01
GRADIENT_CLIP = 1.0
EVALUATE_EVERY = 100  # steps

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = (PAD, EOS, *"0123456789", "+", "-", "=", ">")
_IGNORED = -100  # label of tokens outside the loss, as in torch's cross_entropy

ARCHITECTURE: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": VOCABULARY.index(PAD),
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(EOS),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an embedded model learns, and for how long."""

    task: ArithmeticSettings
    steps: int
    """Optimizer steps."""
    max_response: int
    """Most tokens of a scored response, with the end token."""


RECIPES: Mapping[str, Recipe] = {
    # The longest solution is "-49>-99".
    TINY: Recipe(ArithmeticSettings(), steps=1850, max_response=8),
    # The longest solution has seven results of three characters, such as "-10>-19>-28>-37>-46>-55>-64".
    LONG: Recipe(ArithmeticSettings(terms_min=4, terms_max=8, max_value=9), steps=800, max_response=28),
}
"""Recipe of each embedded model."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the learning curve."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean cross-entropy of the last batch, nats per response token."""
    accuracy: float
    """Share of the test problems that greedy decoding solves."""

    def __str__(self) -> str:
        return f"step {self.step:5d}   loss {self.loss:.4f}   accuracy {self.accuracy:6.1%}"


def build(
    out_dir: Path,
    *,
    model: str = TINY,
    seed: int = SEED,
    steps: int | None = None,
    evaluate_every: int = EVALUATE_EVERY,
    progress: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Train a model from `seed`, save it to `out_dir`, and return its learning curve.

    The default arguments rebuild `tiny` in about four minutes on one core.

    Args:
        out_dir: becomes a Hugging Face model directory (weights in safetensors, configuration, tokenizer).
        model: name of the embedded model whose recipe is followed.
        seed: of the initial weights and of the problems.
        steps: optimizer steps; None takes those of the recipe.
        evaluate_every: steps between two points of the curve; the last step is always one.
        progress: called with each point as soon as it is measured.

    Raises:
        ModelError: if `out_dir` exists and is not an empty directory, or if `steps` or `evaluate_every` is below 1.
    """
    recipe = RECIPES[model]
    steps = recipe.steps if steps is None else steps
    if steps < 1 or evaluate_every < 1:
        raise ModelError(f"steps and evaluate_every must be at least 1, but are {steps} and {evaluate_every}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists and is not an empty directory; name another one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained, curve = train(recipe, seed=seed, steps=steps, evaluate_every=evaluate_every, progress=progress)
    finally:
        torch.set_num_threads(threads)
    save(trained, out_dir)
    return curve


def train(
    recipe: Recipe, *, seed: int, steps: int, evaluate_every: int, progress: Callable[[Point], None] | None = None
) -> tuple[Qwen2ForCausalLM, list[Point]]:
    """The trained model, in evaluation mode, and its learning curve."""
    task = ArithmeticTask(recipe.task)
    tokenizer = make_tokenizer()
    model = make_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    stream = task.train_stream(seed)
    curve: list[Point] = []
    for step in range(1, steps + 1):
        tokens, labels = encode(tokenizer, task, islice(stream, BATCH))
        logits = model(input_ids=tokens).logits  # right padding needs no mask under causal attention
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % evaluate_every == 0 or step == steps:
            model.eval()
            curve.append(Point(step, loss.item(), greedy_accuracy(model, tokenizer, task, recipe.max_response)))
            model.train()
            if progress is not None:
                progress(curve[-1])
    return model.eval(), curve


def save(model: Qwen2ForCausalLM, out_dir: Path) -> None:
    """Write a Hugging Face model directory: weights in safetensors, configuration, tokenizer."""
    model.save_pretrained(out_dir)
    make_tokenizer().save_pretrained(out_dir)


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per character of `VOCABULARY`: the byte-pair encoding of Qwen2 without a single merge.

    It has to be a Qwen2Tokenizer: for a model of type `qwen2`, AutoTokenizer of transformers 5 builds that class
    whatever the files say. Like every Qwen2Tokenizer, it drops characters that it does not know;
    `roundoff.models.load.check_readable` finds them.
    """
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(VOCABULARY)},
        merges=[],
        unk_token=None,  # type: ignore[arg-type]
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """The untrained model."""
    with torch.random.fork_rng(devices=[]):  # transformers initializes weights from the global generator
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**ARCHITECTURE))


def encode(
    tokenizer: PreTrainedTokenizerBase, task: ArithmeticTask, problems: Iterable[Problem]
) -> tuple[Int[Tensor, "texts columns"], Int[Tensor, "texts columns"]]:
    """Token ids and labels of prompts with their solutions, padded on the right."""
    texts = [(problem.prompt, task.solution(problem)) for problem in problems]
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    responses = tokenizer([response for _, response in texts])["input_ids"]
    rows = [[*prompt, *response, tokenizer.eos_token_id] for prompt, response in zip(prompts, responses, strict=True)]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(tokens, _IGNORED)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        labels[index, len(prompt) : len(row)] = tokens[index, len(prompt) : len(row)]
    return tokens, labels


@torch.inference_mode()
def greedy_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, task: ArithmeticTask, max_response: int
) -> float:
    """Share of the test problems, from 0 to 1, that the model solves with greedy decoding in one batch."""
    problems = task.test()
    batch = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=max_response)  # type: ignore[misc]
    responses = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return math.fsum(map(task.reward, problems, responses)) / len(problems)
