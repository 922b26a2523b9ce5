"""The SRDD scan: its time, and how well each metric ranks the layers against exact sensitivity.

Set ROUNDOFF_BENCHMARK_MODEL to the directory of a model (SmolLM2-135M-Instruct in docs/srdd.md) to measure it beside
`tiny`, and ROUNDOFF_BENCHMARK_TEXTS to a file of JSON lines with `question` and `answer` (GSM8K) for its texts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.models.calibration import calibration_batches
from roundoff.models.load import LoadedModel, load_model
from roundoff.srdd import METRICS, LayerScan, frontier, rank_correlation, scan
from roundoff.tasks import TASKS

MODEL_VARIABLE = "ROUNDOFF_BENCHMARK_MODEL"
TEXTS_VARIABLE = "ROUNDOFF_BENCHMARK_TEXTS"
HARDWARE = {
    "MXFP4 W4A4": Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")),
    "NVFP4 W4A4": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "MXFP4 W4A16": Hardware(precision=Precision(weight="mxfp4")),
    "5 % noise": Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
}
SCORES = [name for name in METRICS if name != "exact"]


def calibration_texts(model: str) -> list[str]:
    """Prompts with their worked solutions."""
    path = os.environ.get(TEXTS_VARIABLE)
    if model == "tiny" or path is None:
        task = TASKS["arithmetic"]({})
        return [problem.prompt + (task.solution(problem) or "") for problem in task.train()]
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def timed(loaded: LoadedModel, batches: Sequence[Mapping[str, Tensor]], *, gradient: bool) -> tuple[float, float]:
    """Wall and CPU seconds of one scan."""
    began, cpu = time.perf_counter(), time.process_time()
    scan(loaded.model, batches, HARDWARE["MXFP4 W4A4"], gradient=gradient)
    return time.perf_counter() - began, time.process_time() - cpu


def correlations(found: LayerScan, exact: LayerScan) -> list[str]:
    """Spearman's correlation of each score of one scan with the exact KL of another."""
    target = list(exact.damage("exact").values())
    cells = []
    for name in SCORES:
        value = rank_correlation(list(found.damage(name).values()), target) if name in found.metric_names() else None
        cells.append("-" if value is None else f"{value:.2f}")
    return cells


def measure(name: str, tokens: int) -> None:
    """Print the tables of one model."""
    loaded = load_model(name)
    texts = calibration_texts(name)
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=tokens, batches=4)
    used = sum(len(b["input_ids"]) for b in batches)
    other = calibration_batches(loaded.tokenizer, texts[used:], max_tokens=tokens, batches=4)
    print(f"## {name}: {tokens} tokens, one thread\n\n| scan | wall (s) | CPU (s) |\n|---|---|---|")
    for gradient in (True, False):
        wall, cpu = timed(loaded, batches, gradient=gradient)
        print(f"| {'with' if gradient else 'without'} gradient score | {wall:.1f} | {cpu:.1f} |", flush=True)
    print("\nSpearman with exact KL on other texts / on the same texts:\n")
    print(f"| hardware | {' | '.join(SCORES)} | halves |\n|{'---|' * (len(SCORES) + 2)}", flush=True)
    for title, hardware in HARDWARE.items():
        found, exact = scan(loaded.model, batches, hardware), scan(loaded.model, other, hardware, exact=True)
        pairs = zip(correlations(found, exact), correlations(exact, exact), strict=True)
        cells = [a if a == b == "-" else f"{a} / {b}" for a, b in pairs]
        print(f"| {title} | {' | '.join(cells)} | {found.agreement() or 0:.2f} |", flush=True)
        if title == "MXFP4 W4A4":
            ks = sorted({0, 1, 2, 4, 6, 10, len(found.layers) // 2} & set(range(len(found.layers))))
            lines = {
                metric: [f"{p.divergence.kl:.3f}" for p in frontier(loaded.model, other, source, ks, metric=metric)]
                for metric, source in (("gradient", found), ("relative_error", found), ("exact", exact))
            }
    print(f"\nKL (nats/token) against k kept layers, MXFP4 W4A4\n\n| ranked by | {' | '.join(map(str, ks))} |")
    print("|---|" + "---|" * len(ks))
    for metric, values in lines.items():
        print(f"| {metric} | {' | '.join(values)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    measure("tiny", 2048)
    directory = os.environ.get(MODEL_VARIABLE)
    if directory:
        measure(directory, 512)
    else:
        print(f"(set {MODEL_VARIABLE} to the directory of a 135 M model to measure it, too)", file=sys.stderr)


if __name__ == "__main__":
    main()
