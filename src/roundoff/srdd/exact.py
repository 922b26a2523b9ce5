"""Exact sensitivity: the KL to the clean model when only one layer is perturbed, or all layers but the kept ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from roundoff.config import ConfigError, Hardware
from roundoff.hardware import InstalledHardware, install, uninstall
from roundoff.models.calibration import (
    Calibration,
    decoder_layers,
    draw_of,
    frozen_evaluation,
    in_force_on,
    read_batches,
    text_kl,
)
from roundoff.numerics.rng import Key
from roundoff.srdd.layer_scan import LayerScan


@dataclass(frozen=True, slots=True)
class Divergence:
    """A KL divergence from the clean to the perturbed model."""

    kl: float
    """KL(clean || perturbed), in nats per token."""
    se: float | None
    """Standard error over texts, in nats per token; None for a single text."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """KL of the entire model on the hardware, with the most sensitive layers kept in high precision."""

    k: int
    """Number of kept layers."""
    kept: tuple[int, ...]
    """Indices of the kept layers."""
    divergence: Divergence


def divergence(totals: Sequence[float], counts: Sequence[float]) -> Divergence:
    """KL per token, from the KL sums (in nats) and the token counts of the texts.

    The standard error is that of a ratio, with texts as the sampling unit because the tokens of one text are not
    independent: `sqrt(n / (n - 1) * sum (total - kl * count)^2) / sum count`.
    """
    tokens = sum(counts)
    kl = sum(totals) / tokens
    n = len(totals)
    if n < 2:
        return Divergence(kl, None)
    spread = sum((total - kl * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return Divergence(kl, math.sqrt(n / (n - 1) * spread) / tokens)


@torch.no_grad()
def exact_divergences(
    model: nn.Module,
    installed: InstalledHardware,
    layers: Mapping[int, nn.Module],
    batches: Sequence[Calibration],
    key: Key,
) -> dict[int, list[Divergence]]:
    """KL when each layer alone is perturbed: over all batches, over the even ones and over the odd ones.

    With a single batch, only the first of the three is given. The hardware of `installed` must cover the layers; it is
    off afterwards.
    """
    sums: dict[int, list[list[float]]] = {index: [] for index in layers}
    counts = [[float(count) for count in batch.mask.sum(1)] for batch in batches]
    for batch in batches:
        installed.switch(False)
        clean = model(**batch.inputs()).logits
        for index, layer in layers.items():
            with in_force_on(installed, [layer]), draw_of(model, key, batch):
                sums[index].append(text_kl(clean, model(**batch.inputs()).logits, batch.mask))

    def over(totals: list[list[float]], part: slice) -> Divergence:
        return divergence([t for batch in totals[part] for t in batch], [c for batch in counts[part] for c in batch])

    everything, even, odd = slice(None), slice(0, None, 2), slice(1, None, 2)
    parts = [everything, even, odd] if len(batches) > 1 else [everything]
    return {index: [over(totals, part) for part in parts] for index, totals in sums.items()}


def frontier(
    model: nn.Module,
    batches: Sequence[Mapping[str, Shaped[Tensor, "_texts _columns"]]],
    scan: LayerScan,
    ks: Sequence[int],
    *,
    metric: str | None = None,
    seed: int = 0,
) -> list[FrontierPoint]:
    """KL of the entire model on the scan's hardware, for each number k of kept layers.

    Args:
        model: without hardware installed; unchanged afterwards.
        batches: what a tokenizer returns. To judge the choice of layers fairly, pass texts that the scan did not see.
        scan: ranks the layers, and names the hardware.
        ks: numbers of layers to keep; 0 keeps none.
        metric: of the scan, by which to rank; None: the scan's own choice.
        seed: of matmul noise.

    Raises:
        ConfigError: if the hardware has no format, so that keeping layers changes nothing, or if a k is out of range.
    """
    precision = scan.hardware.precision
    if not precision.quantizes_forward:
        raise ConfigError("a frontier needs a format: kept layers are kept from quantization, and noise stays on them")
    texts = read_batches(batches, next(model.parameters()).device)
    decoder_layers(model)
    with frozen_evaluation(model), torch.no_grad():
        clean = [model(**batch.inputs()).logits for batch in texts]
        counts = [float(count) for batch in texts for count in batch.mask.sum(1)]
        points = []
        for k in ks:
            kept = scan.most_sensitive(k, metric) if k else ()
            hardware = scan.hardware.model_copy(update={"precision": precision.model_copy(update={"keep": kept})})
            sums = _sums(model, hardware, texts, clean, seed)
            points.append(FrontierPoint(k, kept, divergence(sums, counts)))
    return points


def _sums(
    model: nn.Module, hardware: Hardware, texts: Sequence[Calibration], clean: Sequence[Tensor], seed: int
) -> list[float]:
    """KL sum of every text on the hardware, in nats; 0 if all layers are kept and the hardware does nothing else."""
    kept_all = len(hardware.precision.keep) == len(decoder_layers(model))
    rest = hardware.model_copy(update={"precision": type(hardware.precision)(), "accumulator": None})
    if kept_all and rest.changes_nothing:
        return [0.0 for batch in texts for _ in batch.tokens]
    install(model, hardware, seed=seed)
    try:
        sums: list[float] = []
        key = Key.from_seed(seed).fold("srdd", "frontier")
        for batch, logits in zip(texts, clean, strict=True):
            with draw_of(model, key, batch):
                sums += text_kl(logits, model(**batch.inputs()).logits, batch.mask)
        return sums
    finally:
        uninstall(model)
