"""SRDD, Static Relative Deadzone Detection: which layers a format, noise or a fault damages, and what follows."""

from roundoff.srdd.decoder import calibration_batches, decoder_layers
from roundoff.srdd.exact import Divergence, FrontierPoint, frontier
from roundoff.srdd.experiment_scan import calibration_texts, experiment_scan, layer_multipliers
from roundoff.srdd.fault_report import Alarm, FaultReport
from roundoff.srdd.faults import find_faults
from roundoff.srdd.keep import needs_scan, resolve_keep
from roundoff.srdd.layer_scan import METRICS, LayerMetrics, LayerScan, LinearMetrics, rank_correlation
from roundoff.srdd.multipliers import DIRECTIONS, MODES
from roundoff.srdd.probe import scan

__all__ = [
    "DIRECTIONS",
    "METRICS",
    "MODES",
    "Alarm",
    "Divergence",
    "FaultReport",
    "FrontierPoint",
    "LayerMetrics",
    "LayerScan",
    "LinearMetrics",
    "calibration_batches",
    "calibration_texts",
    "decoder_layers",
    "experiment_scan",
    "find_faults",
    "frontier",
    "layer_multipliers",
    "needs_scan",
    "rank_correlation",
    "resolve_keep",
    "scan",
]
