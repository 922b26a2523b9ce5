"""The Hadamard transform: golden data, orthogonality, axes, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from roundoff.numerics.hadamard import TRANSFORMER_ENGINE_SIGNS, hadamard

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "hadamard16.npz")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_golden():
    assert tuple(int(s) for s in GOLDEN["sign_in"].reshape(-1)) == TRANSFORMER_ENGINE_SIGNS
    x, expected = (torch.from_numpy(GOLDEN[f"normal_{end}"]) for end in ("in", "out"))
    assert torch.allclose(hadamard(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_product_of_two_transformed_matrices_is_that_of_the_plain_ones(size):
    a, b = draw(8, 128), draw(24, 128)
    signs = TRANSFORMER_ENGINE_SIGNS if size == 16 else None
    product = hadamard(a, size, signs).double() @ hadamard(b, size, signs).double().t()
    assert torch.allclose(product, a.double() @ b.double().t(), rtol=0, atol=2e-5)


def test_groups_lie_along_the_axis_and_the_dtype_is_kept():
    x = draw(32, 5)
    assert torch.equal(hadamard(x, axis=0), hadamard(x.t().contiguous()).t())
    assert hadamard(x.to(torch.bfloat16), axis=0).dtype is torch.bfloat16


def test_an_outlier_is_spread_over_its_group():
    x = torch.zeros(16)
    x[3] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.full((16,), 2.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 12}, "a power of two"),
        ({"size": 64, "signs": None}, "must divide the axis"),
        ({"signs": (1, -1)}, "16 numbers"),
        ({"signs": (1, 0) * 8}, "each 1 or -1"),
    ],
)
def test_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        hadamard(draw(2, 96), **arguments)


@pytest.mark.usefixtures("unchecked_shapes")
def test_integers_are_refused():
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        hadamard(torch.ones(16, dtype=torch.int32))
    with pytest.raises(TypeError, match="float64; convert it first"):  # float32 sums would lose its digits
        hadamard(torch.ones(16, dtype=torch.float64))


def test_an_axis_out_of_range_is_an_index_error():
    with pytest.raises(IndexError, match=r"axis must be in \[-2, 1\]"):
        hadamard(draw(2, 16), axis=2)


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (2, 0, 32)])
def test_tensors_without_elements_keep_their_shape(shape):
    assert hadamard(torch.zeros(shape)).shape == shape


def test_autocast_does_not_round_the_operands():
    x = draw(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hadamard(x)
    assert torch.equal(inside, hadamard(x))
