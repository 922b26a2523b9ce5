"""Fault finding: top-1 localization of every simulated fault over random sites, and false alarms on healthy models."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.srdd import MODEL_VARIABLE, calibration_texts
from roundoff.config import Fault, Hardware
from roundoff.hardware import install, uninstall
from roundoff.hardware.faults import install_fault
from roundoff.hardware.inventory import within_layer
from roundoff.models.calibration import calibration_batches, decoder_layers
from roundoff.models.load import LoadedModel, load_model
from roundoff.numerics.rng import Key, uniform
from roundoff.srdd import find_faults

SITES = 20
FAULTS: dict[str, dict[str, object]] = {
    "deadzone 5 %": {"kind": "deadzone", "amount": 0.05},
    "saturation at 50 %": {"kind": "saturation", "amount": 0.5},
    "noise 5 %": {"kind": "noise", "amount": 0.05},
    "noise 5 % on 1 % of elements": {"kind": "noise", "amount": 0.05, "share": 0.01},
    "stuck at 0.5, 5 % of channels": {"kind": "stuck", "amount": 0.5, "share": 0.05},
    "stuck at 0.5, one channel": {"kind": "stuck", "amount": 0.5, "share": 1e-6},
    "random flips of bit 22, 1 %": {"kind": "bitflip", "amount": 1.0, "bit": 22, "share": 0.01},
    "every bit 22 (mantissa) flipped": {"kind": "bitflip", "amount": 1.0, "bit": 22},
    "every bit 23 (exponent) flipped": {"kind": "bitflip", "amount": 1.0, "bit": 23},
    "every bit 12 flipped": {"kind": "bitflip", "amount": 1.0, "bit": 12},
    "every bit 4 flipped": {"kind": "bitflip", "amount": 1.0, "bit": 4},
    "every bit 0 flipped": {"kind": "bitflip", "amount": 1.0, "bit": 0},
    "gain +5 %": {"kind": "gain", "amount": 0.05},
    "gain +5 %, one channel": {"kind": "gain", "amount": 0.05, "share": 1e-6},
}
"""The faults of a trial, without their site."""
FEW = (
    "deadzone 5 %",
    "saturation at 50 %",
    "noise 5 %",
    "stuck at 0.5, 5 % of channels",
    "random flips of bit 22, 1 %",
    "every bit 22 (mantissa) flipped",
    "every bit 23 (exponent) flipped",
    "gain +5 %",
)
"""Those tried on the larger model, where a trial takes seconds."""


@dataclass(frozen=True)
class Outcome:
    """Of the trials of one fault."""

    located: int
    checks: Counter[str]
    trials: int


def pick(key: Key, options: Sequence[str | int]) -> str | int:
    """One of the options, by key."""
    return options[min(int(float(uniform(key, (1, 1))) * len(options)), len(options) - 1)]


@contextmanager
def broken_linear(model: nn.Module, fault: Fault, seed: int) -> Iterator[None]:
    """The model on a chip whose unit for one Linear is broken."""
    install(model, Hardware(faults=(fault,)), seed=seed)
    try:
        yield
    finally:
        uninstall(model)


@contextmanager
def broken_layer(layer: nn.Module, fault: Fault, width: int, seed: int) -> Iterator[None]:
    """The output of one decoder layer as a broken unit gives it; random faults are drawn anew at each call."""
    key = Key.from_seed(seed)
    unit = install_fault(fault, width, key)
    plain: Callable[..., object] = layer.forward
    calls = 0

    def forward(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        output = plain(*args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        assert isinstance(h, Tensor)
        h = unit.apply(h, key.fold("call", calls), None)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def try_fault(
    loaded: LoadedModel, batches: Sequence[Mapping[str, Tensor]], settings: Mapping[str, object], *, at_layer: bool
) -> Outcome:
    """Trials of one fault at random sites: how often the first alarm names the site, and which checks fired there."""
    model = loaded.model
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    located, fired = 0, Counter[str]()
    for trial in range(SITES):
        key = Key.from_seed(trial).fold("site", str(settings), int(at_layer))
        index = int(pick(key, list(layers)))
        site = names[id(layers[index])]
        if at_layer:
            context = broken_layer(layers[index], Fault(layer=index, **settings), model.config.hidden_size, trial)
        else:
            inner = [within_layer(n) for n, m in layers[index].named_modules(prefix=site) if isinstance(m, nn.Linear)]
            module = str(pick(key.fold("module"), inner))
            site = f"{site}.{module}"
            context = broken_linear(model, Fault(layer=index, module=module, **settings), trial)
        with context:
            report = find_faults(model, batches[trial % len(batches) :][:1], stop_at_first=True)
        located += report.suspect is not None and report.suspect.site == site
        fired.update({alarm.check for alarm in report.alarms if alarm.site == site})
    return Outcome(located, fired, SITES)


def false_alarms(loaded: LoadedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Alarms on the healthy model, one scan a batch."""
    return [f"{a.check} at {a.site}: {a.detail}" for b in batches for a in find_faults(loaded.model, [b]).alarms]


def measure(name: str, tokens: int, *, few: bool = False) -> None:
    """Print the table of one model."""
    loaded = load_model(name)
    texts = calibration_texts(name)
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=tokens * SITES, batches=SITES)
    began = time.perf_counter()
    alarms = false_alarms(loaded, batches)
    seconds = (time.perf_counter() - began) / SITES
    print(f"## {name}\n\n{SITES} healthy scans of about {tokens} tokens ({seconds:.1f} s each): {len(alarms)} alarms")
    print(*alarms, sep="\n")
    print(f"\n| fault | Linear: first alarm right, of {SITES} | checks that fired there | layer output | checks |")
    print("|---|---|---|---|---|", flush=True)
    for title, settings in FAULTS.items():
        if few and title not in FEW:
            continue
        cells = []
        for at_layer in (False, True):
            outcome = try_fault(loaded, batches, settings, at_layer=at_layer)
            checks = ", ".join(f"{check} {count}" for check, count in outcome.checks.most_common())
            cells.append(f"{outcome.located} | {checks or 'none'}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    directory = os.environ.get(MODEL_VARIABLE)
    measure("tiny", 128)
    if directory:
        measure(directory, 32, few=True)
    else:
        print(f"(set {MODEL_VARIABLE} to the directory of a 135 M model to measure it, too)", file=sys.stderr)


if __name__ == "__main__":
    main()
