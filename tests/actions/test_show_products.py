"""The products that `roundoff show` draws: of a rule only what the rule can reach."""

from roundoff.actions.show import products
from roundoff.config import Hardware, validate


def drawn(**settings: object) -> str:
    return products(validate(Hardware, settings, source="test"))


def test_attention_is_drawn_for_rules_that_set_its_formats() -> None:
    cache = {"weight": "mxfp4", "kv_cache": "fp8_e4m3"}
    text = drawn(precision=cache, rules=[{"match": ["mlp"], "precision": {"weight": "int8"}}])
    assert text.count("# products of attention") == 1
    text = drawn(precision=cache, rules=[{"match": ["layers.0.*"], "precision": {"kv_cache": "int8"}}])
    assert text.count("# products of attention") == 2
    assert "cache int8" in text


def test_deadzones_are_drawn_on_the_input() -> None:
    text = drawn(precision={"weight": "int8"}, rules=[{"match": ["mlp"], "deadzone": {"threshold": 0.01}}])
    assert "y  = x . W [int8 along in_features]\n" in text
    assert "y  = x [deadzone 0.01] . W [int8 along in_features]\n" in text
    text = drawn(deadzone={"threshold": 0.02, "layers": [0, 3]})
    assert "y  = x [deadzone 0.02 in layers 0, 3] . W\n" in text
    assert "dW = dY . x [deadzone 0.02 in layers 0, 3]\n" in text
