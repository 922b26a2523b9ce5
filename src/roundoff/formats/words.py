"""A format in words, for tables that people read."""

from __future__ import annotations

from roundoff.formats.table import Format, Rule

HEADER = ("name", "element", "block", "scale", "how the scale is chosen")
_RULES: dict[Rule, str] = {
    "te": "in Transformer Engine's order of operations",
    "46": "four over six by the squared error",
    "46_mae": "four over six by the absolute error",
}


def in_words(fmt: Format) -> tuple[str, str, str, str, str]:
    """The columns of `HEADER` for a format."""
    return fmt.name, _element(fmt), _block(fmt), _scale(fmt), _rule(fmt)


def _element(fmt: Format) -> str:
    if fmt.element is None:
        return "as PyTorch casts"
    return fmt.element.name.replace("int", "integers ") if fmt.element.is_integer else fmt.element.name.upper()


def _block(fmt: Format) -> str:
    if fmt.block is None:
        return "row" if fmt.scale != "none" else "none" if fmt.tensor_divisor is None else "tensor"
    return str(fmt.block) if fmt.rows == 1 else f"{fmt.rows} x {fmt.block}"


def _scale(fmt: Format) -> str:
    of_block = {"none": "", "float32": "float32"}.get(fmt.scale, fmt.scale.upper())
    of_tensor = "" if fmt.tensor_divisor is None else "float32 a tensor"
    return ", ".join(part for part in (of_block, of_tensor) if part) or "none"


def _rule(fmt: Format) -> str:
    if fmt.rule in _RULES:
        return _RULES[fmt.rule]
    if fmt.scale == "e6m2":
        return "amax / 7 in bfloat16, two micro-exponents"
    return fmt.rule or ("" if fmt.scale == "none" else f"amax / {fmt.divisor:g}")
