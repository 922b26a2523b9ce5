"""Choosing the compiled path."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roundoff.numerics import backend
from roundoff.numerics.quantize import quantize


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


def test_a_target_that_the_compiler_does_not_know_is_passed_over(monkeypatch):
    """An old compiler on a new machine still gives kernels, of narrower vectors."""
    real, refused = backend.library_for, []

    def narrow(target, say):
        if target == "avx512":
            refused.append(target)
            raise backend.BuildError("unrecognized command-line option '-mavx512f'")
        return real(target, say)

    monkeypatch.setattr(backend, "library_for", narrow)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    if "avx512" not in backend.targets_for("AVX512"):
        pytest.skip("no such target on this kind of machine")
    backend.build.cache_clear()
    backend.kernels_of.cache_clear()
    try:
        assert backend.build().target == "avx2"
        assert refused == ["avx512"]
    finally:
        backend.build.cache_clear()
        backend.kernels_of.cache_clear()


def test_what_computes_is_named():
    assert backend.computed_by(torch.ones(1, device="meta")) == "torch"  # no kernels are built for another device
    assert backend.computed_by(torch.ones(1)) == backend.build().target
    with backend.use_backend("torch"):
        assert backend.computed_by(torch.ones(1)) == "torch"


def test_the_choice_of_backend_is_restored_and_checked():
    x = torch.ones(4)
    with backend.use_backend("torch"):
        assert backend.kernels_for(x) is None
        with backend.use_backend("compiled"):
            assert backend.kernels_for(x) is not None
        assert backend.kernels_for(x) is None
    with pytest.raises(ValueError, match="but is 'cuda'"), backend.use_backend("cuda"):
        pass


def test_a_narrower_target_may_be_chosen():
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    *_, narrowest = backend.targets_for(torch.backends.cpu.get_cpu_capability())
    with backend.use_backend(narrowest):
        assert backend.computed_by(x) == narrowest
        narrow = quantize(x, "nvfp4")
        with backend.use_backend("compiled"):  # as a part of a benchmark says that asks for kernels
            assert backend.computed_by(x) == narrowest
    assert backend.computed_by(x) == backend.build().target
    assert torch.equal(narrow, quantize(x, "nvfp4"))


def test_a_target_of_another_processor_is_refused():
    with pytest.raises(ValueError, match=r"or a target \(.*\), but is 'sve'"), backend.use_backend("sve"):
        pass


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
