"""Every caller puts a problem to a model in the same way."""

import json
import shutil
import sys

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel

from roundoff.actions.evaluate import score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.actions.export import export
from roundoff.config import ConfigError
from roundoff.experiments import load_experiment
from roundoff.models.errors import ModelError
from roundoff.models.load import TINY_DIRECTORY, load_model
from roundoff.models.prompts import Worked, encode, text
from roundoff.runs.checkpoint import load_checkpoint
from roundoff.runs.record import read_run
from roundoff.srdd import experiment_scan
from roundoff.tasks import Message, Problem, make_task
from roundoff.tasks.find import find_task
from roundoff.training.preparation import prepare
from tests.small_models import make_tokenizer
from tests.training.test_loop import run, with_training

TEMPLATE = "{% for m in messages %}-{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
ASKED = Problem("a", "12+7=", "19", (Message("user", "12+7"),))
PLAIN = Problem("b", "9=", "9")


@pytest.fixture
def tokenizer():
    """A tokenizer of characters that puts a BOS token before every text, with a template that writes another one."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="> $A", special_tokens=[(">", 15)])
    return made


def ids(tokenizer, characters):
    return [tokenizer.convert_tokens_to_ids(c) for c in characters]


def test_a_plain_prompt_has_the_tokenizers_own_special_tokens(tokenizer):
    assert encode(tokenizer, [ASKED, "9=", PLAIN]) == [ids(tokenizer, s) for s in (">12+7=", ">9=", ">9=")]
    assert text(tokenizer, ASKED) == "12+7="


def test_a_conversation_goes_through_the_template_with_its_special_tokens_alone(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert text(tokenizer, ASKED) == "-12+7>"
    # plain texts and problems without a conversation are asked as before, in one call with others
    expected = [ids(tokenizer, s) for s in ("-12+7>", ">9=", ">9=", "-12+7>")]
    assert encode(tokenizer, [ASKED, "9=", PLAIN, ASKED]) == expected
    by_transformers = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+7"}], add_generation_prompt=True, return_dict=False
    )
    assert encode(tokenizer, [ASKED])[0] == by_transformers


def test_a_worked_problem_is_the_prompt_and_then_the_response(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert encode(tokenizer, [Worked(ASKED, "19"), Worked(PLAIN, "")]) == [
        ids(tokenizer, "-12+7>19"),
        ids(tokenizer, ">9="),
    ]
    assert text(tokenizer, Worked(ASKED, "19")) == "-12+7>19"


def test_a_template_always_gets_the_same_date(tokenizer):
    tokenizer.chat_template = "{% set day = strftime_now('%d %b') %}{{ day }} {{ strftime_now( \"%Y\" ) }}"
    assert text(tokenizer, ASKED) == "26 Jul 2024"
    tokenizer.chat_template = "{{ strftime_now(form) }}"
    with pytest.raises(ModelError, match="today's date"):
        text(tokenizer, ASKED)


def test_a_template_that_refuses_a_conversation_is_an_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match=r"conversation of a: System role not supported.*profile\.chat = false"):
        encode(tokenizer, [ASKED])


OWN = """
from roundoff.tasks import Message, Problem

class Sums:
    name = "sums"
    def __init__(self, settings): self.messages = settings.get("messages", True)
    def problem(self, n):
        messages = (Message("user", f"{n}+{n}"),) if self.messages else ()
        return Problem(f"sums/{n}", f"{n}+{n}=", str(2 * n), messages)
    def train(self): return [self.problem(n) for n in range(1, 17)]
    def test(self): return [self.problem(n) for n in range(20, 30)]
    def reward(self, problem, response): return float(response.endswith(problem.answer[-1]))
    def solution(self, problem): return problem.answer
"""


@pytest.fixture
def profile(small, tmp_path):
    """The embedded model with a chat template, on a task that asks conversations."""
    directory = tmp_path / "model"
    shutil.copytree(TINY_DIRECTORY, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    (tmp_path / "own.py").write_text(OWN)
    task = small.task.model_copy(update={"name": f"{tmp_path / 'own.py'}:Sums", "settings": {}})
    return with_training(small, prompts_per_step=16).model_copy(update={"model": str(directory), "task": task})


@pytest.fixture
def read(monkeypatch):
    """Every sequence of two or more tokens that a model reads, as text without padding."""
    seen = []
    plain = PreTrainedModel.__call__
    characters = {i: c for c, i in load_model("tiny").tokenizer.get_vocab().items()}

    def watched(self, *given, **named):
        for row in named["input_ids"] if named["input_ids"].shape[1] > 1 else []:
            seen.append("".join(characters[i] for i in row.tolist() if i != 0))
        return plain(self, *given, **named)

    monkeypatch.setattr(PreTrainedModel, "__call__", watched)
    monkeypatch.setattr(
        "roundoff.sampling.fused_decoder.kernels_for", lambda like: None
    )  # the fused pass calls no model
    return seen


@pytest.mark.parametrize(("chat", "form"), [("auto", "-{0}+{0}>"), (True, "-{0}+{0}>"), (False, "{0}+{0}=")])
def test_training_evaluation_scan_and_the_eval_command_use_the_same_prompts(tmp_path, profile, read, chat, form):
    profile = profile.model_copy(update={"chat": chat})
    train, test = ([form.format(n) for n in numbers] for numbers in (range(1, 17), range(20, 30)))

    def asked(expected):
        """Whether all of them were read, and nothing that does not begin with one of them."""
        rows, read[:] = list(read), []
        assert rows
        assert [row for row in rows if not row.startswith(tuple(expected))] == []
        assert all(any(row.startswith(prompt) for row in rows) for prompt in expected)

    experiment = load_experiment("quickstart-mxfp4")
    done = run(tmp_path / "runs", experiment, profile)
    asked(train + test)
    assert sorted(o.prompt for o in done.evaluation(1).outcomes) == sorted(test)
    result = score_subject(open_subject(str(read_run(done.path).path)))
    asked(test)
    assert result.agrees
    loaded = load_model(profile.model, chat=chat)
    experiment_scan(experiment, loaded, make_task(profile), 0)
    asked(train)


def test_prompt_lengths_are_those_of_the_encoded_prompts(profile):
    with pytest.raises(ConfigError, match=r"max_prompt_tokens is 5.*longer \(up to 7 tokens\)"):
        prepare(load_experiment("quickstart-clean"), with_training(profile, max_prompt_tokens=5), 0)


def test_a_required_template_must_exist_and_is_used(profile, small):
    always = {"chat": True}
    with pytest.raises(ModelError, match="tokenizer of model 'tiny' has no chat template"):
        prepare(load_experiment("quickstart-clean"), profile.model_copy(update={**always, "model": "tiny"}), 0)
    plain = profile.task.model_copy(update={"settings": {"messages": False}})
    with pytest.raises(ConfigError, match="asks no conversations: set it to auto"):
        prepare(load_experiment("quickstart-clean"), profile.model_copy(update={**always, "task": plain}), 0)


def test_a_character_that_the_model_cannot_read_is_refused_before_training(profile, tmp_path):
    (tmp_path / "own.py").write_text(OWN.replace('f"{n}+{n}"', 'f"{n} plus {n}"'))
    with pytest.raises(ModelError, match="cannot read the character ' '"):
        prepare(load_experiment("quickstart-clean"), profile, 0)


def test_a_run_does_not_resume_with_other_problems_or_another_template(tmp_path, profile):
    profile = with_training(profile, prompts_per_step=8)
    run(tmp_path / "runs", load_experiment("quickstart-clean"), profile, stop_after=1)
    own, settings = tmp_path / "own.py", tmp_path / "model" / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(before.replace("-{{ m.content }}", "+{{ m.content }}"))
    with pytest.raises(ConfigError, match="problems of task 'sums', or how they are asked, have changed"):
        run(tmp_path / "runs", load_experiment("quickstart-clean"), profile)
    settings.write_text(before)
    other = tmp_path / "other.py"
    other.write_text(OWN.replace("str(2 * n)", "str(3 * n)"))
    find_task(f"{other}:Sums", {}, {})
    sys.modules[str(own.resolve())] = sys.modules[str(other.resolve())]  # as if own.py had been edited
    with pytest.raises(ConfigError, match="problems of task 'sums'"):
        run(tmp_path / "runs", load_experiment("quickstart-clean"), profile)
    del sys.modules[str(own.resolve())]
    assert run(tmp_path / "runs", load_experiment("quickstart-clean"), profile).is_final


def test_the_template_stays_with_an_exported_model(tmp_path, profile):
    done = run(tmp_path / "runs", load_experiment("quickstart-clean"), profile.model_copy(update={"chat": False}))
    export(done, tmp_path / "out")
    trained = load_checkpoint(done.path / "checkpoints").tensors["model"]["lm_head.weight"]
    assert load_model(str(tmp_path / "out")).tokenizer.chat_template == TEMPLATE
    assert torch.equal(load_model(str(tmp_path / "out")).model.lm_head.weight, trained)
