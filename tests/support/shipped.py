"""The data as they are shipped, for tests: each part is made once a run; tests share the rows and change none."""

from functools import cache
from typing import Any

import pandas as pd
import yaml

from telco_nb import ROOT
from telco_nb.corpus import cards as cards_module
from telco_nb.corpus import dataset, gold, scenarios, variants
from telco_nb.corpus.cards import Card

PARAMS = yaml.safe_load((ROOT / "params" / "base.yaml").read_text(encoding="utf-8"))
Rows = list[dict[str, Any]]


@cache
def cards() -> list[Card]:
    return cards_module.load_cards(ROOT / PARAMS["glossary_path"])


@cache
def by_id() -> dict[str, Card]:
    return {card.id: card for card in cards()}


@cache
def contexts() -> list[scenarios.Context]:
    return scenarios.load_contexts(ROOT / PARAMS["contexts_path"])


@cache
def grid() -> list[scenarios.Scenario]:
    return scenarios.build_scenarios(cards(), contexts(), PARAMS["unseen_terms"])


@cache
def gold_rows() -> Rows:
    return gold.load_gold(ROOT / PARAMS["gold_path"], grid())


@cache
def variant_rows() -> Rows:
    """All 29,640 variants: about 10 s."""
    return list(variants.write_variants(cards(), grid(), contexts(), range(1, PARAMS["conversations_per_scenario"])))


@cache
def filtered() -> tuple[Rows, pd.DataFrame, dict[str, int]]:
    """What the filters keep of gold and variants, the rejects, and their number by reason: about 25 s more."""
    return dataset.apply_filters(gold_rows() + variant_rows(), cards())


def cut(card: Card, problems: int | None = None, contexts: tuple[str, ...] = ()) -> Card:
    """The card with its first so many problems, and with these contexts alone."""
    kept = [
        problem.model_copy(update={"contexts": {name: problem.contexts[name] for name in contexts}})
        if contexts
        else problem
        for problem in card.problems[:problems]
    ]
    return card.model_copy(update={"problems": kept})
