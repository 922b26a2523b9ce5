"""Quantize-dequantize of public packages on a CPU, through the functions their users call.

Pinned: torchao 0.18.0, nvidia-modelopt 0.47.0, compressed-tensors 0.20.0; microxcaling has no release on a package
index and is installed from its repository (github.com/microsoft/microxcaling; the package is called `mx`).
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]


def torchao() -> dict[str, Quantize]:
    """torchao's MXTensor and NVFP4Tensor: pack, then dequantize."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def nvfp4(x: Tensor) -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().amax().float())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)

    return {
        "mxfp4": lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(x.dtype),
        "mxfp8_e4m3": lambda x: MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize(x.dtype),
        "nvfp4": nvfp4,
    }


def modelopt() -> dict[str, Quantize]:
    """modelopt's packed tensors: quantize, then dequantize."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def mxfp4(x: Tensor) -> Tensor:
        packed, scale = MXFP4QTensor.quantize(x, 32)
        return packed.dequantize(x.dtype, scale=scale, block_sizes={-1: 32})

    def nvfp4(x: Tensor) -> Tensor:
        packed, scale, double_scale = NVFP4QTensor.quantize(x, 16)
        return packed.dequantize(x.dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16})

    return {"mxfp4": mxfp4, "nvfp4": nvfp4}


def compressed_tensors() -> dict[str, Quantize]:
    """compressed-tensors' fake_quantize with dynamic scales of its preset schemes."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import MXFP4, NVFP4
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    def make(args: object, size: int, two_level: bool) -> Quantize:
        def run(x: Tensor) -> Tensor:
            low, high = torch.aminmax(x.unflatten(-1, (-1, size)), dim=-1)
            whole = (448 * 6 / x.abs().amax().float()).reshape(1) if two_level else None
            scale, zero = calculate_qparams(low, high, args, global_scale=whole)
            return fake_quantize(x, scale, zero, args, global_scale=whole)

        return run

    return {"mxfp4": make(MXFP4["weights"], 32, False), "nvfp4": make(NVFP4["weights"], 16, True)}


def microxcaling() -> dict[str, Quantize]:
    """microxcaling's quantize_mx with its own default specification."""
    from mx.mx_ops import _quantize_mx

    def make(element: str) -> Quantize:
        return lambda x: _quantize_mx(x, 8, elem_format=element, block_size=32, axes=[-1])

    return {"mxfp4": make("fp4_e2m1"), "mxfp8_e4m3": make("fp8_e4m3")}


PEERS: dict[str, tuple[str, Callable[[], dict[str, Quantize]]]] = {
    "torchao": ("torchao", torchao),
    "modelopt": ("modelopt.torch", modelopt),
    "compressed-tensors": ("compressed_tensors", compressed_tensors),
    "microxcaling": ("mx.mx_ops", microxcaling),
}


def installed() -> tuple[dict[str, dict[str, Quantize]], list[str]]:
    """The quantizers of each peer that is installed, and a line for each that is not."""
    found, missing = {}, []
    for name, (module, load) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{name}: skipped, not installed ({error})")
        else:
            found[name] = load()
    return found, missing
