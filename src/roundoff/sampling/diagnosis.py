"""Where a forward pass stopped being finite: the first module whose output holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.hardware import rollout_phase
from roundoff.hardware.inventory import plain_name
from roundoff.models.draws import noise_context
from roundoff.models.mode import evaluation_mode
from roundoff.numerics.transfer import put
from roundoff.sampling.rollouts import Rollouts

UNSEEN = "a module that a second pass over the response does not show"
"""What `first_nonfinite` returns if the second pass is finite."""


@torch.no_grad()
def first_nonfinite(model: PreTrainedModel, rollouts: Rollouts) -> str:
    """The first module, in order of execution, whose output is not finite, in words; empty if all rollouts are finite.

    The first rollout that ended for this reason is computed again, with the current arithmetic and under the noise that
    it met when it was sampled.
    """
    bad = rollouts.nonfinite.nonzero()[:, 0].tolist()
    if not bad:
        return ""
    rollout = rollouts.select(bad[:1])
    inside = rollout.attention_mask[0]  # without padding, every output counts
    tokens, rows = put(rollout.tokens[:, inside], model.device), rollout.rows[:, inside]
    modules: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if modules or _is_finite(output):
                return
            why = ", whose weights hold NaN or Inf" if _has_bad_weights(module) else ""
            if not why and not _is_finite(inputs):  # computed outside of any module, such as the products of attention
                why = ", whose input was not finite already"
            modules.append(name + why)

        return hook

    handles = [module.register_forward_hook(watch(plain_name(name))) for name, module in model.named_modules() if name]
    try:
        with evaluation_mode(model), rollout_phase(model), noise_context(model, rollouts.noise_key, rows):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return modules[0] if modules else UNSEEN


@torch.no_grad()
def nonfinite_parameters(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    if not parameters:
        return []
    return nonfinite_among(parameters, finite_sums(parameters))


@torch.no_grad()
def finite_sums(parameters: Mapping[str, nn.Parameter]) -> Bool[Tensor, " parameters"]:
    """Whether the sum of each parameter is finite, where the parameters are.

    A sum is not finite if a term is not, and costs a tenth of `isfinite`; it may also overflow.
    """
    sums = [p.sum(dtype=torch.float32) for p in parameters.values()]
    return torch.stack(sums).isfinite() if sums else torch.zeros(0, dtype=torch.bool)


@torch.no_grad()
def nonfinite_among(parameters: Mapping[str, nn.Parameter], sums: Bool[Tensor, " parameters"]) -> list[str]:
    """Names of the parameters that hold NaN or infinity, given their `finite_sums`; only suspects are read again."""
    suspects = [name for name, ok in zip(parameters, sums.tolist(), strict=True) if not ok]
    return [name for name in suspects if not bool(parameters[name].isfinite().all())]


def _is_finite(output: Any) -> bool:
    """Whether the tensor, or the first one of a tuple, is finite; anything else counts as finite."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return not (isinstance(output, Tensor) and output.is_floating_point()) or bool(output.isfinite().all())


def _has_bad_weights(module: nn.Module) -> bool:
    return any(not bool(p.isfinite().all()) for p in module.parameters(recurse=False) if not p.is_meta)
