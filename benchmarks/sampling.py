"""Tokens per second of `sample` beside `model.generate`: same model, prompts and limits, one thread, taken in turn.

Two models: `tiny` with the prompts of its task, 32 x 8 rollouts; and one of SmolLM2-135M's shape with random weights,
32 prompts of 8 to 64 tokens, where a token ends the response with probability 1/24. Tokens are counted up to the end
token; `generate` computes padding until its last rollout has ended. "In forward" is time inside `model(...)`: no
sampler that calls the model can be faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.sampler import sample
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
    """Seconds of one call, seconds of it inside the model, and tokens sampled."""

    seconds: float
    forward: float
    tokens: int


def tiny() -> Case:
    """32 prompts of the task, 8 rollouts each."""
    loaded = load_model("tiny")
    prompts = [problem.prompt for problem in ArithmeticTask(ArithmeticSettings()).test()[:32]]
    return Case("tiny, 32 x 8", loaded.model, loaded.tokenizer, prompts, 8, 16, 21)


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
    inside = 0.0
    began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter() - began

    handles = [case.model.register_forward_pre_hook(before), case.model.register_forward_hook(after)]
    try:
        start = time.perf_counter()
        tokens = call(case, seed)
        return Run(time.perf_counter() - start, inside, tokens)
    finally:
        for handle in handles:
            handle.remove()


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
        rate[name] = statistics.median(run.tokens / run.seconds for run in found)
        milliseconds = 1e3 * statistics.median(run.seconds for run in found)
        forward = 1e3 * statistics.median(run.forward for run in found)
        tokens = statistics.mean(run.tokens for run in found)
        print(
            f"  {name:9} {rate[name]:9.0f} tokens/s   {milliseconds:8.1f} ms a call   {forward:8.1f} ms in forward"
            f"   {tokens:7.1f} tokens"
        )
    print(f"  ratio {rate['sample'] / rate['generate']:.2f}\n", flush=True)


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in (tiny, smol):
            compare(case())
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
