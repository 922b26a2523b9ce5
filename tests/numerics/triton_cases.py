"""Triton's kernels in its interpreter, on the CPU, against the CPU's own paths: every bit is the same.

`test_triton.py` runs this file in a process of its own, in which `TRITON_INTERPRET=1` is set before Triton is imported.
The interpreter computes with numpy; where that differs from a device, `rounding.narrowed` says so.
"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roundoff.formats.element import E2M1, Element
from roundoff.formats.table import FORMATS, Format, get_format
from roundoff.numerics import backend
from roundoff.numerics.backend import DTYPES, BuildError, computed_by, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal, uniform
from roundoff.numerics.triton_kernels import examples, launch, layout
from tests.numerics.test_golden import FILES, GOLDEN, bits, tensor_scale
from tests.numerics.test_paths import BLOCKS, CUSTOM, random_bits, random_blocks, same

KEY = Key.from_seed(11)
FOUR_OVER_SIX = [name for name in BLOCKS if FORMATS[name].tries_two_scales]  # slow in the interpreter
CHEAP = [name for name in BLOCKS if name not in FOUR_OVER_SIX]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about overflows that are meant


@pytest.fixture
def on_triton(monkeypatch):
    """A function that computes something by Triton's kernels."""

    def compute(work):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "TRITON_DEVICES", ("cpu",))
            assert computed_by(torch.ones(1)) == "triton"
            return work()

    return compute


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles of more elements, which take the interpreter less time for each."""
    monkeypatch.setattr(launch, "TILE", 1 << 14)


def scales_of(fmt):
    if fmt.tensor_divisor is None:
        return (None,)
    return (None, 0.02) if fmt.rows > 1 else (None, "row", 0.02)


def agree(on_triton, x, fmt, **options):
    expected = quantize(x, fmt, **options)
    assert same(expected, on_triton(lambda: quantize(x, fmt, **options))), (fmt, x.shape, x.dtype, options)


def test_the_interpreter_runs():
    assert launch.interpreted()


def test_the_examples_have_the_bits_of_the_cpu():
    x, y = examples.inputs("cpu")
    q = quantize(x, examples.FORMAT, tensor_scale="row")
    noisy = matmul_noise(y, examples.STD, Key(examples.KEY))
    assert tuple(map(tuple, q.view(torch.int32).tolist())) == examples.QUANTIZED
    assert tuple(map(tuple, noisy.view(torch.int16).tolist())) == examples.NOISY
    assert examples.first_difference("cpu") is None


def test_a_device_with_other_bits_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(examples, "NOISY", ((0,) * 8,))
    monkeypatch.setattr(backend, "TRITON_DEVICES", ("cpu",))
    backend.triton_problem.cache_clear()
    try:
        assert computed_by(torch.ones(1)) == backend.build().target
        quantize(torch.ones(4, 32), "mxfp4")
        (line,) = [record.message for record in caplog.records if "Triton" in record.message]
        assert "no Triton kernels on cpu: the kernel of noise does not give the bits of the CPU" in line
        with use_backend("compiled"), pytest.raises(BuildError, match="does not give the bits"):
            quantize(torch.ones(4, 32), "mxfp4")
    finally:
        backend.triton_problem.cache_clear()


def slow_where(heavy, values):
    """The values, those of which `heavy` holds under the marker."""
    return [pytest.param(value, marks=pytest.mark.slow) if heavy(value) else value for value in values]


def is_heavy(name):
    """Whether a format takes the interpreter seconds: one step for each of 256 elements, twice."""
    return FORMATS[name].tries_two_scales and FORMATS[name].rows > 1


@pytest.mark.parametrize("cases", [slice(2), pytest.param(slice(2, None), marks=pytest.mark.slow)], ids=["two", "rest"])
@pytest.mark.parametrize("file", slow_where(lambda file: is_heavy(FILES[file]), sorted(FILES)))
def test_golden_cases_are_reproduced_to_the_bit(file, cases, on_triton, large_tiles):
    data = np.load(GOLDEN / f"{file}.npz")
    for case in [name[:-3] for name in data if name.endswith("_in")][cases]:
        x, expected = (torch.from_numpy(data[f"{case}_{end}"]) for end in ("in", "out"))
        scale = tensor_scale(data, case)
        q = on_triton(lambda x=x, scale=scale: quantize(x, FILES[file], tensor_scale=scale))
        assert torch.equal(bits(q), bits(expected)), case


@pytest.mark.parametrize("name", CHEAP)
def test_formats_agree_on_random_bits(name, on_triton):
    fmt, turn = FORMATS[name], BLOCKS.index(name)
    for make, columns in ((random_bits, 64), (random_blocks, 70)):
        x = make(12, columns, turn, DTYPES[turn % 3])
        for scale in scales_of(fmt):
            agree(on_triton, x, name, tensor_scale=scale)
    agree(on_triton, x, name, stochastic=KEY)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_formats_agree_on_many_random_bits(name, dtype, on_triton, large_tiles):
    # 36 formats x 3 dtypes x 2 kinds x about 2 scales x 2 roundings x 12,000 = 10^7 patterns
    shapes = ((20, 96), (7, 33)) if name in FOUR_OVER_SIX else ((100, 96), (7, 257), (300, 3))
    for make in (random_bits, random_blocks):
        for seed, shape in enumerate(shapes):
            x = make(*shape, seed, dtype)
            for scale in scales_of(FORMATS[name]):
                agree(on_triton, x, name, tensor_scale=scale)
                agree(on_triton, x, name, tensor_scale=scale, stochastic=KEY)


@pytest.mark.parametrize("name", slow_where(is_heavy, FOUR_OVER_SIX))
def test_four_over_six_agrees(name, on_triton):
    x = random_blocks(3, 35, 4, torch.bfloat16)
    for scale in scales_of(FORMATS[name]):
        agree(on_triton, x, name, tensor_scale=scale)


OTHERS = [
    *CUSTOM,
    *map(
        get_format,
        ("e2m1/8x4/e8m0", "e3m2/1x64/float32", "int4/16/e8m0:even", "int4/16/e4m3+tensor", "e4m3/tensor/float32"),
    ),
    Format("blocks that no kernel knows", E2M1, 12, "e8m0", "floor", 6.0),
    Format("a grid that no kernel knows", Element("odd", 2, 0, 2, -4.0, 6.0), 32, "e8m0", "floor", 6.0),
]


@pytest.mark.parametrize("fmt", OTHERS, ids=lambda fmt: fmt.name)
def test_other_formats_agree(fmt, on_triton):
    x = random_blocks(5, 70, seed=12)
    agree(on_triton, x, fmt)
    agree(on_triton, x, fmt, stochastic=KEY)


@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3", "nvfp4:te"])
def test_given_tensor_scales_agree(name, on_triton):
    x = random_blocks(6, 40, seed=6)
    for scale in (0.0, 1e-40, 1e30, torch.rand(6, 1), torch.tensor(0.25), torch.zeros(1)):
        agree(on_triton, x, name, tensor_scale=scale)
    agree(on_triton, torch.full((3, 40), math.nan), name)
    agree(on_triton, torch.zeros(3, 40), name)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4:te", "fp8_e4m3", "int8"])
def test_rows_too_long_for_the_registers_agree(name, on_triton, monkeypatch):
    monkeypatch.setattr(layout, "LONGEST_ROW", 64)
    for make in (random_bits, random_blocks):
        agree(on_triton, make(3, 5000, 2), name, tensor_scale="row", stochastic=KEY)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_deadzones_agree(dtype, on_triton):
    for make in (random_bits, random_blocks):
        x = make(6, 70, 3, dtype)
        for name in ("nvfp4", "mxfp4", "int8", "hif4", "fp8_e4m3", "nvfp4:te", "bf16"):
            agree(on_triton, x, name, tensor_scale="row", deadzone=0.07)
    agree(on_triton, x, "mxfp4", axis=0, deadzone=0.07)
    agree(on_triton, x, "nvfp4", deadzone=0.07)  # a scale of the tensor: not fused
    agree(on_triton, x, "nvfp4:2d", deadzone=0.07)


def test_axes_layouts_and_outputs_agree(on_triton):
    x = random_blocks(34, 20, seed=3).reshape(2, 17, 20)
    for name in ("nvfp4", "nvfp4:2d"):
        for axis in (0, 1, -1):
            agree(on_triton, x, name, axis=axis)
        agree(on_triton, x.transpose(1, 2), name)
        for shape in ((), (1,), (0,), (3, 0), (0, 3)):
            agree(on_triton, torch.full(shape, 3.0), name)
        expected, wide, y = quantize(x, name), torch.zeros(2, 17, 40), x.clone()
        on_triton(lambda name=name, wide=wide: quantize(x, name, out=wide[..., ::2]))
        assert same(wide[..., ::2].contiguous(), expected) and not wide[..., 1::2].any()
        version = y._version
        assert on_triton(lambda name=name, y=y: quantize(y, name, out=y)) is y and same(y, expected)
        assert y._version > version


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_noise_agrees(dtype, on_triton):
    generator = torch.Generator().manual_seed(1)
    for shape in ((9, 64), (2, 3, 35)) if dtype is torch.float32 else ((5, 70),):
        y = torch.randn(shape, generator=generator).to(dtype)
        rows = torch.randint(-(2**62), 2**62, shape[:-1], generator=generator)
        start = torch.randint(-50, 50, shape[:-1], generator=generator)
        for options in (
            {},
            {"rows": rows},
            {"rows": rows, "column_start": start},
            {"column_start": start * 4 - 2**33},
            {"rows": rows, "bias": torch.randn(shape[-1:], generator=generator).to(dtype)},
        ):
            expected = matmul_noise(y, 0.05, KEY, **options)
            assert same(expected, on_triton(lambda y=y, o=options: matmul_noise(y, 0.05, KEY, **o))), (shape, options)
        with_gaps = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        on_triton(lambda y=y, out=with_gaps: matmul_noise(y, 0.05, KEY, out=out[..., ::2]))
        assert same(with_gaps[..., ::2].contiguous(), matmul_noise(y, 0.05, KEY))
        expected = matmul_noise(y, 0.05, KEY)
        assert on_triton(lambda y=y: matmul_noise(y, 0.05, KEY, out=y)) is y and same(y, expected)
    for special in (random_bits(2, 1100, 5, dtype), random_bits(3, 1, 5, dtype)):
        expected = matmul_noise(special, 0.05, KEY)
        assert same(expected, on_triton(lambda special=special: matmul_noise(special, 0.05, KEY)))


@pytest.mark.parametrize("key", [Key(0), Key(3), Key(2**64 - 1), KEY])
@pytest.mark.parametrize("draw", [normal, uniform])
def test_draws_agree(draw, key, on_triton):
    rows = torch.tensor([0, -1, 2**40])
    expected = draw(key, (3, 1030), rows=rows)
    assert same(expected, on_triton(lambda: draw(key, (3, 1030), rows=rows)))


@pytest.mark.slow
def test_ten_million_normals_agree(on_triton, large_tiles):
    for part in range(5):
        expected = normal(KEY.fold(part), (500, 4000))
        assert same(expected, on_triton(lambda part=part: normal(KEY.fold(part), (500, 4000)))), part


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: the value of a tensor in Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "this waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(on_triton):
    x, one, ids = random_blocks(4, 64, seed=1), torch.tensor(0.5), torch.arange(4)

    def work():
        with NoWaiting():
            for name in ("mxfp4", "nvfp4", "nvfp4:te", "nvfp4:2d", "fp8_e4m3", "int8", "hif4"):
                quantize(x, name)
                if FORMATS[name].tensor_divisor and FORMATS[name].rows == 1:
                    quantize(x, name, tensor_scale=one)
                    quantize(x, name, tensor_scale="row")
            matmul_noise(x, 0.05, KEY, rows=ids, column_start=ids)
            normal(KEY, (4, 8), rows=ids)

    on_triton(work)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(one)


@pytest.mark.slow
def test_torch_compile_takes_the_operators(on_triton):
    x = random_blocks(6, 70, seed=8)

    def work(x):
        q = quantize(x * 1.0, "nvfp4", tensor_scale="row", stochastic=KEY)
        return matmul_noise(q, 0.05, KEY) + 0 * uniform(KEY, (6, 70)), quantize(x, "nvfp4:2d", axis=0)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for expected, result in zip(work(x), on_triton(lambda: compiled(x)), strict=True):
        assert same(expected, result)
