"""torch's global settings, held at known values while roundoff computes.

Another library in the process may have changed one of these, and each would silently change a result:

| setting | what it would change | inside `own_torch_state` |
|---|---|---|
| `set_default_dtype` | the dtype of log-probabilities and masks | float32 |
| `set_default_device` | the device of index tensors | cpu |
| `set_float32_matmul_precision` | float32 products become bfloat16 or TF32 | `highest` |
| `torch.backends.*.matmul.fp32_precision` | the same, under torch's newer names | `ieee` |
| `set_flush_denormal` | subnormal numbers become zero before they are quantized | off |

`own_defaults` also leaves inference mode, because a parameter created in it cannot be trained. Loading a model uses it.

`torch.autocast` is refused instead of being reset (`refuse_autocast`): its user asked for products in another dtype,
and a score under it would not be that of the declared arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Hold the settings above at their known values inside the block, and restore them afterwards."""
    with ExitStack() as restored:
        _round_products_exactly(
            restored
        )  # first, because torch refuses to report the older setting if the two disagree
        dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        if torch.get_default_device().type != "cpu":
            restored.enter_context(torch.device("cpu"))
        if dtype is not torch.float32:
            torch.set_default_dtype(torch.float32)
            restored.callback(torch.set_default_dtype, dtype)
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            restored.callback(torch.set_float32_matmul_precision, precision)
        if flushes_denormals():
            torch.set_flush_denormal(False)
            restored.callback(torch.set_flush_denormal, True)
        yield


def _round_products_exactly(restored: ExitStack) -> None:
    """Set the newer names, which torch before 2.9 does not have, to `ieee`."""
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        products: Any = getattr(backend, "matmul", None)
        before = getattr(products, "fp32_precision", "none")
        if before in ("bf16", "tf32"):
            products.fp32_precision = "ieee"
            restored.callback(_put_back, products, before)


def _put_back(products: Any, before: str) -> None:
    products.fp32_precision = "none"  # inherit `torch.backends.fp32_precision`, if that was the origin of the value
    if products.fp32_precision != before:
        products.fp32_precision = before


@contextmanager
def own_defaults() -> Iterator[None]:
    """Enter `own_torch_state` with gradients and outside of inference mode, so that new parameters can be trained."""
    with torch.inference_mode(False), torch.enable_grad(), own_torch_state():
        yield


def flushes_denormals() -> bool:
    """Whether this thread computes subnormal numbers as zero; torch has a setter for that but no getter."""
    smallest = torch.full((1,), 1e-40, dtype=torch.float32, device="cpu")
    return float(smallest.add(smallest)[0]) == 0.0


def refuse_autocast(what: str, device: torch.device) -> None:
    """Refuse to work under `torch.autocast`.

    Args:
        what: the subject of the message, such as "the evaluation".
        device: device of the computation.

    Raises:
        RuntimeError: if autocast is on for the device.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            f"torch.autocast is on ({torch.get_autocast_dtype(device.type)}), so {what} would compute in another "
            "arithmetic than the model's: leave the autocast block, or load the model in that dtype"
        )
