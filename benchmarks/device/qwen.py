"""A model of Qwen2.5-1.5B's shape with random weights in bfloat16, and the hardware that it is timed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.device.machine import Device
from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import install, uninstall
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
SMALL: dict[str, Any] = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PLAIN = "plain"
HARDWARE = {
    PLAIN: Hardware(),
    "W4A4 mxfp4": Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")),
    "W4A4 nvfp4": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "5 % noise": Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
}
"""In the order in which they are timed."""
GOALS = {"W4A4 mxfp4": 1.25, "W4A4 nvfp4": 1.25, "5 % noise": 1.3}
"""Of a training step, in times of the plain one."""


def build(device: str, *, small: bool) -> PreTrainedModel:
    """The model in evaluation mode; its weights are made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**(SMALL if small else SHAPE)))
    return model.to(torch.bfloat16).eval()


def random_tokens(rows: int, columns: int, *, small: bool, seed: int) -> torch.Tensor:
    """Token ids [rows, columns] on the CPU, none of them the end token."""
    vocabulary = (SMALL if small else SHAPE)["vocab_size"]
    return torch.randint(1, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))


@contextmanager
def installed(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Compute on the hardware of this name inside the block."""
    if name == PLAIN:
        yield
        return
    install(model, HARDWARE[name], seed=0)
    try:
        yield
    finally:
        uninstall(model)


def too_slow(
    device: Device, model: PreTrainedModel, hardware: Hardware, tokens: int, seconds: float, *, trained: bool
) -> str:
    """Why a pass over so many tokens would take longer than `seconds`; empty if it would not.

    Only noise is estimated, from one call of its kernel: in plain torch a pass of a large model takes minutes, and a
    pass that has begun cannot be ended without the process.
    """
    if seconds <= 0:
        return "the time of this part was over"
    if not hardware.is_noisy:
        return ""
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    elements = tokens * sum(m.out_features + (m.in_features if trained else 0) for m in linears)
    elements += sum(m.weight.numel() for m in linears) if trained else 0
    y = torch.ones(min(tokens, 1024), model.config.intermediate_size, dtype=model.dtype, device=device.name)
    device.wall_seconds(lambda: matmul_noise(y, 0.05, Key.from_seed(0)))
    estimate = elements / y.numel() * device.wall_seconds(lambda: matmul_noise(y, 0.05, Key.from_seed(0)))
    if estimate <= seconds:
        return ""
    return f"noise alone would take {estimate:.0f} s here, by {device.computes_by()}"
