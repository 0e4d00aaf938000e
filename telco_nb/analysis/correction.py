"""Votes correct the scores of a judge that judges everything: prediction-powered Bradley-Terry scores.

A cheap judge compares every pair of answers, a voter (a person, or a panel outside) compares few. The voter decides
what is true; the judge only takes noise away, as far as it agrees with the votes. For a comparison with the vote y, the
judge's verdict f on it, and the judge's mean F over all prompts for the same two configurations (a win is 1, a tie a
half), the scores solve

    sum of x (y - weight (f - F) - sigma(x scores)) = 0

With weight 0 this is the ranking by votes alone. f - F has mean 0 whatever the judge prefers, so a biased judge moves
no score. The weight that the data choose makes the variance least (PPI++ for M-estimators,
Angelopoulos, Duchi and Zrnic 2023). Errors are clustered by term; `bench/judging_correction.py` checks the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis.results import JudgeResults
from telco_nb.analysis.statistics import kendall_tau
from telco_nb.judge import separation
from telco_nb.judge.bradley_terry import RIDGE, unrankable_reason
from telco_nb.judge.ranking import few_terms
from telco_nb.judge.store import FIT_PURPOSES
from telco_nb.study.params import VOTED_KINDS

MIN_VOTES = 100  # on pairs that the judge has judged too; fewer correct nothing


class Correction(NamedTuple):
    """Scores of a judge after correction.

    `table` has one row per configuration, best first: config, judge_score (by the judge alone), votes_score, votes_low,
    votes_high (by the votes alone), score, low, high (corrected), n_votes. All are log-odds with mean 0 in which a tie
    is half a win, so they are comparable with each other, and not with scores of a model with ties. Bounds are missing
    where the votes do not limit a score. `weight` is that of the judge, 0 to 1.
    """

    judge: str
    voters: str
    table: pd.DataFrame
    weight: float
    n_votes: int
    n_terms: int


def correct_scores(
    judge: str, voters: str, voted: pd.DataFrame, judged: pd.DataFrame, configs: Sequence[str]
) -> Correction | None:
    """Correct the scores of a judge by votes.

    Args:
        judge, voters: names, for messages.
        voted: the verdicts of the voters (`store.judged_rows`); those by rule count, but are no votes.
        judged: the verdicts of the judge on the same study, as many as it can give.
        configs: the configurations.

    Returns:
        The correction; None with fewer than MIN_VOTES votes on pairs that the judge has judged, with votes on fewer
        terms than a ranking needs (`ranking.few_terms`), or if the votes do not connect all configurations.
    """
    means, rows = _joined(voted, judged, list(configs))
    n_votes = int((rows["source"] != "rule").sum())
    if n_votes < MIN_VOTES or few_terms(rows["term_id"].nunique()) or unrankable_reason(rows, list(configs)):
        return None
    data = _Data.of(means, rows, list(configs))
    alone = _fit(data, 0.0)
    weight = _best_weight(data, alone)
    corrected = _fit(data, weight)
    bounds = _bounds(data, corrected, weight), _bounds(data, alone, 0.0)
    columns = {
        "config": list(configs),
        "judge_score": solve(data.x, data.mean)[:-1],
        "votes_score": alone[:-1],
        "votes_low": bounds[1][0],
        "votes_high": bounds[1][1],
        "score": corrected[:-1],
        "low": bounds[0][0],
        "high": bounds[0][1],
    }
    votes = rows[rows["source"] != "rule"]
    counts = pd.concat([votes["config_first"], votes["config_second"]]).value_counts()
    table = pd.DataFrame(columns).assign(n_votes=counts.reindex(list(configs), fill_value=0).to_numpy())
    table = table.sort_values("score", ascending=False, ignore_index=True)
    return Correction(judge, voters, table, weight, n_votes, int(rows["term_id"].nunique()))


# ---------------------------------------------------------------- the data


def _joined(voted: pd.DataFrame, judged: pd.DataFrame, configs: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The judge's mean outcome per pair and prompt, and the votes on those with it as column f.

    An outcome is 1 if the first of the two names wins, 0 if the other does, and .5 for a tie.
    """
    sides = [_oriented(table[table["purpose"].isin(FIT_PURPOSES)], configs) for table in (judged, voted)]
    keys = ["low", "high", "prompt_id"]
    means = sides[0].groupby([*keys, "term_id"], as_index=False)["outcome"].mean()
    rows = sides[1].merge(means.rename(columns={"outcome": "f"}).drop(columns="term_id"), on=keys)
    return means, rows


def _oriented(table: pd.DataFrame, configs: list[str]) -> pd.DataFrame:
    first, second = table["config_first"], table["config_second"]
    table = table[first.isin(configs) & second.isin(configs)]
    low, high = (getattr(table[["config_first", "config_second"]], end)(axis=1) for end in ("min", "max"))
    outcome = np.select([table["winner"] == low, table["winner"] == high], [1.0, 0.0], 0.5)
    return table.assign(low=low, high=high, outcome=outcome)


class _Data(NamedTuple):
    """Arrays over the votes: design x (votes, configurations + 1), the vote y, the judge's verdict f and its mean; all
    seen from the first seat. `cluster` is the term of each vote, `spread` (terms, configurations + 1) the share of each
    term in the error of the judge's means."""

    x: np.ndarray
    y: np.ndarray
    f: np.ndarray
    mean: np.ndarray
    cluster: np.ndarray
    spread: np.ndarray
    open_above: np.ndarray
    open_below: np.ndarray

    @classmethod
    def of(cls, means: pd.DataFrame, rows: pd.DataFrame, configs: list[str]) -> _Data:
        n, terms = len(rows), pd.Index(sorted(set(means["term_id"])))
        first, second = (pd.Index(configs).get_indexer(rows[f"config_{seat}"]) for seat in ("first", "second"))
        x = np.zeros((n, len(configs) + 1))
        x[np.arange(n), first], x[np.arange(n), second], x[:, -1] = 1.0, -1.0, 1.0
        by_pair = means.groupby(["low", "high"])["outcome"]
        centred = means.assign(outcome=(means["outcome"] - by_pair.transform("mean")) / by_pair.transform("size"))
        shares = centred.pivot_table("outcome", ["low", "high"], "term_id", "sum", fill_value=0.0)
        pairs = pd.MultiIndex.from_frame(rows[["low", "high"]])
        flip = (rows["low"] != rows["config_first"]).to_numpy()
        sign = np.where(flip, -1.0, 1.0)
        spread = (x * sign[:, None]).T @ shares.reindex(index=pairs, columns=terms).to_numpy()
        seen = [np.where(flip, 1 - values, values) for values in (
            rows["outcome"].to_numpy(), rows["f"].to_numpy(), by_pair.mean().reindex(pairs).to_numpy(),
        )]  # fmt: skip
        cluster = terms.get_indexer(rows["term_id"])
        limits = separation.limited(rows, configs, np.ones((1, 1)), np.zeros(n, int))
        above, below = separation.open_sides(limits)
        return cls(x, *seen, cluster, spread.T, above[0], below[0])


# ---------------------------------------------------------------- the fit


def solve(x: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """The logistic fit of outcomes, which need not lie between 0 and 1: Newton steps on a concave function."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        share = _sigma(x @ beta)
        step = np.linalg.solve(_information(x, share), x.T @ (outcome - share) - RIDGE * beta)
        beta += step * min(1.0, 2.0 / max(1e-12, np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    return beta


def _sigma(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(eta, -40, 40)))


def _information(x: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (x * (share * (1 - share))[:, None]).T @ x + RIDGE * np.eye(x.shape[1])


def _fit(data: _Data, weight: float) -> np.ndarray:
    return solve(data.x, data.y - weight * (data.f - data.mean))


def _scores_by_term(data: _Data, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each term adds to the equation: by the votes, and by the judge's verdicts less their means."""
    parts = []
    for values in (data.y - _sigma(data.x @ beta), data.f - data.mean):
        sums = np.zeros_like(data.spread)
        np.add.at(sums, data.cluster, data.x * values[:, None])
        parts.append(sums)
    return parts[0], parts[1] - data.spread


def _best_weight(data: _Data, beta: np.ndarray) -> float:
    """The weight of the judge that makes the variance of the scores least, 0 to 1."""
    inverse = np.linalg.inv(_information(data.x, _sigma(data.x @ beta)))[:-1]
    votes, judge = (part @ inverse.T for part in _scores_by_term(data, beta))
    most = (judge**2).sum()
    return float(np.clip((votes * judge).sum() / most, 0, 1)) if most > 0 else 0.0


def _bounds(data: _Data, beta: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds of the scores: a sandwich clustered by term, with t quantiles."""
    votes, judge = _scores_by_term(data, beta)
    inverse = np.linalg.inv(_information(data.x, _sigma(data.x @ beta)))
    errors = (votes - weight * judge) @ inverse
    terms, (n, p) = len(np.unique(data.cluster)), data.x.shape
    variance = (errors**2).sum(0) * terms / (terms - 1) * (n - 1) / max(1, n - p)
    half = stats.t.ppf(0.975, terms - 1) * np.sqrt(variance)[:-1]
    low, high = beta[:-1] - half, beta[:-1] + half
    return np.where(data.open_below, np.nan, low), np.where(data.open_above, np.nan, high)


# ---------------------------------------------------------------- for 06_analysis


def corrections(
    panel: Sequence[JudgeResults], judgements: Mapping[str, pd.DataFrame], configs: Sequence[str]
) -> list[Correction]:
    """The checklist corrected by people, all together, and by each panel outside; only voters that passed their gate.

    Args:
        panel: the judges of the study.
        judgements: their verdicts, by name.
        configs: the configurations.
    """
    passed = [judge for judge in panel if judge.gate_passed and judge.kind in VOTED_KINDS]
    groups = {judge.name: [judge.name] for judge in passed if judge.kind != "human"}
    if people := [judge.name for judge in passed if judge.kind == "human"]:
        groups = {" and ".join(people) if len(people) < 3 else f"{len(people)} people": people} | groups
    found = [
        correct_scores(
            judge.name, name, pd.concat([judgements[voter] for voter in voters]), judgements[judge.name], configs
        )
        for judge in panel
        if judge.kind == "checklist"
        for name, voters in groups.items()
    ]
    return [correction for correction in found if correction is not None]


def correction_text(correction: Correction) -> str:
    """What a correction has changed, in Markdown."""
    table = correction.table
    tau = kendall_tau(table["judge_score"], table["score"])
    outside = table.loc[(table["judge_score"] < table["low"]) | (table["judge_score"] > table["high"]), "config"]
    width = float(((table["high"] - table["low"]) / (table["votes_high"] - table["votes_low"])).median())
    words = (
        f"for {len(outside)} of {len(table)} the score by {correction.judge} alone lies outside the corrected interval"
    )
    named = f" ({', '.join(outside)})" if len(outside) else ""
    who = f"{correction.n_votes} votes of {correction.voters} on {correction.n_terms} terms"
    return (
        f"**{who} correct {correction.judge}**: {words}{named}. Tau-b of the scores before and after is "
        f"{'not known' if math.isnan(tau) else f'{tau:.2f}'}. The votes decide; with a weight of "
        f"{correction.weight:.2f} {correction.judge} makes the intervals {_width_text(width)}."
    )


def _width_text(width: float) -> str:
    """The width of the corrected intervals as a share of those by the votes alone, in words."""
    if math.isnan(width):
        return "open, as they are by the votes alone"
    word = "narrower" if width < 0.95 else "wider" if width > 1.05 else "hardly another width"
    return f"{word}: {width:.2f} times the width of those by the votes alone"
