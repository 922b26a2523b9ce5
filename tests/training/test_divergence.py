"""The numbers by which an update is found to have diverged."""

import torch

from roundoff.training.divergence import gradient_norms


def test_norms_are_those_of_torch_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((7, 5), (64,), (33, 129))]
    norms, total = gradient_norms(gradients)
    assert torch.equal(total, torch.nn.utils.get_total_norm(gradients))
    assert norms.tolist() == [float(torch.linalg.vector_norm(g)) for g in gradients]
    gradients[1][3] = torch.inf
    norms, total = gradient_norms(gradients)
    assert norms.isfinite().tolist() == [True, False, True]
    assert not total.isfinite()
    assert gradient_norms([])[1] == 0.0
