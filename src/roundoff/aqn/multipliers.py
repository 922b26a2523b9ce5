"""Multipliers of AQN's sigma per decoder layer, from one damage value per layer.

| mode | multiplier of a layer with damage `d` (mean over layers: `m`, smallest: `low`) |
|---|---|
| targeted | 1 in the chosen share of the layers (default 1/7: four of 28), 0 elsewhere |
| variable | 1.5 in the first 1/7 of the ranking, 1.2 in the next 2/7, 1.0 elsewhere |
| proportional | `d / m` |
| inverse | `m / d` |
| ceiling | `low / d`: inverse, scaled so that none exceeds 1 |
| zone | 1 in one half of the layers, 0 in the other; the halves swap at a fraction of the run |

The two halves of `zone` are the edge (the first and the last quarter of the layers) and the middle; the half with the
larger mean damage comes first. The published runs had 28 layers, of which 14 to 17 were "targeted", and 10 to 13 and
18 to 21 were in the second tier of "variable"; the shares above are taken from them.

`direction = "robust"` reverses the ranking: `targeted`, `variable` and `zone` then start at the least damaged layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from roundoff.config import ConfigError, nearest

MODES = ("targeted", "variable", "proportional", "inverse", "ceiling", "zone")
DIRECTIONS = ("sensitive", "robust")
TARGETED_SHARE = 1 / 7
"""Default share of the layers in `targeted`, and in the first tier of `variable`."""
SECOND_TIER_SHARE = 2 / 7
"""Share of the layers in the second tier of `variable`."""
TIERS = (1.5, 1.2, 1.0)
"""Multipliers of the three tiers of `variable`."""
EDGE_SHARE = 1 / 4
"""Share of the layers at either end that belongs to the edge."""
ZONE_SWITCH = 0.5
"""Fraction of the run's steps at which the zones swap."""


def check_mode(mode: str, direction: str = DIRECTIONS[0]) -> None:
    """Check that the mode and the direction exist.

    Raises:
        ConfigError: naming the alternatives.
    """
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, but is {mode!r}{nearest(mode, MODES)}")
    if direction not in DIRECTIONS:
        raise ConfigError(f"direction must be one of {', '.join(DIRECTIONS)}, but is {direction!r}")


def ranking(values: Mapping[int, float], direction: str = "sensitive") -> list[int]:
    """Layers by falling damage (`robust`: by rising damage); of equal ones the earlier layer comes first.

    Raises:
        ConfigError: if there is no such direction.
    """
    check_mode(MODES[0], direction)
    sign = -1.0 if direction == "sensitive" else 1.0
    return sorted(values, key=lambda layer: (sign * values[layer], layer))


def multipliers(
    values: Mapping[int, float],
    mode: str,
    *,
    direction: str = "sensitive",
    share: float = TARGETED_SHARE,
    progress: float = 0.0,
) -> dict[int, float]:
    """The factor on sigma of each decoder layer.

    Args:
        values: damage of each layer, 0 or more, in any unit.
        mode: one of `MODES`.
        direction: the end of the ranking at which `targeted`, `variable` and `zone` start.
        share: fraction of the layers that are `targeted`, or in the first tier of `variable`; at least one layer is.
        progress: fraction of the run's steps that are done; only `zone` depends on it.

    Raises:
        ConfigError: if the mode, direction, share or progress is out of range, or the values do not allow the mode.
    """
    check_mode(mode, direction)
    if not 0 < share < 1:
        raise ConfigError(f"share must be in (0, 1), but is {share}")
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress must be in [0, 1], but is {progress}")
    bad = {layer: value for layer, value in values.items() if not (math.isfinite(value) and value >= 0)}
    if bad or not values:
        raise ConfigError(f"multipliers need a finite damage of 0 or more for every layer, but have {bad or 'none'}")
    layers = sorted(values)
    if mode in ("proportional", "inverse", "ceiling"):
        return _scaled(values, layers, mode)
    order = ranking(values, direction)
    if mode == "zone":
        return _zone(values, layers, direction, progress)
    first = max(1, round(share * len(order)))
    if mode == "targeted":
        if first >= len(order):
            raise ConfigError(f"share = {share} targets all {len(order)} layers: use layers = 'all'")
        return dict.fromkeys(layers, 0.0) | dict.fromkeys(order[:first], 1.0)
    second = first + max(1, round(SECOND_TIER_SHARE * len(order)))
    return {
        layer: TIERS[0] if layer in order[:first] else TIERS[1] if layer in order[:second] else TIERS[2]
        for layer in layers
    }


def _scaled(values: Mapping[int, float], layers: Sequence[int], mode: str) -> dict[int, float]:
    """Multipliers that are a function of the damage itself rather than of the ranking."""
    mean = sum(values.values()) / len(values)
    if mode == "proportional":
        if mean == 0:
            raise ConfigError("mode = 'proportional' needs damage above 0 in some layer, but it is 0 in all")
        return {layer: values[layer] / mean for layer in layers}
    zero = [layer for layer in layers if values[layer] == 0]
    if zero:
        raise ConfigError(f"mode = {mode!r} divides by the damage, which is 0 in layers {zero}: rank by another metric")
    numerator = mean if mode == "inverse" else min(values.values())
    return {layer: numerator / values[layer] for layer in layers}


def _zone(values: Mapping[int, float], layers: Sequence[int], direction: str, progress: float) -> dict[int, float]:
    """1 in the zone whose turn it is, 0 in the other."""
    width = max(1, round(EDGE_SHARE * len(layers)))
    edge, middle = [*layers[:width], *layers[len(layers) - width :]], layers[width : len(layers) - width]
    if not middle:
        raise ConfigError(f"mode = 'zone' needs at least 3 decoder layers, but there are {len(layers)}")

    def mean(zone: Sequence[int]) -> float:
        return sum(values[layer] for layer in zone) / len(zone)

    edge_first = (mean(edge) >= mean(middle)) == (direction == "sensitive")
    noisy = edge if edge_first == (progress < ZONE_SWITCH) else middle
    return {layer: float(layer in noisy) for layer in layers}
