"""Matmul noise on 4096 x 4096 products against clone, and on small ones; the eager expression beside it."""

import torch

from benchmarks.timing import medians, per_call, verdict
from roundoff.numerics.backend import computed_by, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key

SIZE = 4096
# Goals by target in times of clone; on other targets there are none.
GOALS = {"avx512": {torch.float32: 1.4, torch.bfloat16: 1.9}, "avx2": {torch.float32: 2.5, torch.bfloat16: 4.0}}
STD = 0.05  # relative standard deviation, a fraction


def large(dtype: torch.dtype) -> None:
    y = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, key = torch.empty_like(y), Key.from_seed(0)
    work = {
        "clone": lambda: y.clone(),
        "copy_": lambda: out.copy_(y),
        "matmul_noise": lambda: matmul_noise(y, STD, key),
        "matmul_noise, out=": lambda: matmul_noise(y, STD, key, out=out),
        "torch.randn_like": lambda: torch.randn_like(y),
        "eager expression": lambda: y + STD * y.abs() * torch.randn_like(y),
    }
    times = medians(work, repeats=11)
    print(f"\n{dtype}, ratio to clone ({times['clone']:.2f} ms; copy_ takes {times['copy_']:.2f} ms)")
    for name in list(work)[2:]:
        goal = GOALS.get(computed_by(y), {}).get(dtype) if name.startswith("matmul") else None
        print(f"  {name:24} {times[name]:7.2f} ms  {verdict(times[name] / times['clone'], goal)}")


def small() -> None:
    y, key, rows = torch.randn(256, 64), Key.from_seed(0), torch.arange(256)
    out = torch.empty_like(y)
    print("\nfloat32 [256, 64], microseconds a call")
    print(f"  {'matmul_noise, out=':24} {per_call(lambda: matmul_noise(y, STD, key, rows=rows, out=out)):7.1f}")
    print(f"  {'eager expression':24} {per_call(lambda: y + STD * y.abs() * torch.randn_like(y)):7.1f}")
    tiny = torch.randn(1, 4)
    print(f"  {'call alone (4 numbers)':24} {per_call(lambda: matmul_noise(tiny, STD, key, out=tiny)):7.1f}")


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), use_backend("compiled"):
        large(torch.float32)
        large(torch.bfloat16)
        small()


if __name__ == "__main__":
    main()
