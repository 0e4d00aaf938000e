"""The tables of a fitted ranking: scores with intervals, anchors, and tests of the differences.

A bound that the verdicts do not limit is missing: the interval is open on that side. Where a configuration won (or
lost) all its comparisons the other bound is exact (`separation.won_all_bound`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.judge import separation
from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.best import compare_with_best
from telco_nb.judge.bradley_terry import Draws, Fit, interval_levels, place_anchor


def ranking_table(verdicts: pd.DataFrame, fitted: Fit, draws: Draws) -> pd.DataFrame:
    """The ranking.

    Args:
        verdicts: the verdicts of the fit (`store.judged_rows`).
        fitted: the fit.
        draws: its bootstrap.

    Returns:
        One row per configuration, best first: score with interval (low, high) in log-odds, rank with interval
        (rank_low, rank_high), p_best (the share of draws in which it is first, shared between equals), n_judgements and
        n_terms (the clusters in which it was compared). Equal scores have equal ranks. Without two clusters there are
        no bounds; p_best is missing where a bound is. With so few clusters that they carry no claim (`few_terms`)
        rank_low, rank_high and p_best are missing: every place is possible.
    """
    bounds = _score_bounds(verdicts, fitted, draws)
    places = rank_bounds(draws.abilities, bounds, draws.compared, len(draws.units))
    counts = pd.concat([verdicts["config_first"], verdicts["config_second"]]).value_counts()
    table = pd.DataFrame(
        {
            "config": fitted.configs,
            "score": fitted.abilities,
            "low": bounds[:, 0],
            "high": bounds[:, 1],
            "rank": pd.Series(_rounded(-fitted.abilities)).rank(method="min").astype("Int64"),
            "rank_low": pd.Series(places[:, 0]).astype("Int64"),
            "rank_high": pd.Series(places[:, 1]).astype("Int64"),
            "p_best": places[:, 2],
            "n_judgements": [int(counts.get(config, 0)) for config in fitted.configs],
            "is_anchor": False,
            "n_terms": draws.compared,
        }
    )
    return table.sort_values(["rank", "config"], ignore_index=True)


def _rounded(abilities: np.ndarray) -> np.ndarray:
    """Abilities without the last digits, in which equal ones differ by rounding."""
    return np.round(abilities, 8) + 0.0


def _score_bounds(verdicts: pd.DataFrame, fitted: Fit, draws: Draws) -> np.ndarray:
    """The bounds of all scores, (n, 2)."""
    if fitted.is_missing:
        return np.full((len(fitted.configs), 2), np.nan)
    above, below = separation.open_sides(draws.limited)
    found = []
    for i, config in enumerate(fitted.configs):
        rows = verdicts[(verdicts[["config_first", "config_second"]] == config).any(axis=1)]
        sides = above[:, i], below[:, i]
        found.append(_bounds(rows, config, fitted, draws.abilities[:, i], sides, int(draws.compared[i])))
    return np.array(found)


def _centred_bound(bound: float, config: str, fitted: Fit) -> float:
    """A bound on the scale of the others' abilities, once all abilities have mean 0 again."""
    others = [ability for name, ability in zip(fitted.configs, fitted.abilities, strict=True) if name != config]
    return (bound - float(np.mean(others))) * len(others) / len(fitted.configs) if config in fitted.configs else bound


def _bounds(
    rows: pd.DataFrame, config: str, fitted: Fit, drawn: np.ndarray, sides: tuple[np.ndarray, np.ndarray], units: int
) -> tuple[float, float]:
    """The bounds of one score.

    Args:
        rows: the comparisons of the configuration.
        config: its name.
        fitted: the fit that holds the others' abilities.
        drawn: its scores (draws,).
        sides: in which draws the score is open above, and below.
        units: the number of its clusters.
    """
    if units < 2:
        return np.nan, np.nan
    first = (rows["config_first"] == config).to_numpy()
    won, lost = _decided(rows, first)
    if won.all() or lost.all():
        exact = separation.won_all_bound(_share_of_wins(rows, first, fitted, bool(won.all())), units)
        exact = _centred_bound(exact if won.all() else -exact, config, fitted)
        return (exact, np.nan) if won.all() else (np.nan, exact)
    if sides[0].all() or sides[1].all():  # the group of which it is one won or lost everything against the others
        return np.nan, np.nan
    ends = interval_levels(units)
    low, high = np.nanquantile(drawn, ends)
    return (np.nan if sides[1].mean() > ends[0] else low), (np.nan if sides[0].mean() > ends[0] else high)


def _decided(rows: pd.DataFrame, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which comparisons the side that sits `first` where true, else second, has won, and lost."""
    verdict = rows["verdict"].to_numpy(dtype=object)
    return verdict == np.where(first, "A", "B"), verdict == np.where(first, "B", "A")


def _share_of_wins(rows: pd.DataFrame, first: np.ndarray, fitted: Fit, wins: bool) -> Callable[[float], float]:
    """The expected share of wins by ability; with `wins` false the share of losses by minus the ability."""
    theta = dict(zip(fitted.configs, fitted.abilities, strict=True))
    others = rows["config_second"].where(first, rows["config_first"]).map(theta).to_numpy(dtype=float)
    side, sign = np.where(first, 1.0, -1.0), 1 if wins else -1
    column = np.where(first == wins, 0, 2)

    def share(ability: float) -> float:
        shares = fitted.shares(side * (sign * ability - others) + (fitted.position or 0.0))
        return float(shares[np.arange(len(column)), column].mean())

    return share


def rank_bounds(drawn: np.ndarray, bounds: np.ndarray, compared: np.ndarray, n_units: int) -> np.ndarray:
    """The intervals of ranks; equal scores share the best and the worst of their places.

    Args:
        drawn: scores (draws, n).
        bounds: of the scores (n, 2), missing on an open side.
        compared: in how many clusters each was compared, (n,).
        n_units: the number of resampled clusters.

    Returns:
        Lower and upper rank and p_best, (n, 3). All are missing without a score or with few clusters (`few_terms`);
        p_best also where a bound is.
    """
    n = len(bounds)
    if np.isnan(drawn).all() or few_terms(n_units):
        return np.full((n, 3), np.nan)
    scores = _rounded(-drawn)
    best, worst = (stats.rankdata(scores, method=end, axis=1) for end in ("min", "max"))
    ends, (low, high) = interval_levels(n_units), bounds.T
    rank_low = np.quantile(best, ends[0], axis=0, method="lower")
    rank_high = np.quantile(worst, ends[1], axis=0, method="higher")
    p_best = ((best == 1) / (best == 1).sum(1, keepdims=True)).mean(0)
    for i in range(n):  # who won everything can still be below those that do not lie surely below its exact bound
        if np.isnan(high[i]) and not np.isnan(low[i]):
            rank_high[i] = max(rank_high[i], (~(high < low[i])).sum())
        if np.isnan(low[i]) and not np.isnan(high[i]):
            rank_low[i] = min(rank_low[i], n + 1 - (~(low > high[i])).sum())
    found = np.column_stack([rank_low, rank_high, np.where(np.isnan(low) | np.isnan(high), np.nan, p_best)])
    found[compared < 2] = np.nan
    return found


def anchor_row(verdicts: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> tuple[dict, np.ndarray]:
    """The ranking row of an anchor, without rank and p_best, and its scores (draws,).

    Args:
        verdicts: the anchor's comparisons with configurations of the fit.
        anchor: the anchor's name.
        fitted: the fit.
        draws: its bootstrap.

    Returns:
        The row and the scores. If the anchor won (lost) all comparisons, the upper (lower) bound is missing, because
        the data do not limit that side, and the other one is exact.
    """
    row = {"config": anchor, "score": np.nan, "n_judgements": len(verdicts), "is_anchor": True, "n_terms": 0}
    if fitted.is_missing or verdicts.empty:
        return row | {"low": np.nan, "high": np.nan}, np.full(len(draws.abilities), np.nan)
    score, drawn = place_anchor(verdicts, anchor, fitted, draws)
    weights = draws.weights[:, draws.units.get_indexer(verdicts[draws.units.name])]
    won, lost = _decided(verdicts, (verdicts["config_first"] == anchor).to_numpy())
    sides = weights @ ~won == 0, weights @ ~lost == 0
    units = int(verdicts[draws.units.name].nunique())
    low, high = _bounds(verdicts, anchor, fitted, drawn, sides, units)
    return row | {"score": score, "low": low, "high": high, "n_terms": units}, drawn


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
        row, scores = anchor_row(_placing(judged, anchor, fitted, draws), anchor, fitted, draws)
        rows.append(row)
        columns.append(pd.Series(scores, name=anchor).to_frame())
    placed = pd.concat([table, pd.DataFrame(rows)], ignore_index=True) if rows else table
    return placed, pd.concat(columns, axis=1).rename_axis("draw")


def _placing(judged: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> pd.DataFrame:
    """The verdicts that place an anchor: beside a ranked configuration, and on a unit that the bootstrap draws."""
    sides = judged[["config_first", "config_second"]]
    own = (judged["purpose"] == "anchor") & (sides == anchor).any(axis=1) & sides.isin(fitted.configs).any(axis=1)
    return judged[own & judged[draws.units.name].isin(draws.units)]


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
    freedom. No p is below that of a sign test with the clusters as its units. Where one side of a pair won everything
    that is its p, because the verdicts limit neither the difference nor its deviation.

    Returns:
        One row per pair: config_a (with the higher score), config_b, difference with interval (low, high; missing where
        the verdicts set no bound), p, p_holm (adjusted over all pairs) and told_apart (p_holm below .05).
    """
    order = np.argsort(-_rounded(fitted.abilities), kind="stable")
    a, b = (order[i] for i in np.triu_indices(len(order), 1))
    gap = np.maximum(fitted.abilities[a] - fitted.abilities[b], 0.0)
    drawn = draws.abilities[:, a] - draws.abilities[:, b]
    p, ends = _pair_p(gap, drawn, np.minimum(draws.compared[a], draws.compared[b])), interval_levels(len(draws.units))
    above, below = (1 - draws.limited[:, i, j].mean(0) for i, j in ((b, a), (a, b)))
    p = np.where(above == 1, np.where(below == 1, 1.0, separation.least_p(draws.cut[a])), p)
    p = np.full(len(p), np.nan) if fitted.is_missing else p
    never = (above == 1) | (below == 1) | (len(draws.units) < 2)
    low, high = np.quantile(drawn, ends, axis=0)
    low, high = (np.where(never | (share > ends[0]), np.nan, x) for share, x in ((below, low), (above, high)))
    adjusted = holm(p)
    names = np.array(fitted.configs, dtype=object)
    table = {"config_a": names[a], "config_b": names[b], "difference": gap, "low": low, "high": high, "p": p}
    return pd.DataFrame(table | {"p_holm": adjusted, "told_apart": adjusted < 0.05})


def _pair_p(gap: np.ndarray, drawn: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Two-sided p of differences against t, not below that of a sign test."""
    t = gap / np.maximum(drawn.std(0, ddof=1), 1e-12)
    p = 2 * stats.t.sf(t, np.maximum(units - 1, 1))
    return np.maximum(np.where(units > 1, p, 1.0), separation.least_p(units))


def tied_top(
    scores: pd.Series, draws: pd.DataFrame, n_terms: pd.Series | None = None, level: float = 0.05
) -> list[str]:
    """The configurations that can be the best one, best first (`best.compare_with_best`): with 95 % it is one of them.

    Args:
        scores: score by configuration.
        draws: scores as (draws, configurations).
        n_terms: the clusters in which each was compared; None: as if there were many.
        level: the share of studies in which the best may be left out.
    """
    found = compare_with_best(scores, draws, n_terms, level)
    return list(found.index[found["can_be_best"]])


def few_terms(n_terms: int | None) -> str | None:
    """The reason why so few terms, or a number that is not known, carry no claim about a ranking, or None."""
    least = separation.LEAST_TERMS
    if n_terms is None:
        return "the number of terms is not known"
    terms = "1 term was" if n_terms == 1 else f"{n_terms} terms were"
    return None if n_terms >= least else f"only {terms} judged; a ranking needs {least}"


def interval_text(low: float | str | None, high: float | str | None, digits: str = "+.2f") -> str:
    """`[low, high]`, with `open` for a bound that is missing; `(no interval)` without both. Texts need digits ``."""
    if pd.isna(low) and pd.isna(high):
        return "(no interval)"
    return f"[{', '.join('open' if pd.isna(bound) else format(bound, digits) for bound in (low, high))}]"


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values, in the given order; NaN for NaN."""
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


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
    if not kept.any() or not len(draws.units):  # with one unit there is a value, but no interval
        return {"value": None, "low": None, "high": None, "n": 0}
    numbers = values[kept].to_numpy(dtype=float)
    weights = draws.weights[:, draws.units.get_indexer(units[kept])]
    total = weights.sum(1)
    means = (weights @ numbers)[total > 0] / total[total > 0]
    found = {"value": float(numbers.mean()), "low": None, "high": None, "n": int(kept.sum())}
    if len(draws.units) > 1:
        found["low"], found["high"] = map(float, np.quantile(means, interval_levels(len(draws.units))))
    return found
