"""Mixture-of-experts layers whose expert weights are one [E, out, in] parameter each, on simulated hardware.

`transformers` 5 stores experts like that and lets their computation be chosen by name. Each expert's two products
(`gate_up_proj`, `down_proj`) are those of a Linear of its own: blocks along `in`, one tensor scale an expert, noise
drawn under `name.<expert>.gate_up_proj` with the row ids of the tokens it was given, so that a token's noise does not
depend on which others went to the same expert. The router stays in high precision and without noise.

Left out (and then listed as skipped): experts with biases, without a gate, transposed, or spread over devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from roundoff.hardware.draw import Draw, Runtime
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.hardware.linear import LinearState

NAME = "roundoff"
"""Name of the computation in transformers' registry."""
STATE = "hardware_experts_state"
PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(eq=False, slots=True)
class ExpertsState:
    """What the hardware does to the experts of one layer: one state for each expert's projection."""

    runtime: Runtime
    linears: dict[str, list[LinearState]] = field(default_factory=dict)

    def states(self) -> list[LinearState]:
        """All of them."""
        return [state for states in self.linears.values() for state in states]


def unsupported(module: nn.Module) -> str | None:
    """Why the experts of a module cannot be computed here; None if they can."""
    for flag, text in (
        ("is_transposed", "transposed weights"),
        ("has_bias", "biases"),
        ("has_post_expert_norm", "a norm after each expert"),
        ("_is_expert_parallel", "experts spread over devices"),
    ):
        if getattr(module, flag, False):
            return text
    return None if getattr(module, "has_gate", True) else "no gate"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in transformers' stacked layout."""
    weights = [getattr(module, name, None) for name in PROJECTIONS]
    return all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights) and hasattr(module, "_apply_gate")


@outside_of_graphs
def experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum [N, hidden] of each token's k experts, for tokens [N, hidden] and choices [N, k]."""
    state: ExpertsState = getattr(module, STATE)
    draw = state.runtime.draw
    rows = None if draw is None else draw.rows_of(hidden.shape[:-1], state.linears[PROJECTIONS[0]][0].name)
    result = torch.zeros_like(hidden)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        token, choice = torch.where(top_k_index == expert)
        inner = None if draw is None or rows is None else Draw(draw.key, rows[token][None])
        y = _product(module, state, "gate_up_proj", expert, hidden[token], inner)
        y = _product(module, state, "down_proj", expert, module._apply_gate(y), inner)  # type: ignore[operator]
        y = y * top_k_weights[token, choice, None]
        result = result.index_add(0, token, y.to(result.dtype))
    return result


def _product(
    module: nn.Module, state: ExpertsState, projection: str, expert: int, x: Tensor, draw: Draw | None
) -> Tensor:
    weight: Tensor = getattr(module, projection)[expert]
    return state.linears[projection][expert].linear(x, weight, None, draw)


def register() -> None:
    """Make the computation known to transformers; a second call changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
