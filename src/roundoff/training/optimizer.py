"""AdamW whose weights, gradients and moments are float32, whatever the model computes in.

A bfloat16 weight has 8 significant bits: a step below about 1/500 of the weight rounds to nothing, so that at the
learning rates of this field (1e-6 and less) a bfloat16 model under plain AdamW does not train at all, without a word.
Hence each parameter of lower precision has a float32 **master weight**. After every backward pass its gradient is
added to a float32 sum (micro-batches and ranks are added in float32, too); the optimizer moves the master, and the
model gets the master rounded to nearest. Float32 parameters (LoRA adapters, over any base) are their own masters, and
all of this is plain AdamW.

A checkpoint holds the masters and the moments, so that a resumed run goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from roundoff.config import Training
from roundoff.runs.checkpoint import DamagedCheckpointError

MASTER = "master"
"""Name under which a master weight is saved beside the moments of its parameter."""


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
        """Add the gradients of parameters in lower precision to those of their masters; after every backward pass."""
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
        """Move the masters by their gradients, and the model with them."""
        result = super().step(closure)
        for name, parameter in self.trained.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        return result

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the weights of the model, by `parameter/field`."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            master = self.masters[name]
            found |= {f"{name}/{field}": value for field, value in self.state[master].items()}
            if master is not parameter:
                found[f"{name}/{MASTER}"] = master.detach()
        return found

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` returned in place, bit for bit.

        Raises:
            DamagedCheckpointError: if a master weight is missing; the rounded weight of the model is no substitute.
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
