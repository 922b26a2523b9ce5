"""How much room a format takes, and how a table describes it."""

import pytest

from roundoff.formats.table import FORMATS, get_format
from roundoff.formats.words import HEADER, in_words


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4 + 8 / 32),
        ("mxfp6_e3m2", 6 + 8 / 32),
        ("mxfp8_e4m3", 8 + 8 / 32),
        ("mxfp8_e5m2", 8 + 8 / 32),
        ("nvfp4", 4 + 8 / 16),
        ("nvfp4:2d", 4 + 8 / 256),
        # 64 elements of 4 bits, a scale of 8, and 8 + 16 micro-exponents (arXiv:2602.11287): 288 bits
        ("hif4", 288 / 64),
        ("hif8", 8),
        ("fp8_e4m3", 8),
        ("int8:full", 8),
        ("int4", 4 + 32 / 32),
        ("bf16", 16),
        ("e2m1/24/e8m0:ceil", 4 + 8 / 24),
        ("e5m10/row/float32", 16),
        ("int16/8x16/e8m0", 16 + 8 / 128),
    ],
)
def test_bits_of_a_number_with_its_share_of_the_scale(name, bits):
    assert get_format(name).bits == bits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nvfp4:46_2d", ("nvfp4:46_2d", "E2M1", "4.03", "16x16", "E4M3+tensor", "4 over 6, squared")),
        ("hif8", ("hif8", "HiFloat8", "8", "none", "none", "")),
        ("fp8_e4m3", ("fp8_e4m3", "E4M3", "8", "tensor", "float32", "amax / 448")),
        ("int4:full", ("int4:full", "[-8, 7]", "5", "32", "float32", "amax / 7.5")),
        ("mxfp4:ceil", ("mxfp4:ceil", "E2M1", "4.25", "32", "E8M0", "ceil")),
    ],
)
def test_a_format_in_words(name, words):
    assert in_words(FORMATS[name]) == words
    assert len(words) == len(HEADER)
