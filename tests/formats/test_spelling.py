"""Formats of one's own: as a word, as a table in TOML, and wherever a name is taken."""

import resource

import pytest
import torch

from roundoff.config import ConfigError, Hardware, Precision, validate
from roundoff.formats.spelling import parts_of, spelled
from roundoff.formats.table import FORMATS, get_format
from roundoff.numerics.quantize import quantize

X = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("e2m1/32/e8m0", "mxfp4"),
        ("e2m1/32/e8m0:ceil", "mxfp4:ceil"),
        ("e4m3/32/e8m0:rceil", "mxfp8_e4m3:rceil"),
        ("e5m2/32/e8m0", "mxfp8_e5m2"),
        ("e2m1/16/e4m3+tensor", "nvfp4"),
        ("e2m1/16/e4m3", "nvfp4_block"),
        ("e2m1/16/e4m3+tensor:te", "nvfp4:te"),
        ("e2m1/16x16/e4m3+tensor:46_mae", "nvfp4:46_mae_2d"),
        ("e4m3/tensor/float32", "fp8_e4m3"),
        ("e4m3/row/float32", "fp8_e4m3_row"),
        ("int4/32/float32", "int4"),
        ("int8/row/float32", "int8"),
        ("e2m1/1x32/e8m0:floor", "mxfp4"),
    ],
)
def test_a_word_for_a_known_format_is_that_format(word, name):
    assert get_format(word) is FORMATS[name]
    assert Precision(weight=word).weight == name


@pytest.mark.parametrize(
    ("word", "values"),
    [
        # e3m0 would have no mantissa; E3M1 without codes for NaN: 0.125 0.1875 0.25 ... 12; blocks of 4, scale 2^(3-3)
        ("e3m1/4/e8m0", [(0.2, 0.1875), (1.3, 1.5), (9.0, 8.0), (12.0, 12.0)]),
        # scale 7 / 7 = 1: whole numbers
        ("int4/4/float32", [(0.4, 0.0), (-2.5, -2.0), (3.5, 4.0), (7.0, 7.0)]),
        # emax of [-7, 7] is 2, so that amax 8 gets the scale 2
        ("int4/4/e8m0", [(0.9, 0.0), (1.1, 2.0), (-5.0, -4.0), (8.0, 8.0)]),
        # 7.4 is nearer to 7 than to 8, so that the scale is 1; 7.5 is rounded up to 8, so that it is 2
        ("int4/4/e8m0:even", [(0.9, 1.0), (1.1, 1.0), (-5.0, -5.0), (7.4, 7.0)]),
        ("int4/4/e8m0:even", [(0.9, 0.0), (1.1, 2.0), (-5.0, -4.0), (7.5, 8.0)]),
    ],
)
def test_worked_blocks_of_own_formats(word, values):
    x, expected = (torch.tensor(side) for side in zip(*values, strict=True))
    assert torch.equal(quantize(x, word), expected)


def test_a_table_in_toml_becomes_the_word():
    table = {"element": "e2m1", "block": 16, "scale": "e8m0", "rule": "even"}
    precision = validate(Hardware, {"precision": {"weight": table, "activation": table}}, source="own.toml").precision
    assert precision.weight == precision.activation == spelled(table) == "e2m1/16/e8m0:even"
    assert spelled({"element": "e2m1", "block": 32, "rows": 8, "scale": "e4m3", "tensor_scale": True}) == (
        "e2m1/8x32/e4m3+tensor"
    )
    assert not torch.equal(quantize(X, precision.weight), quantize(X, "mxfp4:even"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("e2m1/16", "the format 'e2m1/16' must be element/block/scale, such as 'e2m1/16/e8m0'"),
        ("e2m0/16/e8m0", "1 to 10 mantissa bits"),
        ("e9m3/16/e8m0", "2 to 5 exponent"),
        ("int1/16/e8m0", "intN of 2 to 16 bits"),
        ("e2m1/0/e8m0", "the block of"),
        ("e2m1/1\N{ARABIC-INDIC DIGIT SIX}/e8m0", "the block of"),
        ("e2m1/65537/e8m0", "above 65536 elements"),
        ("e2m1/99999x99999/e8m0", "above 65536 elements"),
        ("e2m1/16/e8m1", "the scale of"),
        ("e2m1/16/e8m0:up", ":floor, :ceil, :even or :rceil"),
        ("e2m1/16/e8m0:te", "rule 'te'"),
        ("e4m3/16/e4m3+tensor:46", "needs elements in E2M1"),
        ("e2m1/16/e4m3:46", "a scale of the tensor"),
        ("e2m1/tensor/e8m0", "must be float32"),
        ("int8/16xrow/float32", "the block of"),
        ({"element": "e2m1", "block": 16}, "as well"),
        ({"element": "e2m1", "block": "16", "scale": "e8m0", "size": 3}, "the key 'size'"),
        ({"element": "e2m1", "block": 16.0, "scale": "e8m0"}, "block = 16.0"),
        ({"element": "e2m1", "block": True, "scale": "e8m0"}, "block = True"),
        ("mxfp5", "did you mean 'mxfp4'"),
    ],
)
def test_what_is_no_format_is_refused_with_its_reason(value, said):
    with pytest.raises(ConfigError, match=r"own\.toml: precision\.weight .*" + said.replace("+", r"\+")):
        validate(Hardware, {"precision": {"weight": value}}, source="own.toml")


def test_activations_cannot_have_blocks_that_span_tokens():
    for name in ("nvfp4:2d", "e2m1/16x16/e8m0"):
        assert Precision(weight=name).weight == name
        with pytest.raises(ConfigError, match="span tokens"):
            validate(Precision, {"activation": name}, source="own.toml")


def test_a_word_is_read_once():
    assert get_format("e2m1/8/e8m0") is get_format("e2m1/8/e8m0") and parts_of("e2m1/8/e8m0")["block"] == 8


def test_a_format_has_one_name_however_it_is_spelled():
    for word, name in [("e2m1/1x8/e8m0:floor", "e2m1/8/e8m0"), ("int5/1x1/float32", "int5/1/float32")]:
        assert get_format(word).name == Precision(weight=word).weight == name


@pytest.mark.parametrize("scale", ["e8m0", "e4m3+tensor:46"])
def test_blocks_longer_than_a_row_are_rows_and_are_not_padded(scale):
    x = X[:, :16].repeat(64, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long = quantize(x, f"e2m1/65536/{scale}")
    assert torch.equal(long, quantize(x, f"e2m1/row/{scale}"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB; padded rows alone would take 786,432
