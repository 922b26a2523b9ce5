"""Exact sensitivity: the KL to the clean model when one layer alone, or all but the kept ones, are perturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
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
    """KL(clean || perturbed) per token (nats), with its standard error over texts; None for one text."""

    kl: float
    se: float | None


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """KL of the whole model on the hardware with the k most sensitive layers kept in high precision."""

    k: int
    kept: tuple[int, ...]
    divergence: Divergence


def divergence(totals: Sequence[float], counts: Sequence[float]) -> Divergence:
    """KL per token of texts with these KL sums (nats) and token counts.

    The standard error is that of a ratio with whole texts as the sampling unit, because tokens of one text are not
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
    """KL when each layer alone is perturbed: over all batches, over the even and over the odd ones.

    The hardware of `installed` must cover the layers; it is left switched off.
    """
    sums: dict[int, list[list[float]]] = {index: [] for index in layers}
    counts = [[float(v) for v in batch.mask.sum(1)] for batch in batches]
    for batch in batches:
        installed.switch(False)
        clean = model(**batch.inputs()).logits
        for index, layer in layers.items():
            with in_force_on(installed, [layer]), draw_of(model, key, batch):
                sums[index].append(text_kl(clean, model(**batch.inputs()).logits, batch.mask))

    def over(parts: list[list[float]], which: slice) -> Divergence:
        return divergence([v for part in parts[which] for v in part], [v for part in counts[which] for v in part])

    whole, even, odd = slice(None), slice(0, None, 2), slice(1, None, 2)
    chosen = [whole, even, odd] if len(batches) > 1 else [whole]
    return {index: [over(parts, which) for which in chosen] for index, parts in sums.items()}


def frontier(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    scan: LayerScan,
    ks: Sequence[int],
    *,
    metric: str | None = None,
    seed: int = 0,
) -> list[FrontierPoint]:
    """KL of the whole model on the scan's hardware against the number k of kept layers (0: none).

    The layers are chosen by `scan`; to judge the choice fairly, pass texts that it did not see.

    Raises:
        ConfigError: if the hardware has no format, so that keeping layers changes nothing, or a k is out of range.
    """
    precision = scan.hardware.precision
    if not (precision.weight or precision.activation):
        raise ConfigError("a frontier needs a format: kept layers are kept from quantization, and noise stays on them")
    texts = read_batches(batches, next(model.parameters()).device)
    decoder_layers(model)
    with frozen_evaluation(model), torch.no_grad():
        clean = [model(**batch.inputs()).logits for batch in texts]
        counts = [float(v) for batch in texts for v in batch.mask.sum(1)]
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
    """KL sums of every text on the hardware; 0 where every layer is kept and nothing else is left."""
    kept_all = len(hardware.precision.keep) == len(decoder_layers(model))
    if kept_all and hardware.model_copy(update={"precision": type(hardware.precision)()}).changes_nothing:
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
