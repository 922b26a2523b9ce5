"""Where a forward pass left the finite numbers: the first module whose output is NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.hardware.inventory import plain_name
from roundoff.logprobs import noise_context
from roundoff.rollouts import Rollouts

UNSEEN = "no module, when that response was computed again in one pass"


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
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(name + (", whose weights hold NaN or Inf" if _has_bad_weights(module) else ""))

        return hook

    handles = [
        module.register_forward_hook(watch(plain_name(name))) for name, module in model.named_modules() if name
    ]
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with noise_context(model, rollouts.noise_key, rows):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    return found[0] if found else UNSEEN


def nonfinite_parameters(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that hold NaN or Inf; each is read once."""
    if not parameters:
        return []
    # the largest magnitude: of one pass over the memory, without the overflow that a sum of squares has in bfloat16
    sizes = torch._foreach_norm([p.detach() for p in parameters.values()], torch.inf)
    bad = ~torch.stack([size.float() for size in sizes]).isfinite()
    return [name for name, is_bad in zip(parameters, bad.tolist(), strict=True) if is_bad]


def _is_finite(output: Any) -> bool:
    """Whether the tensor, or the first of several, is finite."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return not (isinstance(output, Tensor) and output.is_floating_point()) or bool(output.isfinite().all())


def _has_bad_weights(module: nn.Module) -> bool:
    return any(not bool(p.isfinite().all()) for p in module.parameters(recurse=False) if not p.is_meta)
