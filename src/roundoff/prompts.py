"""How a problem is put to a model: the only place that does it, for training, evaluation, scans and checks alike.

A problem that comes as a conversation is asked through the chat template of the model's tokenizer, with the header of
the answer appended (`add_generation_prompt`); its special tokens are then those of the template. Without a template, or
where the task gives no conversation, the model continues the problem's plain prompt, and the tokenizer adds its own
special tokens (a BOS, say). Whether a template is used is a property of the loaded tokenizer (`load_model(chat=...)`
takes it away or insists on it), not an argument that one caller could pass and another forget.

A template that writes the date (Llama 3's does) is given a fixed one: prompts would otherwise change over night.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from roundoff.models.load import ModelError
from roundoff.tasks import Problem

DATE = date(2024, 7, 26)
"""The day that a template is told; the one that Llama 3 falls back to."""
_TODAY = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


@dataclass(frozen=True, slots=True)
class Worked:
    """A problem and a response to it."""

    problem: Problem
    response: str


Asked = str | Problem | Worked
"""What a model is given: a text as it is, a problem, or a problem with a response."""


def uses_template(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> bool:
    """Whether the problem is asked through the tokenizer's chat template."""
    return bool(problem.messages) and tokenizer.chat_template is not None


def text(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> str:
    """What the model reads, as text, without the special tokens that a tokenizer adds by itself.

    Raises:
        ModelError: if the chat template refuses the conversation.
    """
    if isinstance(asked, str):
        return asked
    if isinstance(asked, Worked):
        return text(tokenizer, asked.problem) + asked.response
    if not uses_template(tokenizer, asked):
        return asked.prompt
    messages = [{"role": message.role, "content": message.content} for message in asked.messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=_dated(tokenizer.get_chat_template()),
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(
            f"the chat template of this model refuses the conversation of {asked.id}: {error}; change the task's "
            "messages (system_prompt), or set profile.chat = false"
        ) from error


def _dated(template: str) -> str:
    """The template with a fixed date in place of today's.

    Raises:
        ValueError: if it asks for today in another way than `strftime_now("...")`.
    """
    fixed = _TODAY.sub(lambda match: f'"{DATE.strftime(match[1] or match[2])}"', template)
    if "strftime_now(" in fixed:
        raise ValueError("it writes today's date, so that prompts would change from day to day")
    return fixed


def encode(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> list[list[int]]:
    """Token ids of each; a response is encoded by itself, as sampling appends it.

    Raises:
        ModelError: if the chat template refuses a conversation.
    """
    problems = [item.problem if isinstance(item, Worked) else item for item in asked]
    templated = [isinstance(item, Problem) and uses_template(tokenizer, item) for item in problems]
    found: list[list[int]] = [[]] * len(asked)
    for special in (True, False):  # a template writes its own special tokens
        chosen = [i for i, by_template in enumerate(templated) if by_template is not special]
        if chosen:
            texts = [text(tokenizer, problems[i]) for i in chosen]
            ids = tokenizer(texts, padding=False, add_special_tokens=special)["input_ids"]
            for i, tokens in zip(chosen, ids, strict=True):
                found[i] = list(tokens)
    for i, item in enumerate(asked):
        if isinstance(item, Worked) and item.response:
            found[i] = found[i] + list(tokenizer(item.response, add_special_tokens=False)["input_ids"])
    return found
