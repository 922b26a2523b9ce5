"""What installed formats add to a training step and to sampling of a real model, in one process (ratios).

Set ROUNDOFF_BENCHMARK_MODEL to the directory of a model; `make real` leaves SmolLM2-135M-Instruct in build/real/model.
Every step begins after an update: weights that are quantized are quantized again within it.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.srdd import MODEL_VARIABLE
from roundoff.config import Hardware, LoRA, Precision
from roundoff.hardware import hardware_off, install, installed
from roundoff.models.load import LoadedModel, load_model
from roundoff.models.logprobs import token_logprobs
from roundoff.models.lora import attach
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample

DEFAULT = "build/real/model"
PROMPTS = [
    "Ann has 3 boxes of 24 pens each. She sells 12 pens and gives 6 to her brother. How many pens does she have left?",
    "A train covers 60 km in the first hour and 45 km in each of the next two. How far does it go in three hours?",
]
GROUP, NEW_TOKENS = 4, 24
TRAINED = (4, 96)  # rollouts x tokens of a training step
REPEATS = 9
PLAIN = "plain"
FORMATS = {
    "W4A16 (mxfp4)": (Precision(weight="mxfp4"), 1.15),
    "W4A4 (mxfp4)": (Precision(weight="mxfp4", activation="mxfp4"), 1.60),
}
Step = Callable[[PreTrainedModel], None]


def timed(models: dict[str, LoadedModel], steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of a step under each setting, in turns; the plain one is the first model with its hardware off."""
    first = next(iter(models))
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *models)}
    for repeat in range(REPEATS + 1):
        for name in seconds:
            model = models[first if name == PLAIN else name].model
            found = installed(model)
            assert found is not None
            found.refresh()
            began = time.perf_counter()
            with hardware_off(model) if name == PLAIN else nullcontext():
                steps[first if name == PLAIN else name](model)
            if repeat:  # the first turn warms caches and the allocator
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print medians, the median ratio to the plain step of the same turn, and the ratio of the fastest steps.

    On a machine with other work the ratio of the fastest is the steadier one.
    """
    print(f"\n{title}\n{'':16s} {'median s':>9s} {'ratio':>6s} {'fastest s':>10s} {'ratio':>6s} {'goal':>5s}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[PLAIN], strict=True))
        fastest = min(values)
        goal = FORMATS[name][1] if name in FORMATS else ""
        line = f"{name:16s} {statistics.median(values):9.2f} {ratio:6.2f} {fastest:10.2f}"
        print(f"{line} {fastest / min(seconds[PLAIN]):6.2f} {goal:>5}", flush=True)


def training_step(model: PreTrainedModel) -> Step:
    """Forward over half of the tokens as a response, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-7)
    tokens = torch.randint(100, 40000, TRAINED, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)

    def step(model: PreTrainedModel) -> None:
        logprobs, _ = token_logprobs(model, tokens, mask, TRAINED[1] // 2, temperature=1.0)
        (-logprobs.mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    torch.set_num_threads(1)
    directory = os.environ.get(MODEL_VARIABLE, DEFAULT)
    if not Path(directory).is_dir():
        print(f"(there is no {directory}: run `make real`, or set {MODEL_VARIABLE})", file=sys.stderr)
        return
    key = Key.from_seed(0)
    models = {name: load_model(directory) for name in FORMATS}
    for name, loaded in models.items():
        install(loaded.model, Hardware(precision=FORMATS[name][0]), seed=0)

    def rollout(model: PreTrainedModel) -> None:
        tokenizer = models[next(iter(models))].tokenizer
        sample(model, tokenizer, PROMPTS, group_size=GROUP, max_new_tokens=NEW_TOKENS, temperature=1.0, key=key)

    report(
        f"sampling, {len(PROMPTS) * GROUP} rollouts x {NEW_TOKENS} tokens",
        timed(models, dict.fromkeys(models, rollout)),
    )
    shape = f"{TRAINED[0]} rollouts x {TRAINED[1]} tokens"
    steps = {name: training_step(loaded.model) for name, loaded in models.items()}
    report(f"training step, every weight, {shape}", timed(models, steps))
    steps.clear()
    for loaded in models.values():
        attach(loaded.model, LoRA(), key)
    steps = {name: training_step(loaded.model) for name, loaded in models.items()}
    report(f"training step, LoRA of rank 32, {shape}", timed(models, steps))


if __name__ == "__main__":
    main()
