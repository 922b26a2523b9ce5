"""Tokens per second of `sample` beside `model.generate`: same model, prompts and limits, one thread, taken in turn.

`tiny` with the prompts of its task, 32 x 8 rollouts, at temperature 1, and 256 x 1, where no two rollouts share a
prompt; and one of SmolLM2-135M's shape with random weights, 32 prompts of 8 to 64 tokens, where a token ends the
response with probability 1/24. `python -m benchmarks.sampling DIRECTORY` adds a real model from a directory, on
arithmetic in words. Tokens are counted up to the end token; `generate` computes padding until its last rollout has
ended. Rates are tokens per second of thread CPU time, medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample
from roundoff.tasks.arithmetic import ArithmeticSettings, ArithmeticTask

SHAPE_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class NumberTokenizer:
    """As much of a tokenizer as sampling needs: a prompt is a list of token ids in text form."""

    pad_token_id = 0
    eos_token_id = 0

    def __call__(self, prompts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Token ids of each prompt."""
        return {"input_ids": [[int(word) for word in prompt.split()] for prompt in prompts]}

    def batch_decode(self, sequences: list[list[int]], **_: Any) -> list[str]:
        """Texts of sequences."""
        return [" ".join(map(str, tokens)) for tokens in sequences]


@dataclass
class Case:
    """One comparison."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    prompts: list[str]
    group_size: int
    max_new_tokens: int
    repeats: int


@dataclass
class Run:
    """Seconds of thread CPU time and on the wall of one call, and tokens sampled."""

    cpu: float
    wall: float
    tokens: int


SECONDS: tuple[Callable[[Run], float], ...] = (lambda run: run.cpu, lambda run: run.wall)


def tiny() -> Case:
    """32 prompts of the task, 8 rollouts each."""
    loaded = load_model("tiny")
    prompts = [problem.prompt for problem in ArithmeticTask(ArithmeticSettings()).test()[:32]]
    return Case("tiny, 32 x 8", loaded.model, loaded.tokenizer, prompts, 8, 16, 21)


def tiny_alone() -> Case:
    """256 prompts of the task, one rollout each: nothing to share between rollouts."""
    loaded = load_model("tiny")
    prompts = [problem.prompt for problem in ArithmeticTask(ArithmeticSettings()).test()[:256]]
    return Case("tiny, 256 x 1", loaded.model, loaded.tokenizer, prompts, 1, 16, 21)


def directory(path: str) -> Case:
    """A real model, 32 prompts of ragged lengths, one rollout each."""
    loaded = load_model(path)
    sentence = "A farmer has some apples and gives some of them away to each of the neighbours who ask for one."
    words = sentence.split()
    prompts = [f"Question: {' '.join(words[: 3 + n % 16])} How many of {n} are left? Answer:" for n in range(32)]
    return Case(f"{loaded.name}, 32 x 1", loaded.model, loaded.tokenizer, prompts, 1, 48, 3)


def smol() -> Case:
    """32 prompts of ragged lengths, one rollout each."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE_135M)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = list(range(0, SHAPE_135M["vocab_size"], 24))
    lengths = torch.linspace(8, 64, 32).int().tolist()
    prompts = [" ".join(str(int(t)) for t in torch.randint(1, 24, (length,))) for length in lengths]
    return Case("135M shape, 32 x 1", model, NumberTokenizer(), prompts, 1, 48, 2)


def ours(case: Case, seed: int) -> int:
    """Tokens that one call of `sample` returns."""
    rollouts = sample(
        case.model,
        case.tokenizer,
        case.prompts,
        group_size=case.group_size,
        max_new_tokens=case.max_new_tokens,
        temperature=1.0,
        key=Key.from_seed(seed),
    )
    return int(rollouts.lengths.sum())


def generate(case: Case, seed: int) -> int:
    """Tokens that one call of `model.generate` returns, tokenization and decoding to text included."""
    torch.manual_seed(seed)
    encoded = case.tokenizer(case.prompts, padding=False)["input_ids"]
    width = max(map(len, encoded))
    tokens = torch.tensor([[case.tokenizer.pad_token_id] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    output = case.model.generate(
        tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.max_new_tokens,
        num_return_sequences=case.group_size,
    )[:, width:]
    case.tokenizer.batch_decode(output.tolist(), skip_special_tokens=True)
    ended = torch.isin(output, torch.tensor(case.model.generation_config.eos_token_id)).cumsum(dim=1)
    before = ended.roll(1, dims=1)
    before[:, 0] = 0
    return int((before == 0).sum())  # up to the first end token, which counts


def timed(case: Case, call: Callable[[Case, int], int], seed: int) -> Run:
    """One call."""
    cpu, wall = time.thread_time(), time.perf_counter()
    tokens = call(case, seed)
    return Run(time.thread_time() - cpu, time.perf_counter() - wall, tokens)


def compare(case: Case) -> None:
    """Print one table: both samplers in turn, medians."""
    calls = {"sample": ours, "generate": generate}
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for seed in range(case.repeats + 1):
        for name, call in calls.items():
            run = timed(case, call, seed)
            if seed:  # the first round warms up
                runs[name].append(run)
    print(f"{case.name}, at most {case.max_new_tokens} tokens, {case.repeats} rounds")
    rate = {}
    for name, found in runs.items():
        rate[name] = [statistics.median(r.tokens / seconds(r) for r in found) for seconds in SECONDS]
        milliseconds = 1e3 * statistics.median(run.cpu for run in found)
        tokens = statistics.mean(run.tokens for run in found)
        print(f"  {name:9} {rate[name][0]:9.0f} tokens/s   {milliseconds:8.1f} ms a call   {tokens:7.1f} tokens")
    cpu, wall = (ours / theirs for ours, theirs in zip(rate["sample"], rate["generate"], strict=True))
    print(f"  ratio {cpu:.2f} (on the wall {wall:.2f})\n", flush=True)


def main(directories: Sequence[str] = ()) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in (tiny, tiny_alone, smol):
            compare(case())
        for path in directories:
            compare(directory(path))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main(sys.argv[1:])
