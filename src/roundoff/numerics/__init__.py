"""Number formats, quantize-dequantize, keyed noise, and the counter-based generator behind it.

Everything here works on plain tensors: how a model computes with it (Linear layers, attention, gradients) is the
business of `roundoff.hardware`. On a CPU the work is done by the C++ kernels in `kernels/`, with the same bits as the
plain torch path.

Doors: `quantize.quantize`, `noise.matmul_noise`, `rng.Key`, `rng.normal` and `rng.uniform`, `formats.FORMATS` and
`formats.get_format`, `torch_state`, `transfer`, and for code that goes below them `backend` and `blocks`.
"""
