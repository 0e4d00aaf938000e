"""API keys from the environment, and texts of servers made safe: no piece of a key, no control character."""

from __future__ import annotations

import itertools
import os
import string

# Environment variables that may hold the key, by kind; the first that is set counts. A local server may need no key.
KEY_VARIABLES: dict[str, tuple[str, ...]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "google": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "openai-compatible": ("OPENAI_COMPATIBLE_API_KEY",),
}
PIECE = 8  # characters of a key that are hidden wherever they stand
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # unlike str.lower, it keeps the length


def all_keys() -> list[str]:
    """The keys of all providers in the environment: a server may repeat one that belongs to another."""
    return [key for names in KEY_VARIABLES.values() for name in names if (key := os.environ.get(name, "").strip())]


def redact(text: str) -> str:
    """The text with every run of `PIECE` or more characters of a key, in any case, replaced by [key]."""
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
    """All runs of `PIECE` characters; a shorter key is one piece, and what has under 4 characters is no key."""
    return {key[i : i + PIECE] for i in range(max(1, len(key) - PIECE + 1))} if len(key) >= 4 else set()


def safe(text: object, limit: int = 500) -> str:
    """A text of a server in one line, fit for a terminal and a record.

    Keys are hidden before anything is cut or replaced: a cut key would no longer be recognised. A control character
    becomes the replacement character and is not removed, so the parts of a key around it do not join.
    """
    line = redact(" ".join(redact(_text_of(text)).split()))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)[:limit]


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # such as the body of a reply that is nested too deeply to be written out
        return f"({type(value).__name__} without a text: {type(error).__name__})"
