"""What is written for verl passes the shell, Hydra's own parser and OmegaConf unchanged."""

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roundoff.config import ConfigError, LoRA
from roundoff.experiments import load_experiment, load_profile
from roundoff.plugins.verl.command import Resources, command
from roundoff.plugins.verl.hydra_values import number, quoted, quoted_json
from roundoff.plugins.verl.settings import VARIABLE, from_environment

hydra = pytest.importorskip("hydra")
omegaconf = pytest.importorskip("omegaconf")

TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.text("\\\"'${}x:,=[]() \n\t#%", max_size=12),
    st.from_regex(r"[a-zA-Z0-9_/.:+-]{1,8}", fullmatch=True),
    st.sampled_from(
        ["", " a ", "true", "null", "nan", "-inf", "1_000", "1e5", "0x1f", ".5", "~", "@", "${oc.env:HOME}"]
    ),
).filter(lambda text: text != "???")
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def composed(arguments: list[str]):
    """The configuration that Hydra makes of arguments, each forced in, as verl's own files are not here."""
    forced = ["++" + argument.lstrip("+") for argument in arguments]
    with hydra.initialize(config_path=None, version_base=None):
        return hydra.compose(overrides=forced)


def arrives(value: str):
    """What `config.a` is for `a=value`, after a shell has read it."""
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    (argument,) = shlex.split(shlex.quote(f"+a={value}"))
    config = omegaconf.OmegaConf.create({})
    omegaconf.OmegaConf.update(config, "a", parser.parse_override(argument).value(), force_add=True)
    return config


@settings(deadline=None, max_examples=300)
@given(TEXT)
@example("C:\\models\\qwen")
@example("ends\\")
@example('\\"')
@example("\\'\"")
@example("\\\\${x}")
@example("$${x}")
@example("'${a")
def test_a_string_arrives_as_it_is(text):
    found = arrives(quoted(text)).a
    assert (type(found), found) == (str, text)


@settings(deadline=None, max_examples=300)
@given(JSON)
@example({"instruction": 'the answer after "####".'})
@example({"system_prompt": "it's\n${x} \\${x} \\\\"})
def test_json_arrives_whether_resolved_or_not(content):
    config = arrives(quoted_json(content))
    unresolved = omegaconf.OmegaConf.to_container(config, resolve=False)["a"]
    assert json.loads(config.a) == json.loads(unresolved) == content


@settings(deadline=None)
@given(NUMBERS)
@example(1.2345678e-06)
@example(5e-324)
@example(1e22)
def test_a_number_keeps_its_digits(value):
    found = arrives(number(value)).a
    assert (type(found), found) == (float, value)


@pytest.mark.parametrize("text", ["???", "a\0b", "\ud800"])
def test_what_cannot_get_through_is_refused(text):
    with pytest.raises(ConfigError, match="cannot be handed to verl"):
        quoted(text)


def test_settings_that_json_cannot_hold_are_refused():
    with pytest.raises(ConfigError, match="cannot be handed to verl"):
        quoted_json({"a": {1, 2}})


HOSTILE = 'it\'s "${here}" \\${x} C:\\a\\ [1], {a: 1} = #### é\n−'


def test_the_whole_command_arrives():
    """Names, paths, numbers and nested settings, each with what the grammars would change."""
    experiment = load_experiment("quickstart-noise-aqn")
    algorithm = experiment.algorithm.model_copy(
        update={
            "clip_low": 0.12345678,
            "kl_coefficient": 1.00000001e-5,
            "temperature": 0.9999999,
            "ratio": "recomputed",
        }
    )
    lora = LoRA(rank=4, targets=("q_proj", "down_proj"))
    experiment = experiment.model_copy(update={"id": HOSTILE, "algorithm": algorithm, "lora": lora})
    profile = load_profile("tiny")
    task = profile.task.model_copy(update={"settings": {"instruction": HOSTILE, "nested": [{"x": 0.1, HOSTILE: None}]}})
    training = profile.training.model_copy(
        update={"lora_learning_rate": 1.2345678901234567e-06, "betas": (0.9, 0.99999999), "weight_decay": 1 / 3}
    )
    profile = profile.model_copy(update={"model": HOSTILE, "task": task, "training": training})
    resources = Resources(Path("/a b/${x}/t.parquet"), Path("/a'b/v,w.parquet"), Path("/out=1/[2]/" + HOSTILE))
    words = shlex.split(command(experiment, profile, 7, resources).replace(" \\\n", " "))
    start = words.index("python")
    config = composed(words[start + 3 :])
    assert config.data.train_files == str(resources.train)
    assert config.data.val_files == str(resources.val)
    assert config.trainer.default_local_dir == str(resources.out)
    assert config.trainer.experiment_name == config.actor_rollout_ref.model.path == HOSTILE
    assert list(config.actor_rollout_ref.model.target_modules) == ["q_proj", "down_proj"]
    actor = config.actor_rollout_ref.actor
    assert (actor.optim.lr, list(actor.optim.betas)) == (1.2345678901234567e-06, [0.9, 0.99999999])
    assert (actor.optim.weight_decay, actor.clip_ratio, actor.kl_loss_coef) == (1 / 3, 0.12345678, 1.00000001e-5)
    assert config.actor_rollout_ref.rollout.temperature == 0.9999999
    kwargs = config.reward.custom_reward_function.reward_kwargs
    assert json.loads(kwargs.settings) == task.settings
    # Ray is handed the environment as it stands in the configuration, not resolved
    variables = omegaconf.OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env.env_vars, resolve=False)
    in_the_shell = dict(word.split("=", 1) for word in words[:start])
    assert from_environment(variables) == from_environment(in_the_shell)
    assert from_environment(variables).experiment == HOSTILE
    assert {k: v for k, v in variables.items() if k != VARIABLE} == {
        k: v for k, v in in_the_shell.items() if k != VARIABLE
    }
