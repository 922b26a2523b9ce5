"""Checks, by token ids, what a tokenizer adds to a prompt, what it loses, and whether the model can read the result.

A prompt is to be continued, so it must not end with a token that ends a response. Many tokenizers append their end
token to every text, which is right for training on whole texts and wrong here: `beginning` removes it. Any other token
that a tokenizer appends is an error, because its effect on the model is unknown.

A tokenizer may have more tokens than the model has embeddings, as Gemma 3's does. What matters is that no such token is
used, be it for padding, for the end of a response or in a prompt.
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
"""Short texts; any useful tokenizer should have a token for at least one of them."""


def beginning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: Sequence[Sequence[int]]) -> list[int]:
    """The ids that the tokenizer puts before every text. End tokens that it appends are ignored.

    Args:
        tokenizer: of a model that is to continue the texts.
        texts: any texts; the first that has a token is examined.
        plain: ids of each text without special tokens.

    Raises:
        ModelError: if the tokenizer appends any token but its end token, or changes the text's own tokens.
    """
    text, own = next(((t, list(ids)) for t, ids in zip(texts, plain, strict=True) if ids), (texts[0], list(plain[0])))
    extended = list(tokenizer(text, padding=False, truncation=False, add_special_tokens=True)["input_ids"])
    splits = [k for k in range(len(extended) - len(own), -1, -1) if extended[k : k + len(own)] == own]
    for k in splits:
        if all(token == tokenizer.eos_token_id for token in extended[k + len(own) :]):
            return extended[:k]
    if not splits:
        raise ModelError(
            f"the tokenizer encodes {text[:40]!r} as {extended} with special tokens, but as {own} without them: its "
            "post_processor (tokenizer.json) must put special tokens around a text and leave the text alone"
        )
    last = extended[-1]
    raise ModelError(
        f"the tokenizer appends {_shown(tokenizer, last)} to every text, and a prompt that is to be continued must not "
        "end with it: take it out of post_processor in tokenizer.json"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> list[int]:
    """Check that the tokenizer's special tokens fit the model.

    Returns:
        The ids that the tokenizer puts before every plain text.

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
            label = "the end token" if role == "eos" else "the padding token"
            raise ModelError(
                f"{where}{label} {str(token)!r} (id {number}) {why}: name another {role}_token in "
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
    """Check that `add_bos_token` in tokenizer_config.json agrees with what tokenizer.json does.

    transformers ignores the former. With a chat template a disagreement is only a warning, because a conversation has
    no special tokens but those of its template.

    Raises:
        ModelError: if they disagree and the tokenizer has no chat template.
    """
    setting = settings.get("add_bos_token")
    bos = tokenizer.bos_token_id
    if not isinstance(setting, bool) or bos is None or setting == (list(added[:1]) == [bos]):
        return
    message = (
        f"model {name!r}: tokenizer_config.json says add_bos_token = {str(setting).lower()}, but post_processor of "
        f"tokenizer.json {'does not put' if setting else 'puts'} {_shown(tokenizer, bos)} before a text: make them "
        "agree"
    )
    if tokenizer.chat_template is None:
        raise ModelError(message)
    warnings.warn(f"{message} (prompts through the chat template are not affected)", RoundoffWarning, stacklevel=4)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of every token that ends a response: the tokenizer's, and those in the model's generation_config."""
    own = tokenizer.eos_token_id
    return frozenset([*([] if own is None else [own]), *_configured_ends(model)])


def embeddings(model: PreTrainedModel) -> int:
    """Number of tokens that the model has an input embedding for."""
    layer: Any = model.get_input_embeddings()
    return int(getattr(layer, "num_embeddings", None) or layer.weight.shape[0])


def check_embedded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Iterable[Sequence[int]], what: str = "a prompt"
) -> None:
    """Check that the model has an embedding for every token of the encoded texts.

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
    """Check that a prompt does not end with an end token, nor with one that only white space follows.

    Raises:
        ModelError: if it does; `fix` is the part of the message that says what to do.
    """
    closing = set(ends)
    for token in reversed(ids):
        if token in closing:
            raise ModelError(
                f"{what} ends with the end token {_shown(tokenizer, token)}, so that nothing is left to answer: {fix}"
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
    """Check that the ids of a text, without what the tokenizer adds, hold all of the text.

    Only loss counts: variants of a character (NFKD), case, accents and white space may change.

    Raises:
        ModelError: if a part of the text became the unknown token, or is gone.
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
