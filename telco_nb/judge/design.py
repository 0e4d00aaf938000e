"""The design of the comparisons: who meets whom, on which prompt, in which order, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.judge.cases import Form

ANCHORS = ("untuned", "reference")
ANCHOR_OPPONENTS = 4  # configurations that each anchor meets on an anchor prompt
SHARED_COLUMNS = ["purpose", "prompt_id", "scenario_id", "term_id"]
PLAN_COLUMNS = [*SHARED_COLUMNS, "config_first", "config_second", "order", "repeat"]
RATING_COLUMNS = [*SHARED_COLUMNS, "configs", "order", "repeat"]


def matchings(n: int) -> list[list[tuple[int, int]]]:
    """All rounds of a round robin of `n` by the circle method: every pair once; with odd n one has a bye each round."""
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
) -> pd.DataFrame:
    """The sparse round robin as a plan; a pure function of prompts (prompt_id, scenario_id, term_id), configs, numbers.

    The k-th prompt (in a seeded order, so that the design does not line up with the terms) gets `matchings_per_prompt`
    consecutive matchings. Seats are balanced per pair, then per configuration. Shares are of the ranking rows (swap,
    retest) and of the prompts (anchor). Raises ValueError for fewer than two or repeated configs or prompts.
    """
    _check_design(prompts, configs)
    rng = np.random.default_rng(seed)
    keys = prompts.sort_values("prompt_id")[["prompt_id", "scenario_id", "term_id"]].to_dict("records")
    keys = [keys[i] for i in rng.permutation(len(keys))]
    base = _ranking_rows(keys, list(configs), matchings_per_prompt, rng)
    swapped = [r | {"purpose": "swap", "order": "ba", **_exchanged(r)} for r in _sample(base, swap_share, rng)]
    again = [r | {"purpose": "retest", "repeat": 1} for r in _sample(base, retest_share, rng)]
    anchored = _anchor_rows(_sample(keys, anchor_share, rng), list(configs), rng)
    return pd.DataFrame([*base, *swapped, *again, *anchored], columns=PLAN_COLUMNS)


def _check_design(prompts: pd.DataFrame, configs: Sequence[str]) -> None:
    doubled = [c for c, count in Counter(configs).items() if count > 1]
    if len(configs) < 2 or doubled or set(configs) & set(ANCHORS):
        raise ValueError(f"at least two different configurations are needed, none named as an anchor; got {configs}")
    if prompts["prompt_id"].duplicated().any() or prompts.empty:
        raise ValueError("prompts must not be empty, and every prompt_id must be there once")


def pair_row(key: Mapping[str, str], purpose: str, first: str, second: str) -> dict[str, Any]:
    seats = {"config_first": first, "config_second": second}
    return {**key, "purpose": purpose, **seats, "order": "ab", "repeat": 0}


def _exchanged(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"config_first": row["config_second"], "config_second": row["config_first"]}


def _ranking_rows(keys: list[dict], configs: list[str], per_prompt: int, rng: np.random.Generator) -> list[dict]:
    rounds = matchings(len(configs))
    per_prompt = min(per_prompt, len(rounds))  # never the same pair twice on one prompt
    lead = np.zeros((len(configs), len(configs)), int)  # lead[i, j]: times i sat before j, minus times after
    rows = []
    for k, key in enumerate(keys):
        for m in range(per_prompt * k, per_prompt * (k + 1)):
            for i, j in rounds[m % len(rounds)]:
                a, b = (i, j) if rng.random() < 0.5 else (j, i)
                # Whoever sat second more often, against this opponent and then over all, sits first; else chance.
                if (lead[a, b], lead[a].sum()) > (lead[b, a], lead[b].sum()):
                    a, b = b, a
                lead[a, b] += 1
                lead[b, a] -= 1
                rows.append(pair_row(key, "ranking", configs[a], configs[b]))
    return rows


def _sample(items: list, share: float, rng: np.random.Generator) -> list:
    """A seeded sample of round(share * n) items, at least one if the share is not 0, in their order."""
    n = max(1, round(share * len(items))) if share > 0 else 0
    return [items[i] for i in sorted(rng.permutation(len(items))[:n])]


def _anchor_rows(keys: list[dict], configs: list[str], rng: np.random.Generator) -> list[dict]:
    order = rng.permutation(len(configs))
    rows, met = [], 0
    for a, anchor in enumerate(ANCHORS):
        for k, key in enumerate(keys):
            for slot in range(min(ANCHOR_OPPONENTS, len(configs))):
                config = configs[order[met % len(configs)]]
                pair = (anchor, config) if (k + slot + a) % 2 else (config, anchor)
                rows.append(pair_row(key, "anchor", *pair))
                met += 1
    return rows


def plan_ratings(prompts: pd.DataFrame, configs: Sequence[str], *, share: float, seed: int) -> pd.DataFrame:
    """The rubric as a plan: every configuration's answer on a seeded share of the prompts, one question each.

    A smaller share is a part of a larger one, so that judges who rate different shares have answers in common.
    """
    _check_design(prompts, configs)
    keys = _shuffled(prompts, np.random.default_rng(seed))
    keys = keys[: max(1, round(share * len(keys))) if share > 0 else 0]
    fixed = {"purpose": "rubric", "order": "ab", "repeat": 0}
    rows = [{**key, **fixed, "configs": [config]} for key in keys for config in configs]
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _shuffled(prompts: pd.DataFrame, rng: np.random.Generator) -> list[dict]:
    """The prompts' ids in a seeded order, so that a design does not line up with the terms."""
    keys = prompts.sort_values("prompt_id")[SHARED_COLUMNS[1:]].to_dict("records")
    return [keys[i] for i in rng.permutation(len(keys))]


def seated(row: Mapping[str, Any]) -> list[str]:
    """The configurations of a plan's row by seat."""
    return list(row["configs"]) if "configs" in row else [row["config_first"], row["config_second"]]


def form_of(row: Mapping[str, Any]) -> Form:
    return "rubric" if row["purpose"] == "rubric" else "pair"
