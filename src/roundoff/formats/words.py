"""A format in words, for tables that people read."""

from __future__ import annotations

from roundoff.formats.element import HIF8
from roundoff.formats.table import Format, Rule

HEADER = ("name", "element", "bits", "block", "scale", "rule of the scale")
_RULES: dict[Rule, str] = {
    "te": "Transformer Engine",
    "46": "4 over 6, squared",
    "46_mae": "4 over 6, absolute",
}


def in_words(fmt: Format) -> tuple[str, str, str, str, str, str]:
    """The columns of `HEADER` for a format, in 80 columns altogether."""
    return fmt.name, _element(fmt), f"{fmt.bits:.3g}", _block(fmt), _scale(fmt), _rule(fmt)


def _element(fmt: Format) -> str:
    if fmt.element is None:
        return "as cast"
    if fmt.element == HIF8:
        return "HiFloat8"
    return fmt.element.name.removeprefix("int") if fmt.element.is_integer else fmt.element.name.upper()


def _block(fmt: Format) -> str:
    if fmt.block is None:
        return "row" if fmt.scale != "none" else "none" if fmt.tensor_divisor is None else "tensor"
    return str(fmt.block) if fmt.rows == 1 else f"{fmt.rows}x{fmt.block}"


def _scale(fmt: Format) -> str:
    """As in a word of one's own: `+tensor` is a float32 scale for the tensor beside those of the blocks."""
    of_block = fmt.scale if fmt.scale == "float32" else fmt.scale.upper()
    if fmt.tensor_divisor is None:
        return of_block.lower() if fmt.scale == "none" else of_block
    return "float32" if fmt.scale == "none" else f"{of_block}+tensor"


def _rule(fmt: Format) -> str:
    if fmt.rule in _RULES:
        return _RULES[fmt.rule]
    if fmt.scale == "e6m2":
        return "amax / 7, in bf16"
    if fmt.scale == "none":
        return "" if fmt.tensor_divisor is None else f"amax / {fmt.tensor_divisor:g}"
    return fmt.rule or f"amax / {fmt.divisor:g}"
