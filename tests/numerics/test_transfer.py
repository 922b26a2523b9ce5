"""Copies between host memory and a device: bits, and how often the program waits."""

import torch

from roundoff.numerics.quantize import quantize
from roundoff.numerics.transfer import fetch, put
from tests.pretend_device import pretended, side, waits


def test_tensors_of_every_kind_are_fetched_in_one_wait():
    values = [
        torch.tensor([[1, -(2**60)], [3, 4]]),
        torch.tensor([True, False, True]),
        torch.tensor(float("nan")),
        torch.arange(6, dtype=torch.float64).view(2, 3).t(),  # not contiguous
        torch.zeros(0, 4),
        torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    ]
    with pretended() as device:
        there = [put(value, device) for value in values]
        assert {side(tensor) for tensor in there} == {"cuda"}
        with waits() as waited:
            back = fetch([*there, torch.tensor([7])])
        assert len(waited) == 1
        assert {side(tensor) for tensor in back} <= {"cpu", None}
    for got, value in zip(back, [*values, torch.tensor([7])], strict=True):
        assert got.dtype is value.dtype
        torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_copied_on_a_cpu():
    tensors = [torch.ones(2), torch.zeros(3, dtype=torch.bool)]
    assert all(a is b for a, b in zip(fetch(tensors), tensors, strict=True))
    assert put(tensors[0], "cpu") is tensors[0]


def test_a_copy_to_a_device_does_not_wait():
    with pretended() as device, waits(refused=True):
        assert side(put([1, 2], device)) == "cuda"
        assert put(torch.ones(2), device, torch.bfloat16).dtype is torch.bfloat16


def test_given_tensor_scales_are_not_looked_at_on_a_device():
    x, scale = torch.randn(2, 32), torch.tensor([[0.01], [0.02]])
    expected = quantize(x, "nvfp4", tensor_scale=scale)
    one = quantize(x, "nvfp4", tensor_scale=scale[:1, 0])
    with pretended() as device:
        there, given = put(x, device), put(scale, device)
        bad = put(torch.tensor([[0.01], [-1.0]]), device)
        with waits(refused=True):
            found = quantize(there, "nvfp4", tensor_scale=given)
            single = quantize(there, "nvfp4", tensor_scale=given[:1, :, None])
            spoilt = quantize(there, "nvfp4", tensor_scale=bad)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(single.cpu(), one)
        assert spoilt[0].isfinite().all()
        assert spoilt[1].isnan().all()
