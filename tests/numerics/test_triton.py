"""Triton's kernels without a GPU: run in its interpreter, compiled for three of NVIDIA's architectures, and refused."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roundoff.formats.table import FORMATS, get_format
from roundoff.numerics import backend
from roundoff.numerics.backend import BuildError, computed_by, use_backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal, signed
from roundoff.numerics.triton_kernels.layout import LONGEST_ROW, format_of, layout_of

CASES = Path(__file__).parent / "triton_cases.py"
KEY = Key.from_seed(5)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(marker, names=""):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, "-k", names, str(CASES)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    # Not 0 either if no case was found.
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("names", ["golden", "not golden"])
def test_the_interpreter_gives_the_bits_of_the_cpu(names):
    run_cases("not slow", names)


@needs_triton
@pytest.mark.slow
def test_the_interpreter_gives_the_bits_of_the_cpu_on_more_patterns():
    run_cases("slow")


class Recorder:
    """Takes the place of a kernel and compiles what is launched, with the arguments as Triton would specialize them."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.compiled = kernel, capability, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, **named):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        given = dict(zip(names, values, strict=False)) | {name: named.pop(name) for name in names if name in named}
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{DTYPES[value.dtype]}"
                aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = parameter.annotation_type or "i32"
                if not parameter.annotation_type and not parameter.do_not_specialize and value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", self.capability, 32)
        self.compiled.append(triton.compile(source, target=target, options=named))


@pytest.fixture
def compiled_for(monkeypatch, tmp_path):
    """A function that does some work and returns the kernels that it compiled, for one of NVIDIA's architectures."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from roundoff.numerics.triton_kernels import launch

    kernels = {name: value for name, value in vars(launch).items() if type(value).__name__ == "JITFunction"}
    assert len(kernels) == 6

    def work(capability, function):
        recorders = {name: Recorder(kernel, capability) for name, kernel in kernels.items()}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                patch.setattr(launch, name, recorder)
            function(launch)
        return {name: recorder.compiled for name, recorder in recorders.items() if recorder.compiled}

    return work


def is_exact(ptx):
    """Whether a kernel holds nothing that a device may round otherwise: fused or approximate operations, flushing."""
    return not re.search(r"\bfma\.|\.ftz\b|\.approx\b|\.full\b", ptx)


def is_wide(ptx):
    """Whether all loads and stores of more than a few bytes have 16 bytes."""
    sixteen = r"global\S*\.(v4\.b32|v2\.b64)\b"
    return bool(re.search(rf"\bld\.{sixteen}", ptx)) and bool(re.search(rf"\bst\.{sixteen}", ptx))


def matrices(dtype, rows=4, columns=4096):
    return torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=dtype)


@needs_triton
def test_kernels_compile_without_a_gpu(compiled_for):
    x, y = matrices(torch.bfloat16)

    def work(launch):
        launch.quantize(x, y, layout_of(FORMATS["mxfp4"]), 0, None, 1.0, None)
        launch.quantize(x, y, layout_of(FORMATS["nvfp4"]), launch.FROM_ROW, None, 1.0, KEY.value)
        launch.noise(x, y, 0.05, KEY.value, torch.empty(4, dtype=torch.int64), None, y[0])

    for name, kernels in compiled_for(90, work).items():
        for kernel in kernels:
            ptx = kernel.asm["ptx"]
            assert is_exact(ptx) and is_wide(ptx), name
            assert "cvt.rn.bf16" in ptx, name
    assert not is_exact("fma.rn.f32 %f1") and not is_exact("div.full.f32") and not is_wide("ld.global.b32 %r1")


EACH_WAY = ("mxfp4", "mxfp8_e5m2:ceil", "mxfp6_e3m2:even", "mxfp4:rceil", "nvfp4", "nvfp4:te", "nvfp4:2d", "nvfp4:46")
EACH_WAY += ("nvfp4:46_mae_2d", "hif8", "hif4", "fp8_e4m3", "fp8_e4m3_row", "int8:full", "int4")
"""Formats that take each way through the kernels."""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", backend.DTYPES, ids=["float32", "bfloat16", "float16"])
def test_all_kernels_compile_for(capability, dtype, compiled_for):
    x, y = matrices(dtype)
    ids = torch.empty(4, dtype=torch.int64)

    def work(launch):
        for fmt in map(get_format, EACH_WAY):
            sources = (0,) if fmt.tensor_divisor is None else (1, 3) if fmt.rows > 1 else (1, 2, 4)
            for source in sources:
                launch.quantize(x, y, layout_of(fmt), source, torch.empty(4), 1.0, None)
            launch.quantize(x, y, layout_of(fmt), sources[-1], torch.empty(4), 1.0, KEY.value)
        long, out = matrices(dtype, 1, 2 * LONGEST_ROW)
        for name in ("int8", "nvfp4"):
            launch.quantize(long, out, layout_of(FORMATS[name]), launch.FROM_ROW, None, 1.0, None)
        launch.noise(x, y, 0.05, KEY.value, None, None)
        for kind in (1, 2):
            launch.draw(kind, torch.empty(4, 4096), KEY.value, ids)

    kernels = compiled_for(capability, work)
    assert set(kernels) == {
        *("quantize_blocks", "quantize_rows", "quantize_elements", "row_scales", "tensor_amax", "noise_kernel")
    }
    for name, compiled in kernels.items():
        for kernel in compiled:
            ptx = kernel.asm["ptx"]
            assert is_exact(ptx), name
            # Maxima are not stored, and draws are not loaded.
            assert is_wide(ptx) or name in ("row_scales", "tensor_amax") or "noise" in name, (name, kernel.metadata)
    shifted = compiled_for(capability, lambda launch: launch.noise(x, y, 0.05, KEY.value, ids, ids))
    assert is_exact(shifted["noise_kernel"][0].asm["ptx"])  # a shifted first column has no wide accesses


def test_layouts_hold_all_of_a_format():
    words = (
        "e2m1/8x4/e8m0:even",
        "e3m2/1x64/float32",
        "int4/16/e4m3+tensor",
        "int4/16/e8m0:even",
        "e4m3/tensor/float32",
        "e2m1/32/e4m3:te",
    )
    known = [fmt for fmt in (*FORMATS.values(), *map(get_format, words)) if fmt.element is not None]
    for fmt in known:
        form = layout_of(fmt)
        assert form is not None, fmt.name
        x = torch.randn(32, 70, generator=torch.Generator().manual_seed(1))
        assert torch.equal(quantize(x, format_of(form)), quantize(x, fmt)), fmt.name
        assert layout_of(format_of(form)) == form


class TestOperators:
    """The operators that `torch.compile` sees, here on the CPU: by plain torch."""

    def arguments(self, name="nvfp4", **changes):
        form = layout_of(FORMATS[name])
        x = torch.randn(6, 70, generator=torch.Generator().manual_seed(2))
        return (x, list(form[:8]), list(form[8:]), changes.get("source", 2), None, 1.0, changes.get("key"), 0.1)

    def test_have_schemas_and_fake_forms_that_are_right(self):
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        ids = torch.arange(6)
        for operator, arguments in (
            (torch.ops.roundoff.quantize.default, self.arguments()),
            (torch.ops.roundoff.quantize.default, self.arguments("nvfp4:2d", source=1, key=signed(KEY))),
            (torch.ops.roundoff.noise.default, (torch.ones(6, 70), 0.05, signed(KEY), ids, ids, torch.ones(70))),
            (torch.ops.roundoff.noise.default, (torch.ones(6, 70), 0.05, signed(KEY), None, None, None)),
            (torch.ops.roundoff.draw.default, (1, ids, 30, signed(KEY))),
        ):
            torch.library.opcheck(operator, arguments, test_utils=checks)

    def test_compute_what_the_functions_do(self):
        arguments = self.arguments(key=signed(KEY))
        expected = quantize(arguments[0], "nvfp4", tensor_scale="row", stochastic=KEY, deadzone=0.1)
        assert torch.equal(torch.ops.roundoff.quantize(*arguments), expected)
        y, ids = arguments[0], torch.arange(6) * 7
        expected = matmul_noise(y, 0.05, KEY, rows=ids)
        assert torch.equal(torch.ops.roundoff.noise(y, 0.05, signed(KEY), ids, None, None), expected)
        assert torch.equal(torch.ops.roundoff.draw(1, ids, 30, signed(KEY)), normal(KEY, (6, 30), rows=ids))

    def test_know_their_shapes_without_numbers(self):
        form = layout_of(FORMATS["mxfp4"])
        x = torch.empty(3, 5, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
        q = torch.ops.roundoff.quantize(x, form[:8], form[8:], 0, None, 1.0, None, 0.0)
        assert q.shape == x.shape and q.dtype is torch.bfloat16 and q.is_contiguous()
        eps = torch.ops.roundoff.draw(1, torch.empty(7, dtype=torch.int64, device="meta"), 30, 0)
        assert eps.shape == (7, 30) and eps.dtype is torch.float32


@needs_triton
def test_a_device_that_triton_has_no_driver_for_takes_the_torch_path(monkeypatch, caplog):
    x = torch.randn(4, 64)
    expected, noisy, eps = quantize(x, "nvfp4"), matmul_noise(x, 0.05, KEY), normal(KEY, (4, 8))
    monkeypatch.setattr(backend, "TRITON_DEVICES", ("cpu",))  # for which Triton has none
    backend.triton_problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="roundoff"):
            assert torch.equal(quantize(x, "nvfp4"), expected)
            assert torch.equal(matmul_noise(x, 0.05, KEY), noisy) and torch.equal(normal(KEY, (4, 8)), eps)
            with use_backend("compiled"), pytest.raises(BuildError, match="no Triton kernels on cpu"):
                quantize(x, "nvfp4")
        (line,) = [record.message for record in caplog.records]
        assert line.startswith("roundoff: no Triton kernels on cpu: Triton failed with RuntimeError: 0 active drivers")
        assert line.endswith("; using the slower pure-torch path")
        assert computed_by(x) != "triton"
    finally:
        backend.triton_problem.cache_clear()


def test_triton_is_imported_for_a_device_alone_and_need_not_be_there():
    program = """
import sys
import torch
from roundoff.numerics import backend
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
x = torch.randn(4, 64)
q, y = quantize(x, "nvfp4"), matmul_noise(x, 0.05, Key(3))
assert "triton" not in sys.modules
sys.modules["triton"] = None  # as if it were not installed
backend.TRITON_DEVICES = ("cpu",)
assert torch.equal(quantize(x, "nvfp4"), q) and torch.equal(matmul_noise(x, 0.05, Key(3)), y)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    line = "roundoff: no Triton kernels on cpu: the package triton is not installed; using the slower pure-torch path"
    assert done.stderr.strip() == line
