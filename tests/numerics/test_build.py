"""Building and finding the compiled kernels: one library for each kind of processor."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from roundoff.models.load import load_model
from roundoff.numerics import backend, build
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample

TARGET = list(build.targets())[-1]
"""A target that every machine of this kind can run."""
HERE = build.targets_for(torch.backends.cpu.get_cpu_capability())


@pytest.fixture
def compiler():
    """The path of the C++ compiler of this machine."""
    try:
        return build.find_compiler(build.COMPILERS)
    except build.BuildError:
        pytest.skip("no C++ compiler here")


def counting_compiler(directory: Path) -> str:
    """Stands in for a compiler: writes "built" to the argument after -o, and adds a line to `runs` for each run."""
    compiler = directory / "c++"
    compiler.write_text(
        f"#!/bin/sh\nwhile [ $1 != -o ]; do shift; done; echo built > $2; echo run >> {directory / 'runs'}\n"
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_the_widest_target_that_the_processor_has_comes_first():
    assert list(build.targets("x86_64")) == list(build.targets("AMD64")) == ["avx512", "avx2", "sse2"]
    assert list(build.targets("aarch64")) == list(build.targets("arm64")) == ["neon"]
    assert list(build.targets("riscv64")) == ["generic"]
    if len(build.targets()) == 3:
        assert build.targets_for("AVX512") == ["avx512", "avx2", "sse2"]
        assert build.targets_for("AVX2") == ["avx2", "sse2"]
    assert build.targets_for("DEFAULT") == [TARGET]
    assert build.targets_for("SVE256") == [TARGET]


def test_no_compiler_is_said():
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found \(looked for nothing-of-the-kind\)"):
        build.find_compiler(("nothing-of-the-kind",))


def test_a_failing_compiler_is_said_in_one_line(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(build.BuildError, match=r"failed .*no such luck") as error:
        build.compile_target(tmp_path, str(broken), TARGET)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.so"))


def test_a_library_is_compiled_once_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "nothing is packaged")
    monkeypatch.setattr(build, "COMPILERS", (counting_compiler(tmp_path),))
    lines = []
    for _ in range(2):
        with build.library_for(TARGET, lines.append) as library:
            assert library.read_text() == "built\n"
    assert (tmp_path / "runs").read_text() == "run\n"
    assert [line.split(" in ")[0] for line in lines] == [f"compiled the kernels for {TARGET}"]
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}  # no temporary file is left


def test_the_name_of_a_library_holds_what_it_depends_on(tmp_path, monkeypatch):
    name = build.library_name(TARGET, ("-mavx2",))
    assert name == build.library_name(TARGET, ("-mavx2",))
    assert name != build.library_name(TARGET, ())
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "roundoff.cpp").write_text("int changed;")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert name != build.library_name(TARGET, ("-mavx2",))


def test_a_packaged_library_is_taken_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGED", tmp_path)
    monkeypatch.setattr(build, "COMPILERS", ("nothing-of-the-kind",))
    packaged = tmp_path / build.library_name(TARGET, build.targets()[TARGET])
    packaged.write_text("packaged")
    with build.library_for(TARGET, pytest.fail) as library:
        assert library == packaged
    packaged.rename(tmp_path / "kernels-of-an-older-source.so")
    with pytest.raises(build.BuildError, match="no C"), build.library_for(TARGET, pytest.fail):
        pass


@pytest.mark.slow
def test_processes_may_build_at_once(tmp_path, compiler):
    program = (
        "import torch; from roundoff.numerics.backend import build; from roundoff.numerics.quantize import quantize;"
        "build(); assert quantize(torch.full((4, 32), 3.0), 'mxfp4').eq(3.0).all()"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate()[1] for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said.count("compiled the kernels") == 1  # the others waited for it
    assert len(list((tmp_path / "roundoff").glob("*.so"))) == 1


def test_an_unwritable_cache_gives_a_private_directory(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    directory = build.cache_directory()
    assert directory.is_dir() and directory.stat().st_mode & 0o077 == 0
    directory.rmdir()


def test_a_user_without_a_home_gets_a_private_directory(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", fail)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert build.cache_directory().parent == tmp_path


def test_nowhere_to_write_is_said(tmp_path, monkeypatch, compiler):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build.tempfile, "tempdir", str(blocked / "none"))
    with pytest.raises(build.BuildError, match="no directory to compile the kernels in"):
        build.cache_directory()
    with pytest.raises(build.BuildError, match="cannot be compiled into"):
        build.compile_target(blocked, compiler, TARGET)


@pytest.mark.slow
def test_a_private_directory_is_not_left_behind(tmp_path, compiler):
    # A temporary directory for each process that runs under a read-only home would fill the disk.
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    program = (
        "import torch; from roundoff.numerics.backend import build; from roundoff.numerics.quantize import quantize;"
        "build(); assert quantize(torch.full((4, 32), 3.0), 'mxfp4').eq(3.0).all()"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list((tmp_path / "temporary").iterdir()) == []


def work():
    """What every kernel gives on random numbers."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("mxfp4", "mxfp8_e4m3:rceil", "nvfp4", "int4", "int8", "fp8_e4m3"):
            yield quantize(x.to(dtype), name)
        yield quantize(x.to(dtype), "nvfp4", tensor_scale="row")
        yield quantize(x.to(dtype), "mxfp4", stochastic=Key(1))
        yield matmul_noise(x.to(dtype), 0.05, Key(1), column_start=torch.arange(64))
    loaded = load_model("tiny")  # norm, gate and attention of the fused decoder
    prompts = ["3+4=", "12+7+5="]
    rollouts = sample(
        loaded.model, loaded.tokenizer, prompts, group_size=4, max_new_tokens=12, temperature=1.0, key=Key(2)
    )
    yield rollouts.tokens
    yield rollouts.logprobs


@pytest.mark.slow
@pytest.mark.parametrize("target", HERE)
def test_every_target_gives_the_same_bits(target, tmp_path, monkeypatch, compiler):
    expected = list(work())
    kernels = backend.load(build.compile_target(tmp_path, compiler, target), target)
    monkeypatch.setattr(backend, "available_kernels", lambda: kernels)
    assert backend.computed_by(torch.ones(1)) == target
    for a, b in zip(expected, work(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_wheel_holds_a_library_for_every_target(tmp_path, compiler):
    """So that nothing is compiled at the first call on any machine that it is installed on."""
    root = Path(build.__file__).parents[3]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(root)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl")
    names = [Path(name).name for name in ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(names) == sorted(build.library_name(target, flags) for target, flags in build.targets().items())
