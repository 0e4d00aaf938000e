"""Choices between two answers, measured by likelihood: what a model knows, without a judge.

An item holds two customer messages and two answers that fit them crosswise. A model chooses rightly if it finds the two
fitting pairs likelier, together, than the two others: an answer that is likely after any message then gains nothing.
The pairs are gold conversations of held-out scenarios, so no training text is among them. Items of kind `figure` have
one message and two sentences of a card that differ in a figure alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.corpus.cards import Card, figures_in
from telco_nb.corpus.gold import WrittenFileError, read_lines
from telco_nb.corpus.scenarios import stable_hash

NEUTRAL = "What should I know about {term}?"
MOST_APART = 5  # times by which a wrong figure may differ from the right one: a wilder one is no choice


@dataclass(frozen=True)
class Choice:
    """One item: `right` are the (message, answer) pairs that fit, `wrong` the same texts paired otherwise."""

    item_id: str
    kind: str
    term_id: str
    right: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]


def choice_items(cards: Sequence[Card], gold_rows: Sequence[Mapping[str, Any]], n: int | None) -> list[Choice]:
    """Return `n` items (None: all), the kinds in turn, ordered by hash: a larger sample holds a smaller one.

    Args:
        cards: the cards.
        gold_rows: gold conversations (`gold.load_gold`); those of the training split are left out.
        n: the number of items.
    """
    held_out = [row for row in gold_rows if row["split"] != "train"]
    made = [*_pair_items(cards, held_out), *_figure_items(cards)]
    by_kind: dict[str, list[Choice]] = defaultdict(list)
    for item in sorted(made, key=lambda item: stable_hash("choice", item.item_id)):
        by_kind[item.kind].append(item)
    longest = max(map(len, by_kind.values()), default=0)
    kinds = sorted(by_kind)
    return [by_kind[kind][i] for i in range(longest) for kind in kinds if i < len(by_kind[kind])][:n]


def _crosswise(kind: str, term_id: str, name: str, pairs: Sequence[tuple[str, str]]) -> Choice:
    (one, answer_one), (two, answer_two) = pairs
    return Choice(f"{kind}.{term_id}.{name}", kind, term_id, tuple(pairs), ((one, answer_two), (two, answer_one)))


def _pair_items(cards: Sequence[Card], rows: Sequence[Mapping[str, Any]]) -> Iterator[Choice]:
    """Two customers of one card with different problems: which answer belongs to whom?

    The kind is `protects_first` if exactly one of them must be protected before all else, else `problem`.
    """
    by_term: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_term[row["term_id"]].append(row)
    for card in cards:
        for one, two in combinations(by_term[card.id], 2):
            if one["problem_id"] == two["problem_id"]:
                continue
            firsts = [card.by_problem[row["problem_id"]].first for row in (one, two)]
            urgent = [first is not None and first.when is None for first in firsts]
            kind = "protects_first" if urgent[0] != urgent[1] else "problem"
            name = ".".join(row["scenario_id"].split(".", 1)[1] for row in (one, two))
            pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in (one, two)]
            yield _crosswise(kind, card.id, name, pairs)


def _figure_items(cards: Sequence[Card]) -> Iterator[Choice]:
    """A fact of a card, and the same with another card's figure: of the same unit, near in size, as grammatical."""
    known = sorted({(unit, number) for c in cards for f in c.figures for number, unit in figures_in(f.text) if unit})
    for card in cards:
        own = {number for number, _ in card.allowed_figures}
        for i, fact in enumerate(card.facts):
            found = next(((n, unit) for n, unit in figures_in(fact.text) if unit and n in fact.text), None)
            wrong = found and _near(found[0], [n for unit, n in known if unit == found[1] and n not in own])
            if found and wrong:
                pattern = rf"(?<![\d.]){re.escape(found[0])}(?![\d])"
                changed = re.sub(pattern, wrong, fact.text, count=1)
                question = NEUTRAL.format(term=card.term)
                yield Choice(
                    f"figure.{card.id}.{i}", "figure", card.id, ((question, fact.text),), ((question, changed),)
                )


def _near(number: str, others: Sequence[str]) -> str | None:
    """The other number nearest in size; None if all are further apart than MOST_APART times, or singular or zero."""
    value = float(number)
    if value in (0, 1):
        return None
    ratios = {other: max(float(other) / value, value / float(other)) for other in others if float(other) not in (0, 1)}
    near = [other for other, ratio in ratios.items() if 1 < ratio <= MOST_APART]
    return min(near, key=ratios.__getitem__, default=None)


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
