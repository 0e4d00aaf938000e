"""API keys from the environment, and texts of servers made safe: no piece of a key, no control character."""

from __future__ import annotations

import itertools
import os
import re
import string
from collections.abc import Callable

# Environment variables that may hold the key, by kind; the first that is set counts. A local server may need no key.
KEY_VARIABLES: dict[str, tuple[str, ...]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "google": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "openai-compatible": ("OPENAI_COMPATIBLE_API_KEY",),
}
PIECE = 8  # characters of a key that are hidden wherever an error text holds them
WHOLE = 16  # shortest key that is hidden in what a model says; servers take words such as EMPTY or none as keys
ERROR_CHARACTERS = 500  # of the text of an error that is kept
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # unlike str.lower, it keeps the length


def keys_of(kind: str) -> list[str]:
    """The keys of a kind of provider in the environment, the one that counts first; a blank variable holds none."""
    return [key for name in KEY_VARIABLES[kind] if (key := os.environ.get(name, "").strip())]


def all_keys() -> list[str]:
    """The keys of all providers in the environment: a server may repeat one that belongs to another."""
    return [key for kind in KEY_VARIABLES for key in keys_of(kind)]


def redact_whole(text: str) -> str:
    """What a model says, with every whole key of `WHOLE` or more characters replaced by [key]; all else stays."""
    long = sorted((key for key in all_keys() if len(key) >= WHOLE), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, long)), "[key]", text, flags=re.IGNORECASE) if long else text


def redact(text: str) -> str:
    """An error text with every run of `PIECE` or more characters of a key, in any case, replaced by [key]."""
    lowered = text.translate(_LOWER)
    hidden = bytearray(len(text))
    for piece in {piece for key in all_keys() for piece in _pieces(key.translate(_LOWER))}:
        at = lowered.find(piece)
        while at >= 0:
            hidden[at : at + len(piece)] = b"\x01" * len(piece)
            at = lowered.find(piece, at + 1)
    if not any(hidden):
        return text
    runs = itertools.groupby(range(len(text)), key=hidden.__getitem__)
    return "".join("[key]" if hide else "".join(text[i] for i in run) for hide, run in runs)


def _pieces(key: str) -> set[str]:
    """All runs of `PIECE` characters; a shorter key has none, because it is a word that stands for no key."""
    return {key[i : i + PIECE] for i in range(len(key) - PIECE + 1)}


def printable(text: str) -> str:
    """Replaces control characters, direction marks and lone surrogates, which could harm a page or a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def safe(text: object, hide: Callable[[str], str] = redact) -> str:
    """A text of a server in one line, fit for a terminal and a record; `hide` removes the keys.

    Keys are hidden before anything is cut or replaced: a cut key would no longer be recognised. A control character
    becomes the replacement character and is not removed, so the parts of a key around it do not join.
    """
    line = hide(" ".join(hide(_text_of(text)).split()))
    return printable(line)[:ERROR_CHARACTERS]


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # such as the body of a reply that is nested too deeply to be written out
        return f"({type(value).__name__} without a text: {type(error).__name__})"
