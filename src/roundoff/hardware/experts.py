"""Mixture-of-experts layers on simulated hardware, for experts whose weights are stacked into one parameter.

`transformers` 5 stacks the weights of all experts as [experts, out_features, in_features] and selects their computation
by name. Each of an expert's two products (`gate_up_proj`, `down_proj`) is computed like a Linear of its own: it has
blocks along `in_features` and a tensor scale per expert, and it draws its noise under the name
`name.<expert>.gate_up_proj` with the row ids of the expert's tokens. A token's noise therefore does not depend on the
other tokens that were routed to the same expert. The router stays in high precision and without noise. A pass waits for
the device once in each layer of experts, to learn which tokens go where.

Not supported, and then listed as skipped: experts with biases, without a gate, transposed, or spread over devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roundoff.hardware.draw import Draw
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.hardware.linear import LinearState
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.transfer import fetch, put

NAME = "roundoff"
"""Name of the computation in transformers' registry."""
STATE = "hardware_experts_state"
"""Attribute of an experts module that holds its `ExpertsState`."""
PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of the stacked weights, in the order of computation."""


@dataclass(eq=False, slots=True)
class ExpertsState:
    """The experts of one layer on hardware."""

    runtime: Runtime
    """State that all layers of the model share."""
    linears: dict[str, list[LinearState]] = field(default_factory=dict)
    """The state of each expert's product, by projection."""

    def states(self) -> list[LinearState]:
        """The states of all products."""
        return [state for states in self.linears.values() for state in states]


def unsupported(module: nn.Module) -> str | None:
    """The property of a module's experts that is not supported, in words; None if there is none."""
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
def experts_forward(
    module: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens choices"],
    top_k_weights: Float[Tensor, "tokens choices"],
) -> Float[Tensor, "tokens hidden"]:
    """Compute the experts of one layer; transformers calls this for every experts module on hardware.

    Args:
        module: the experts module, which holds an `ExpertsState`.
        hidden: hidden states of the tokens.
        top_k_index: experts that the router chose for each token.
        top_k_weights: weight of each choice.

    Returns:
        The weighted sum of the chosen experts' outputs.
    """
    state: ExpertsState = getattr(module, STATE)
    draw = state.runtime.draw
    rows = None if draw is None else draw.rows_of(hidden.shape[:-1], state.linears[PROJECTIONS[0]][0].name)
    result = torch.zeros_like(hidden)
    (chosen,) = fetch([top_k_index])  # how many tokens each expert has decides the shapes of its products
    for expert in sorted(set(chosen.flatten().tolist())):
        places = torch.stack(torch.where(chosen == expert))
        token, choice = put(places, hidden.device)
        inner = None if draw is None or rows is None else _inner_draw(draw, rows[token], places[0])
        y = _product(module, state, "gate_up_proj", expert, hidden[token], inner)
        y = _product(module, state, "down_proj", expert, module._apply_gate(y), inner)  # type: ignore[operator]
        y = y * top_k_weights[token, choice, None]
        result = result.index_add(0, token, y.to(result.dtype))
    return result


def _inner_draw(draw: Draw, rows: Tensor, tokens: Tensor) -> Draw:
    """The draw of one expert's products; `rows` are the row ids of its tokens, and `tokens` their places."""
    host = draw.host.reshape(-1)[tokens][None] if draw.host is not None and draw.host.is_cpu else None
    real = None if draw.real is None else draw.real.reshape(-1)[tokens][None]
    return Draw(draw.key, rows[None], host, real=real)


def _product(
    module: nn.Module, state: ExpertsState, projection: str, expert: int, x: Tensor, draw: Draw | None
) -> Tensor:
    """One product of one expert, for its tokens `x` [tokens, in_features]."""
    weight: Tensor = getattr(module, projection)[expert]
    return state.linears[projection][expert].linear(x, weight, None, draw)


def register() -> None:
    """Register the computation with transformers; idempotent."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
