"""Tables of a fitted ranking: scores with intervals, anchors, which configurations can be told apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.judge.bradley_terry import Draws, Fit, interval_levels, place_anchor
from telco_nb.judge.design import ANCHORS


def ranking_table(verdicts: pd.DataFrame, fitted: Fit, draws: Draws) -> pd.DataFrame:
    """One row per configuration, best first: score, interval, rank, rank interval, P(best), number of verdicts."""
    ranks = (-draws.abilities).argsort(1).argsort(1) + 1
    ends = interval_levels(len(draws.units))
    low, high = np.quantile(draws.abilities, ends, axis=0)
    rank_low = np.quantile(ranks, ends[0], axis=0, method="lower")
    rank_high = np.quantile(ranks, ends[1], axis=0, method="higher")
    if fitted.is_missing:
        ranks, rank_low, rank_high = (np.full(np.shape(x), np.nan) for x in (ranks, rank_low, rank_high))
    met = pd.concat([verdicts["config_first"], verdicts["config_second"]]).value_counts()
    table = pd.DataFrame(
        {
            "config": fitted.configs,
            "score": fitted.abilities,
            "low": low,
            "high": high,
            "rank": pd.Series(-fitted.abilities).rank(method="min").astype("Int64"),
            "rank_low": pd.array(rank_low, dtype="Int64"),
            "rank_high": pd.array(rank_high, dtype="Int64"),
            "p_best": np.full(len(fitted.configs), np.nan) if fitted.is_missing else (ranks == 1).mean(0),
            "n_judgements": [int(met.get(config, 0)) for config in fitted.configs],
            "is_anchor": False,
        }
    )
    return table.sort_values(["rank", "config"], ignore_index=True)


def anchor_row(verdicts: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> tuple[dict, np.ndarray]:
    """A row like those of `ranking_table` for an anchor (no rank, no P(best)), and its score per draw.

    Where the anchor won (or lost) every comparison, the data put no bound on that side: the bound is missing.
    """
    row = {"config": anchor, "score": np.nan, "n_judgements": len(verdicts), "is_anchor": True}
    if fitted.is_missing or verdicts.empty:
        return row | {"low": np.nan, "high": np.nan}, np.full(len(draws.abilities), np.nan)
    score, drawn = place_anchor(verdicts, anchor, fitted, draws)
    low, high = np.nanquantile(drawn, interval_levels(len(draws.units)))
    won = np.where(verdicts["config_first"] == anchor, verdicts["verdict"] == "A", verdicts["verdict"] == "B")
    lost = np.where(verdicts["config_first"] == anchor, verdicts["verdict"] == "B", verdicts["verdict"] == "A")
    return row | {"score": score, "low": np.nan if lost.all() else low, "high": np.nan if won.all() else high}, drawn


def with_anchors(
    table: pd.DataFrame, plan: pd.DataFrame, judged: pd.DataFrame, fitted: Fit, draws: Draws
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Place the anchors on the finished scale, so that they cannot move the ranking.

    Args:
        table: the ranking of the configurations (`ranking_table`).
        plan: the planned pairs; an anchor that it never names is left out.
        judged: the verdicts on the plan.
        fitted, draws: the fit and its bootstrap.

    Returns:
        The table with a row more per anchor, and the scores of all in every draw: (draws, configurations and anchors).
    """
    rows, columns = [], [pd.DataFrame(draws.abilities, columns=fitted.configs)]
    for anchor in ANCHORS:
        if not (plan[["config_first", "config_second"]] == anchor).to_numpy().any():
            continue
        met = (judged["purpose"] == "anchor") & (judged[["config_first", "config_second"]] == anchor).any(axis=1)
        row, scores = anchor_row(judged[met], anchor, fitted, draws)
        rows.append(row)
        columns.append(pd.Series(scores, name=anchor).to_frame())
    placed = pd.concat([table, pd.DataFrame(rows)], ignore_index=True) if rows else table
    return placed, pd.concat(columns, axis=1).rename_axis("draw")


def pair_counts(verdicts: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """Wins and ties of every pair that met, whatever the seats: config_a, config_b, wins_a, ties, wins_b."""
    place = {config: i for i, config in enumerate(configs)}
    swap = verdicts["config_first"].map(place) > verdicts["config_second"].map(place)
    a = verdicts["config_second"].where(swap, verdicts["config_first"])
    b = verdicts["config_first"].where(swap, verdicts["config_second"])
    first_won, second_won = verdicts["verdict"] == "A", verdicts["verdict"] == "B"
    rows = pd.DataFrame(
        {
            "config_a": a,
            "config_b": b,
            "wins_a": second_won.where(swap, first_won).astype(int),
            "ties": (verdicts["verdict"] == "tie").astype(int),
            "wins_b": first_won.where(swap, second_won).astype(int),
        }
    )
    return rows.groupby(["config_a", "config_b"], as_index=False).sum()


def pair_tests(fitted: Fit, draws: Draws) -> pd.DataFrame:
    """Every two configurations: difference of their scores, its interval, p and Holm-adjusted p over all pairs.

    config_a has the higher score. The difference over its standard deviation in the draws is taken as t with one
    degree of freedom less than there are clusters; `told_apart` where the adjusted p is below .05.
    """
    order = np.argsort(-fitted.abilities, kind="stable")
    a, b = (order[i] for i in np.triu_indices(len(order), 1))
    gap = fitted.abilities[a] - fitted.abilities[b]
    drawn = draws.abilities[:, a] - draws.abilities[:, b]
    low, high = np.quantile(drawn, interval_levels(len(draws.units)), axis=0)
    t = gap / np.maximum(drawn.std(0, ddof=1), 1e-12)
    p = 2 * stats.t.sf(np.abs(t), max(1, len(draws.units) - 1))
    adjusted = np.full(len(p), np.nan) if fitted.is_missing else holm(p)
    names = np.array(fitted.configs, dtype=object)
    table = {"config_a": names[a], "config_b": names[b], "difference": gap, "low": low, "high": high, "p": p}
    return pd.DataFrame(table | {"p_holm": adjusted, "told_apart": adjusted < 0.05})


def tied_top(scores: pd.Series, draws: pd.DataFrame, level: float = 0.05) -> list[str]:
    """Configurations not distinguishable from the best one, best first.

    Each is compared with the best by its paired difference over the draws (normal approximation), Holm-adjusted over
    these comparisons only: fewer than all pairs, so this tells apart what `pair_tests` may not.
    """
    scores = scores.sort_values(ascending=False)
    best, others = scores.index[0], scores.index[1:]
    z = [(scores[best] - scores[c]) / max((draws[best] - draws[c]).std(), 1e-12) for c in others]
    p = 2 * stats.norm.sf(np.array(z))
    return [best, *(c for c, adjusted in zip(others, holm(p), strict=True) if adjusted >= level)]


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values, in the order given."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted


def win_rates(pairs: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """Share of the meetings that the row won against the column, ties as a half (`pair_counts`); NaN where none."""
    rates = pd.DataFrame(np.nan, index=pd.Index(configs, name="config"), columns=list(configs))
    for row in pairs.itertuples():
        met = row.wins_a + row.ties + row.wins_b
        rates.loc[row.config_a, row.config_b] = (row.wins_a + row.ties / 2) / met
        rates.loc[row.config_b, row.config_a] = (row.wins_b + row.ties / 2) / met
    return rates


def mean_with_interval(values: pd.Series, units: pd.Series, draws: Draws) -> dict[str, float | int | None]:
    """Mean of `values`, and its interval over the resamples of the fit's bootstrap; missing values are left out.

    `units` is the cluster of every value, as in the bootstrap.
    """
    kept = values.notna().to_numpy()
    if not kept.any() or not len(draws.units):
        return {"value": None, "low": None, "high": None, "n": 0}
    numbers = values[kept].to_numpy(dtype=float)
    weights = draws.weights[:, draws.units.get_indexer(units[kept])]
    total = weights.sum(1)
    means = (weights @ numbers)[total > 0] / total[total > 0]
    low, high = np.quantile(means, interval_levels(len(draws.units)))
    return {"value": float(numbers.mean()), "low": float(low), "high": float(high), "n": int(kept.sum())}
