"""Values as Hydra's override grammar and OmegaConf read them, so that verl sees what was written and nothing else.

Two grammars lie between the command and verl. Hydra takes a quoted string apart: a backslash counts only before the
quotation mark or at the end, and is an ordinary character elsewhere (hydra-ecosystem/hydra#1600). OmegaConf then
replaces `${...}` wherever the string is read. verl reads some settings resolved and hands others on as they are, so
JSON, which can spell any character otherwise, avoids both.
"""

from __future__ import annotations

import json
import re
from typing import Any

from roundoff.config import ConfigError

MISSING = "???"
"""What OmegaConf takes for a value that is still to be set; there is no way to write it as a string."""
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")
_WORDS = ("true", "false", "null", "nan", "inf")
"""Words that are no strings without quotation marks."""


def number(value: float) -> str:
    """A number with all its digits, which read back as the same number."""
    return repr(value)


def quoted(text: str) -> str:
    """A string as a value of a Hydra override, which arrives as it is, whatever characters it holds.

    Raises:
        ConfigError: if the string has no way through: `???`, or one with a null character or half a surrogate pair.
    """
    if text == MISSING:
        raise ConfigError(f"{text!r} cannot be handed to verl: OmegaConf takes it for a value that is missing")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{text!r} cannot be handed to verl: it holds a character that no command line can carry")
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # Backslashes before `${` are read in pairs by OmegaConf, and one more makes the `${` an ordinary text.
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    mark = "'" if '"' in text else '"'
    # Backslashes before a quotation mark, the closing one included, are read in pairs by Hydra.
    inner = re.sub(rf"(\\*){mark}", lambda found: found[1] * 2 + "\\" + mark, text)
    tail = len(inner) - len(inner.rstrip("\\"))
    return mark + inner + "\\" * tail + mark


def quoted_json(content: Any) -> str:
    """JSON as a value of a Hydra override, which arrives as JSON of the same content, resolved by OmegaConf or not.

    Raises:
        ConfigError: if the content is none that JSON can hold.
    """
    try:
        text = json.dumps(content)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{content!r} cannot be handed to verl: {error}") from None
    return "'" + text.replace("'", "\\u0027").replace("${", "\\u0024{") + "'"
