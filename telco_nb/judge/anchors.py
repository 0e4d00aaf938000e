"""Anchors: texts that need no training. A configuration that does not beat them has learned nothing that counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from telco_nb.corpus.cards import Card

TEMPLATE = "This is about {term}. Please tell me what you see, and I will check it."
GOLD = "reference"  # the name of the gold answers in tables of answers, verdicts and checks
ANCHORS = {  # the one table of anchors: name, and what it is
    "untuned": "the untuned model",
    GOLD: "the gold answer",
    "template": "one sentence for everything",
    "echo": "the customer's own words",
    "nearest": "the answer of the most similar training conversation",
}
FLOORS = tuple(name for name in ANCHORS if name != GOLD)  # what a configuration must beat to be fit


def anchor_texts(
    prompts: pd.DataFrame, cards: Mapping[str, Card], train: Sequence[Mapping[str, Any]] | pd.DataFrame
) -> dict[tuple[str, str], str]:
    """The texts of the anchors that no model wrote, by (anchor, prompt_id).

    Args:
        prompts: the test prompts, one row each.
        cards: card by term_id.
        train: the training conversations, with `messages`; `nearest` is left out without any.
    """
    texts: dict[tuple[str, str], str] = {}
    for row in prompts.to_dict("records"):
        question = list(row["messages"])[-1]["content"]
        texts[GOLD, row["prompt_id"]] = row["reference"]
        texts["template", row["prompt_id"]] = TEMPLATE.format(term=cards[row["term_id"]].term)
        texts["echo", row["prompt_id"]] = question
    conversations = train["messages"].tolist() if isinstance(train, pd.DataFrame) else [c["messages"] for c in train]
    if len(conversations):
        nearest = nearest_answers([list(m)[-1]["content"] for m in prompts["messages"]], conversations)
        texts |= {("nearest", i): text for i, text in zip(prompts["prompt_id"], nearest, strict=True)}
    return texts


def nearest_answers(questions: Sequence[str], conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """The first answer of the conversation whose first message is most alike (TF-IDF cosine), for each question."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    known = vectorizer.fit_transform([messages[0]["content"] for messages in conversations])
    likeness = (vectorizer.transform(questions) @ known.T).toarray()
    return [conversations[int(i)][1]["content"] for i in likeness.argmax(axis=1)]
