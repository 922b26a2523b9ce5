"""Every mode, with multipliers worked out by hand."""

import pytest

from roundoff.aqn.multipliers import MODES, multipliers
from roundoff.config import ConfigError

FOUR = {0: 1.0, 1: 4.0, 2: 2.0, 3: 1.0}  # mean 2


def test_proportional_inverse_and_ceiling():
    assert multipliers(FOUR, "proportional") == {0: 0.5, 1: 2.0, 2: 1.0, 3: 0.5}
    assert multipliers(FOUR, "inverse") == {0: 2.0, 1: 0.5, 2: 1.0, 3: 2.0}
    assert multipliers(FOUR, "ceiling") == {0: 1.0, 1: 0.25, 2: 0.5, 3: 1.0}


def test_targeted_and_variable_take_the_published_shares_of_28_layers():
    values = {layer: float(layer in range(14, 18)) * 2 + float(layer in range(10, 22)) for layer in range(28)}
    targeted = multipliers(values, "targeted")
    assert [layer for layer, m in targeted.items() if m == 1.0] == [14, 15, 16, 17]
    assert [layer for layer, m in targeted.items() if m == 0.0] == [*range(14), *range(18, 28)]
    variable = multipliers(values, "variable")
    assert [layer for layer, m in variable.items() if m == 1.5] == [14, 15, 16, 17]
    assert [layer for layer, m in variable.items() if m == 1.2] == [10, 11, 12, 13, 18, 19, 20, 21]
    assert all(variable[layer] == 1.0 for layer in [*range(10), *range(22, 28)])


def test_direction_reverses_the_ranking_and_ties_go_to_the_earlier_layer():
    assert multipliers(FOUR, "targeted") == {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}
    assert multipliers(FOUR, "targeted", direction="robust") == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}
    assert multipliers(FOUR, "targeted", direction="robust", share=0.5) == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}


def test_zones_swap_halfway():
    # Eight layers: the edge is 0, 1, 6, 7. Its mean damage is larger, so it comes first.
    values = {layer: 2.0 if layer in (0, 7) else 0.5 for layer in range(8)}
    edge = {layer: float(layer in (0, 1, 6, 7)) for layer in range(8)}
    middle = {layer: 1.0 - m for layer, m in edge.items()}
    assert multipliers(values, "zone") == multipliers(values, "zone", progress=0.49) == edge
    assert multipliers(values, "zone", progress=0.5) == middle
    assert multipliers(values, "zone", direction="robust") == middle


@pytest.mark.parametrize(
    ("values", "mode", "options", "message"),
    [
        (FOUR, "targetd", {}, "mode must be one of .*did you mean 'targeted'"),
        (FOUR, "targeted", {"direction": "up"}, "direction must be one of sensitive, robust, but is 'up'"),
        (FOUR, "targeted", {"share": 1.0}, r"share must be in \(0, 1\)"),
        (FOUR, "zone", {"progress": 1.5}, r"progress must be in \[0, 1\]"),
        ({0: 1.0}, "targeted", {}, "targets all 1 layers"),
        ({0: 1.0, 1: 0.0}, "inverse", {}, r"divides by the damage, which is 0 in layers \[1\]"),
        ({0: 0.0, 1: 0.0}, "proportional", {}, "it is 0 in all"),
        ({0: 1.0, 1: float("nan")}, "variable", {}, "finite damage"),
        ({0: 1.0, 1: 2.0}, "zone", {}, "at least 3"),
        ({}, "proportional", {}, "finite damage"),
    ],
)
def test_unusable_arguments_are_errors(values, mode, options, message):
    with pytest.raises(ConfigError, match=message):
        multipliers(values, mode, **options)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_names_every_layer_once(mode):
    assert list(multipliers({5: 1.0, 3: 2.0, 4: 3.0, 6: 0.5}, mode)) == [3, 4, 5, 6]
