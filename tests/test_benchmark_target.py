"""`python -m benchmarks --target`: which kernels a benchmark measures."""

import pytest
import torch
from benchmarks import __main__ as listing

from roundoff.numerics.backend import computed_by
from roundoff.numerics.build import targets_for


def test_a_target_reaches_the_benchmark(monkeypatch, capsys):
    *_, narrowest = targets_for(torch.backends.cpu.get_cpu_capability())
    monkeypatch.setattr(listing, "run", lambda names: print(*names, computed_by(torch.ones(1))) or 0)
    assert listing.main(["--target", narrowest, "noise"]) == 0
    assert listing.main(["--target=torch", "noise"]) == 0
    assert capsys.readouterr().out == f"noise {narrowest}\nnoise torch\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sve", "noise"], "but is 'sve'"),
        (["--target", "torch", "quickstart"], "does not reach the processes that quickstart would start"),
        (["--target", "torch", "all"], "does not reach the processes that `all` would start"),
    ],
)
def test_a_target_that_would_not_be_measured_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        listing.main(arguments)
    assert message in capsys.readouterr().err
