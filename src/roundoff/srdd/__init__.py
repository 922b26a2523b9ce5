"""SRDD, Static Relative Deadzone Detection: which layers a format, noise or a fault damages, and which unit is faulty.

Here: the scan of a model under hardware, the metrics of a layer, the exact KL per layer and the frontier of kept
layers, and the search for faults on the machine at hand. Not here: calibration batches (`roundoff.models.calibration`),
the hardware that is scanned (`roundoff.hardware`), and what AQN does with the multipliers (`roundoff.aqn`).

Doors: the names below, foremost `scan`, `LayerScan`, `experiment_scan`, `layer_multipliers`, `resolve_keep`,
`keep_names_a_scan`, `kept_count`, `frontier`, and `find_faults`.
"""

from roundoff.srdd.exact import Divergence, FrontierPoint, frontier
from roundoff.srdd.fault_report import Alarm, FaultReport
from roundoff.srdd.fault_search import find_faults
from roundoff.srdd.keep import keep_names_a_scan, kept_count, resolve_keep
from roundoff.srdd.layer_scan import METRICS, LayerMetrics, LayerScan, LinearMetrics, rank_correlation
from roundoff.srdd.of_experiment import experiment_scan, layer_multipliers
from roundoff.srdd.scanning import scan

__all__ = [
    "METRICS",
    "Alarm",
    "Divergence",
    "FaultReport",
    "FrontierPoint",
    "LayerMetrics",
    "LayerScan",
    "LinearMetrics",
    "experiment_scan",
    "find_faults",
    "frontier",
    "keep_names_a_scan",
    "kept_count",
    "layer_multipliers",
    "rank_correlation",
    "resolve_keep",
    "scan",
]
