"""The design of the comparisons: the pairs of configurations on each prompt, their seats, and the repetitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.cases import Form

ANCHOR_OPPONENTS = 4  # configurations that each anchor is compared with on an anchor prompt
PROMPT_COLUMNS = ["prompt_id", "scenario_id", "term_id"]
PLAN_COLUMNS = ["purpose", *PROMPT_COLUMNS, "config_first", "config_second", "order", "repeat"]
RATING_COLUMNS = ["purpose", *PROMPT_COLUMNS, "configs", "order", "repeat"]


def matchings(n: int) -> list[list[tuple[int, int]]]:
    """All rounds of a round robin of `n` by the circle method: every pair once. With odd n one rests in each round."""
    seats = list(range(n)) + ([-1] if n % 2 else [])
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if -1 not in p])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def plan_comparisons(
    prompts: pd.DataFrame,
    configs: Sequence[str],
    *,
    matchings_per_prompt: int,
    swap_share: float,
    retest_share: float,
    anchor_share: float,
    seed: int,
    complete: bool = False,
    anchors: Sequence[str] = tuple(ANCHORS),
) -> pd.DataFrame:
    """Plans a sparse round robin, or a complete one. The plan depends on the arguments alone.

    The k-th prompt gets `matchings_per_prompt` consecutive rounds of the round robin. Prompts are in a seeded order, so
    the rounds do not line up with the terms. Seats are balanced per pair, then per configuration.

    Args:
        prompts: the test prompts, with prompt_id, scenario_id and term_id.
        configs: the configurations to rank.
        matchings_per_prompt: rounds of pairings per prompt.
        swap_share: the share of the ranking rows that are asked again with exchanged seats.
        retest_share: the share of the ranking rows that are asked again unchanged.
        anchor_share: the share of the prompts on which the anchors take part.
        seed: the seed of all random choices.
        complete: all pairs on all prompts, and all anchors against all configurations, for a judge that costs nothing.
        anchors: the anchors that have answers.

    Returns:
        One row per question, with `PLAN_COLUMNS`.

    Raises:
        ValueError: fewer than two configurations, or repeated configurations or prompts.
    """
    _check_design(prompts, configs)
    rng = np.random.default_rng(seed)
    keys = _shuffled(prompts, rng)
    base = _ranking_rows(keys, list(configs), len(configs) if complete else matchings_per_prompt, rng)
    swapped = [with_swapped_seats(row) for row in _sample(base, swap_share, rng)]
    again = [r | {"purpose": "retest", "repeat": 1} for r in _sample(base, retest_share, rng)]
    anchored_keys = keys if complete and anchor_share else _sample(keys, anchor_share, rng)
    anchored = _anchor_rows(anchored_keys, list(configs), anchors, len(configs) if complete else ANCHOR_OPPONENTS, rng)
    return pd.DataFrame([*base, *swapped, *again, *anchored], columns=PLAN_COLUMNS)


def _check_design(prompts: pd.DataFrame, configs: Sequence[str]) -> None:
    doubled = [c for c, count in Counter(configs).items() if count > 1]
    if len(configs) < 2 or doubled or set(configs) & set(ANCHORS):
        raise ValueError(f"at least two different configurations are needed, none named as an anchor; got {configs}")
    if prompts["prompt_id"].duplicated().any() or prompts.empty:
        raise ValueError("prompts must not be empty, and no prompt_id may occur twice")


def pair_row(key: Mapping[str, str], purpose: str, first: str, second: str) -> dict[str, Any]:
    """A row of a plan of pairs, with the columns of `key`."""
    seats = {"config_first": first, "config_second": second}
    return {**key, "purpose": purpose, **seats, "order": "ab", "repeat": 0}


def with_swapped_seats(row: dict[str, Any]) -> dict[str, Any]:
    return pair_row(row, "swap", row["config_second"], row["config_first"]) | {"order": "ba"}


def _ranking_rows(keys: list[dict], configs: list[str], per_prompt: int, rng: np.random.Generator) -> list[dict]:
    rounds = matchings(len(configs))
    per_prompt = min(per_prompt, len(rounds))  # never the same pair twice on one prompt
    seats = Seats(len(configs), rng)
    rows = []
    for k, key in enumerate(keys):
        for m in range(per_prompt * k, per_prompt * (k + 1)):
            for i, j in rounds[m % len(rounds)]:
                a, b = seats.take(i, j)
                rows.append(pair_row(key, "ranking", configs[a], configs[b]))
    return rows


class Seats:
    """Balances who sits first, per pair, then per configuration; chance decides the rest."""

    def __init__(self, n: int, rng: np.random.Generator):
        self.rng = rng
        self.lead = np.zeros((n, n), int)  # lead[i, j]: times i sat before j minus times j sat before i

    def take(self, i: int, j: int) -> tuple[int, int]:
        """The two by seat. First sits who sat second more often against this opponent, then in all pairs."""
        lead = self.lead
        a, b = (i, j) if self.rng.random() < 0.5 else (j, i)
        if (lead[a, b], lead[a].sum()) > (lead[b, a], lead[b].sum()):
            a, b = b, a
        lead[a, b] += 1
        lead[b, a] -= 1
        return a, b


def _sample(items: list, share: float, rng: np.random.Generator) -> list:
    """A seeded sample of items in their order."""
    return [items[i] for i in sorted(rng.permutation(len(items))[: _size(items, share)])]


def _size(items: list, share: float) -> int:
    """The size of a sample: round(share * n), but at least one if the share is above 0."""
    return max(1, round(share * len(items))) if share > 0 else 0


def _anchor_rows(
    keys: list[dict], configs: list[str], anchors: Sequence[str], opponents: int, rng: np.random.Generator
) -> list[dict]:
    order = rng.permutation(len(configs))
    rows, met = [], 0
    for a, anchor in enumerate(anchors):
        for k, key in enumerate(keys):
            for slot in range(min(opponents, len(configs))):
                config = configs[order[met % len(configs)]]
                pair = (anchor, config) if (k + slot + a) % 2 else (config, anchor)
                rows.append(pair_row(key, "anchor", *pair))
                met += 1
    return rows


def plan_ratings(prompts: pd.DataFrame, configs: Sequence[str], *, share: float, seed: int) -> pd.DataFrame:
    """Plans the rubric: every configuration's answer to a seeded share of the prompts, one question each.

    A smaller share is a subset of a larger one, so judges with different shares rate common answers.
    """
    _check_design(prompts, configs)
    keys = _shuffled(prompts, np.random.default_rng(seed))
    fixed = {"purpose": "rubric", "order": "ab", "repeat": 0}
    rows = [{**key, **fixed, "configs": [config]} for key in keys[: _size(keys, share)] for config in configs]
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _shuffled(prompts: pd.DataFrame, rng: np.random.Generator) -> list[dict]:
    """The ids of the prompts in a seeded order, so that a design does not line up with the terms."""
    keys = prompts.sort_values("prompt_id")[PROMPT_COLUMNS].to_dict("records")
    return [keys[i] for i in rng.permutation(len(keys))]


def seated(row: Mapping[str, Any]) -> list[str]:
    """The configurations of a plan row, by seat."""
    return list(row["configs"]) if "configs" in row else [row["config_first"], row["config_second"]]


def form_of(row: Mapping[str, Any]) -> Form:
    return "rubric" if row["purpose"] == "rubric" else "pair"
