"""Blind pairs for people, or for any judge outside: which pairs to show, and the key that stays here.

The pairs whose vote is worth most come first. What a rater gets names no configuration and no control; the key maps
`pair_id` to them. Answers that lose by rule are not shown: their verdict is known. They are drawn like all others and
stand in the key, because without them a configuration that often loops would look better than it is. Some pairs set a
configuration beside an anchor, a text that needs no training.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from telco_nb.corpus.cards import Card
from telco_nb.hosted.keys import printable
from telco_nb.judge import design
from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.cases import Answers, degenerate_answer
from telco_nb.judge.gate import planted_controls
from telco_nb.judge.prompts import card_text
from telco_nb.judge.store import text_sha256
from telco_nb.study.input_files import InputFileError, read_json_lines

CONTROL_SHARE, ANCHOR_SHARE, REPEAT_SHARE = 0.15, 0.15, 0.05
BALANCED_EVERY = 5  # every fifth pair follows the round robin, so that all configurations hang together
MOST_DRAWS = 20  # per pair to be shown; where nearly all answers lose by rule fewer pairs are shown
KEY_COLUMNS = ["pair_id", "position", *design.PLAN_COLUMNS, "control", "planted", "sha256_first", "sha256_second"]
KEY_FOLDER = "votes"
SEATS = ("config_first", "config_second")

Row = dict[str, Any]


class Material(NamedTuple):
    """What a study holds to be voted on. `answers` has the planted texts of `controls`, the plan of the gate, in it."""

    prompts: pd.DataFrame
    answers: Answers
    cards: Mapping[str, Card]
    configs: Sequence[str]
    controls: pd.DataFrame

    def texts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The two texts of a row, by seat."""
        first, second = (self.answers.get((row[seat], row["prompt_id"])) or "" for seat in SEATS)
        return first, second


def make_material(
    prompts: pd.DataFrame, answers: Answers, cards: Mapping[str, Card], configs: Sequence[str], seed: int
) -> Material:
    """The material of a study; `seed` is the study's, because it decides what the gate plants."""
    controls, planted = planted_controls(prompts, answers, cards, configs, seed=seed)
    return Material(prompts, {**answers, **planted}, cards, configs, controls)


class Export(NamedTuple):
    """`pairs` is what a rater gets, in order; `key` has one row a pair, and one without pair_id for each by rule."""

    name: str
    pairs: list[Row]
    key: list[Row]

    def count(self, *purposes: str) -> int:
        return sum(row["purpose"] in purposes and row["pair_id"] is not None for row in self.key)


# ---------------------------------------------------------------- which pairs


def worth_of_pairs(score_draws: Sequence[pd.DataFrame], configs: Sequence[str]) -> np.ndarray | None:
    """How much a vote on each pair of configurations is worth, (n, n), 0 to 1; None without any ranking.

    It is 4 p (1 - p), where p is the share of draws in which the one scores above the other, over all rankings: 1 where
    scores are close or uncertain, or where the judges contradict each other; near 0 where all are sure.

    Args:
        score_draws: of each judge with a ranking, (draws, configurations).
        configs: the configurations to compare.
    """
    n, seen = len(configs), []
    for draws in score_draws:
        scores = draws.reindex(columns=list(configs)).to_numpy(float)
        above = (scores[:, :, None] > scores[:, None, :]).mean(0) + (scores[:, :, None] == scores[:, None, :]).mean(
            0
        ) / 2
        known = np.flatnonzero(~np.isnan(scores).any(axis=0))
        if len(known) > 1:
            p = np.full((n, n), 0.5)
            p[np.ix_(known, known)] = above[np.ix_(known, known)]
            seen.append(p)
    if not seen:
        return None
    p = np.mean(seen, axis=0)
    return np.where(np.eye(n, dtype=bool), 0.0, 4 * p * (1 - p))


def pair_order(worth: np.ndarray | None, n: int, n_pairs: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Pairs of `n` configurations without end, those worth most first, each in proportion to its worth.

    A share follows the rounds of a round robin; without a ranking all do.

    Args:
        worth: of `worth_of_pairs`.
        n: the number of configurations.
        n_pairs: how many pairs will be shown, at least; with few the share of the round robin is larger.
        rng: decides between equals.
    """
    names = rng.permutation(n)
    robin = cycle([(int(names[i]), int(names[j])) for matching in design.matchings(n) for i, j in matching])
    if worth is None:
        yield from robin
        return
    every = max(1, min(BALANCED_EVERY, n_pairs // n))
    upper = np.triu(worth * (1 + 1e-6 * rng.random((n, n))), 1)
    count, k = np.zeros((n, n)), 0
    while True:
        k += 1
        if k % every == 0:
            i, j = sorted(next(robin))
        else:
            i, j = (int(place) for place in np.unravel_index((upper / (1 + count)).argmax(), upper.shape))
        count[i, j] += 1
        yield i, j


def spread_prompts(prompts: pd.DataFrame, rng: np.random.Generator) -> list[Row]:
    """The prompts in a seeded order in which every stretch holds all test sets in their shares."""
    rows = prompts.sort_values("prompt_id").to_dict("records")
    rows = [rows[i] for i in rng.permutation(len(rows))]
    sets: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sets[row.get("test_set", "")].append(row)
    place = {r["prompt_id"]: (i + rng.random()) / len(own) for own in sets.values() for i, r in enumerate(own)}
    rows.sort(key=lambda row: place[row["prompt_id"]])
    return [{name: row[name] for name in design.PROMPT_COLUMNS} for row in rows]


def ranking_rows(
    material: Material, n: int, worth: np.ndarray | None, rng: np.random.Generator, taken: set[tuple]
) -> list[Row]:
    """Draw pairs until `n` can be shown. Rows in order; `by_rule` marks those whose verdict needs no judge.

    `taken` holds the questions that were drawn before, by prompt and texts; new ones are added.
    """
    configs = list(material.configs)
    prompts, seats = spread_prompts(material.prompts, rng), design.Seats(len(configs), rng)
    rows: list[Row] = []
    shown = 0
    for k, (i, j) in enumerate(pair_order(worth, len(configs), n, rng)):
        if shown == n or k == MOST_DRAWS * n:
            break
        for key in prompts[k % len(prompts) :] + prompts[: k % len(prompts)]:
            row = design.pair_row(key, "ranking", configs[i], configs[j])
            if not _is_new(row, material, taken):  # asked, also where another pair gave the same two answers
                continue
            a, b = seats.take(i, j)
            row |= {"config_first": configs[a], "config_second": configs[b]}
            row["by_rule"] = any(degenerate_answer(text) for text in material.texts(row))
            shown += not row["by_rule"]
            rows.append(row)
            break
    return rows


def _is_new(row: Row, material: Material, taken: set[tuple]) -> bool:
    """Whether this question was not drawn before; from now on it was."""
    question = (row["prompt_id"], *sorted(material.texts(row)))
    is_new = question not in taken
    taken.add(question)
    return is_new


def anchor_rows(material: Material, n: int, rng: np.random.Generator, taken: set[tuple]) -> list[Row]:
    """Pairs of an anchor and a configuration until `n` can be shown, anchors, configurations and prompts in turn.

    `taken` as in `ranking_rows`.
    """
    prompts = spread_prompts(material.prompts, rng)
    anchors = [name for name in ANCHORS if any((name, key["prompt_id"]) in material.answers for key in prompts)]
    configs = [material.configs[i] for i in rng.permutation(len(material.configs))]
    rows: list[Row] = []
    for turn in range(len(configs) * len(prompts)):
        shift = turn // math.lcm(len(configs), len(prompts))  # otherwise the same pairs would come again
        key, config = prompts[(turn + shift) % len(prompts)], configs[turn % len(configs)]
        for k, anchor in enumerate(anchors):
            if sum(not row["by_rule"] for row in rows) == n:
                return rows
            is_first = (turn + turn // len(configs) + k) % 2  # each in both seats, whatever their numbers
            row = design.pair_row(key, "anchor", *((anchor, config) if is_first else (config, anchor)))
            if _is_new(row, material, taken):
                rows.append(row | {"by_rule": any(degenerate_answer(text) for text in material.texts(row))})
    return rows


def control_rows(controls: pd.DataFrame, n: int, rng: np.random.Generator) -> list[Row]:
    """`n` planted controls, all kinds in turn, each time on another prompt."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    rows = controls.to_dict("records")
    for i in rng.permutation(len(rows)):
        by_kind[rows[i]["control"]].append(rows[i])
    kinds = [sorted(by_kind)[i] for i in rng.permutation(len(by_kind))]
    longest = max(map(len, by_kind.values()), default=0)
    in_turn = [by_kind[kind][turn] for turn in range(longest) for kind in kinds if turn < len(by_kind[kind])]
    return in_turn[:n]


# ---------------------------------------------------------------- the file and its key


def make_export(material: Material, n: int, seed: int, score_draws: Sequence[pd.DataFrame] = ()) -> Export:
    """Choose the pairs of an export, put them in order, and make its key. The same arguments give the same export.

    Args:
        material: what can be voted on.
        n: the number of pairs, those with anchors, controls and repeats among them.
        seed: of all random choices.
        score_draws: of the rankings that exist, see `worth_of_pairs`.
    """
    rng = np.random.default_rng(seed)
    n_repeats = round(REPEAT_SHARE * n)
    controls = control_rows(material.controls, round(CONTROL_SHARE * n), rng)
    worth = worth_of_pairs(score_draws, material.configs)
    n_anchored, taken = round(ANCHOR_SHARE * n), set()
    drawn = ranking_rows(material, n - len(controls) - n_repeats - n_anchored, worth, rng, taken)
    anchored = anchor_rows(material, n_anchored, rng, taken)
    shown = [row for row in drawn if not row["by_rule"]]
    early = shown[: len(shown) // 2]
    again = [early[i] for i in sorted(rng.permutation(len(early))[:n_repeats])]
    repeats = [design.with_swapped_seats(row) | {"by_rule": False} for row in again]
    return _sealed(_mixed(_merged(drawn, anchored), controls, repeats, rng), material, seed)


def _merged(*lists: list[Row]) -> list[Row]:
    """Rows in their orders, every stretch with all lists in their shares."""
    placed = [[((i + 0.5) / len(rows), k, row) for i, row in enumerate(rows)] for k, rows in enumerate(lists)]
    return [row for _, _, row in heapq.merge(*placed, key=lambda entry: entry[:2])]


def _mixed(drawn: list[Row], controls: list[Row], repeats: list[Row], rng: np.random.Generator) -> list[Row]:
    """All rows in one order: controls anywhere, repeats in the last third, the others as they were drawn."""
    n = len(controls) + len(repeats) + sum(not row["by_rule"] for row in drawn)
    late = rng.permutation(np.arange(n - n // 3, n))[: len(repeats)]
    free = rng.permutation(np.setdiff1d(np.arange(n), late))[: len(controls)]
    planned = dict(zip(late, repeats, strict=False)) | dict(zip(free, controls, strict=True))
    others, rows = iter(drawn), []
    for place in range(n):
        if place in planned:
            rows.append(planned[place])
            continue
        for row in others:
            rows.append(row)
            if not row["by_rule"]:
                break
    return [*rows, *others]


def _sealed(rows: list[Row], material: Material, seed: int) -> Export:
    """Give every row its place, its id and the hashes of its texts."""
    pairs, key = [], []
    conversations = material.prompts.set_index("prompt_id")
    for row in rows:
        first, second = material.texts(row)
        entry = {name: row.get(name) for name in KEY_COLUMNS} | {"position": len(pairs) + 1}
        entry |= {"sha256_first": text_sha256(first), "sha256_second": text_sha256(second)}
        if not row.get("by_rule"):
            entry["pair_id"] = _digest([seed, *(entry[name] for name in KEY_COLUMNS)])
            prompt = conversations.loc[row["prompt_id"]]
            said = [{"role": m["role"], "content": printable(m["content"])} for m in prompt["messages"]]
            card = card_text(material.cards[prompt["term_id"]], prompt["problem_id"])
            texts = {"answer_a": printable(first), "answer_b": printable(second)}
            pairs.append({"pair_id": entry["pair_id"], "conversation": said, "card": card} | texts)
        key.append(entry)
    return Export(_digest([seed, key]), pairs, key)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSONL in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def key_path(root: Path, export: Export) -> Path:
    return root / KEY_FOLDER / f"{export.name}.jsonl"


def _is_key_row(row: Any) -> bool:
    """True for an object with all columns of a key: two numbers, and texts, some of which may be null."""
    if not isinstance(row, dict) or set(row) != set(KEY_COLUMNS):
        return False
    numbers = all(type(row[name]) is int for name in ("position", "repeat"))
    texts = (value for name, value in row.items() if name not in ("position", "repeat"))
    return numbers and all(isinstance(value, str | None) for value in texts) and all(row[seat] for seat in SEATS)


def read_keys(root: Path) -> list[list[Row]]:
    """The keys of all exports of a study, each in the order of its pairs.

    Raises InputFileError for a key that cannot be read.
    """
    keys = []
    for path in sorted((root / KEY_FOLDER).glob("*.jsonl")):
        try:
            rows = [row for _, row in read_json_lines(path)]
        except InputFileError:
            rows = [{}]
        if not all(_is_key_row(row) for row in rows):
            raise InputFileError(f"{path}: this is no key of an export. Put the file back, or remove it.")
        keys.append(rows)
    return keys
