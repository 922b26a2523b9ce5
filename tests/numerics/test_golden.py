"""Every golden file is reproduced bit for bit (except for signs of zeros) on both paths."""

from pathlib import Path

import numpy as np
import pytest
import torch

from roundoff.numerics.backend import use_backend
from roundoff.numerics.quantize import quantize

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = {
    "nvfp4_two_level": "nvfp4",
    "nvfp4_block_only": "nvfp4_block",
    "fp8_e4m3_per_tensor": "fp8_e4m3",
    "fp8_e4m3_per_row": "fp8_e4m3_row",
    "int4_group32_sym_amax7": "int4",
    "int4_group32_sym_amax7p5": "int4:full",
    "int8_per_row_sym_amax127": "int8",
    "int8_per_row_sym_amax127p5": "int8:full",
    "hif8": "hif8",
    "hif4": "hif4",
    "nvfp4_te_1d": "nvfp4:te",
    "nvfp4_te_2d": "nvfp4:2d",
    "nvfp4_four_over_six_mse_1d": "nvfp4:46",
    "nvfp4_four_over_six_mse_2d": "nvfp4:46_2d",
    "nvfp4_four_over_six_mae_1d": "nvfp4:46_mae",
    "nvfp4_four_over_six_mae_2d": "nvfp4:46_mae_2d",
}
for mx in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"):
    FILES[mx] = mx
    FILES.update({f"{mx}_scale_{rule}": f"{mx}:{rule}" for rule in ("ceil", "even", "rceil")})


def tensor_scale(data, case):
    """The tensor scale of a golden case: stored as it is (nvfp4), or as an amax to divide by 448 in float32 (fp8)."""
    if f"{case}_pts" in data:
        return float(data[f"{case}_pts"])
    if f"{case}_amax" in data:
        return float(np.float32(data[f"{case}_amax"]) / np.float32(448))
    return None


def bits(x):
    return (x + 0.0).view(torch.int32)  # -0 + 0 is +0


def test_every_golden_file_has_a_format():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == {*FILES, "hadamard16"}  # a transform, not a format


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("file", sorted(FILES))
def test_golden_cases_are_reproduced_to_the_bit(file, backend):
    data = np.load(GOLDEN / f"{file}.npz")
    cases = [name[:-3] for name in data if name.endswith("_in")]
    assert len(cases) >= 4
    for case in cases:
        x, expected = (torch.from_numpy(data[f"{case}_{end}"]) for end in ("in", "out"))
        scale = tensor_scale(data, case)
        with use_backend(backend):
            q = quantize(x, FILES[file], tensor_scale=scale)
            q16 = quantize(x.to(torch.bfloat16), FILES[file], tensor_scale=scale)
        assert torch.equal(bits(q), bits(expected)), (file, case)
        if case == "bf16":
            assert torch.equal(bits(q16.float()), bits(expected.to(torch.bfloat16).float())), (file, case)
