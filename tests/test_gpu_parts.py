"""Parts a to c of the script for a GPU, each on the CPU or on a device that is pretended."""

import json
import math

import pytest
import torch
from benchmarks.device import bits, decoding, kernels, models, qwen, training
from benchmarks.device.results import Row

from roundoff import FORMATS
from tests.pretend_cuda import CPU, Rows, pretended_cuda


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def cuda(monkeypatch):
    with pretended_cuda(monkeypatch) as device:
        yield device


# --- part a -----------------------------------------------------------------------------------------------------------


def test_a_comparison_counts_every_bit_but_those_of_nan():
    total = bits.Comparison()
    here = torch.tensor([1.0, 0.0, math.nan, math.inf, 2.0])
    there = torch.tensor([1.0, -0.0, -math.nan, math.inf, 2.0000002])
    total.add("mode", torch.arange(5.0), here, there)
    assert (total.compared, total.unequal) == (5, 2)
    assert total.first == "mode, element 1: 1 -> CPU 0 and device -0"
    total.add("later", torch.arange(5.0), here.bfloat16(), torch.zeros(5).bfloat16())
    assert (total.compared, total.unequal) == (10, 6)
    assert total.first.startswith("mode")


def test_patterns_have_every_exponent_and_tame_ones_beside_them(monkeypatch):
    monkeypatch.setattr(bits, "ROWS", 96)
    first, second, third = list(bits.chunks((bits.FIRST_ROWS + bits.ROWS + 1) * bits.COLUMNS))
    assert [len(x) % 32 for x in (first, second, third)] == [0, 0, 0]
    exponents = [((x.view(torch.int32) >> 23) & 255).unique() for x in (first[:32], first[32:], second, third)]
    assert [(int(e.min()), int(e.max())) for e in exponents] == [(0, 255), (112, 127), (112, 127), (0, 255)]
    assert bool((second < 0).any()) and bool((second > 0).any())


def test_bits_are_compared_in_every_mode_of_some_formats(rows, monkeypatch, capsys):
    monkeypatch.setattr(bits, "FORMATS", {name: FORMATS[name] for name in ("mxfp4", "nvfp4", "int8", "bf16")})
    monkeypatch.setattr(bits, "FILES", {name: bits.FILES[name] for name in ("mxfp4", "nvfp4_two_level")})
    bits.share_of_small("a", "cpu", 60.0, 0, 1)
    lines = [line.removeprefix("ROW ") for line in capsys.readouterr().out.splitlines() if line.startswith("ROW ")]
    found = [Row(**json.loads(line)) for line in lines]
    assert {row.verdict for row in found} == {"equal"}
    assert len(found) == 2 + 3 + 4
    assert "7 of 7 modes" in next(row.measured for row in found if row.what.startswith("nvfp4,"))


def test_bits_that_differ_are_counted_and_shown(rows, monkeypatch):
    monkeypatch.setattr(bits, "FORMATS", {"mxfp4": FORMATS["mxfp4"]})
    real, calls = bits.quantize, []

    def wrong(x, *arguments, **options):
        y = real(x, *arguments, **options)
        if x.dim() == 2 and len(x) > 1:
            calls.append(1)
            if len(calls) == 2:  # the device's
                y[0, 7] += 1.0
        return y

    monkeypatch.setattr(bits, "quantize", wrong)
    bits.many(CPU, rows.results(), 1000)
    assert rows.of("mxfp4, many").verdict == "DIFFERS"
    assert "1 unequal; first: float32, element 7" in rows.of("mxfp4, many").measured
    assert rows.of("normal draws, many").verdict == "equal"


def test_bits_on_a_pretended_device(rows, cuda, monkeypatch):
    monkeypatch.setattr(bits, "FORMATS", {name: FORMATS[name] for name in ("mxfp4", "nvfp4")})
    bits.many(cuda, rows.results(), 1000)
    bits.golden(cuda, rows.results(), ["nvfp4_two_level"])
    assert rows.verdicts() == {"equal"} and len(rows) == 6


def test_what_there_is_no_time_for_is_left_out(rows):
    bits.many(CPU, rows.results(seconds=-1.0), 1000)
    models.measure(CPU, rows.results(seconds=-1.0), small=True)
    assert rows.verdicts() == {"left out"}


# --- part b -----------------------------------------------------------------------------------------------------------


def test_deviations_are_relative_and_infinite_if_not_finite():
    a = torch.tensor([3.0, 4.0])
    assert models.deviation(a, a) == 0.0
    assert models.deviation(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)
    assert models.deviation(a, torch.tensor([3.0, math.nan])) == math.inf


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("W4A4 mxfp4", [1e-7, 1e-7, 0.05], "reached"),  # one step
        ("W4A4 mxfp4", [1e-7, 0.05, 0.05], "MISSED"),
        ("W4A4 mxfp4", [1e-7, 1e-7, 0.5], "MISSED"),
        ("5 % noise", [1e-7, 1e-7, 1e-6], "reached"),
        ("5 % noise", [1e-7, 1e-7, 1e-3], "MISSED"),  # noise has no steps
    ],
)
def test_models_are_held_to_two_bounds(rows, name, values, verdict):
    models.judge(rows.results(is_judged=False), name, models.HARDWARE[name], {"logits": [0.0], "gradients": values})
    assert rows.verdicts() == {verdict}


def test_models_on_a_pretended_device(rows, cuda, monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", {"qwen3_moe": None})
    models.measure(cuda, rows.results(), small=True)
    assert rows.verdicts() == {"reached"} and len(rows) == 5


# --- part c -----------------------------------------------------------------------------------------------------------


def test_synchronisations_are_counted_by_line(cuda):
    def work():
        for _ in range(3):
            torch.cuda.item()

    assert cuda.finds_synchronisations and not CPU.finds_synchronisations
    ((place, count),) = cuda.synchronisations(work).items()
    assert place.startswith("tests/test_gpu_parts.py:") and count == 3
    assert torch.cuda.mode == "default"


def test_the_device_is_described(cuda, monkeypatch):
    monkeypatch.setattr("benchmarks.device.machine._driver", lambda: "1.2.3")
    described = cuda.describe()
    assert (described["card"], described["memory"], described["driver"]) == ("Pretended 100", "80.0 GiB", "1.2.3")
    assert described["torch"] == torch.__version__ and described["computes by"] == "torch"


def test_kernels_on_a_pretended_device(rows, cuda, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "FORMATS", {name: FORMATS[name] for name in (*kernels.FIRST, "int8", "bf16")})
    monkeypatch.setattr(kernels, "SECONDS_EACH", 0.001)
    kernels.measure(cuda, rows.results(is_judged=False), small=True)
    assert rows.verdicts() == {"", "not judged"}
    assert rows.of("quantizes and draws by").measured == "torch"
    assert len(rows) == 2 + 2 * (6 + 2) + 1


def test_decoding_on_a_pretended_device(rows, cuda, monkeypatch):
    monkeypatch.setattr(decoding, "FEW", 2)
    monkeypatch.setattr(decoding, "SMALL_MANY", 4)
    monkeypatch.setattr(decoding, "REPEATS", 1)
    monkeypatch.delitem(qwen.HARDWARE, "W4A4 nvfp4")
    monkeypatch.setattr(kernels, "SMALL_BYTES", 1 << 16)
    monkeypatch.setattr(decoding, "call", synchronising(decoding.call))
    decoding.measure(cuda, rows.results("c", is_judged=False), small=True)
    assert rows.verdicts() == {"", "not judged"}
    assert "peak 3.0 GiB" in rows.of("decode step, 4 rollouts, plain").measured
    assert math.isfinite(rows.of("decode step, 4 rollouts, 5 % noise, over plain").details["value"])
    # one for each token of a call: (4 - 2) / (4 - 2)
    found = rows.of("decode step, 4 rollouts, W4A4 mxfp4, host synchronisations")
    assert found.details["value"] == 1.0 and found.measured.startswith("1.00 a step (tests/test_gpu_parts.py:")


def synchronising(call):
    def called(model, prompts, tokens):
        call(model, prompts, tokens)
        for _ in range(tokens):
            torch.cuda.item()

    return called


def test_the_memory_limit_counts_weights_and_cache():
    model = qwen.build("cpu", small=True)
    # 512 x 64 embeddings (tied); a layer: q 64 x 64 + 64, k and v 2 x (32 x 64 + 32), o 64 x 64, MLP 3 x 64 x 128,
    # two norms of 64; a last norm of 64. Cache: 2 layers x 2 (k, v) x 2 heads x 16 numbers a token; 2 bytes each.
    weights = 512 * 64 + 2 * (64 * 64 + 64 + 2 * (32 * 64 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    seconds, read = decoding.limit_seconds(model, 4, 10.0, 1e6)
    assert read == 2 * (weights + 4 * 10 * 2 * 2 * 2 * 16)
    assert seconds == pytest.approx(read / 1e6)


def test_training_on_a_pretended_device(rows, cuda, monkeypatch):
    monkeypatch.setattr(training, "STEPS", 2)
    training.measure(cuda, rows.results("c", is_judged=False), small=True)
    assert rows.verdicts() == {"", "not judged"}
    assert rows.of("training step, 5 % noise").details["rollouts"] == 4
    assert rows.of("training step, W4A4 nvfp4, over plain").details["value"] > 0


def test_training_takes_the_most_rollouts_that_fit(rows, monkeypatch):
    real = training.update

    def limited(session, step, batch):
        if len(batch.rollouts) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(session, step, batch)

    monkeypatch.setattr(training, "update", limited)
    monkeypatch.setattr(training, "STEPS", 1)
    training.measure(CPU, rows.results("c", is_judged=False), small=True)
    assert rows.of("training step, plain").details["rollouts"] == 2
    assert "FAILED" not in rows.verdicts()


def test_noise_that_would_take_minutes_is_not_begun(rows):
    model = qwen.build("cpu", small=True)
    noisy, plain = qwen.HARDWARE["5 % noise"], qwen.HARDWARE[qwen.PLAIN]
    assert qwen.too_slow(CPU, model, noisy, 10**9, 1.0, trained=True).startswith("noise alone would take")
    assert qwen.too_slow(CPU, model, noisy, 4, 60.0, trained=True) == ""
    assert qwen.too_slow(CPU, model, plain, 10**9, 1.0, trained=True) == ""
    assert qwen.too_slow(CPU, model, plain, 4, -1.0, trained=True) == "the time of this part was over"
