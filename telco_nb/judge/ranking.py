"""The tables of a fitted ranking: scores with intervals, anchors, and tests of the differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.judge.bradley_terry import Draws, Fit, interval_levels, place_anchor
from telco_nb.judge.design import ANCHORS


def ranking_table(verdicts: pd.DataFrame, fitted: Fit, draws: Draws) -> pd.DataFrame:
    """The ranking.

    Args:
        verdicts: the verdicts of the fit (`store.judged_rows`).
        fitted: the fit.
        draws: its bootstrap.

    Returns:
        One row per configuration, best first: score with interval (low, high) in log-odds, rank with interval
        (rank_low, rank_high), p_best (the share of draws in which it is first) and n_judgements.
    """
    ranks = (-draws.abilities).argsort(1).argsort(1) + 1
    ends = interval_levels(len(draws.units))
    low, high = np.quantile(draws.abilities, ends, axis=0)
    rank_low = np.quantile(ranks, ends[0], axis=0, method="lower")
    rank_high = np.quantile(ranks, ends[1], axis=0, method="higher")
    if fitted.is_missing:
        ranks, rank_low, rank_high = (np.full(np.shape(x), np.nan) for x in (ranks, rank_low, rank_high))
    counts = pd.concat([verdicts["config_first"], verdicts["config_second"]]).value_counts()
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
            "n_judgements": [int(counts.get(config, 0)) for config in fitted.configs],
            "is_anchor": False,
        }
    )
    return table.sort_values(["rank", "config"], ignore_index=True)


def anchor_row(verdicts: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> tuple[dict, np.ndarray]:
    """The ranking row of an anchor, without rank and p_best, and its scores (draws,).

    Args:
        verdicts: the anchor's comparisons with configurations of the fit.
        anchor: the anchor's name.
        fitted: the fit.
        draws: its bootstrap.

    Returns:
        The row and the scores. If the anchor won (lost) all comparisons, the upper (lower) bound is missing, because
        the data do not limit that side.
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
    """Places the anchors on the finished scale, so that they cannot change the ranking.

    Args:
        table: the ranking of the configurations (`ranking_table`).
        plan: the planned pairs; an anchor that does not occur in it is left out.
        judged: the verdicts on the plan.
        fitted: the fit.
        draws: its bootstrap.

    Returns:
        The table with one more row per anchor, and all scores as (draws, configurations and anchors).
    """
    rows, columns = [], [pd.DataFrame(draws.abilities, columns=fitted.configs)]
    for anchor in ANCHORS:
        if not (plan[["config_first", "config_second"]] == anchor).to_numpy().any():
            continue
        own = (judged["purpose"] == "anchor") & (judged[["config_first", "config_second"]] == anchor).any(axis=1)
        row, scores = anchor_row(judged[own], anchor, fitted, draws)
        rows.append(row)
        columns.append(pd.Series(scores, name=anchor).to_frame())
    placed = pd.concat([table, pd.DataFrame(rows)], ignore_index=True) if rows else table
    return placed, pd.concat(columns, axis=1).rename_axis("draw")


def pair_counts(verdicts: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """The wins and ties of every pair with a comparison, in both seats: config_a, config_b, wins_a, ties, wins_b.

    `config_a` is the configuration that comes first in `configs`.
    """
    place = {config: i for i, config in enumerate(configs)}
    first, second, verdict = verdicts["config_first"], verdicts["config_second"], verdicts["verdict"]
    swap = first.map(place) > second.map(place)
    rows = pd.DataFrame(
        {
            "config_a": second.where(swap, first),
            "config_b": first.where(swap, second),
            "wins_a": (verdict == np.where(swap, "B", "A")).astype(int),
            "ties": (verdict == "tie").astype(int),
            "wins_b": (verdict == np.where(swap, "A", "B")).astype(int),
        }
    )
    return rows.groupby(["config_a", "config_b"], as_index=False).sum()


def pair_tests(fitted: Fit, draws: Draws) -> pd.DataFrame:
    """Tests the difference of scores in every pair of configurations.

    The difference over its standard deviation in the draws is compared with t on (number of clusters - 1) degrees of
    freedom.

    Returns:
        One row per pair: config_a (with the higher score), config_b, difference with interval (low, high), p, p_holm
        (adjusted over all pairs) and told_apart (p_holm below .05).
    """
    order = np.argsort(-fitted.abilities, kind="stable")
    a, b = (order[i] for i in np.triu_indices(len(order), 1))
    gap = fitted.abilities[a] - fitted.abilities[b]
    drawn = draws.abilities[:, a] - draws.abilities[:, b]
    low, high = np.quantile(drawn, interval_levels(len(draws.units)), axis=0)
    t = gap / np.maximum(drawn.std(0, ddof=1), 1e-12)
    p = 2 * stats.t.sf(np.abs(t), max(1, len(draws.units) - 1))
    adjusted = holm(p)
    names = np.array(fitted.configs, dtype=object)
    table = {"config_a": names[a], "config_b": names[b], "difference": gap, "low": low, "high": high, "p": p}
    return pd.DataFrame(table | {"p_holm": adjusted, "told_apart": adjusted < 0.05})


def tied_top(scores: pd.Series, draws: pd.DataFrame, level: float = 0.05) -> list[str]:
    """The configurations that are not distinguishable from the best one, best first.

    Each is compared with the best by the paired difference over the draws (normal approximation), Holm-adjusted over
    these comparisons. They are fewer than all pairs, so this can separate configurations that `pair_tests` cannot.

    Args:
        scores: score by configuration.
        draws: scores as (draws, configurations).
        level: configurations with an adjusted p of at least this are kept.
    """
    scores = scores.sort_values(ascending=False)
    best, others = scores.index[0], scores.index[1:]
    z = [(scores[best] - scores[c]) / max((draws[best] - draws[c]).std(), 1e-12) for c in others]
    p = 2 * stats.norm.sf(np.array(z))
    return [best, *(c for c, adjusted in zip(others, holm(p), strict=True) if adjusted >= level)]


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values, in the given order; NaN for NaN."""
    from statsmodels.stats.multitest import multipletests  # slow to import

    return multipletests(p, method="holm")[1]


def win_rates(pairs: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """The win rates of every pair (`pair_counts`).

    Returns:
        The share of comparisons that the row won against the column, with a tie as 0.5; NaN without a comparison.
    """
    rates = pd.DataFrame(np.nan, index=pd.Index(configs, name="config"), columns=list(configs))
    columns = ["config_a", "config_b", "wins_a", "ties", "wins_b"]
    for a, b, wins_a, ties, wins_b in pairs[columns].itertuples(index=False, name=None):
        rates.loc[a, b] = (wins_a + ties / 2) / (wins_a + ties + wins_b)
        rates.loc[b, a] = (wins_b + ties / 2) / (wins_a + ties + wins_b)
    return rates


def mean_with_interval(values: pd.Series, units: pd.Series, draws: Draws) -> dict[str, float | int | None]:
    """A mean with its interval over the resamples of the fit's bootstrap.

    Args:
        values: the values; missing ones are left out.
        units: the cluster of every value, as in the bootstrap.
        draws: the bootstrap.

    Returns:
        value, low, high and n; None for the first three without any value.
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
