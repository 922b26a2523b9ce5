"""How `--set` is read: all of a value is either TOML or text, and an unknown setting suggests the one meant."""

import tomllib

import pytest
import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roundoff.config import ConfigError
from roundoff.experiments import load_profile, select, variants, with_overrides

TINY = load_profile("tiny")
QUICKSTART = select(["quickstart-noise-aqn"])


def setting(raw: str) -> object:
    """The setting that a task gets from `--set profile.task.settings.x=raw`."""
    return with_overrides([], TINY, [f"profile.task.settings.x={raw}"])[1].task.settings["x"]


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("5", 5),
        ("1e-3", 1e-3),
        ("true", True),
        ('"true"', "true"),
        ('"5"', "5"),
        ("[1, 2]", [1, 2]),
        ('{a = "b"}', {"a": "b"}),
        ("", ""),
        ("a=b", "a=b"),
        ("a, b", "a, b"),
        ("1, 2", "1, 2"),
        ("5 # five", "5 # five"),
        ("#### then the answer", "#### then the answer"),
        ("1\nother = 2", "1\nother = 2"),
        ("1]\nother = [2", "1]\nother = [2"),
        ("2026-01-01", "2026-01-01"),
        ("[2026-01-01]", "[2026-01-01]"),
        ("it's", "it's"),
        ('say "x"', 'say "x"'),
        ("C:\\models", "C:\\models"),
        ("\\boxed{}", "\\boxed{}"),
        ("${x}", "${x}"),
        ("null", "null"),
        ("[1", "[1"),
    ],
)
def test_a_value_is_read_whole(raw, value):
    found = setting(raw)
    assert (type(found), found) == (type(value), value)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example("''' \"\"\" \\")
def test_a_text_quoted_as_in_toml_is_that_text(text):
    quoted = tomli_w.dumps({"x": text}).partition("=")[2].strip()
    assert setting(quoted) == text
    assert tomllib.loads(tomli_w.dumps(TINY.model_copy(update={"model": text}).model_dump(exclude_none=True)))


@pytest.mark.parametrize("raw", ["a\0b", "a\udcffb"])
def test_text_that_no_file_can_hold_is_refused(raw):
    with pytest.raises(ConfigError, match=r"--set profile.task.settings.x must be text in UTF-8"):
        setting(raw)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (
            "profile.learning_rate",
            "profile.learning_rate is not a setting; did you mean 'profile.training.learning_rate'",
        ),
        ("learning_rate", "did you mean 'profile.training.learning_rate'"),
        ("profile.temperature", "did you mean 'algorithm.temperature'"),
        ("hardware.sigma_start", "did you mean 'aqn.sigma_start'"),
        ("hardware.matmul_noise.weight", "did you mean 'hardware.precision.weight'"),
        ("relative_std", "did you mean 'hardware.matmul_noise.relative_std'"),
        ("training.learning_rate", "did you mean 'profile.training.learning_rate'"),
        ("training.no_such_thing", "did you mean 'profile.training'"),
        ("profile.training.learning_rat", "did you mean 'learning_rate'"),
        ("profile.training.evry", "profile.training.evry is not a setting"),
    ],
)
def test_an_unknown_setting_names_the_one_meant(path, meant):
    with pytest.raises(ConfigError) as refused:
        with_overrides(QUICKSTART, TINY, [f"{path}=1"])
    assert meant in str(refused.value)


def test_a_number_for_a_text_says_how_to_write_it():
    with pytest.raises(ConfigError, match=r'profile\.model must be text.* marks \("123"\)'):
        with_overrides(QUICKSTART, TINY, ["profile.model=123"])


def test_a_setting_inside_of_one_that_has_none_is_shown_with_its_value():
    with pytest.raises(ConfigError, match=r"profile\.model is wrong: .*string, but is \{'path': 'x'\}"):
        with_overrides(QUICKSTART, TINY, ["profile.model.path=x"])


def test_a_name_made_of_settings_is_one_line_that_a_file_can_have():
    _, first = with_overrides([], TINY, ['profile.task.settings.x="a\\nb\\\\c"'])
    _, second = with_overrides([], TINY, ['profile.task.settings.x="a\\tb\\\\c"'])
    assert first.name.isprintable()
    assert "\\" not in first.name
    assert first.name != second.name


def test_variants_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two variants would both be called"):
        variants(QUICKSTART, TINY, ['profile.task.settings.x="a b","ab"'])


@pytest.mark.parametrize("values", ["it's,b", "[1,2", '"a,b'])
def test_values_of_a_sweep_must_close_brackets_and_quotation_marks(values):
    with pytest.raises(ConfigError, match="must close its brackets and quotation marks"):
        variants(QUICKSTART, TINY, [f"profile.task.settings.x={values}"])
