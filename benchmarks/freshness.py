"""What the check for writes that torch does not count costs: passes with and without it, in shuffled turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.hardware import DECODED, TRAINED, decoding_step, training_step
from benchmarks.timing import verdict
from roundoff.config import Hardware, Precision
from roundoff.hardware import install
from roundoff.hardware.linear import LinearState

W4A16 = Hardware(precision=Precision(weight="mxfp4"))
GOAL = 1.01
LARGER = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ARMS = ("with", "without", "without again")
"""The third arm repeats the second: what it differs by is the error of the measurement."""


def in_turns(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median thread CPU time in ms of each arm; the order within a turn is shuffled, since it matters to the cache."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    for turn in range(repeats + 3):
        for arm in order.sample(ARMS, len(ARMS)):
            check = LinearState.check_weights if arm == "with" else lambda *_: None
            with mock.patch.object(LinearState, "check_weights", check):
                start = time.thread_time()
                step()
            if turn >= 3:
                times[arm].append(1e3 * (time.thread_time() - start))
    return {arm: statistics.median(values) for arm, values in times.items()}


def row(name: str, step: Callable[[], object], repeats: int) -> None:
    times = in_turns(step, repeats)
    ratio, error = times["with"] / times["without"], times["without again"] / times["without"]
    print(f"{name:50} {times['without']:8.2f} ms {ratio:8.4f} {error:8.4f}  {verdict(ratio, GOAL)[6:]}", flush=True)


def forward(tokens: int) -> Callable[[], object]:
    """A forward pass of six layers of SmolLM2-135M's shape over so many tokens."""
    model = LlamaForCausalLM(LlamaConfig(**LARGER, num_hidden_layers=6, vocab_size=4096)).requires_grad_(False).eval()
    install(model, W4A16, seed=0)
    ids = torch.ones(max(1, tokens // 32), min(tokens, 32), dtype=torch.int64)
    return torch.no_grad()(lambda: model(ids, use_cache=False))


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'W4A16 (mxfp4), one thread':50} {'without':>11} {'with':>8} {'error':>8}")
    row(f"tiny, decoding step of {DECODED[0]} rollouts", decoding_step(W4A16), 401)
    row(f"tiny, training step of {TRAINED[0]} x {TRAINED[1]} tokens", training_step(W4A16), 61)
    for tokens, repeats in ((1, 201), (256, 41), (1024, 15), (2048, 11)):
        row(f"6 layers of SmolLM2-135M's shape, {tokens} tokens", forward(tokens), repeats)


if __name__ == "__main__":
    main()
