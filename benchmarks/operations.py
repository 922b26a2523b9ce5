"""Operations and memory traffic of a decoder layer: the counts behind `roundoff plan`'s cost model.

Counted on a small Qwen2 as its number of layers, hidden and intermediate size grow, so they hold for any size. An
operation is one that computes (views are not); the plain torch path is taken, as on an accelerator.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.models.logprobs import token_logprobs
from roundoff.models.masks import positions, row_ids
from roundoff.numerics.backend import use_backend
from roundoff.numerics.rng import Key

VIEWS = (
    *("view", "reshape", "transpose", "expand", "slice", "select", "squeeze", "aten.t.", "detach", "permute"),
    *("split", "alias", "narrow", "unbind", "as_strided", "lift_fresh"),
)
PRODUCTS = ("aten.mm.", "aten.bmm.", "aten.addmm.", "aten.baddbmm.", "scaled_dot_product")
ROWS, COLUMNS, RESPONSE = 4, 16, 8
HARDWARE = {
    "plain": Hardware(),
    "W4A16 MXFP4": Hardware(precision=Precision(weight="mxfp4")),
    "W4A4 MXFP4": Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")),
    "W4A4 NVFP4": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "FP8 cache": Hardware(precision=Precision(kv_cache="fp8_e4m3")),
    "FP8 attention": Hardware(precision=Precision(attention="fp8_e4m3")),
    "5 % noise": Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
}


class Counting(TorchDispatchMode):
    """Counts operations and the elements that all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.names[name] += 1
        if not func.is_view and not any(word in name for word in PRODUCTS):
            found = tree_leaves((args, kwargs, result))
            self.elements += sum(t.numel() * t.element_size() for t in found if isinstance(t, torch.Tensor)) // 4
        return result

    @property
    def operations(self) -> int:
        """Operations that compute."""
        return sum(count for name, count in self.names.items() if not any(word in name for word in VIEWS))


def counted(hardware: Hardware, *, training: bool, layers: int, hidden: int = 64, intermediate: int = 128) -> Counting:
    """Counts of one pass over `ROWS` x `COLUMNS` tokens."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS * COLUMNS}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).train(training)
    if not hardware.changes_nothing:
        install(model, hardware, seed=0)
    tokens = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)  # texts that differ: equal ones share their pass
    mask = torch.ones_like(tokens)
    rows = row_ids(torch.arange(ROWS), positions(torch.zeros(ROWS, dtype=torch.int64), COLUMNS))
    key = Key.from_seed(0) if hardware.is_noisy else None

    def once() -> None:
        logprobs, _ = token_logprobs(model, tokens, mask, RESPONSE, temperature=1.0, rows=rows, key=key)
        if training:
            logprobs.sum().backward()

    with use_backend("torch"), torch.set_grad_enabled(training):
        once()  # quantized weights are cached
        with Counting() as counting:
            once()
    return counting


def per_layer(hardware: Hardware, *, training: bool) -> tuple[float, float, float]:
    """Operations of a layer, and elements a token of a layer in units of the hidden and the intermediate size."""

    def elements(hidden: int, intermediate: int) -> float:
        size = {"hidden": hidden, "intermediate": intermediate}
        more, less = (counted(hardware, training=training, layers=n, **size).elements for n in (3, 2))
        return (more - less) / (ROWS * COLUMNS)

    many, few = (counted(hardware, training=training, layers=n).operations for n in (6, 2))
    base = elements(64, 128)
    return (many - few) / 4, (elements(128, 128) - base) / 64, (elements(64, 256) - base) / 128


def main() -> None:
    print("| | pass | operations a layer | elements a token: hidden x | intermediate x |\n|---|---|---|---|---|")
    for name, hardware in HARDWARE.items():
        for training in (False, True):
            operations, hidden, intermediate = per_layer(hardware, training=training)
            kind = "forward and backward" if training else "forward"
            print(f"| {name} | {kind} | {operations:.0f} | {hidden:.0f} | {intermediate:.0f} |")


if __name__ == "__main__":
    main()
