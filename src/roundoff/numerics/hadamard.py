"""The randomized Hadamard transform, which spreads outliers over a group before it is quantized.

A group of n numbers is multiplied by `diag(signs) H / sqrt(n)` with H Sylvester's matrix of size n. That product is
orthogonal, so transforming both operands of a matrix product along the contraction axis changes the product by rounding
alone. NVIDIA's NVFP4 recipe (arXiv:2509.25149) uses groups of 16 for the gradients of weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .backend import DTYPES
from .transfer import put

TRANSFORMER_ENGINE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Signs of the groups of 16 in Transformer Engine's gradients of weights."""


def hadamard(
    x: Float[Tensor, "*shape"],
    size: int = 16,
    signs: Sequence[int] | None = TRANSFORMER_ENGINE_SIGNS,
    *,
    axis: int = -1,
) -> Float[Tensor, "*shape"]:
    """Multiply each group of `size` neighbours along an axis by `diag(signs) H / sqrt(size)`.

    Args:
        x: the numbers, float32, bfloat16 or float16; the sums are in float32.
        size: number of elements of a group, a power of two that divides the length of the axis.
        signs: 1 or -1 for each element of a group; None for no change of sign.
        axis: the axis along which groups lie.

    Returns:
        The transformed numbers, of the shape and dtype of `x`.

    Raises:
        TypeError, ValueError, IndexError: if an argument cannot be used.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"hadamard takes float32, bfloat16 or float16, but the tensor is {x.dtype}; convert it first")
    if x.dim() and not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis must be in [{-x.dim()}, {x.dim() - 1}] for shape {tuple(x.shape)}, but is {axis}")
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, but is {size}")
    if x.dim() == 0 or x.shape[axis] % size:
        raise ValueError(
            f"groups of {size} must divide the axis, but the tensor has shape {tuple(x.shape)} (axis {axis}): pad it "
            "with zeros"
        )
    if signs is not None and (len(signs) != size or any(sign not in (1, -1) for sign in signs)):
        raise ValueError(f"signs must be {size} numbers, each 1 or -1, but is {tuple(signs)}")
    matrix = _matrix(size, None if signs is None else tuple(signs), x.device)
    moved = x.movedim(axis, -1)
    groups = moved.to(torch.float32).reshape(*moved.shape[:-1], moved.shape[-1] // size, size)
    with torch.autocast(x.device.type, enabled=False):  # which would round the operands to its own dtype
        result = (groups @ matrix).reshape(moved.shape).movedim(-1, axis)
    return result.to(x.dtype)


@functools.cache
def _matrix(size: int, signs: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """`diag(signs) H / sqrt(size)` in float32, made once for a device, because the copy makes a device wait."""
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    if signs is not None:
        h = h * torch.tensor(signs, dtype=torch.float64, device="cpu").unsqueeze(1)
    return put((h / math.sqrt(size)).to(torch.float32), device)
