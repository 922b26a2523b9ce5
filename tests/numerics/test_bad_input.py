"""The input that quantize refuses before anything is written, and its error messages."""

import math

import pytest
import torch

from roundoff.formats.element import E2M1
from roundoff.formats.table import Format, get_format
from roundoff.numerics.backend import use_backend
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, but the tensor is torch"):
        quantize(torch.ones(4, 32).to(dtype), "mxfp4")


def test_a_list_is_refused():
    with pytest.raises(TypeError, match="but got list"):
        quantize([1.0], "mxfp4")


@pytest.mark.parametrize(
    ("name", "near"),
    [("mxfp5", "mxfp4"), ("nvfp", "nvfp4"), ("MXFP4", "mxfp4"), ("mxfp4:ceiling", "mxfp4:ceil"), ("int", "int8")],
)
def test_unknown_format_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown number format '{name}'.*'{near}'"):
        quantize(torch.ones(32), name)


def test_an_unknown_format_unlike_any_other_lists_all():
    with pytest.raises(ValueError, match="known: mxfp4, "):
        get_format("zzz")


@pytest.mark.parametrize(("shape", "axis"), [((4, 32), 2), ((4, 32), -3), ((32,), 1), ((), 1)])
def test_an_axis_outside_of_the_shape_is_refused(shape, axis):
    with pytest.raises(IndexError, match=f"axis must be in .*but is {axis}"):
        quantize(torch.ones(shape), "mxfp4", axis=axis)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e39, -1.0, torch.tensor(math.nan), torch.tensor([[-1.0]] * 4)])
def test_tensor_scales_that_are_negative_or_not_finite_are_refused(scale):
    out = torch.zeros(4, 32)
    with pytest.raises(ValueError, match="tensor_scale must be finite and not negative"):
        quantize(torch.ones(4, 32), "nvfp4", tensor_scale=scale, out=out)
    assert not out.any()


def test_tensor_scales_of_a_wrong_shape_or_word_are_refused():
    with pytest.raises(ValueError, match=r"must broadcast to \(4, 1\), but has shape \(3, 1\)"):
        quantize(torch.ones(4, 32), "nvfp4", tensor_scale=torch.ones(3, 1))
    with pytest.raises(ValueError, match="rows"):
        quantize(torch.ones(4, 32), "nvfp4", tensor_scale="rows")
    with pytest.raises(ValueError, match="'mxfp4' has no tensor scale"):
        quantize(torch.ones(4, 32), "mxfp4", tensor_scale=1.0)


@pytest.mark.parametrize("out", [torch.zeros(4, 33), torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(32, 4)])
def test_an_out_unlike_the_input_is_refused(out):
    with pytest.raises(ValueError, match=r"out must be torch.float32 of shape \(4, 32\)"):
        quantize(torch.ones(4, 32), "mxfp4", out=out)
    assert not out.any()


def test_a_cast_has_no_stochastic_rounding():
    with pytest.raises(ValueError, match="not for the cast 'bf16'"):
        quantize(torch.ones(32), "bf16", stochastic=Key(0))


def test_a_cast_has_no_tensor_scale():
    with pytest.raises(ValueError, match="'bf16' has no tensor scale"):
        quantize(torch.ones(32), "bf16", tensor_scale=2.0)
    assert torch.equal(quantize(torch.ones(32), "bf16", tensor_scale="row"), torch.ones(32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmt": None}, "a format is a name such as 'mxfp4' or a Format, but got NoneType"),
        ({"fmt": "mxfp4", "stochastic": True}, "stochastic must be a Key .* but is True"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        quantize(torch.ones(4, 32), **options)


def test_a_format_with_blocks_needs_a_scale():
    with pytest.raises(ValueError, match="blocks of 16 without a scale"):
        Format("odd", E2M1, 16, "none")


@pytest.mark.parametrize("deadzone", [-0.1, 1.5, math.nan])
def test_a_deadzone_that_is_no_fraction_is_refused(deadzone):
    x = torch.ones(4, 32)
    with pytest.raises(ValueError, match=r"deadzone must be a fraction .* in \[0, 1\], but is"):
        quantize(x, "mxfp4", deadzone=deadzone, out=x)
    assert x.eq(1.0).all()
