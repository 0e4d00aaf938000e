"""Choices between two sentences of the cards: what a model knows, measured by likelihood and without a judge.

An item holds two customer messages and two answers that fit them crosswise. A model chooses rightly if it finds the two
fitting pairs likelier, together, than the two others: an answer that is likely after any message then gains nothing.
Items of kind `figure` have one message and two answers that differ in a figure alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from telco_nb.corpus.cards import Card, Problem, figures_in
from telco_nb.corpus.gold import WrittenFileError, read_lines
from telco_nb.corpus.scenarios import stable_hash

KINDS = ("problem", "protects_first", "figure")
NEUTRAL = "What should I know about {term}?"


@dataclass(frozen=True)
class Choice:
    """One item: `right` are the (message, answer) pairs that fit, `wrong` the same texts paired otherwise."""

    item_id: str
    kind: str
    term_id: str
    right: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]


def choice_items(cards: Sequence[Card], n: int | None) -> list[Choice]:
    """Return `n` items (None: all), the kinds in turn, ordered by hash: a larger sample holds a smaller one."""
    by_kind = {
        kind: sorted(make(cards), key=lambda item: stable_hash("choice", item.item_id))
        for kind, make in zip(KINDS, (_problem_items, _first_items, _figure_items), strict=True)
    }
    longest = max(map(len, by_kind.values()), default=0)
    ordered = [items[i] for i in range(longest) for items in by_kind.values() if i < len(items)]
    return ordered[:n]


def _crosswise(kind: str, term_id: str, name: str, pairs: Sequence[tuple[str, str]]) -> Choice:
    (one, answer_one), (two, answer_two) = pairs
    return Choice(f"{kind}.{term_id}.{name}", kind, term_id, tuple(pairs), ((one, answer_two), (two, answer_one)))


def _said(problem: Problem) -> str:
    """The longest of a customer's phrasings: it tells most about the problem."""
    return max(problem.says, key=lambda text: len(text.split()))


def _problem_items(cards: Sequence[Card]) -> Iterator[Choice]:
    """Two problems of one card: which first step belongs to which customer?"""
    for card in cards:
        for one, two in combinations(card.problems, 2):
            pairs = [(_said(problem), problem.steps[0].say[0]) for problem in (one, two)]
            yield _crosswise("problem", card.id, f"{one.id}.{two.id}", pairs)


def _first_items(cards: Sequence[Card]) -> Iterator[Choice]:
    """A customer who must be protected first, and one of the same card who must not: which answer is whose?"""
    for card in cards:
        urgent = [p for p in card.problems if p.first and p.first.when is None]
        calm = [p for p in card.problems if p.first is None]
        for one in urgent:
            for two in calm:
                assert one.first is not None
                pairs = [(_said(one), one.first.say[0]), (_said(two), two.steps[0].say[0])]
                yield _crosswise("protects_first", card.id, f"{one.id}.{two.id}", pairs)


def _figure_items(cards: Sequence[Card]) -> Iterator[Choice]:
    """A fact of a card, and the same with a figure of the same unit from another card."""
    known = sorted({(unit, number) for c in cards for f in c.figures for number, unit in figures_in(f.text) if unit})
    for card in cards:
        own = {number for number, _ in card.allowed_figures}
        for i, fact in enumerate(card.facts):
            found = [(number, unit) for number, unit in figures_in(fact.text) if unit and number in fact.text]
            if not found:
                continue
            number, unit = found[0]
            others = [other for other_unit, other in known if other_unit == unit and other not in own]
            if others:
                wrong = others[stable_hash("figure", card.id, i) % len(others)]
                changed = re.sub(rf"(?<![\d.]){re.escape(number)}(?![\d])", wrong, fact.text, count=1)
                question = NEUTRAL.format(term=card.term)
                pairs = ((question, fact.text),), ((question, changed),)
                if changed != fact.text:
                    yield Choice(f"figure.{card.id}.{i}", "figure", card.id, *pairs)


# ---------------------------------------------------------------- general texts, and tables


def load_general(path: Path | None) -> list[dict[str, str]]:
    """Load general texts: rows with id, kind, prompt and text, in the order of the file. They show forgetting.

    Raises WrittenFileError for a line without these four texts.
    """
    rows: list[dict[str, str]] = []
    if path is None:
        return rows
    for number, value in read_lines(path):
        fields = {key: value.get(key) if isinstance(value, dict) else None for key in ("id", "kind", "prompt", "text")}
        if not all(isinstance(text, str) and text.strip() for text in fields.values()):
            raise WrittenFileError(f"{path.name}, line {number}: id, kind, prompt and text are needed, as texts")
        rows.append({key: str(text) for key, text in fields.items()})
    return rows


def general_items(texts: Sequence[Mapping[str, str]]) -> list[Choice]:
    """The twin of the cards' items on general texts: neighbours of one kind, which text answers which prompt?

    In an order made by hash, as `choice_items`.
    """
    items = []
    for one, two in zip(texts[::2], texts[1::2], strict=False):
        pairs = [(row["prompt"], row["text"]) for row in (one, two)]
        items.append(_crosswise("general", one["kind"], f"{one['id']}.{two['id']}", pairs))
    return sorted(items, key=lambda item: stable_hash("choice", item.item_id))


def pairs_table(items: Sequence[Choice], texts: Sequence[Mapping[str, str]], n: int | None) -> pd.DataFrame:
    """Return what 04 measures, one row per (message, answer): pair_id, item_id, kind, term_id, fits, message, answer.

    `n` general texts (None: all) follow as kind "general_text"; their loss shows forgetting.
    """
    rows = [
        (f"{item.item_id}.{fits:d}.{i}", item.item_id, item.kind, item.term_id, fits, *pair)
        for item in items
        for fits, pairs in ((True, item.right), (False, item.wrong))
        for i, pair in enumerate(pairs)
    ]
    shuffled = sorted(texts, key=lambda row: stable_hash("text", row["id"]))
    rows += [
        (f"text.{r['id']}", r["id"], "general_text", r["kind"], True, r["prompt"], r["text"]) for r in shuffled[:n]
    ]
    columns = ["pair_id", "item_id", "kind", "term_id", "fits", "message", "answer"]
    return pd.DataFrame(rows, columns=columns)


def chosen_table(pairs: pd.DataFrame, losses: Mapping[str, float]) -> pd.DataFrame:
    """Return which items a model chooses rightly: item_id, kind, term_id, margin (nats per token), right.

    Args:
        pairs: as `pairs_table` gives them.
        losses: mean loss of each pair's answer, nats per token.
    """
    items = pairs[pairs["kind"] != "general_text"].assign(loss=lambda frame: frame["pair_id"].map(losses))
    means = items.pivot_table("loss", ["item_id", "kind", "term_id"], "fits", sort=False)
    table = (means[False] - means[True]).rename("margin").reset_index()
    return table.assign(right=table["margin"] > 0)
