"""A format of one's own, spelled out in one word: `element/block/scale`, such as `e2m1/16/e8m0:ceil`.

    element   eXmY    floating point with X exponent bits (2 to 5) and Y mantissa bits (1 to 10)
              intN    the integers of N bits (2 to 16) without the most negative one
    block     N       blocks of N elements along the axis
              RxN     blocks of R rows and N columns
              row     one scale for each row
              tensor  one scale for the tensor (with float32)
    scale     e8m0    powers of two; `:floor` (the default), `:ceil`, `:even` or `:rceil` says how they are chosen
              e4m3    E4M3 numbers; e4m3+tensor relative to one float32 scale for the tensor; `:te`, `:46` or `:46_mae`
                      computes as Transformer Engine does, or by four over six
              float32 amax / the largest element

The word is the format's name, so that records, reports and hashes of settings say what was computed. One format has
one word: `1xN` is written `N`, and the default rule is left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from roundoff.formats.element import E4M3_MAX, E4M3_MAX_46, Element, integers, minifloat

_FLOAT = re.compile(r"e([2-5])m([1-9]|10)")
_INTEGER = re.compile(r"int([2-9]|1[0-6])")
_BLOCK = re.compile(r"(?:([1-9][0-9]{0,4})x)?([1-9][0-9]{0,4})|row|tensor")
_SCALE = re.compile(r"(e8m0|e4m3|e4m3\+tensor|float32)(?::(floor|ceil|even|rceil|te|46|46_mae))?")
_KEYS: Mapping[str, tuple[type, ...]] = {
    "element": (str,),
    "block": (int, str),
    "rows": (int,),
    "scale": (str,),
    "rule": (str,),
    "tensor_scale": (bool,),
}
_NEEDED = ("element", "block", "scale")


def spelled(table: Mapping[str, Any]) -> str:
    """The word of a format that is given as a table.

    Args:
        table: `element`, `block` (a number, "row" or "tensor") and `scale` ("e8m0", "e4m3" or "float32"), and perhaps
            `rows` (a number), `rule`, and `tensor_scale` (whether E4M3 scales are relative to a scale of the tensor).

    Raises:
        ValueError: if a key is missing, unknown, or of another type.
    """
    for key, value in table.items():
        if key not in _KEYS:
            raise ValueError(f"has the key {key!r}, but a format has {', '.join(_KEYS)}")
        if type(value) not in _KEYS[key]:
            raise ValueError(f"has {key} = {value!r}, which is of the wrong type")
    missing = [key for key in _NEEDED if key not in table]
    if missing:
        raise ValueError(f"must be a number format by name, or a table that has {' and '.join(missing)} as well")
    block, rows = table["block"], table.get("rows", 1)
    block = block if rows == 1 else f"{rows}x{block}"
    scale = table["scale"] + ("+tensor" if table.get("tensor_scale") else "")
    return f"{table['element']}/{block}/{scale}" + (f":{table['rule']}" if table.get("rule") else "")


@functools.cache
def parts_of(word: str) -> dict[str, Any]:
    """The arguments of `table.Format` that a word spells out; the name is the word in its one form.

    Raises:
        ValueError: saying which part of the word is wrong.
    """
    pieces = word.split("/")
    if len(pieces) != 3:
        raise ValueError(f"the format {word!r} must be element/block/scale, such as 'e2m1/16/e8m0'")
    element = _element(pieces[0])
    block, scale = _BLOCK.fullmatch(pieces[1]), _SCALE.fullmatch(pieces[2])
    if block is None:
        raise ValueError(f"the block of {word!r} must be a number, such as 16 or 16x16, 'row' or 'tensor'")
    if scale is None:
        raise ValueError(
            f"the scale of {word!r} must be e8m0 (perhaps with :floor, :ceil, :even or :rceil), e4m3 or e4m3+tensor "
            "(perhaps with :te, :46 or :46_mae), or float32"
        )
    shape = pieces[1].removeprefix("1x")
    rows, columns = int(block[1] or 1), int(block[2]) if block[2] else None
    name, rule = scale[1].removesuffix("+tensor"), scale[2] or ""
    if pieces[1] == "tensor" and pieces[2] != "float32":
        raise ValueError(f"the tensor's one scale in {word!r} must be float32")
    if name == "e8m0" and rule == "":
        rule = "floor"
    largest = E4M3_MAX_46 if rule.startswith("46") else E4M3_MAX
    tensor_divisor = element.high if pieces[1] == "tensor" else None
    if scale[1].endswith("+tensor"):
        tensor_divisor = largest * element.high
    return {
        "name": f"{pieces[0]}/{shape}/{pieces[2].removesuffix(':floor')}",
        "element": element,
        "block": columns,
        "scale": "none" if pieces[1] == "tensor" else name,
        "rule": rule,
        "divisor": element.high if pieces[1] != "tensor" else 1.0,
        "tensor_divisor": tensor_divisor,
        "rows": rows,
    }


def _element(text: str) -> Element:
    floating, integer = _FLOAT.fullmatch(text), _INTEGER.fullmatch(text)
    if floating:
        return minifloat(int(floating[1]), int(floating[2]))
    if integer:
        high = 2 ** (int(integer[1]) - 1) - 1
        return integers(-high, high)
    raise ValueError(
        f"the element {text!r} must be eXmY with 2 to 5 exponent and 1 to 10 mantissa bits, or intN of 2 to 16 bits"
    )
