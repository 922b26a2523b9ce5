"""Triton kernels of quantize-dequantize, noise and draws: the path of `roundoff.numerics` on GPUs and NPUs.

One source serves every device for which Triton has a compiler: NVIDIA (`cuda`), AMD (`cuda` under ROCm), Intel (`xpu`),
and Ascend (`npu`, where the package triton-ascend provides `triton`). `roundoff.numerics.backend` decides when it is
used; nothing here is imported before a tensor of such a device is seen.

**The bits are those of the CPU.** Every step is an operation that IEEE 754 rounds correctly, in the order of the torch
path: additions and multiplications of float32 without contraction to fused multiply-adds (the launch option
`enable_fp_fusion=False`), division and square root in their correctly rounded forms (`div_rn`, `sqrt_rn`), and
exponents read from bits. Subnormal numbers are kept, which is Triton's default.

**Memory.** Each element is read once and written once, with two exceptions. A scale for the whole tensor needs a pass
of its own to find it; the maximum stays on the device, so nothing waits for it. A scale for a row of more than
`layout.LONGEST_ROW` elements does too.

**What was run.** Triton's interpreter executes these kernels on a CPU against the other paths, and Triton compiles them
for three generations of NVIDIA GPUs, on machines without one (`tests/numerics/test_triton.py`). They were never run on
a GPU or an NPU.

| module | holds |
|---|---|
| `layout` | what a kernel must know of a format; it imports no Triton |
| `rounding`, `philox`, `hifloat`, `nvfp4`, `blocks` | device functions, named after the modules whose work they do |
| `quantize` | kernels of quantize-dequantize, and of maxima |
| `noise` | the kernel of noise and draws |
| `launch` | which kernel does which work, on tiles of which size |
| `examples` | two small examples, with which the kernels are tried on a device before they are used |
"""
