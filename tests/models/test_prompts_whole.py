"""A chat template must keep every message; one that leaves the question out is refused."""

import warnings

import pytest

from roundoff.models.errors import ModelError
from roundoff.models.load import load_model
from roundoff.models.prompts import check_asked
from roundoff.tasks import Message, Problem

PROBLEM = Problem("p", "1+1=12+3=", "15", (Message("system", "1+1="), Message("user", " 12+3=\n")))
BOTH = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
LOSING = [
    "1+1=",
    "{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ (m['content'] | trim)[:3] }}{% endfor %}",
    # as vision models have: content must be a list of parts
    "1={% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}",
]


def loaded(template):
    model = load_model("tiny")
    model.tokenizer.chat_template = template
    return model


@pytest.mark.parametrize("template", LOSING)
def test_a_template_that_loses_the_question_is_refused(template):
    with pytest.raises(ModelError, match="leaves out what the user says in p"):
        check_asked(loaded(template), [PROBLEM])


def test_a_system_message_that_is_left_out_gives_a_warning():
    with pytest.warns(UserWarning, match="leaves out what the system says"):
        check_asked(
            loaded(BOTH.replace("{{", "{% if m['role'] == 'user' %}{{").replace("}}", "}}{% endif %}")), [PROBLEM]
        )


def test_a_template_that_keeps_every_message_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_asked(loaded(BOTH), [PROBLEM])
        check_asked(loaded(None), [PROBLEM])
