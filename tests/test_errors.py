"""Whatever roundoff raises or warns of on purpose can be told from all else by its class, wherever it comes from."""

import ast
import importlib
import inspect
import warnings
from pathlib import Path

import pytest

import roundoff
from roundoff.errors import RoundoffError, RoundoffWarning, message_of, warnings_as_text

SOURCE = Path(roundoff.__file__).parent
INTERNAL = {"StopRewardError"}
"""Exceptions that no user meets: they end a computation, and roundoff catches them."""


def modules_with(word: str):
    for path in sorted(SOURCE.rglob("*.py")):
        if word in path.read_text("utf-8"):
            yield path, ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def exception_classes():
    for path, module in modules_with("Error"):
        names = [n.name for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.ClassDef)]
        for name in names:
            if name.endswith("Error") and not name.startswith("_") and name not in INTERNAL:
                yield pytest.param(module, name, id=name)


@pytest.mark.parametrize(("module", "name"), exception_classes())
def test_every_error_of_ours_has_the_common_base(module, name):
    found = getattr(importlib.import_module(module), name)
    assert inspect.isclass(found) and issubclass(found, RoundoffError)


@pytest.mark.parametrize("path", [pytest.param(p, id=m) for p, m in modules_with("warnings.warn(")])
def test_every_warning_of_ours_has_the_common_class(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    warned = [call for call in calls if ast.unparse(call.func) == "warnings.warn"]
    assert warned and all(ast.unparse(call.args[1]) == "RoundoffWarning" for call in warned)


@pytest.mark.parametrize("depth", [1, 2, 3, 50])
def test_a_warning_is_shown_as_text_whatever_frame_it_is_attributed_to(depth):
    shown = []
    with warnings_as_text(shown.append):
        warnings.warn("layer 3 overflows", RoundoffWarning, stacklevel=depth)
    assert shown == ["layer 3 overflows"]


def test_warnings_of_others_are_not_taken_for_ours():
    shown = []
    with pytest.warns(UserWarning, match="not ours"), warnings_as_text(shown.append):
        warnings.warn("not ours", UserWarning, stacklevel=1)
    assert shown == []


def test_an_error_of_others_is_shown_with_its_type():
    assert message_of(RoundoffError("what to do")) == "what to do"
    assert message_of(KeyError("name")) == "KeyError: 'name'"
    assert message_of(RoundoffError()) == "RoundoffError"
