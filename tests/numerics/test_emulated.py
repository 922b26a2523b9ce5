"""The kernels of ARM (NEON), run by QEMU's user emulation, give the bits of this machine's kernels."""

import ctypes
import platform
import shutil

import numpy as np
import pytest
import torch

from roundoff.formats.table import FORMATS
from roundoff.models.load import load_model
from roundoff.numerics import backend
from roundoff.numerics.accumulate import PartialSums, accumulated
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal, uniform
from roundoff.sampling.sampler import sample
from tests.numerics.emulated import Emulated, compile_caller
from tests.numerics.test_golden import FILES, GOLDEN, bits, tensor_scale
from tests.numerics.test_paths import KEY, random_bits, random_blocks, same

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
KERNELS = [name for name, fmt in FORMATS.items() if fmt.has_kernel]
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")
        for tool in (COMPILER, EMULATOR)
    ),
    pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="this machine runs NEON itself"),
]


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    """The kernels for NEON in a running emulator."""
    program = compile_caller(tmp_path_factory.mktemp("neon"), COMPILER, "aarch64", "neon")
    emulated = Emulated(EMULATOR, program, "neon")
    yield emulated
    emulated.close()


@pytest.fixture
def both(neon, monkeypatch):
    """Runs work on this machine's kernels and on NEON's; fails if it did not reach the function named."""

    def run(function, work):
        expected, before = work(), neon.calls[function]
        with monkeypatch.context() as patch:
            patch.setattr(backend, "available_kernels", lambda: neon.kernels)
            assert backend.computed_by(torch.ones(1)) == "neon"
            result = work()
        assert neon.calls[function] > before
        return expected, result

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_quantize(both, name, dtype):
    given = [None, "row"]
    if FORMATS[name].tensor_divisor is not None:
        given += [0.0, 1e-40, 1e-3, 1e30, torch.rand(33, 1, generator=torch.Generator().manual_seed(3))]
    for make in (random_bits, random_blocks):
        for columns in (96, 512, 70, 3):
            x = make(33, columns, 17, dtype)
            for scale in given:
                for key in (None, KEY):
                    work = lambda x=x, s=scale, k=key: quantize(x, name, tensor_scale=s, stochastic=k)  # noqa: E731
                    assert same(*both("quantize", work)), (make.__name__, columns, scale, key)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4", "int8"])
def test_many_random_bits(both, name):
    for dtype in (torch.float32, torch.bfloat16):  # 2^22 patterns each, which are streamed past the cache on x86
        x = random_bits(1024, 4096, 18, dtype)
        assert same(*both("quantize", lambda x=x: quantize(x, name)))


@pytest.mark.parametrize("file", sorted(name for name in FILES if FORMATS[FILES[name]].has_kernel))
def test_golden_files(both, file):
    data = np.load(GOLDEN / f"{file}.npz")
    for case in [name[:-3] for name in data if name.endswith("_in")]:
        x, golden = (torch.from_numpy(data[f"{case}_{end}"]) for end in ("in", "out"))
        scale = tensor_scale(data, case)
        _, q = both("quantize", lambda x=x, scale=scale: quantize(x, FILES[file], tensor_scale=scale))
        assert torch.equal(bits(q), bits(golden)), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_noise(both, dtype):
    generator = torch.Generator().manual_seed(1)
    for shape in ((64, 64), (33, 70), (5, 1), (300, 3), (2, 5000), (7, 16)):
        y = torch.randn(shape, generator=generator).to(dtype)
        rows = torch.randint(-(2**62), 2**62, shape[:-1], generator=generator)
        start = torch.randint(-50, 50, shape[:-1], generator=generator)
        for options in ({}, {"rows": rows}, {"rows": rows, "column_start": start}, {"column_start": start * 4}):
            assert same(*both("noise", lambda y=y, o=options: matmul_noise(y, 0.05, KEY, **o))), (shape, options.keys())


@pytest.mark.parametrize("draw", [normal, uniform])
def test_draws(both, draw):
    assert same(*both("draw", lambda: draw(KEY, (100, 10_007))))


def numbers(generator, *shape):
    """Normal numbers of very different sizes."""
    return torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape[0], 1, generator=generator) - 2)


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


@pytest.mark.parametrize("n", [16, 64, 100, 7])
def test_norm_and_gate(neon, n):
    generator = torch.Generator().manual_seed(n)
    hidden, delta, up, weight = (numbers(generator, rows, n) for rows in (9, 9, 9, 1))
    for added in (None, delta):
        results = []
        for kernels in (backend.build(), neon.kernels):
            h, out, gate = hidden.clone(), torch.zeros(9, n), hidden * 10
            address = None if added is None else added.data_ptr()
            kernels.norm(h.data_ptr(), address, weight.data_ptr(), 1e-5, out.data_ptr(), 9, n, 1)
            kernels.gate(gate.data_ptr(), up.data_ptr(), 9 * n, 1)
            results.append((h, out, gate))
        assert all(same(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["one cache", "a shared prompt"])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("fmt", [None, "fp8_e4m3", "mxfp4"])
def test_attention(neon, fmt, size, window, shared):
    batch, tokens, heads, kv_heads, start, capacity = 3, 5, 4, 2, 24, 40
    prompt = 20 if shared else 0
    generator = torch.Generator().manual_seed(size + window)
    q = torch.randn(batch, tokens, heads * size, generator=generator)
    k, v = (torch.randn(batch, tokens, kv_heads * size, generator=generator) for _ in range(2))
    prefix = [torch.randn(2, kv_heads, prompt, size, generator=generator) for _ in range(2)]
    own = [torch.randn(4, kv_heads, capacity, size, generator=generator) for _ in range(2)]
    angle = torch.randn(start + tokens, size, generator=generator)
    cosine, sine = angle.cos(), angle.sin()
    prompt_row, own_row, left = torch.tensor([0, 0, 1]), torch.tensor([3, 1, 0]), torch.tensor([0, 4, 26])
    results = []
    for kernels in (backend.build(), neon.kernels):
        written = [x.clone() for x in (q, k, v, torch.zeros_like(q), *own)]
        kernels.attend(
            pointers(*written[:4], *(prefix if shared else (None, None)), *written[4:], cosine, sine),
            pointers(prompt_row if shared else None, own_row, left),
            (ctypes.c_int64 * 9)(batch, tokens, heads, kv_heads, start, window, prompt, capacity, size),
            0.17,
            None if fmt is None else FORMATS[fmt].packed,
            1,
        )
        results.append(written)
    assert all(same(a, b) for a, b in zip(*results, strict=True))
    assert results[0][3].abs().sum() > 0


def test_fingerprints(neon):
    generator = torch.Generator().manual_seed(4)
    memory = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in (1, 63, 64, 5000, 300_000)]
    starts = (ctypes.c_void_p * len(memory))(*(x.data_ptr() for x in memory))
    sizes = (ctypes.c_int64 * len(memory))(*(x.numel() for x in memory))
    results = []
    for kernels in (backend.build(), neon.kernels):
        found = []
        for lines, step in ((4, 0), (0, 7)):
            out = (ctypes.c_uint64 * len(memory))()
            kernels.fingerprint(starts, sizes, len(memory), lines, step, out)
            found += list(out)
        for x in memory:
            out = (ctypes.c_uint64 * 3)()
            kernels.fingerprints(x.data_ptr(), x.numel(), 4, 7, out)
            found += list(out)
        results.append(found)
    assert results[0] == results[1]


def test_sampling(both):
    """The fused decoder as the sampler uses it."""
    loaded = load_model("tiny")
    prompts = ["3+4=", "12+7+5="]

    def work():
        key = Key(2)
        out = sample(loaded.model, loaded.tokenizer, prompts, group_size=4, max_new_tokens=12, temperature=1.0, key=key)
        return out.tokens, out.logprobs

    for function in ("norm", "gate", "attend"):
        (tokens, logprobs), (neon_tokens, neon_logprobs) = both(function, work)
        assert torch.equal(tokens, neon_tokens) and torch.equal(logprobs, neon_logprobs)


@pytest.mark.parametrize("sums", [PartialSums(13, 128, 32, "align"), PartialSums(10, 24, 24, "align", half=True)])
def test_sums_of_few_bits(both, sums):
    for make in (random_bits, random_blocks):
        a, b = make(40, 200, 3), make(30, 200, 4)
        expected, result = both("accumulate", lambda a=a, b=b: accumulated(a, b, sums))
        assert same(expected, result)
