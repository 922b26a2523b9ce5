"""Quantize-dequantize of 4096 x 4096 numbers against copy_, small tensors, plain torch, and public packages."""

import logging
import warnings

import torch

from benchmarks.peers_quantize import Quantize, installed
from benchmarks.timing import medians, per_call, verdict
from roundoff.numerics.backend import computed_by, use_backend
from roundoff.numerics.quantize import quantize

SIZE = 4096
# (work, format, tensor scale)
WORK = [
    ("mxfp4", "mxfp4", None),
    ("mxfp8_e4m3", "mxfp8_e4m3", None),
    ("mxfp8_e5m2", "mxfp8_e5m2", None),
    ("hif8", "hif8", None),
    ("hif4", "hif4", None),
    ("nvfp4, scale given", "nvfp4", 0.002),
    ("nvfp4, scale computed", "nvfp4", None),
    ("nvfp4, scale a row", "nvfp4", "row"),
    ("nvfp4:te", "nvfp4:te", None),
    ("nvfp4:46", "nvfp4:46", None),
    ("fp8_e4m3", "fp8_e4m3", None),
    ("fp8_e4m3_row", "fp8_e4m3_row", None),
    ("int8", "int8", None),
    ("int4", "int4", None),
]
POWERS_OF_TWO = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "hif8")
# Goals by target in times of copy_: of POWERS_OF_TWO in float32 and in bfloat16, of nvfp4 with the scale given and
# computed in float32. On other targets there are none.
GOALS = {"avx512": (1.05, 1.7, 1.35, 1.8), "avx2": (1.15, 2.2, 1.6, 2.1)}
PURE_TORCH_GOAL = 20.0
PEER_GOAL = 5.0
PEER_REPEATS = 3


def matrix(dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers [4096, 4096]."""
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


def goal_of(name: str, dtype: torch.dtype) -> float | None:
    """The goal of a work on the target that computes now, or None."""
    goals = GOALS.get(computed_by(torch.ones(1)))
    single = dtype is torch.float32
    if goals is None:
        return None
    if name in POWERS_OF_TWO:
        return goals[0] if single else goals[1]
    return {"nvfp4, scale given": goals[2], "nvfp4, scale computed": goals[3]}.get(name) if single else None


def against_copy(dtype: torch.dtype) -> dict[str, float]:
    """Times in ms of the compiled path with out=; printed as ratios to copy_."""
    x = matrix(dtype)
    out = torch.empty_like(x)
    work = {"copy_": lambda: out.copy_(x)}
    for name, fmt, scale in WORK:
        work[name] = lambda fmt=fmt, scale=scale: quantize(x, fmt, tensor_scale=scale, out=out)
    times = medians(work, repeats=25)
    print(f"\n{dtype}, compiled, out=, ratio to copy_ ({times['copy_']:.2f} ms)")
    for name, _, _ in WORK:
        print(f"  {name:24} {times[name]:7.2f} ms  {verdict(times[name] / times['copy_'], goal_of(name, dtype))}")
    return times


def pure_torch(dtype: torch.dtype) -> None:
    x = matrix(dtype)
    out = torch.empty_like(x)
    work = {"copy_": lambda: out.copy_(x)}
    for fmt in ("mxfp4", "mxfp8_e4m3", "nvfp4", "int8"):
        work[fmt] = lambda fmt=fmt: quantize(x, fmt, out=out)
    with use_backend("torch"):
        times = medians(work, repeats=7)
    print(f"\n{dtype}, plain torch (eager), ratio to copy_ ({times['copy_']:.2f} ms)")
    for fmt in list(work)[1:]:
        print(f"  {fmt:24} {times[fmt]:7.2f} ms  {verdict(times[fmt] / times['copy_'], PURE_TORCH_GOAL)}")


def small() -> None:
    x = torch.randn(256, 64)
    out = torch.empty_like(x)
    print("\nsmall tensors, float32 [256, 64], microseconds a call")
    for fmt, scale in (("mxfp4", None), ("nvfp4", None), ("nvfp4", "row")):
        label = fmt if scale is None else f"{fmt}, scale a row"
        time = per_call(lambda fmt=fmt, scale=scale: quantize(x, fmt, tensor_scale=scale, out=out))
        print(f"  {label:24} {time:7.1f}")
    tiny = torch.randn(1, 32)
    print(f"  {'call alone (32 numbers)':24} {per_call(lambda: quantize(tiny, 'mxfp4', out=tiny)):7.1f}")


def attempt(function: Quantize, x: torch.Tensor) -> tuple[float, str]:
    """Time in ms of a peer and how to show it; a peer that fails on a CPU is a result."""
    try:
        time = medians({"it": lambda: function(x)}, PEER_REPEATS)["it"]
    except Exception as error:  # each peer and torch.compile raise kinds of their own; the table shows which
        return float("inf"), f"fails ({type(error).__name__})"
    return time, f"{time:8.1f} ms"


def peers(dtype: torch.dtype, ours: dict[str, float]) -> None:
    found, missing = installed()
    print(f"\n{dtype}, public packages: eager, under torch.compile, and the better over ours")
    for line in missing:
        print(f"  {line}")
    x = matrix(dtype)
    for name, formats in found.items():
        for fmt, function in formats.items():
            eager, shown_eager = attempt(function, x)
            compiled, shown = attempt(torch.compile(function), x)
            own = ours["nvfp4, scale computed" if fmt == "nvfp4" else fmt]
            ratio = min(eager, compiled) / own
            goal = "reached" if ratio >= PEER_GOAL else "MISSED"
            print(
                f"  {name:20} {fmt:11} eager {shown_eager:20} compiled {shown:22} "
                f"{ratio:6.1f} x ours   goal >= {PEER_GOAL:.0f} {goal}",
                flush=True,
            )


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)  # peers that fail to compile print pages
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)
    with use_backend("compiled"):
        times = {dtype: against_copy(dtype) for dtype in (torch.float32, torch.bfloat16)}
        small()
    for dtype in (torch.float32, torch.bfloat16):
        pure_torch(dtype)
    for dtype, ours in times.items():
        peers(dtype, ours)


if __name__ == "__main__":
    main()
