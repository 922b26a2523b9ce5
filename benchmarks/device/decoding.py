"""Part c, decoding: a decode step of Qwen2.5-1.5B's shape, 256 rollouts, against the memory limit.

The time of a step is the difference between calls of `sample` that write many and few tokens, over the difference in
tokens: it holds all that a user waits for (choosing tokens, noise, the host's work) and neither the prompts nor the
capture of graphs. The memory limit is the time in which the device copies as many bytes as a step must read: all
weights, and the keys and values of the cache at its mean length.
"""

from __future__ import annotations

import statistics
from collections import Counter

from transformers import PreTrainedModel

from benchmarks.device import qwen
from benchmarks.device.kernels import BYTES, SMALL_BYTES
from benchmarks.device.machine import Device
from benchmarks.device.results import Results
from benchmarks.sampling import NumberTokenizer
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample

ROLLOUTS, SMALL_ROLLOUTS = 256, 4
PROMPT, SMALL_PROMPT = 256, 8
FEW, MANY, SMALL_MANY = 16, 144, 32
"""New tokens of the two calls."""
RATIO_GOAL, LIMIT_GOAL = 1.3, 0.5
SYNCHRONISATIONS_GOAL = 1 / 16
"""For each step: the host asks once in 16 steps which rollouts have ended."""
REPEATS = 3


def call(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> None:
    """Sample one response of this length to each prompt; hardly any ends earlier, as weights are random."""
    key = Key.from_seed(1)
    sample(model, NumberTokenizer(), prompts, group_size=1, max_new_tokens=tokens, temperature=1.0, key=key)


def step_seconds(device: Device, model: PreTrainedModel, prompts: list[list[int]], many: int, left: float) -> float:
    """Seconds of one decode step: the median of a few differences, of one where time is short."""
    differences: list[float] = []
    for tokens in (FEW, many):  # warms up, and captures what is captured
        call(model, prompts, tokens)
    for _ in range(REPEATS):
        seconds = {tokens: device.wall_seconds(lambda t=tokens: call(model, prompts, t)) for tokens in (FEW, many)}
        differences.append((seconds[many] - seconds[FEW]) / (many - FEW))
        left -= sum(seconds.values())
        if left < sum(seconds.values()):
            break
    return statistics.median(differences)


def limit_seconds(model: PreTrainedModel, rollouts: int, columns: float, bandwidth: float) -> tuple[float, int]:
    """The memory limit of a step with so many columns in the cache (s), and the bytes that it must read."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    weights = sum(p.nbytes for p in model.parameters())  # tied embeddings once: the output layer reads all of them
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    read = weights + int(rollouts * columns * token)
    return read / bandwidth, read


def count_synchronisations(device: Device, model: PreTrainedModel, prompts: list[list[int]], many: int) -> Counter[str]:
    """Host synchronisations of the steps between the two lengths, by line of code."""
    few, more = (device.synchronisations(lambda t=tokens: call(model, prompts, t)) for tokens in (FEW, many))
    more.subtract(few)
    return Counter({place: count for place, count in more.items() if count > 0})


def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of this part."""
    rollouts, length = (SMALL_ROLLOUTS, SMALL_PROMPT) if small else (ROLLOUTS, PROMPT)
    many = SMALL_MANY if small else MANY
    bandwidth = device.copy_bandwidth(SMALL_BYTES if small else BYTES)
    model = qwen.build(device.name, small=small)
    prompts = qwen.random_tokens(rollouts, length, small=small, seed=2).tolist()
    limit, read = limit_seconds(model, rollouts, length + (FEW + many) / 2, bandwidth)
    results.shown("memory limit of a decode step", f"{1e3 * limit:.3f} ms for {read / 2**30:.2f} GiB", bytes=read)
    steps: dict[str, float] = {}
    for number, (name, hardware) in enumerate(qwen.HARDWARE.items()):
        what = f"decode step, {rollouts} rollouts, {name}"
        share = results.seconds_left() / (len(qwen.HARDWARE) - number)
        if why := qwen.too_slow(device, model, hardware, rollouts * (length + many), share / 6, trained=False):
            results.left_out(what, why)
            continue
        device.free_memory()
        with results.attempt(what, device), qwen.installed(model, name):
            steps[name] = step_seconds(device, model, prompts, many, share)
            report(device, results, what, steps, name, limit)
            synchronisations(device, results, what, model, prompts, many)


def report(device: Device, results: Results, what: str, steps: dict[str, float], name: str, limit: float) -> None:
    """Write the rows about the time of one kind of step."""
    seconds, share = steps[name], limit / steps[name]
    peak = device.peak_gibibytes()
    shown = f"{share:.2f} of the memory limit ({1e3 * seconds:.2f} ms)"
    shown += "" if peak is None else f", peak {peak:.1f} GiB"
    if "noise" in name:
        results.shown(what, shown, value=share, seconds=seconds)
    else:
        results.at_least(what, share, LIMIT_GOAL, shown, seconds=seconds)
    if name != qwen.PLAIN and qwen.PLAIN in steps:
        ratio = seconds / steps[qwen.PLAIN]
        results.at_most(f"{what}, over plain", ratio, RATIO_GOAL, f"{ratio:.2f} x")


def synchronisations(
    device: Device, results: Results, what: str, model: PreTrainedModel, prompts: list[list[int]], many: int
) -> None:
    """Write the row about host synchronisations."""
    row = f"{what}, host synchronisations"
    if not device.finds_synchronisations:
        results.left_out(row, f"torch does not find them on {device.name}")
        return
    places = count_synchronisations(device, model, prompts, many)
    each = sum(places.values()) / (many - FEW)
    results.at_most(
        row, each, SYNCHRONISATIONS_GOAL, f"{each:.2f} a step {frequent(places)}".strip(), places=dict(places)
    )


def frequent(places: Counter[str]) -> str:
    """The lines with the most synchronisations."""
    shown = ", ".join(f"{place} {count} x" for place, count in places.most_common(3))
    return f"({shown})" if shown else ""
