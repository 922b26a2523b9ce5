"""torch's global settings, held at known values while roundoff computes.

Another library in the process may have left one of these changed, and each would silently change a result:

| setting | what it would change | inside `own_torch_state` |
|---|---|---|
| `set_default_dtype` | the dtype of log-probabilities and masks | float32 |
| `set_default_device` | where index tensors are made | cpu |
| `set_float32_matmul_precision` | float32 products become bfloat16 or TF32 | `highest` |
| `set_flush_denormal` | subnormal numbers become zero before they are quantized | off |

`own_defaults` also leaves inference mode, in which no parameter that can be trained is made: for loading models.

`torch.autocast` is refused instead (`refuse_autocast`): whoever turned it on asked for products in another dtype, and a
score under it would not be that of the declared arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_torch_state() -> Iterator[None]:
    """The settings above at their known values inside, and as they were afterwards."""
    with ExitStack() as restored:
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


@contextmanager
def own_defaults() -> Iterator[None]:
    """`own_torch_state`, outside of inference mode: what is made inside can be trained."""
    with torch.inference_mode(False), own_torch_state():
        yield


def flushes_denormals() -> bool:
    """Whether this thread computes subnormal numbers as zero; torch sets that and does not tell."""
    smallest = torch.full((1,), 1e-40, dtype=torch.float32, device="cpu")
    return float(smallest.add(smallest)[0]) == 0.0


def refuse_autocast(what: str, device: torch.device) -> None:
    """Refuse to work under `torch.autocast`.

    Raises:
        RuntimeError: if it is on for the device.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            f"torch.autocast is on ({torch.get_autocast_dtype(device.type)}), so {what} would compute in another "
            "arithmetic than the model's: leave the autocast block, or load the model in that dtype"
        )
