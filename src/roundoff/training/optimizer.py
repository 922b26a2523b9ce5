"""AdamW whose weights, gradients and moments are float32, whatever the model computes in.

A bfloat16 weight has 8 significant bits: a step below about 1/500 of the weight rounds to nothing. At the learning
rates of this field (1e-6 and less) a bfloat16 model under plain AdamW therefore does not train at all, and no error
says so. Hence each parameter of lower precision has a float32 **master weight**. After every backward pass its gradient
is added to a float32 sum; micro-batches and ranks are added in float32, too. The optimizer moves the master, and the
model receives the master rounded to nearest. A float32 parameter, such as a LoRA adapter over any base, is its own
master, and for it this is plain AdamW.

A checkpoint holds the masters and the moments, so that a resumed run continues to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from roundoff.config import Training
from roundoff.runs.checkpoint import DamagedCheckpointError

MASTER = "master"
"""The name under which a master weight is saved, beside the moments of its parameter."""


class MasterAdamW(torch.optim.AdamW):
    """AdamW over the master weights of named parameters."""

    def __init__(self, trained: Mapping[str, nn.Parameter], learning_rate: float, training: Training) -> None:
        self.trained = dict(trained)
        self.masters = {
            name: p if p.dtype is torch.float32 else nn.Parameter(p.detach().float()) for name, p in trained.items()
        }
        super().__init__(
            list(self.masters.values()),
            lr=learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            foreach=True,
        )

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of lower-precision parameters to their masters, after each backward pass."""
        for name, parameter in self.trained.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the masters along their gradients, and round the masters into the model."""
        result = super().step(closure)
        for name, parameter in self.trained.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        return result

    def tensors(self) -> dict[str, Tensor]:
        """What the next step depends on besides the weights of the model, keyed by `parameter/field`."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            master = self.masters[name]
            tensors |= {f"{name}/{field}": value for field, value in self.state[master].items()}
            if master is not parameter:
                tensors[f"{name}/{MASTER}"] = master.detach()
        return tensors

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned, bit for bit.

        Raises:
            DamagedCheckpointError: if a master weight is missing, for which the rounded weight is no substitute.
        """
        for name, parameter in self.trained.items():
            if self.masters[name] is not parameter and f"{name}/{MASTER}" not in tensors:
                raise DamagedCheckpointError(f"a checkpoint holds no master weight of {name}")
        for path, value in tensors.items():
            name, _, field = path.rpartition("/")
            master = self.masters[name]
            if field == MASTER:
                master.copy_(value)
            else:
                self.state[master][field] = value if field == "step" else value.to(master.device)
