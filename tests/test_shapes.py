"""The shapes in signatures are checked while the suite runs, so that none can rot; outside of it they cost nothing."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from roundoff.config import Algorithm
from roundoff.training.loss import kl_estimate
from tests.shapes import fits

GRPO = Algorithm(name="GRPO")


def test_a_wrong_shape_is_an_error_in_the_suite():
    with pytest.raises(TypeCheckError, match="ref_logprobs"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 4), GRPO)


def test_outside_of_the_suite_nothing_is_checked():
    code = (
        "import torch; from roundoff.config import Algorithm; from roundoff.training.loss import kl_estimate;"
        "assert kl_estimate(torch.zeros(2, 3), torch.zeros(1, 3), Algorithm(name='GRPO')).shape == (2, 3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (torch.zeros(2), Float[Tensor, " a"], True),
        (torch.zeros(2, 3), Float[Tensor, " a"], False),
        (torch.zeros(2, dtype=torch.int64), Float[Tensor, " a"], False),
        (None, Float[Tensor, " a"] | None, True),
        (None, Float[Tensor, " a"], False),
        ((torch.zeros(2), torch.zeros(3)), tuple[Float[Tensor, " a"], Float[Tensor, " b"]], True),
        ((torch.zeros(2), torch.zeros(3, 1)), tuple[Float[Tensor, " a"], Float[Tensor, " b"]], False),
        ((torch.zeros(2), torch.zeros(3, 1)), tuple[Float[Tensor, " a"], ...], False),
    ],
)
def test_what_fits_a_shape(value, hint, expected):
    assert fits(value, hint) == expected
