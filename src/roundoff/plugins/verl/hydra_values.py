"""Values in the grammars of Hydra's overrides and OmegaConf, so that verl receives exactly what was written.

Two grammars lie between the command and verl. Hydra parses a quoted string: a backslash is an escape only before a
quotation mark or at the end, and an ordinary character elsewhere (hydra-ecosystem/hydra#1600). OmegaConf then replaces
`${...}` whenever the string is read. verl reads some settings resolved and passes others on as they are. JSON can spell
any character in another way, so it avoids both problems.
"""

from __future__ import annotations

import json
import re
from typing import Any

from roundoff.config import ConfigError

MISSING = "???"
"""Text that means a missing value to OmegaConf, and cannot be written as a string."""
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")
_WORDS = ("true", "false", "null", "nan", "inf")
"""Words that Hydra reads as strings only inside quotation marks."""


def number(value: float) -> str:
    """A number with all its digits, so that it is read back as the same number."""
    return repr(value)


def quoted(text: str) -> str:
    """A string as the value of a Hydra override, which verl receives unchanged, whatever characters it holds.

    Raises:
        ConfigError: if no value can express the string: `???`, or one with a null character or half a surrogate pair.
    """
    if text == MISSING:
        raise ConfigError(f"{text!r} cannot be handed to verl: OmegaConf takes it for a value that is missing")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{text!r} cannot be handed to verl: it holds a character that no command line can carry")
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # OmegaConf reads backslashes before `${` in pairs, and one more makes the `${` ordinary text.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    mark = "'" if '"' in text else '"'
    # Hydra reads backslashes before a quotation mark, including the closing one, in pairs.
    inner = re.sub(rf"(\\*){mark}", lambda match: match[1] * 2 + "\\" + mark, text)
    tail = len(inner) - len(inner.rstrip("\\"))
    return mark + inner + "\\" * tail + mark


def quoted_json(content: Any) -> str:
    """JSON as the value of a Hydra override; it has the same content whether OmegaConf resolves it or not.

    Raises:
        ConfigError: if JSON cannot hold the content.
    """
    try:
        text = json.dumps(content)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{content!r} cannot be handed to verl: {error}") from None
    return "'" + text.replace("'", "\\u0027").replace("${", "\\u0024{") + "'"
