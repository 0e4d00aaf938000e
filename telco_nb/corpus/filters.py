"""Filters on one conversation, the same for every generator. The first filter that refuses it gives the reason.

A conversation may come from a language model: it is untrusted text, of any shape. No row makes a filter crash;
`schema` refuses a row that cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from telco_nb.corpus import personal_data
from telco_nb.corpus.cards import Card, unknown_figures
from telco_nb.corpus.scenarios import SPLITS
from telco_nb.corpus.text_measures import content_stems, ngrams

CONVERSATION_KEYS = (
    "conversation_id", "scenario_id", "term_id", "problem_id", "kind", "context", "origin", "manner", "n_turns",
    "messages", "split",
)  # fmt: skip
FINISHED = ("stop", "end", "end_turn", "completed")  # providers' names for an answer that was not cut off
TOTAL_WORDS = (15, 600)
MAX_TURNS = 4
LOOP_NGRAM, LOOP_SHARE = 4, 0.3  # of a message's word 4-grams, the share that may repeat an earlier one
ENGLISH_SHARE = 0.15  # a message with this share of English function words is not classified
ENGLISH_PROBABILITY = 0.02  # the classifier refuses below this; it often takes short jargon for another language
SHARED_STEMS = 0.18  # of the content words; the least of a gold conversation is .19, 25 % of misplaced ones have less
SHORTEST_CLASSIFIED = 6  # words; "OK, VoLTE off." is too short to have a language

Conversation = dict[str, Any]
Reject = tuple[str, str]  # (reason, detail)

_FUNCTION_WORDS = frozenset(
    """the and you your that this with my not it is for are be have has what if can will when how from or we our but
    they there which would should does did i i'm it's don't was were them then than about to of please thank thanks
    here now again still once step first after before take check let us whether because only its""".split()  # noqa: SIM905
)

# Phrases of a language model about itself, or left in by mistake. Each pattern is tried only where its key occurs.
_BOILERPLATE = {
    key: re.compile(pattern, re.I)
    for key, pattern in {
        " ai": r"\b(?:as|i am|i'm) (?:just |only )?an ai\b|\bai (?:language )?(?:model|assistant)\b",
        "artificial": r"\b(?:as|i am|i'm) (?:just |only )?an artificial intelligence\b",
        "language model": r"\blanguage model\b",
        "training": r"\bmy training data\b|\bas of my last training\b",
        "knowledge cut": r"\bknowledge cut-?off\b",
        "last update": r"\bas of my last update\b",
        "request": r"\bi(?: cannot| can't| can not| am unable to|'m unable to) (?:assist|help|comply) with "
        r"(?:that|this|your) request\b",
        "here": r"\bhere(?: is|'s) (?:a|the|your) (?:conversation|dialogue|response|json)\b",
        "lorem": r"\blorem ipsum\b",
        "[": r"\[(?:insert|your|customer|company|name|date|agent|account)\b[^\]]{0,40}\]",
        "openai": "openai", "chatgpt": "chatgpt", "anthropic": "anthropic", "<|": r"<\|[a-z_]+\|>",
    }.items()
}  # fmt: skip


def _schema(c: Any, card: Card | None) -> str | None:
    """Check that the row has every field in the type that later steps and the Parquet file expect."""
    if not isinstance(c, Mapping):
        return f"a {type(c).__name__}, not a conversation"
    missing = [key for key in CONVERSATION_KEYS if key not in c]
    if missing:
        return f"missing {', '.join(missing)}"
    for key in CONVERSATION_KEYS:
        if key not in ("n_turns", "messages") and not (isinstance(c[key], str) and c[key].strip()):
            return f"{key} is not a text"
    if c["split"] not in SPLITS:
        return f"split {c['split']!r}"
    if type(c["n_turns"]) is not int or not 1 <= c["n_turns"] <= MAX_TURNS:
        return f"n_turns {c['n_turns']!r:.20}"
    if card is None or c["term_id"] != card.id:
        return f"no card {c['term_id']!r}"
    if c["problem_id"] not in card.by_problem:
        return f"no problem {c['problem_id']!r} on card {card.id}"
    return _messages(c["messages"])


def _messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            return "a message is not {role, content}"
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            return "a message is not text"
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            return "a message is not valid Unicode"
    return "an empty message" if any(not m["content"].strip() for m in messages) else None


def _finish(c: Conversation, card: Card) -> str | None:
    """Refuse an answer that was cut off or refused, if the generator reports why it stopped."""
    reason = c.get("finish_reason", "stop")
    return None if isinstance(reason, str) and reason.lower() in FINISHED else f"{reason!r:.40}"


def _roles(c: Conversation, card: Card) -> str | None:
    roles = [m["role"] for m in c["messages"]]
    expected = ["user", "assistant"] * c["n_turns"]
    return None if roles == expected else " ".join(roles)[:200]


def mentions_term(text: str, card: Card) -> bool:
    """Return True if the text holds the term or an alias as a whole word, in upper or lower case."""
    return _names_pattern(tuple(card.names)).search(text) is not None


@cache
def _names_pattern(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", re.IGNORECASE)


def _problem(c: Conversation, card: Card) -> str | None:
    """Refuse a conversation that is about something else: it names the term, or has enough words of its problem."""
    text = " ".join(m["content"] for m in c["messages"])
    stems, own = content_stems(text), card.by_problem[c["problem_id"]].stems
    share = sum(stem in own for stem in stems) / max(1, len(stems))
    if share >= SHARED_STEMS or mentions_term(text, card):
        return None
    return f"{share:.0%} of the words are those of the problem; none of {', '.join(card.names)}"[:200]


def is_english(text: str) -> bool:
    """Return True if a message is English or too short to tell.

    The share of English function words decides nearly all messages; py3langid classifies the rest, with a low
    threshold that lets jargon pass.
    """
    tokens = text.replace("’", "'").lower().split()
    if sum(token in _FUNCTION_WORDS for token in tokens) >= ENGLISH_SHARE * max(1, len(tokens)):
        return True
    if len(tokens) < SHORTEST_CLASSIFIED and text.isascii():
        return True
    ranked = _language_identifier().rank(text)
    return ranked[0][0] == "en" or dict(ranked)["en"] >= ENGLISH_PROBABILITY


@cache
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(c: Conversation, card: Card) -> str | None:
    return next((m["content"][:80] for m in c["messages"] if not is_english(m["content"])), None)


def _length(c: Conversation, card: Card) -> str | None:
    total = sum(len(m["content"].split()) for m in c["messages"])
    return None if TOTAL_WORDS[0] <= total <= TOTAL_WORDS[1] else f"{total} words"


def repeated_ngram_share(text: str) -> float:
    """Share of a text's word 4-grams that repeat an earlier one (0 to 1), after Rae et al. 2021 (Gopher)."""
    grams = ngrams(text.lower().split(), LOOP_NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _loop(c: Conversation, card: Card) -> str | None:
    worst = max(repeated_ngram_share(m["content"]) for m in c["messages"])
    return f"{worst:.2f} of the {LOOP_NGRAM}-grams repeat" if worst > LOOP_SHARE else None


def _boilerplate(c: Conversation, card: Card) -> str | None:
    for message in c["messages"]:
        text = message["content"].lower().replace("’", "'")
        for key, pattern in _BOILERPLATE.items():
            if key in text and (match := pattern.search(text)):
                return match[0]
    return None


def _figures(c: Conversation, card: Card) -> str | None:
    said, unknown = "", []  # what the customer has said so far: a figure that they repeat later was the agent's
    for message in c["messages"]:
        if message["role"] == "user":
            said = f"{said} {message['content']}"
        else:
            unknown += unknown_figures(message["content"], card, said)
    return ", ".join(unknown)[:200] or None


def _personal(c: Conversation, card: Card) -> str | None:
    """Name the kinds only: the detail column of the reject file must not repeat the personal data.

    A made-up secret that a customer gives away is wanted, because the agent must react to it; an agent never says one.
    """
    found = [(m["role"], kind) for m in c["messages"] for kind, _ in personal_data.find_personal_data(m["content"])]
    return ", ".join(dict.fromkeys(kind for role, kind in found if (role, kind) != ("user", "secret"))) or None


FILTERS: dict[str, Callable[[Any, Any], str | None]] = {
    "schema": _schema,
    "finish_reason": _finish,
    "roles": _roles,
    "off_problem": _problem,
    "language": _language,
    "length": _length,
    "loop": _loop,
    "boilerplate": _boilerplate,
    "unlisted_figure": _figures,
    "personal_data": _personal,
}  # each takes a conversation and its card; those after `schema` need a card and a row that can be read


def reject_reason(conversation: Any, card: Card | None) -> Reject | None:
    """Return (reason, detail) of the first filter that refuses the conversation, or None.

    `card` is the card of its term. `schema` refuses a conversation without one (None).
    """
    for reason, check in FILTERS.items():
        detail = check(conversation, card)
        if detail:
            return reason, detail
    return None
