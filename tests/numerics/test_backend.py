"""How the compiled path is built, cached and chosen."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roundoff.numerics import backend
from roundoff.numerics.quantize import quantize

COMPILER = backend.find_compiler(backend.COMPILERS)


def test_a_missing_compiler_is_reported():
    with pytest.raises(backend.BuildError, match=r"no C\+\+ compiler found \(looked for nothing-of-the-kind\)"):
        backend.find_compiler(("nothing-of-the-kind",))


def test_a_failing_compiler_is_reported_in_one_line(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(backend.BuildError, match=r"failed .*no such luck") as error:
        backend.compile_kernels(tmp_path, str(broken))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.so"))


def test_without_a_compiler_one_line_is_logged_and_torch_computes(monkeypatch, caplog):
    def fail():
        raise backend.BuildError("no C++ compiler found")

    monkeypatch.setattr(backend, "build", fail)
    backend.available_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="roundoff"):
            first = quantize(torch.ones(4, 32), "mxfp4")
            quantize(torch.ones(4, 32), "mxfp4")
        assert [record.message for record in caplog.records] == [
            "roundoff: no C++ compiler found; using the slower pure-torch path"
        ]
        assert torch.equal(first, torch.ones(4, 32))
        with pytest.raises(backend.BuildError), backend.use_backend("compiled"):
            pass
    finally:
        backend.available_kernels.cache_clear()


def test_the_choice_of_backend_is_restored_and_checked():
    x = torch.ones(4)
    with backend.use_backend("torch"):
        assert backend.kernels_for(x) is None
        with backend.use_backend("compiled"):
            assert backend.kernels_for(x) is not None
        assert backend.kernels_for(x) is None
    with pytest.raises(ValueError, match="but is 'cuda'"), backend.use_backend("cuda"):
        pass


def test_the_library_is_built_once_and_named_after_what_it_depends_on(tmp_path, monkeypatch):
    compiler, cache = tmp_path / "c++", tmp_path / "cache"
    cache.mkdir()
    # A stand-in for a compiler, which writes a file to the argument after -o and counts its runs.
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\n"
        f"while [ $1 != -o ]; do shift; done; echo built > $2; echo run >> {tmp_path / 'runs'}\n"
    )
    compiler.chmod(0o755)
    first = backend.compile_kernels(cache, str(compiler))
    assert backend.compile_kernels(cache, str(compiler)) == first and first.read_text() == "built\n"
    assert (tmp_path / "runs").read_text() == "run\n"
    monkeypatch.setattr(backend, "cpu_description", lambda: "another machine that shares the home directory")
    assert backend.compile_kernels(cache, str(compiler)) != first
    monkeypatch.setattr(backend, "NATIVE", ())
    backend.compile_kernels(cache, str(compiler))
    assert len(list(cache.iterdir())) == 3  # and no temporary file is left


@pytest.mark.slow
def test_processes_may_build_at_the_same_time(tmp_path):
    program = (
        "import torch; from roundoff.numerics.backend import build; from roundoff.numerics.quantize import quantize;"
        "build(); assert quantize(torch.full((4, 32), 3.0), 'mxfp4').eq(3.0).all()"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "roundoff").iterdir())) == 1


def test_an_unwritable_cache_gives_a_private_directory(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    directory = backend.cache_directory()
    assert directory.is_dir() and directory.stat().st_mode & 0o077 == 0
    directory.rmdir()


def test_a_user_without_a_home_gets_a_private_directory(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(backend.Path, "home", fail)
    monkeypatch.setattr(backend.tempfile, "tempdir", str(tmp_path))
    assert backend.cache_directory().parent == tmp_path


def test_a_lack_of_writable_directories_is_reported(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(backend.tempfile, "tempdir", str(blocked / "none"))
    with pytest.raises(backend.BuildError, match="no directory to compile the kernels in"):
        backend.cache_directory()
    with pytest.raises(backend.BuildError, match="cannot be compiled into"):
        backend.compile_kernels(blocked, COMPILER)


@pytest.mark.slow
def test_a_private_directory_is_removed(tmp_path):
    # A temporary directory that stays behind for each process under a read-only home would fill the disk.
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    program = (
        "import torch; from roundoff.numerics.backend import build; from roundoff.numerics.quantize import quantize;"
        "build(); assert quantize(torch.full((4, 32), 3.0), 'mxfp4').eq(3.0).all()"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_kernels_work_without_a_thread_that_cannot_be_started():
    # There is no memory for the stack of another thread, and the process must go on without it.
    program = """
import resource, torch
from pathlib import Path
from roundoff.numerics.backend import use_backend
from roundoff.numerics.quantize import quantize
x = torch.randn(2048, 1024)
out = torch.empty_like(x)
torch.set_num_threads(1)
with use_backend("compiled"):
    expected = quantize(x, "mxfp4")
    torch.set_num_threads(4)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
    quantize(x, "mxfp4", out=out)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert torch.equal(out, expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_generic_code_without_avx512_gives_the_same_bits(tmp_path, monkeypatch):
    # Without -march=native the same source is compiled for SSE2.
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    native = backend.build()
    monkeypatch.setattr(backend, "NATIVE", ())
    plain = backend.load(backend.compile_kernels(tmp_path, COMPILER))
    assert plain.path != native.path
    from roundoff.numerics.noise import matmul_noise
    from roundoff.numerics.rng import Key

    def work():
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("mxfp4", "mxfp8_e4m3:rceil", "nvfp4", "int4", "int8", "fp8_e4m3"):
                yield quantize(x.to(dtype), name)
            yield quantize(x.to(dtype), "nvfp4", tensor_scale="row")
            yield quantize(x.to(dtype), "mxfp4", stochastic=Key(1))
            yield matmul_noise(x.to(dtype), 0.05, Key(1), column_start=torch.arange(64))

    expected = list(work())
    monkeypatch.setattr(backend, "available_kernels", lambda: plain)
    for a, b in zip(expected, work(), strict=True):
        assert torch.equal(a, b)
