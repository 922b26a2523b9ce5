"""How a problem is put to a model: the only place that does it, for training, evaluation, scans and checks alike.

A problem that comes as a conversation is asked through the chat template of the model's tokenizer, with the header of
the answer appended (`add_generation_prompt`); its special tokens are then those of the template. Without a template, or
where the task gives no conversation, the model continues the problem's plain prompt, and the tokenizer puts its own
special tokens (a BOS, say) before it; an end token that it appends is left away. Whether a template is used is a
property of the loaded tokenizer (`load_model(chat=...)` takes it away or insists on it), not an argument that one
caller could pass and another forget.

A template that writes the date (Llama 3's does) is given a fixed one: prompts would otherwise change over night.
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
    """Token ids of each; a response is appended to its prompt's ids as sampling does.

    Raises:
        ModelError: if the chat template refuses a conversation or closes the answer's turn, a prompt begins with two
            BOS tokens, or the tokenizer appends another token than its end token (which is left away).
    """
    problems = [item.problem if isinstance(item, Worked) else item for item in asked]
    texts = [text(tokenizer, item) for item in problems]
    found = [list(ids) for ids in _plain_ids(tokenizer, texts)]
    templated = [isinstance(item, Problem) and uses_template(tokenizer, item) for item in problems]
    plain = [i for i, by_template in enumerate(templated) if not by_template]
    if plain:
        begin = beginning(tokenizer, [texts[i] for i in plain], [found[i] for i in plain])
        for i in plain if begin else ():
            found[i] = begin + found[i]
    for i, problem in enumerate(problems):
        check_begun_once(tokenizer, found[i], f"the prompt {texts[i][:80]!r}")
        if isinstance(problem, Problem):
            fix = "set profile.chat = false, or correct the template" if templated[i] else "change the task's prompt"
            what = f"the prompt of {problem.id}" + (", as the chat template writes it," if templated[i] else "")
            check_open(tokenizer, found[i], (tokenizer.eos_token_id,), what, fix)
    for i, item in enumerate(asked):
        if isinstance(item, Worked) and item.response:
            found[i] = found[i] + _response(tokenizer, texts[i], found[i], item.response)
    return found


def check_asked(loaded: LoadedModel, asked: Sequence[Asked]) -> list[list[int]]:
    """Check, before anything is computed, that the model reads all of what it is asked; the token ids of each.

    Raises:
        ModelError: if a character or a part would be lost, a token has no embedding, a prompt begins with two BOS
            tokens or ends with an end token, or the chat template refuses a conversation or leaves the question out.
    """
    tokenizer = loaded.tokenizer
    texts = [text(tokenizer, item) for item in asked]
    check_readable(loaded, texts)
    where = f"model {loaded.name!r}: "
    ends = end_tokens(loaded.model, tokenizer)
    try:
        encoded = encode(tokenizer, asked)
        check_embedded(loaded.model, tokenizer, encoded)
        for shown, ids, own, item in zip(texts, encoded, _plain_ids(tokenizer, texts), asked, strict=True):
            check_kept(tokenizer, shown, own)
            if isinstance(item, Problem):
                _check_asked_whole(tokenizer, item, shown)
                check_open(tokenizer, ids, ends, f"the prompt {shown[-80:]!r}", "change the task's prompt or template")
    except ModelError as error:
        raise ModelError(where + str(error)) from None
    return encoded


def _check_asked_whole(tokenizer: PreTrainedTokenizerBase, problem: Problem, shown: str) -> None:
    """Check that a chat template has written down what it was given, blanks aside.

    Templates of models that see pictures expect a list of parts, and some write nothing for a text.

    Raises:
        ModelError: if the question is not in the prompt. Where a system message is not, that is a warning.
    """
    if not uses_template(tokenizer, problem):
        return
    written = "".join(shown.split())
    for message in problem.messages:
        if message.role not in ("user", "system") or "".join(message.content.split()) in written:
            continue
        said = f"the chat template leaves out what the {message.role} says in {problem.id} ({message.content[:40]!r})"
        if message.role == "user":
            raise ModelError(f"{said}: set profile.chat = false, or correct the template")
        warnings.warn(f"{said}: the model never sees it", RoundoffWarning, stacklevel=3)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone: whole, unpadded and without special tokens, whatever the tokenizer does by itself."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer([*texts], padding=False, truncation=False, add_special_tokens=False)["input_ids"]
    return ids


def _response(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], response: str) -> list[int]:
    """Ids of a response to a prompt with these ids.

    It is encoded by itself. A tokenizer that puts a blank before every text would begin it with one; the ids of prompt
    and response together then hold the response as the model would write it, if they begin with those of the prompt.
    """
    alone = _plain_ids(tokenizer, [response])[0]
    wanted = _decoded(tokenizer, ids) + response
    if _decoded(tokenizer, ids + alone) != wanted:
        own, both = _plain_ids(tokenizer, [prompt, prompt + response])
        if both[: len(own)] == own and _decoded(tokenizer, ids + both[len(own) :]) == wanted:
            return both[len(own) :]
    return alone


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
