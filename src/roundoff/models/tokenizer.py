"""What a tokenizer does to a prompt, judged by ids: what it adds, what it loses, and whether the model can read it.

A prompt is to be continued, so it must not end with a token that ends a response. Many tokenizers append their end
token to every text, which is right for training on whole texts and wrong here: `beginning` leaves it away. Any other
token that a tokenizer appends is an error, as nobody can tell what the model makes of it.

A tokenizer may hold more tokens than the model has embeddings, and Gemma 3's does. What counts is that no such token is
used: neither for padding, nor for the end of a response, nor in a prompt.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.errors import RoundoffWarning
from roundoff.models.errors import ModelError

_PROBES = ("1", "a", " ", "1+1", "a b")
"""Texts of which a tokenizer has a token for at least one, we hope."""


def beginning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: Sequence[Sequence[int]]) -> list[int]:
    """Ids that the tokenizer puts before every text; end tokens that it appends are left away.

    Args:
        tokenizer: of a model that is to continue the texts.
        texts: any texts; the first that holds a token is looked at.
        plain: ids of each without special tokens.

    Raises:
        ModelError: if it appends another token than its end token, or changes the text's own tokens.
    """
    text, own = next(((t, list(ids)) for t, ids in zip(texts, plain, strict=True) if ids), (texts[0], list(plain[0])))
    whole = list(tokenizer(text, padding=False, truncation=False, add_special_tokens=True)["input_ids"])
    splits = [k for k in range(len(whole) - len(own), -1, -1) if whole[k : k + len(own)] == own]
    for k in splits:
        if all(token == tokenizer.eos_token_id for token in whole[k + len(own) :]):
            return whole[:k]
    if not splits:
        raise ModelError(
            f"the tokenizer encodes {text[:40]!r} as {whole} with special tokens, but as {own} without them: its "
            "post_processor (tokenizer.json) must put special tokens around a text and leave the text alone"
        )
    last = whole[-1]
    raise ModelError(
        f"the tokenizer appends {_shown(tokenizer, last)} to every text, and a prompt that is to be continued must not "
        "end with it: take it out of post_processor in tokenizer.json"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> list[int]:
    """Check that the model can read and end what this tokenizer writes; returns the ids put before every plain text.

    Raises:
        ModelError: naming the setting that is wrong.
    """
    rows = embeddings(model)
    where = f"model {name!r}: "
    for role in ("eos", "pad"):
        token, number = getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")
        if token is None:
            continue
        known = number is not None and tokenizer.convert_ids_to_tokens(number) == str(token)
        if not known or not 0 <= number < rows:
            why = f"has no embedding (the model has {rows})" if known else "is not in the tokenizer's vocabulary"
            meant = "the end token" if role == "eos" else "the padding token"
            raise ModelError(
                f"{where}{meant} {str(token)!r} (id {number}) {why}: name another {role}_token in "
                "tokenizer_config.json, or give the model an embedding for it (resize_token_embeddings)"
            )
    for number in _configured_ends(model):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < rows:
            raise ModelError(
                f"{where}eos_token_id of generation_config.json names {number!r}, but the model has tokens 0 to "
                f"{rows - 1}: correct it, or responses would not end"
            )
    plain = [list(ids) for ids in tokenizer([*_PROBES], padding=False, add_special_tokens=False)["input_ids"]]
    try:
        added = beginning(tokenizer, _PROBES, plain)
    except ModelError as error:
        raise ModelError(where + str(error)) from None
    bos = tokenizer.bos_token_id
    if bos is not None and added[:2] == [bos, bos]:
        raise ModelError(
            f"{where}the tokenizer puts {_shown(tokenizer, bos)} twice before every text: correct post_processor in "
            "tokenizer.json"
        )
    check_embedded(model, tokenizer, [added], f"{where}what the tokenizer puts before every text")
    return added


def check_added_bos(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], added: Sequence[int], name: str
) -> None:
    """Check that `add_bos_token` of tokenizer_config.json is what tokenizer.json does; transformers ignores the former.

    A conversation has the special tokens of its template alone, so that with a template this is a warning.

    Raises:
        ModelError: if they disagree and the tokenizer has no chat template.
    """
    said = settings.get("add_bos_token")
    bos = tokenizer.bos_token_id
    if not isinstance(said, bool) or bos is None or said == (list(added[:1]) == [bos]):
        return
    message = (
        f"model {name!r}: tokenizer_config.json says add_bos_token = {str(said).lower()}, but post_processor of "
        f"tokenizer.json {'does not put' if said else 'puts'} {_shown(tokenizer, bos)} before a text: make them agree"
    )
    if tokenizer.chat_template is None:
        raise ModelError(message)
    warnings.warn(f"{message} (prompts through the chat template are not affected)", RoundoffWarning, stacklevel=4)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's, and those of the model's generation_config."""
    own = tokenizer.eos_token_id
    return frozenset([*([] if own is None else [own]), *_configured_ends(model)])


def embeddings(model: PreTrainedModel) -> int:
    """Tokens that the model has an input embedding for."""
    layer: Any = model.get_input_embeddings()
    return int(getattr(layer, "num_embeddings", None) or layer.weight.shape[0])


def check_embedded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Iterable[Sequence[int]], what: str = "a prompt"
) -> None:
    """Check that the model has an embedding for every token of some texts.

    Raises:
        ModelError: naming the first token without one.
    """
    rows = embeddings(model)
    for ids in encoded:
        if ids and (max(ids) >= rows or min(ids) < 0):
            beyond = next(token for token in ids if not 0 <= token < rows)
            raise ModelError(
                f"{what} holds {_shown(tokenizer, beyond)}, for which the model has no embedding (it has {rows}): give "
                "the model one (resize_token_embeddings), or take the token out of the tokenizer, its chat template "
                "or the text"
            )


def check_open(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Iterable[int | None], what: str, fix: str
) -> None:
    """Check that a prompt does not end with an end token; blanks after it do not count.

    Raises:
        ModelError: if it does; the message says what to do, in the words of `fix`.
    """
    closing = set(ends)
    for token in reversed(ids):
        if token in closing:
            raise ModelError(
                f"{what} ends with the end token {_shown(tokenizer, token)}, so that nothing is left to be answered: "
                f"{fix}"
            )
        if str(tokenizer.decode([token])).strip():
            return


def check_begun_once(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], what: str) -> None:
    """Check that a prompt does not begin with two BOS tokens.

    Raises:
        ModelError: if it does.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise ModelError(
            f"{what} begins with {_shown(tokenizer, bos)} twice: the tokenizer adds it to a plain text and a chat "
            "template writes its own, so take it out of the text"
        )


def check_kept(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> None:
    """Check that the ids of a text (without what the tokenizer adds) hold all of it.

    Forms of one character (NFKC), capitals, accents and blanks are not told apart: what is looked for is loss.

    Raises:
        ModelError: if some of it became the unknown token, or is gone.
    """
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in text:
        raise ModelError(
            f"the tokenizer has no token for a part of {text[:80]!r}: it reads {_shown(tokenizer, unknown)} there"
        )
    decoded = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if decoded != text and len(_letters(decoded)) < len(_letters(text)):
        raise ModelError(
            f"the tokenizer loses a part of {text[:80]!r}: its tokens read {decoded[:80]!r} (look at normalizer and "
            "pre_tokenizer in tokenizer.json)"
        )


def _letters(text: str) -> str:
    """The characters of a text that a tokenizer may not lose."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in plain if not c.isspace() and not unicodedata.combining(c))


def _configured_ends(model: PreTrainedModel) -> list[int]:
    value = getattr(model.generation_config, "eos_token_id", None)
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"
