"""The result of a scan: damage per decoder layer and per Linear, in several metrics with their units and titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import rankdata

from roundoff.aqn.multipliers import TARGETED_SHARE, multipliers, ranking
from roundoff.config import ConfigError, Hardware, nearest, validate

AGREEMENT_WARNING = 0.8
"""Rank correlation between the two halves of the calibration text below which a scan warns about its ranking."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of a scan."""

    title: str
    """Short name to show."""
    unit: str
    meaning: str
    """Definition in one line."""
    classic: bool = False
    """Whether the metric is misleading and kept only because published work uses it (see docs/srdd.md)."""
    decibel: bool = False
    """Whether the value is a signal-to-noise ratio, so that the damage is `10^(-value/10)`."""


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "gradient": Metric(
            "gradient score",
            "nats^2/token",
            "mean over tokens of (g_t . e_t)^2: e_t the layer's output error, g_t the loss gradient there",
        ),
        "energy_error": Metric(
            "energy error",
            "fraction",
            "mean over tokens of |Q(x_t) - x_t|^2 / |x_t|^2 at the inputs of the layer's Linears, sink tokens left out",
        ),
        "shadow": Metric("shadow score", "fraction", "mean over tokens of |L_q(h_t) - L(h_t)| / |L(h_t)|"),
        "deadzone_ratio": Metric("deadzone", "fraction", "share of non-zero Linear inputs that become zero"),
        "saturation_ratio": Metric(
            "saturation", "fraction", "share of Linear inputs beyond the format's largest number"
        ),
        "weight_error": Metric("weight error", "fraction", "|Q(W) - W|^2 / |W|^2 over the layer's Linears"),
        "exact": Metric("exact KL", "nats/token", "KL to the clean model when this layer alone is perturbed"),
        "relative_error": Metric(
            "relative error (classic)", "fraction", "mean of |q - x| / |x| over the layer's output", classic=True
        ),
        "sqnr": Metric("SQNR (classic)", "dB", "SQNR of the layer's whole output tensor", classic=True, decibel=True),
    }
)
"""The metrics of a decoder layer by name."""


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """Damage of one decoder layer; `METRICS` defines the metrics and their units.

    A metric is None if the scan did not measure it, or if the hardware has no effect on it.
    """

    layer: int
    gradient: float | None = None
    energy_error: float | None = None
    shadow: float | None = None
    deadzone_ratio: float | None = None
    saturation_ratio: float | None = None
    weight_error: float | None = None
    exact: float | None = None
    relative_error: float | None = None
    sqnr: float | None = None
    exact_se: float | None = None
    """Standard error of `exact` over calibration texts, in nats per token."""
    sink_share: float = 0.0
    """Share of tokens left out of `energy_error` because they are attention sinks."""


@dataclass(frozen=True, slots=True)
class LinearMetrics:
    """Damage to the operands of one Linear, as fractions; None if the hardware does not change that operand."""

    name: str
    """Dotted name of the Linear."""
    layer: int
    """Index of its decoder layer."""
    weight_error: float | None
    energy_error: float | None
    deadzone_ratio: float | None
    saturation_ratio: float | None


@dataclass(frozen=True)
class LayerScan:
    """The result of `scan`."""

    hardware: Hardware
    """Hardware that the layers were scanned under, with no layer kept in high precision."""
    tokens: int
    """Number of calibration tokens, padding not counted."""
    layers: tuple[LayerMetrics, ...]
    """Damage of every decoder layer, in the model's order."""
    halves: tuple[tuple[LayerMetrics, ...], ...]
    """Damage of every layer on each of two disjoint halves of the calibration text; empty for a single text."""
    linears: tuple[LinearMetrics, ...]
    """Damage of every Linear, in the model's order."""
    rank_by: str
    """Metric that ranks the layers unless another one is named."""

    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that this scan measured."""
        return tuple(name for name in METRICS if all(getattr(row, name) is not None for row in self.layers))

    def values(self, metric: str | None = None) -> dict[int, float]:
        """The metric of each decoder layer, in the unit of `METRICS`.

        Raises:
            ConfigError: if the scan does not have this metric.
        """
        return self._column(self.layers, metric)

    def damage(self, metric: str | None = None) -> dict[int, float]:
        """Damage of each layer by a metric: 0 or more, larger is worse. A ratio in dB becomes noise over signal.

        Raises:
            ConfigError: if the scan does not have this metric.
        """
        return self._damage(self.layers, metric)

    def ranking(self, metric: str | None = None, direction: str = "sensitive") -> tuple[int, ...]:
        """All decoder layers, the most damaged first (`robust`: last).

        Raises:
            ConfigError: if the scan does not have this metric, or if it is not finite in some layer.
        """
        damage = self.damage(metric)
        bad = [layer for layer, value in damage.items() if not math.isfinite(value)]
        if bad:
            title = METRICS[self.rank_by if metric is None else metric].title
            raise ConfigError(
                f"{title} is NaN or infinite in layers {bad}, so nothing can be ranked by it: weights with NaN or Inf, "
                "or overflow on the calibration text"
            )
        return tuple(ranking(damage, direction))

    def most_sensitive(self, k: int, metric: str | None = None) -> tuple[int, ...]:
        """The k most damaged layers, in the model's order.

        Raises:
            ConfigError: if k is below 1 or above the number of layers, or if nothing can be ranked (see `ranking`).
        """
        if not 1 <= k <= len(self.layers):
            raise ConfigError(f"k must be in 1 to {len(self.layers)} (the model's decoder layers), but is {k}")
        return tuple(sorted(self.ranking(metric)[:k]))

    def multipliers(
        self,
        mode: str,
        *,
        metric: str | None = None,
        direction: str = "sensitive",
        share: float = TARGETED_SHARE,
        progress: float = 0.0,
    ) -> dict[int, float]:
        """AQN's multiplier of each decoder layer; see `roundoff.aqn.multipliers`."""
        return multipliers(self.damage(metric), mode, direction=direction, share=share, progress=progress)

    def agreement(self, metric: str | None = None) -> float | None:
        """Spearman's rank correlation of the metric between the two halves; None for a single text or a constant."""
        if len(self.halves) < 2:
            return None
        first, second = (self._damage(half, metric) for half in self.halves)
        return rank_correlation(list(first.values()), list(second.values()))

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the ranking must know; empty if there is nothing."""
        agreement = self.agreement()
        title = METRICS[self.rank_by].title
        if not self.halves:
            return (f"calibrated on one text: whether the ranking by {title} is stable is not known; give more texts",)
        if agreement is None:
            return (f"{title} is the same for every layer of a half: it ranks nothing",)
        if agreement < AGREEMENT_WARNING:
            return (
                f"the two halves of the calibration text rank the layers differently by {title} (Spearman "
                f"{agreement:.2f}, below {AGREEMENT_WARNING}): give more text",
            )
        return ()

    def to_json(self) -> dict[str, Any]:
        """The scan as plain data, with its ranking, agreement and warnings."""
        return {
            "hardware": self.hardware.model_dump(mode="json"),
            "tokens": self.tokens,
            "rank_by": self.rank_by,
            "ranking": list(self.ranking()),
            "agreement": {name: self.agreement(name) for name in self.metric_names()},
            "warnings": list(self.warnings()),
            "metrics": {name: asdict(METRICS[name]) for name in self.metric_names()},
            "layers": [asdict(row) for row in self.layers],
            "halves": [[asdict(row) for row in half] for half in self.halves],
            "linears": [asdict(row) for row in self.linears],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerScan:
        """The scan that `to_json` wrote, equal in every bit.

        Raises:
            ConfigError: if the data is not a scan.
        """
        try:
            return cls(
                validate(Hardware, data["hardware"], source="scan"),
                int(data["tokens"]),
                tuple(LayerMetrics(**row) for row in data["layers"]),
                tuple(tuple(LayerMetrics(**row) for row in half) for half in data["halves"]),
                tuple(LinearMetrics(**row) for row in data["linears"]),
                str(data["rank_by"]),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is not a scan: {type(error).__name__}: {error}") from error

    def _column(self, rows: Sequence[LayerMetrics], metric: str | None) -> dict[int, float]:
        name = self.rank_by if metric is None else metric
        if name not in self.metric_names():
            known = self.metric_names()
            reason = "was not measured by this scan" if name in METRICS else "is not a metric"
            raise ConfigError(f"{name!r} {reason}{nearest(name, known)} (measured: {', '.join(known)})")
        return {row.layer: getattr(row, name) for row in rows}

    def _damage(self, rows: Sequence[LayerMetrics], metric: str | None) -> dict[int, float]:
        values = self._column(rows, metric)
        if METRICS[self.rank_by if metric is None else metric].decibel:
            return {layer: 10.0 ** (-value / 10.0) for layer, value in values.items()}
        return values


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, with ties at their mean rank; None if a side is constant or not finite."""
    if len(first) < 2 or not all(map(math.isfinite, (*first, *second))):
        return None
    ranks = np.stack([rankdata(first), rankdata(second)])
    if (ranks == ranks[:, :1]).all(axis=1).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])
