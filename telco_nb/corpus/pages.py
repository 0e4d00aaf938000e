"""Conversations as HTML for the notebooks. Generated text is data: everything is escaped, nothing is markup.

The class `mathjax_ignore` keeps JupyterLab from reading what stands between two dollar signs as mathematics.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from telco_nb.corpus.cards import Card

SPEAKERS = {"user": "Customer", "assistant": "Agent"}


def conversation_html(conversation: Mapping[str, Any]) -> str:
    """Return the messages of a conversation, one paragraph each, with the speaker's name."""
    said = (
        f"<p><b>{SPEAKERS.get(message['role'], message['role'])}</b>: {html.escape(message['content'])}</p>"
        for message in conversation["messages"]
    )
    return f'<div class="mathjax_ignore">{"".join(said)}</div>'


def side_by_side(conversations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return conversations in columns under their titles."""
    width = 100 // max(1, len(conversations))
    style = f"vertical-align:top;text-align:left;width:{width}%"
    titles = "".join(f'<th style="{style}">{html.escape(title)}</th>' for title in conversations)
    cells = "".join(f'<td style="{style}">{conversation_html(c)}</td>' for c in conversations.values())
    return f'<table class="mathjax_ignore"><thead><tr>{titles}</tr></thead><tbody><tr>{cells}</tr></tbody></table>'


def browser_html(conversations: Sequence[Mapping[str, Any]], cards: Sequence[Card], scores: Mapping[str, float]) -> str:
    """Return all conversations as a tree to open: term, problem, context. It works without scripts.

    Args:
        conversations: rows as in conversations.parquet.
        cards: the cards; their order is that of the terms.
        scores: mean score of the second reading by scenario id; scenarios without one show none.
    """
    by_problem: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in conversations:
        by_problem[row["term_id"], row["problem_id"]].append(row)
    parts = []
    for card in cards:
        problems = "".join(
            _details(
                f"{html.escape(problem.id)} <small>({problem.kind}, {problem.weight:.0%} of contacts)</small>",
                f"<p><i>{html.escape(problem.cause)}</i></p>"
                + "".join(_one(row, scores) for row in by_problem[card.id, problem.id]),
            )
            for problem in card.problems
        )
        parts.append(_details(f"<b>{html.escape(card.term)}</b> <small>{html.escape(card.category)}</small>", problems))
    return "".join(parts)


def _one(row: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    score = f", read again: {scores[row['scenario_id']]:.1f} of 5" if row["scenario_id"] in scores else ""
    title = f"{html.escape(row['context'])} <small>({html.escape(row['split'])}{score})</small>"
    return _details(title, conversation_html(row))


def _details(title: str, inner: str) -> str:
    return f'<details class="mathjax_ignore" style="margin-left:1em"><summary>{title}</summary>{inner}</details>'
