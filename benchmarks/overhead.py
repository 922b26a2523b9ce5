"""What installed formats add to a training step and to sampling of a real model, in one process (ratios).

Set ROUNDOFF_BENCHMARK_MODEL to the directory of a model; `make real` leaves SmolLM2-135M-Instruct in build/real/model.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.srdd import MODEL_VARIABLE
from roundoff.config import Hardware, LoRA, Precision
from roundoff.hardware.install import install, installed, uninstall
from roundoff.logprobs import token_logprobs
from roundoff.models.load import load_model
from roundoff.models.lora import attach
from roundoff.numerics.rng import Key
from roundoff.sampler import sample

DEFAULT = "build/real/model"
PROMPTS = [
    "Ann has 3 boxes of 24 pens each. She sells 12 pens and gives 6 to her brother. How many pens does she have left?",
    "A train covers 60 km in the first hour and 45 km in each of the next two. How far does it go in three hours?",
]
GROUP, NEW_TOKENS = 4, 24
TRAINED = (4, 96)  # rollouts x tokens of a training step
REPEATS = 5
SETTINGS: dict[str, tuple[Hardware | None, float | None]] = {
    "plain": (None, None),
    "W4A16 (mxfp4)": (Hardware(precision=Precision(weight="mxfp4")), 1.15),
    "W4A4 (mxfp4)": (Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")), 1.60),
}


def timed(model: torch.nn.Module, step: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of `step` under each setting, in turns.

    Each install starts without quantized weights, as after an update.
    """
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for repeat in range(REPEATS + 1):
        for name, (hardware, _) in SETTINGS.items():
            if hardware is not None:
                install(model, hardware, seed=0)
            began = time.perf_counter()
            step()
            if repeat:  # the first turn warms caches and the allocator
                seconds[name].append(time.perf_counter() - began)
            if installed(model) is not None:
                uninstall(model)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print medians and the median ratio to the plain step of the same turn."""
    print(f"\n{title}\n{'':20s} {'s':>7s} {'ratio':>7s} {'goal':>6s}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        print(f"{name:20s} {statistics.median(values):7.2f} {ratio:7.2f} {SETTINGS[name][1] or '':>6}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    directory = os.environ.get(MODEL_VARIABLE, DEFAULT)
    if not Path(directory).is_dir():
        print(f"(there is no {directory}: run `make real`, or set {MODEL_VARIABLE})", file=sys.stderr)
        return
    loaded = load_model(directory)
    model, key = loaded.model, Key.from_seed(0)

    def rollout() -> None:
        sample(model, loaded.tokenizer, PROMPTS, group_size=GROUP, max_new_tokens=NEW_TOKENS, temperature=1.0, key=key)

    sizes = f"{len(PROMPTS) * GROUP} rollouts x {NEW_TOKENS} tokens"
    report(f"sampling, {sizes}", timed(model, rollout))
    tokens = torch.randint(100, 40000, TRAINED, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)

    def training_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            logprobs, _ = token_logprobs(model, tokens, mask, TRAINED[1] // 2, temperature=1.0)
            (-logprobs.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        return step

    shape = f"{TRAINED[0]} rollouts x {TRAINED[1]} tokens"
    full = torch.optim.AdamW(model.parameters(), lr=1e-7)
    report(f"training step, every weight, {shape}", timed(model, training_step(full)))
    del full
    attach(model, LoRA(), key)
    lora = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-7)
    report(f"training step, LoRA of rank 32, {shape}", timed(model, training_step(lora)))


if __name__ == "__main__":
    main()
