"""Number formats, quantize-dequantize, keyed noise, and the counter-based generator behind it.

Everything here works on plain tensors: how a model computes with it (Linear layers, attention, gradients) is the
business of `roundoff.hardware`. On a CPU the work is done by the C++ kernels in `kernels/`, on a GPU or NPU by those in
`triton_kernels/`, and where there are none by plain torch, with the same bits everywhere.

Doors: `quantize.quantize`, `noise.matmul_noise`, `scaled_noise`, `accumulate`, `deadzone.outside_of_deadzone`,
`hadamard.hadamard`, `rng.Key`, `rng.normal` and `rng.uniform`, `torch_state`, `transfer`, and for code that goes below
them `backend` and `blocks`.
"""
