"""How a problem is put to a model: the only place that does it, for training, evaluation, scans and checks alike.

A problem that comes as a conversation is asked through the chat template of the model's tokenizer, with the header of
the answer appended (`add_generation_prompt`); its special tokens are then those of the template. Without a template, or
where the task gives no conversation, the model continues the problem's plain prompt, and the tokenizer adds its own
special tokens (a BOS, say). Whether a template is used is a property of the loaded tokenizer (`load_model(chat=...)`
takes it away or insists on it), not an argument that one caller could pass and another forget.

A template that writes the date (Llama 3's does) is given a fixed one: prompts would otherwise change from day to day.

Some tokenizers append tokens to every text (an end token, a separator). A prompt is to be continued, so these are taken
off; what a tokenizer puts in front of a text (a BOS) stays. A prompt whose own last token ends a response is refused,
as is one with a token that the model has no embedding for (`check_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.models.load import ModelError, embedded_tokens
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
            ids = tokenizer(texts, padding=False, truncation=False, add_special_tokens=special)["input_ids"]
            after = _appended(tokenizer) if special else ()
            for i, tokens in zip(chosen, ids, strict=True):
                ends = len(after) and tuple(tokens[-len(after) :]) == after
                found[i] = list(tokens[: -len(after)] if ends else tokens)
    for i, item in enumerate(asked):
        if isinstance(item, Worked) and item.response:
            found[i] = found[i] + list(tokenizer(item.response, add_special_tokens=False)["input_ids"])
    return found


def _appended(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that a tokenizer puts after every text."""
    whole = tokenizer("1", padding=False, truncation=False)["input_ids"]
    bare = tokenizer("1", padding=False, truncation=False, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare), -1, -1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[start + len(bare) :])
    return ()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: those of the tokenizer and of the model's `generation_config`."""
    ends: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        ends.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(ends))


def check_tokens(encoded: Sequence[Sequence[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the ids of prompts against the model that will continue them.

    Raises:
        ModelError: if a token has no embedding, or a prompt's last token ends a response.
    """
    rows = embedded_tokens(model)
    ends = set(end_tokens(model, tokenizer))
    for number, tokens in enumerate(encoded):
        beyond = next((token for token in tokens if not 0 <= token < rows), None)
        if beyond is not None:
            raise ModelError(
                f"prompt {number} has the token {tokenizer.convert_ids_to_tokens(beyond)!r} ({beyond}), but the model "
                f"has embeddings for {rows} tokens only: its tokenizer belongs to another model, or tokens were added "
                "to it without resizing the model's embeddings"
            )
        if tokens and tokens[-1] in ends:
            raise ModelError(
                f"prompt {number} ends with {tokenizer.convert_ids_to_tokens(tokens[-1])!r}, which ends a response: "
                "the model would have nothing left to say. Change the task's prompt, or the chat template's end"
            )
