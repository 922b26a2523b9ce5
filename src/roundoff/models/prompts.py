"""Turns a problem into a prompt: the only place that does so, for training, evaluation, scans and checks alike.

A problem with a conversation goes through the chat template of the model's tokenizer, with the header of the answer
appended (`add_generation_prompt`); its special tokens are then those of the template. Without a template, or without a
conversation, the model continues the problem's plain prompt. The tokenizer then puts its own special tokens (a BOS,
say) before the prompt, and an end token that it appends is removed. Whether a template is used is a property of the
loaded tokenizer (`load_model(chat=...)` removes the template or requires one), not an argument that one caller could
pass and another forget.

A template that writes the date (as Llama 3's does) gets a fixed one; otherwise prompts would change overnight.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from roundoff.errors import RoundoffWarning
from roundoff.models.errors import ModelError
from roundoff.models.load import LoadedModel, check_readable
from roundoff.models.tokenizer import beginning, check_begun_once, check_embedded, check_kept, check_open, end_tokens
from roundoff.tasks import Problem

DATE = date(2024, 7, 26)
"""The date that a template is given: the one that Llama 3 falls back to."""
_TODAY = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


@dataclass(frozen=True, slots=True)
class Worked:
    """A problem and a response to it."""

    problem: Problem
    response: str


Asked = str | Problem | Worked
"""What can be put to a model: a text as it is, a problem, or a problem with a response."""


def uses_template(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> bool:
    """Whether the problem goes through the tokenizer's chat template."""
    return bool(problem.messages) and tokenizer.chat_template is not None


def text(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> str:
    """The text that the model reads, without the special tokens that the tokenizer adds by itself.

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
        ValueError: if it asks for today's date in any way other than `strftime_now("...")`.
    """
    fixed = _TODAY.sub(lambda match: f'"{DATE.strftime(match[1] or match[2])}"', template)
    if "strftime_now(" in fixed:
        raise ValueError("it writes today's date, so that prompts would change from day to day")
    return fixed


def encode(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> list[list[int]]:
    """Token ids of each item; a response is appended to its prompt's ids, as in sampling.

    Raises:
        ModelError: if the chat template refuses a conversation or closes the answer's turn, if a prompt begins with
            two BOS tokens, or if the tokenizer appends any token but its end token (which is removed).
    """
    problems = [item.problem if isinstance(item, Worked) else item for item in asked]
    texts = [text(tokenizer, item) for item in problems]
    encoded = [list(ids) for ids in _plain_ids(tokenizer, texts)]
    templated = [isinstance(item, Problem) and uses_template(tokenizer, item) for item in problems]
    plain = [i for i, by_template in enumerate(templated) if not by_template]
    if plain:
        begin = beginning(tokenizer, [texts[i] for i in plain], [encoded[i] for i in plain])
        for i in plain if begin else ():
            encoded[i] = begin + encoded[i]
    for i, problem in enumerate(problems):
        check_begun_once(tokenizer, encoded[i], f"the prompt {texts[i][:80]!r}")
        if isinstance(problem, Problem):
            fix = "set profile.chat = false, or correct the template" if templated[i] else "change the task's prompt"
            what = f"the prompt of {problem.id}" + (", as the chat template writes it," if templated[i] else "")
            check_open(tokenizer, encoded[i], (tokenizer.eos_token_id,), what, fix)
    for i, item in enumerate(asked):
        if isinstance(item, Worked) and item.response:
            encoded[i] = encoded[i] + _response(tokenizer, texts[i], encoded[i], item.response)
    return encoded


def check_asked(loaded: LoadedModel, asked: Sequence[Asked]) -> list[list[int]]:
    """Check that the model will read all of its prompts; called before anything is computed. Returns their token ids.

    Raises:
        ModelError: if a part of a prompt would be lost, a token has no embedding, a prompt begins with two BOS tokens
            or ends with an end token, or the chat template refuses a conversation or leaves the question out.
    """
    tokenizer = loaded.tokenizer
    texts = [text(tokenizer, item) for item in asked]
    check_readable(loaded, texts)
    where = f"model {loaded.name!r}: "
    ends = end_tokens(loaded.model, tokenizer)
    try:
        encoded = encode(tokenizer, asked)
        check_embedded(loaded.model, tokenizer, encoded)
        for prompt, ids, own, item in zip(texts, encoded, _plain_ids(tokenizer, texts), asked, strict=True):
            check_kept(tokenizer, prompt, own)
            if isinstance(item, Problem):
                _check_complete(tokenizer, item, prompt)
                check_open(tokenizer, ids, ends, f"the prompt {prompt[-80:]!r}", "change the task's prompt or template")
    except ModelError as error:
        raise ModelError(where + str(error)) from None
    return encoded


def _check_complete(tokenizer: PreTrainedTokenizerBase, problem: Problem, prompt: str) -> None:
    """Check that a chat template has kept every message, apart from white space.

    Templates of vision models expect a list of parts, and some write nothing for a plain text. A missing system message
    is only a warning.

    Raises:
        ModelError: if the question is not in the prompt.
    """
    if not uses_template(tokenizer, problem):
        return
    written = "".join(prompt.split())
    for message in problem.messages:
        if message.role not in ("user", "system") or "".join(message.content.split()) in written:
            continue
        loss = f"the chat template leaves out what the {message.role} says in {problem.id} ({message.content[:40]!r})"
        if message.role == "user":
            raise ModelError(f"{loss}: set profile.chat = false, or correct the template")
        warnings.warn(f"{loss}: the model never sees it", RoundoffWarning, stacklevel=3)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone: complete, unpadded and without special tokens, whatever the tokenizer's defaults are."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer([*texts], padding=False, truncation=False, add_special_tokens=False)["input_ids"]
    return ids


def _response(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], response: str) -> list[int]:
    """Ids of a response that follow the ids of its prompt.

    The response is normally encoded alone. A tokenizer that puts a blank before every text would begin the response
    with one. In that case prompt and response are encoded together, and if the result begins with the prompt's ids, the
    rest is the response as the model would write it.
    """
    alone = _plain_ids(tokenizer, [response])[0]
    joined = _decoded(tokenizer, ids) + response
    if _decoded(tokenizer, ids + alone) != joined:
        own, both = _plain_ids(tokenizer, [prompt, prompt + response])
        if both[: len(own)] == own and _decoded(tokenizer, ids + both[len(own) :]) == joined:
            return both[len(own) :]
    return alone


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
