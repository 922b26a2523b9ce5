"""Part b: the seven model families on simulated hardware, forward pass and gradients, against the CPU.

Both sides have the same weights, tokens and keys, and compute in float32, where a matrix product on another device
differs in its last bits alone. On noise those differences stay small. A format of activations and a deadzone are
steps: a number within rounding of a step lands on the other side of it on one device, which moves its token by some
hundredths, and with it everything after it. That is rare, so the median over several keys is held to a tight bound and
the worst to a loose one.

The bounds come from a rehearsal on a CPU, in which one side summed its products in float64 and had relative errors of
1e-7 on every norm and activation function: 2,100 passes of the models and hardware below (60 keys of each) gave medians
of at most 8e-7, and 10 passes were moved by a step, by 0.05 at most.
"""

from __future__ import annotations

import copy
import statistics

import torch
from tests.families import FAMILIES, Batch, build
from transformers import PreTrainedModel

from benchmarks.device.machine import Device, one_thread
from benchmarks.device.results import MISSED, REACHED, Results
from roundoff.config import Deadzone, Hardware, MatmulNoise, Precision
from roundoff.hardware import install, noise_key
from roundoff.numerics.rng import Key

NOISE = MatmulNoise(relative_std=0.05)
HARDWARE = {
    "W4A4 mxfp4": Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")),
    "W4A4 nvfp4": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "5 % noise": Hardware(matmul_noise=NOISE),
    "deadzone": Hardware(deadzone=Deadzone(threshold=0.01, layers=(0, 1))),
    "W4A4 mxfp4, noise, deadzone": Hardware(
        precision=Precision(weight="mxfp4", activation="mxfp4"),
        matmul_noise=NOISE,
        deadzone=Deadzone(threshold=0.01, layers=(1,)),
    ),
}
KEYS, SMALL_KEYS = 9, 3
MEDIAN_BOUND = 1e-5
"""Of the deviation (fraction): ten times what the rehearsal found."""
WORST_BOUND = 0.2
"""Where there are steps; without them `MEDIAN_BOUND` holds for the worst, too."""


def logits_and_gradients(
    model: PreTrainedModel, device: str, key: Key, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens of a batch, and all gradients of a loss in one vector, both on the CPU."""
    inputs = {name: value.to(device) for name, value in batch.inputs().items()}
    inside = batch.mask.bool().to(device)
    model.zero_grad()
    with noise_key(model, key, batch.rows.to(device)):
        logits = model(**inputs, use_cache=False).logits[inside]
        logits.square().mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().cpu(), torch.cat(gradients).cpu()


def deviation(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected (fraction); infinite if anything is not finite."""
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def deviations(device: Device, family: str, hardware: Hardware, keys: int) -> dict[str, list[float]]:
    """Deviations of the logits and of the gradients, one for each key, each on other tokens."""
    here = build(family)
    there = copy.deepcopy(here).to(device.name)
    for model in (here, there):
        install(model, hardware, seed=0)
    found: dict[str, list[float]] = {"logits": [], "gradients": []}
    for number in range(keys):
        key, batch = Key.from_seed(number), Batch(first=3 * number)
        expected = logits_and_gradients(here, "cpu", key, batch)
        with device.as_device():
            computed = logits_and_gradients(there, device.name, key, batch)
        for values, a, b in zip(found.values(), expected, computed, strict=True):
            values.append(deviation(a, b))
    return found


def judge(results: Results, what: str, hardware: Hardware, found: dict[str, list[float]]) -> None:
    """Write one row: within the bounds if the ratio to the nearest of them is at most 1."""
    steps = hardware.precision.activation or hardware.deadzone
    worst_bound = WORST_BOUND if steps else MEDIAN_BOUND
    ratio = max(max(statistics.median(v) / MEDIAN_BOUND, max(v) / worst_bound) for v in found.values())
    shown = (f"{kind} {statistics.median(v):.1e} (worst {max(v):.1e})" for kind, v in found.items())
    goal = f"<= {MEDIAN_BOUND:g} (worst {worst_bound:g})"
    verdict = REACHED if ratio <= 1 else MISSED
    results.row(what, ", ".join(shown), goal, verdict, **found)


@one_thread()
def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of part b."""
    for family in FAMILIES:
        for name, hardware in HARDWARE.items():
            what = f"{family}, {name}"
            if results.seconds_left() < 0:
                results.left_out(what, "the time of this part was over")
                continue
            with results.attempt(what, device):
                judge(results, what, hardware, deviations(device, family, hardware, SMALL_KEYS if small else KEYS))
