"""Where a forward pass left the finite numbers: the first module whose output is NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.hardware.inventory import plain_name
from roundoff.models.draws import noise_context
from roundoff.models.mode import evaluation_mode
from roundoff.sampling.rollouts import Rollouts

UNSEEN = "a module that a second pass over the response does not show"


@torch.no_grad()
def first_nonfinite(model: PreTrainedModel, rollouts: Rollouts) -> str:
    """The first module, in order of execution, whose output is not finite, in words; empty where no rollout needs it.

    The first rollout that ended for this reason is computed again with the arithmetic that is in force and under the
    noise that it met.
    """
    bad = rollouts.nonfinite.nonzero()[:, 0].tolist()
    if not bad:
        return ""
    one = rollouts.select(bad[:1])  # of a single rollout no column is padding, so that every output counts
    inside = one.attention_mask[0]
    tokens, rows = one.tokens[:, inside], one.rows[:, inside]
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found or _is_finite(output):
                return
            why = ", whose weights hold NaN or Inf" if _has_bad_weights(module) else ""
            if not why and not _is_finite(inputs):  # made by no module, such as the products of attention
                why = ", whose input was not finite already"
            found.append(name + why)

        return hook

    handles = [module.register_forward_hook(watch(plain_name(name))) for name, module in model.named_modules() if name]
    try:
        with evaluation_mode(model), noise_context(model, rollouts.noise_key, rows):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else UNSEEN


@torch.no_grad()
def nonfinite_parameters(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that hold NaN or Inf; each is read once."""
    if not parameters:
        return []
    # A sum is NaN or infinite if a term is, and costs a tenth of `isfinite`; one that overflows is looked at again.
    sums = torch.stack([p.sum(dtype=torch.float32) for p in parameters.values()])
    suspects = [name for name, ok in zip(parameters, sums.isfinite().tolist(), strict=True) if not ok]
    return [name for name in suspects if not bool(parameters[name].isfinite().all())]


def _is_finite(output: Any) -> bool:
    """Whether the tensor, or the first of several, is finite."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return not (isinstance(output, Tensor) and output.is_floating_point()) or bool(output.isfinite().all())


def _has_bad_weights(module: nn.Module) -> bool:
    return any(not bool(p.isfinite().all()) for p in module.parameters(recurse=False) if not p.is_meta)
