"""Two small examples with known bits: on a device that does not reproduce them, the kernels are not used.

They hold what a device may treat differently: quotients and roots that must be rounded correctly, ties, signs of zeros,
subnormal numbers (which flushing to zero would lose), and rounding to bfloat16. The answers are those of the CPU;
`tests/numerics/triton_cases.py` compares them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.formats.table import get_format
from roundoff.numerics.blocks import FROM_ROW
from roundoff.numerics.triton_kernels import launch
from roundoff.numerics.triton_kernels.layout import layout_of

FORMAT = "nvfp4"
"""The format of the first example, with one tensor scale for each row."""
KEY, STD = 0x9E3779B97F4A7C15, 0.05
"""Key and relative standard deviation of the noise in the second one."""
# fmt: off
NUMBERS = (
    (0.7, -3.0, 1.3, 0.01, 0.25, -0.0, 2.2, 0.111, -1.7, 0.3, 0.9, 5.3, -0.05, 1e-3, 0.6, -4.1),
    (3e-39, -1.1e-38, 5e-39, 1e-45, -7e-40, 2e-38, 1.3e-38, -4e-39,
     0.0, 9e-39, -1.7e-38, 6e-40, 8e-39, -2e-39, 1e-38, 4e-39),
)
QUANTIZED = (
    (1063395875, -1071015526, 1068079514, 0, 1055007267, -2147483648, 1071784483, 0,
     -1075699165, 1055007267, 1063395875, 1084856730, -2147483648, 0, 1055007267, -1067310557),
    (2378880, -2140347008, 3568320, 0, -2147483648, 14273280, 9515520, -2145104768,
     0, 7136640, -2133210368, 0, 4757760, -2146294208, 7136640, 2378880),
)
"""The answer to the first example, as bits of float32."""
PRODUCT = ((1.5, -2.25, 0.3, 1e-39, 7.0, -0.001, 3.3, 0.9),)
NOISY = ((16311, -16374, 16009, 10, 16603, -17782, 16458, 16242),)
"""The answer to the second example, as bits of bfloat16."""
# fmt: on


def inputs(device: str) -> tuple[Float[Tensor, "2 16"], Float[Tensor, "1 8"]]:
    """The numbers to be quantized (float32), and the product to be made noisy (bfloat16)."""
    x = torch.tensor(NUMBERS, dtype=torch.float32, device=device)
    return x, torch.tensor(PRODUCT, dtype=torch.float32, device=device).to(torch.bfloat16)


def first_difference(device: str) -> str | None:
    """Run both examples on a type of device, and say which one gives other bits; None if neither does."""
    x, y = inputs(device)
    form = layout_of(get_format(FORMAT))
    assert form is not None
    launch.quantize(x, x, form, FROM_ROW, None, 1.0, None)
    launch.noise(y, y, STD, KEY, None, None)
    for name, given, answer in (
        (FORMAT, x.view(torch.int32), QUANTIZED),
        ("noise", y.view(torch.int16), NOISY),
    ):
        if given.tolist() != [list(row) for row in answer]:
            return f"the kernel of {name} does not give the bits of the CPU"
    return None
