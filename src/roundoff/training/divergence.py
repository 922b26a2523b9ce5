"""What was not finite in an update, in words.

On a CPU every optimizer step is checked before it is taken, so that no weight moves along a gradient that is not
finite. On an accelerator the check of each step would wait for it, so the numbers of all steps are read at the end of
the update. The run ends all the same, nothing of it is saved, and the message is about the first step that failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from roundoff.errors import RoundoffError
from roundoff.numerics.transfer import fetch
from roundoff.sampling.diagnosis import finite_sums, nonfinite_among
from roundoff.training.loss import LossOutput

METRICS = LossOutput.__slots__
"""Names of the numbers of an optimizer step, in the order of `StepNumbers.values`; entropy and gradient norm follow."""


class NonFiniteLossError(RoundoffError, ArithmeticError):
    """The loss, the gradient or a weight after the optimizer step is not a finite number."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What one optimizer step reports, where it was computed."""

    values: Float[Tensor, " numbers"]
    """The fields of the loss, the mean entropy and the norm of the gradient before clipping."""
    weights: tuple[str, ...]
    """Names of the weights that have a gradient."""
    norms: Float[Tensor, " weights"]
    """Norm of the gradient of each."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that an update moves, and which of them were finite before it."""

    trained: Mapping[str, nn.Parameter]
    """The weights by name."""
    before: Bool[Tensor, " weights"]
    """Whether each had a finite sum before the update, where the weights are."""

    @classmethod
    def of(cls, trained: Mapping[str, nn.Parameter]) -> Weights:
        """The weights as they are now."""
        return cls(trained, finite_sums(trained))


def checked(
    weights: Weights, steps: Sequence[StepNumbers], others: Sequence[Tensor] = ()
) -> tuple[list[list[float]], list[Tensor]]:
    """The numbers of optimizer steps that have been taken, and other tensors, fetched in one wait.

    Raises:
        NonFiniteLossError: if the loss or gradient of a step, or a weight after the last one, is not finite.
    """
    sums = finite_sums(weights.trained)
    parts = [part for step in steps for part in (step.values, step.norms)]
    fetched = fetch([weights.before, sums, *parts, *others])
    before, after, numbers = fetched[0], fetched[1], fetched[2 : 2 + len(parts)]
    found: list[list[float]] = []
    for step, values, norms in zip(steps, numbers[::2], numbers[1::2], strict=True):
        row = values.tolist()
        if not is_finite(row):
            # Weights that are not finite now may be a consequence of this step, so they are not what it is blamed on.
            raise NonFiniteLossError(diverged(row, dict(zip(step.weights, norms.isfinite().tolist(), strict=True)), ""))
        found.append(row)
    if said := spoilt(weights.trained, before, after):
        raise NonFiniteLossError(said)
    return found, fetched[2 + len(parts) :]


def check_now(weights: Weights, step: StepNumbers) -> None:
    """Check an optimizer step before it is taken; this waits for the device.

    Raises:
        NonFiniteLossError: if its loss or its gradient is not finite; no weight has moved then.
    """
    row = step.values.tolist()
    if is_finite(row):
        return
    before, after = fetch([weights.before, finite_sums(weights.trained)])
    gradients = dict(zip(step.weights, step.norms.isfinite().tolist(), strict=True))
    raise NonFiniteLossError(diverged(row, gradients, spoilt(weights.trained, before, after)))


def is_finite(row: Sequence[float]) -> bool:
    """Whether the loss and the norm of the gradient are finite, among the numbers of an optimizer step."""
    return math.isfinite(row[METRICS.index("loss")]) and math.isfinite(row[-1])


def spoilt(trained: Mapping[str, nn.Parameter], before: Tensor, after: Tensor) -> str:
    """A sentence about the weights that an optimizer step has made NaN or infinite; empty if there are none.

    Args:
        trained: the weights by name.
        before: whether each had a finite sum before the update, in host memory.
        after: whether each has one now, in host memory.
    """
    was_fine = dict(zip(trained, before.tolist(), strict=True))
    bad = [name for name in nonfinite_among(trained, after) if was_fine[name]]
    if not bad:
        return ""
    return (
        f"after an optimizer step {len(bad)} of {len(trained)} weights hold NaN or Inf "
        f"({', '.join(bad[:3])}): lower the learning rate, or train in a dtype of a wider range"
    )


def diverged(row: Sequence[float], gradients: Mapping[str, bool], weights: str) -> str:
    """A sentence about what was not finite first, in the order of the computation.

    Args:
        row: the numbers of an optimizer step.
        gradients: whether the gradient of each weight is finite.
        weights: a sentence about weights that an earlier step has spoilt, if there are any.
    """
    said = f"loss {row[METRICS.index('loss')]}, gradient norm {row[-1]}"
    if weights:
        return f"{said}: {weights}"
    if math.isfinite(row[METRICS.index("policy_loss")]) and not math.isfinite(row[METRICS.index("kl")]):
        return f"{said}: the KL to the reference model is not finite, nor therefore the loss"
    if math.isfinite(row[METRICS.index("loss")]):
        bad = [name for name, finite in gradients.items() if not finite]
        return f"{said}: the loss is finite, but the gradients of {len(bad)} weights are not ({', '.join(bad[:3])})"
    return f"{said}: the log-probabilities of the policy are not finite; a lower learning rate may help"


def gradient_norms(gradients: Sequence[Shaped[Tensor, " ..."]]) -> tuple[Float[Tensor, " weights"], Float[Tensor, ""]]:
    """The Euclidean norm of each gradient, and that of all together, as `torch.nn.utils.get_total_norm` computes it."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float32), torch.zeros((), dtype=torch.float32)
    device = gradients[0].device
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(list(gradients))])
    return norms, torch.linalg.vector_norm(norms)
