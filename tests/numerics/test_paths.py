"""The compiled path and the torch path give the same bits for any input, any split, and any number of threads."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roundoff.formats.element import E2M1, E4M3, Element
from roundoff.formats.table import FORMATS, Format
from roundoff.numerics.backend import DTYPES, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.nvfp4 import encoding_scale
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal, uniform

KEY = Key.from_seed(11)
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.element is not None]


def same(a, b):
    integers = torch.int32 if a.dtype is torch.float32 else torch.int16
    nan = torch.isnan(a)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(
        torch.where(nan, 0, a.view(integers)), torch.where(nan, 0, b.view(integers))
    )


def both(work):
    with use_backend("torch"):
        expected = work()
    with use_backend("compiled"):
        return expected, work()


def random_bits(rows, columns, seed, dtype=torch.float32):
    """Random bit patterns, with every exponent, subnormal numbers, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    info = torch.iinfo(integers)
    drawn = torch.randint(info.min, info.max + 1, (rows, columns), generator=generator, dtype=torch.int64)
    return drawn.to(integers).view(dtype)


def random_blocks(rows, columns, seed, dtype=torch.float32):
    """Random mantissas with exponents near a random one for each row, so that blocks are seldom NaN as a whole."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(0, 1 << 23, (rows, columns), generator=generator)
    center = torch.randint(-10, 256, (rows, 1), generator=generator)
    spread = torch.randint(-12, 1, (rows, columns), generator=generator)
    sign = torch.randint(0, 2, (rows, columns), generator=generator)
    bits = (sign << 31) | ((center + spread).clamp(0, 254) << 23) | mantissa
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32).to(dtype)


def compare(name, rows, columns, seed):
    for dtype in DTYPES:
        for make in (random_bits, random_blocks):
            x = make(rows, columns, seed, dtype)
            for scale in (None, "row") if FORMATS[name].rows == 1 else (None, 0.01):
                expected, q = both(lambda x=x, scale=scale: quantize(x, name, tensor_scale=scale))
                assert same(expected, q), (name, dtype, make.__name__, scale)


@pytest.mark.parametrize("name", BLOCKS)
def test_paths_agree_on_random_bits(name):
    # 36 formats x 3 dtypes x 2 kinds x 2 scales x 9,600 = 4 * 10^6 patterns
    compare(name, 100, 96, seed=BLOCKS.index(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_paths_agree_on_many_random_bits(name):
    # 2 * 10^8 patterns in all, over both kinds and all formats, a sixth of them for each dtype and scale
    for seed in range(4):
        compare(name, 1250, 96, seed=1000 + 100 * seed + BLOCKS.index(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_paths_agree_on_a_hundred_million(name):
    for seed in range(50):
        x = random_blocks(2000, 1024, seed)
        expected, q = both(lambda x=x: quantize(x, name))
        assert same(expected, q), seed


@pytest.mark.parametrize("name", BLOCKS)
def test_paths_agree_on_the_smallest_bfloat16(name):
    # Subnormal numbers and slightly larger ones, by themselves and beside larger numbers.
    generator = torch.Generator().manual_seed(9)
    bits = torch.randint(0, 0x0A00, (400, 64), generator=generator)
    bits[200:] >>= torch.randint(0, 8, (200, 64), generator=generator)
    sign = torch.randint(0, 2, (400, 64), generator=generator)
    x = (bits - (sign << 15)).to(torch.int16).view(torch.bfloat16)
    for scale in (None, "row") if FORMATS[name].rows == 1 else (None,):
        expected, q = both(lambda scale=scale: quantize(x, name, tensor_scale=scale))
        assert same(expected, q), scale


@pytest.mark.parametrize("name", BLOCKS)
def test_paths_agree_on_stochastic_rounding_and_odd_shapes(name):
    for shape in ((7, 3), (3, 70), (2, 257), (40, 64)):
        x = random_blocks(*shape, seed=5)
        for key in (None, KEY):
            expected, q = both(lambda x=x, key=key: quantize(x, name, stochastic=key))
            assert same(expected, q), (shape, key)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_row", "int8", "int8:full"])
def test_paths_agree_on_short_rows(name):
    # Rows of whole vectors up to 256 columns are taken several at a time; 13 is no multiple of any number of lanes.
    for columns in (4, 8, 16, 40, 48, 128, 256, 272):
        compare(name, 13, columns, seed=columns)


CUSTOM = [
    Format("mxfp4 in blocks of 16", E2M1, 16, "e8m0", "floor", 6.0),
    Format("mxint8", Element("int8", 0, 0, 6, -127.0, 127.0), 32, "e8m0", "floor", 127.0),
    Format("fp4 in blocks of 32 under e4m3", E2M1, 32, "e4m3", divisor=6.0),
    Format("int4 in groups of 64", Element("int4", 0, 0, 0, -7.0, 7.0), 64, "float32", divisor=7.0),
    Format("fp4 in groups of 32", E2M1, 32, "float32", divisor=6.0),
    Format("fp4 rows", E2M1, None, "float32", divisor=6.0),
    Format("e4m3 without a scale", E4M3, None, "none"),
]


class DivisionsByTensors(TorchDispatchMode):
    """Refuses `tensor / number`, which torch computes on a GPU as a product with the rounded reciprocal.

    The reciprocal of a power of two is exact.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.div:
            exact = isinstance(args[1], torch.Tensor) or math.frexp(args[1])[0] == 0.5
            assert exact, f"a division by {args[1]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_torch_path_divides_by_tensors_alone(name):
    x = random_blocks(20, 70, seed=3)
    with use_backend("torch"), DivisionsByTensors():
        quantize(x, name)
        if FORMATS[name].rows == 1:
            quantize(x, name, tensor_scale="row", stochastic=KEY)
    with pytest.raises(AssertionError, match=r"a division by 3\.0"), DivisionsByTensors():
        x / 3.0


def test_the_encoding_scale_is_rounded_once():
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(4)) + 0.1
    exact = (2688.0 / amax.double()).to(torch.float32)  # a float64 quotient is never so near a tie of float32
    assert torch.equal(encoding_scale(amax, 2688.0), exact)


@pytest.mark.parametrize("fmt", CUSTOM, ids=lambda fmt: fmt.name)
def test_paths_agree_on_custom_formats(fmt):
    # Both paths compute a layout that no kernel knows in plain torch.
    for shape in ((9, 192), (3, 70)):
        x = random_blocks(*shape, seed=12)
        for key in (None, KEY):
            expected, q = both(lambda x=x, key=key: quantize(x, fmt, stochastic=key))
            assert same(expected, q), (shape, key)


def test_a_custom_block_size_decides_which_elements_share_a_scale():
    x = torch.ones(1, 32)
    x[0, 16:] = 1024.0  # a single scale for all 32 would round the ones to zero
    assert torch.equal(quantize(x, CUSTOM[0]), x)
    assert torch.equal(quantize(torch.tensor([[100.4, -0.3]]), CUSTOM[1]), torch.tensor([[100.0, 0.0]]))
    assert torch.equal(quantize(torch.tensor([[1.1, 500.0]]), CUSTOM[6]), torch.tensor([[1.125, 448.0]]))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3"])
def test_paths_agree_on_given_tensor_scales(name):
    x = random_blocks(64, 96, seed=6)
    for scale in (0.0, 1e-40, 1e-3, 1e30, torch.rand(64, 1), torch.tensor(0.25)):
        expected, q = both(lambda scale=scale: quantize(x, name, tensor_scale=scale))
        assert same(expected, q), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_paths_agree_on_noise(dtype):
    generator = torch.Generator().manual_seed(1)
    for shape in ((64, 64), (33, 70), (5, 1), (300, 3), (2, 5000), (7, 16), (2, 3, 4, 32)):
        y = torch.randn(shape, generator=generator).to(dtype)
        rows = torch.randint(-(2**62), 2**62, shape[:-1], generator=generator)
        start = torch.randint(-50, 50, shape[:-1], generator=generator)
        for options in ({}, {"rows": rows}, {"rows": rows, "column_start": start}, {"column_start": start * 4}):
            expected, out = both(lambda y=y, options=options: matmul_noise(y, 0.05, KEY, **options))
            assert same(expected, out), (shape, options.keys())


@pytest.mark.parametrize("draw", [normal, uniform])
def test_paths_agree_on_draws(draw):
    expected, drawn = both(lambda: draw(KEY, (100, 10_007)))  # 10^6
    assert same(expected, drawn)


@pytest.mark.slow
def test_paths_agree_on_a_hundred_million_normals():
    for part in range(25):
        expected, drawn = both(lambda part=part: normal(KEY.fold(part), (1000, 4000)))
        assert same(expected, drawn), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_number_of_threads_does_not_matter(dtype):
    # Work above 2^19 elements is split between threads. 1021 rows give parts of unequal size.
    x = torch.randn(1021, 1024, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("compiled"):
                work = [quantize(x, name) for name in ("mxfp4", "nvfp4", "int8", "fp8_e4m3")]
                work += [quantize(x, "nvfp4", tensor_scale="row"), quantize(x, "mxfp4", stochastic=KEY)]
                results.append([*work, matmul_noise(x, 0.05, KEY)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))
    with use_backend("torch"):
        assert same(results[0][1], quantize(x, "nvfp4")) and same(results[0][-1], matmul_noise(x, 0.05, KEY))


def test_large_outputs_are_the_same_as_small_ones():
    # The kernels write outputs of 8 MiB or more around the cache.
    x = torch.randn(2048, 1056, generator=torch.Generator().manual_seed(3))
    with use_backend("compiled"):
        for name in ("mxfp4", "nvfp4_block", "int8", "int4"):
            whole = quantize(x, name)
            assert same(whole, torch.cat([quantize(part, name) for part in x.split(100)])), name
        whole = matmul_noise(x, 0.05, KEY)
        ids = torch.arange(2048)
        parts = [matmul_noise(x[i : i + 100], 0.05, KEY, rows=ids[i : i + 100]) for i in range(0, 2048, 100)]
        assert same(whole, torch.cat(parts))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8"])
def test_torch_compile_gives_the_same_bits(name):
    x = random_blocks(64, 96, seed=8)
    compiled = torch.compile(lambda x: quantize(x, name), fullgraph=True)
    assert same(compiled(x), quantize(x, name))
    noisy = torch.compile(lambda x: matmul_noise(x, 0.05, KEY), fullgraph=True)
    assert same(noisy(x), matmul_noise(x, 0.05, KEY))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4:2d", "hif4", "hif8"])
def test_one_graph_holds_the_numerics(name):
    # The graph is traced and not compiled, which takes a second instead of a minute.
    x = random_blocks(32, 64, seed=8)
    traced = torch.compile(lambda x: matmul_noise(quantize(x, name), 0.05, KEY), fullgraph=True, backend="eager")
    assert same(traced(x), matmul_noise(quantize(x, name), 0.05, KEY))
