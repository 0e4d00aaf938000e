"""Statistics of the analysis: intervals, rank correlation, agreement, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float


def percentile_interval(value: float, draws: np.ndarray) -> Interval:
    """95 % percentile interval of bootstrap draws around a value; draws that are NaN are left out."""
    kept = np.asarray(draws, dtype=float)
    kept = kept[np.isfinite(kept)]
    if kept.size == 0:
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; NaN with fewer than two items or when one side is constant."""
    if len(a) < 3:  # scipy divides by n - 2
        return float(np.sign(np.diff(a) * np.diff(b))[0]) or math.nan if len(a) == 2 else math.nan
    return float(stats.kendalltau(a, b, method="asymptotic").statistic)


def permutation_p(a: Sequence[float], b: Sequence[float], seed: int = 0, n_permutations: int = 9999) -> float:
    """Two-sided permutation p-value of tau-b: exact without ties, else Monte Carlo with (1+k)/(1+m).

    Permuting leaves the ties and so the denominator of tau-b alone: the numerator is enough.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(a)
    if n < 2:
        return math.nan
    if n <= 33 and len(np.unique(a)) == n and len(np.unique(b)) == n:
        return float(stats.kendalltau(a, b, method="exact").pvalue)
    sign_a, sign_b = (np.sign(x[:, None] - x[None, :]) for x in (a, b))
    observed = abs((sign_a * sign_b).sum())
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(n) for _ in range(n_permutations))
    extreme = sum(abs((sign_a * sign_b[np.ix_(order, order)]).sum()) >= observed for order in orders)
    return (1 + extreme) / (1 + n_permutations)


def critical_tau(n: int, level: float = 0.05) -> float | None:
    """Smallest |tau| (no ties) whose two-sided exact p is below `level`; None if n items can never reach it.

    Counts permutations by inversions (Mahonian numbers).
    """
    probabilities = np.ones(1)
    for items in range(2, n + 1):
        probabilities = np.convolve(probabilities, np.full(items, 1 / items))
    pairs = n * (n - 1) // 2
    tails = np.minimum(1.0, 2 * np.cumsum(probabilities))
    reached = np.flatnonzero(tails[: pairs // 2 + 1] < level)
    return float(1 - 2 * reached[-1] / pairs) if reached.size else None


def tau_interval(a: pd.Series, b: pd.Series, draws_a: pd.DataFrame, draws_b: pd.DataFrame) -> Interval:
    """tau-b of two scores over configurations with an interval from paired draws of both.

    Draws add the noise a second time, which pulls their tau towards 0. The interval is therefore the hull of the
    percentile interval and its mirror image about the estimate (the basic bootstrap). In simulation at n = 16 it covers
    91-98 % of true tau, where percentiles alone cover 73-96 %, while the noise stays under 40 % of the spread between
    configurations; with more noise and a strong true tau it is still too narrow (75-86 %).
    """
    configs = list(draws_a.columns)
    value = kendall_tau(a[configs], b[configs])
    rows = zip(draws_a.to_numpy(), draws_b.to_numpy(), strict=True)
    low, high = percentile_interval(value, np.array([kendall_tau(x, y) for x, y in rows]))[1:]
    return Interval(value, max(-1.0, min(low, 2 * value - high)), min(1.0, max(high, 2 * value - low)))


def rank_draws(draws: pd.DataFrame) -> pd.DataFrame:
    """Rank of every configuration in every draw, 1 = highest score, ties share the mean rank."""
    return draws.rank(axis=1, ascending=False)


def top_share(losses: pd.DataFrame, draws: pd.DataFrame, k: int) -> float:
    """Share of paired draws in which the configuration with the lowest loss is among the k highest scores."""
    picks = losses.to_numpy().argmin(axis=1)
    return float((rank_draws(draws).to_numpy()[np.arange(len(draws)), picks] <= k).mean())


def pareto_front(energy: pd.Series, score: pd.Series) -> list[str]:
    """Configurations that no other one beats on both energy and score (ties on both keep both), by rising energy."""
    frame = pd.DataFrame({"energy": energy, "score": score}).dropna()
    keep = [
        config
        for config, row in frame.iterrows()
        if not (
            (frame["energy"] <= row["energy"])
            & (frame["score"] >= row["score"])
            & ((frame["energy"] < row["energy"]) | (frame["score"] > row["score"]))
        ).any()
    ]
    return list(frame.loc[keep].sort_values("energy").index)


def pareto_shares(energy: pd.Series, draws: pd.DataFrame) -> pd.Series:
    """Share of the score draws in which each configuration is on the front (energies held at their value)."""
    order = [c for c in energy.dropna().sort_values().index if c in draws]
    scores = draws[order].to_numpy()
    before = np.maximum.accumulate(scores, axis=1)[:, :-1]
    on_front = np.column_stack([np.ones(len(scores), bool), scores[:, 1:] > before])
    return pd.Series(on_front.mean(axis=0), index=order)


def cohen_kappa(a: pd.DataFrame, b: pd.DataFrame, n_draws: int, seed: int) -> tuple[Interval, int]:
    """Cohen's kappa of two judges over the comparisons that both have judged, and how many those are.

    `a` and `b` are judgements (prompt_id, scenario_id, config_first, config_second, purpose, winner). The interval
    draws scenarios with replacement. NaN if nothing is shared or one judge always says the same.
    """
    kept = [frame[frame["purpose"] == "ranking"].copy() for frame in (a, b)]
    for frame in kept:
        pair = frame[["config_first", "config_second"]]
        low, high = pair.min(axis=1), pair.max(axis=1)
        frame["pair"] = low + "|" + high
        frame["vote"] = np.select([frame["winner"] == low, frame["winner"] == high], [0, 2], 1)
    both = kept[0].merge(kept[1], on=["prompt_id", "pair"], suffixes=("", "_b"))
    scenarios, code = np.unique(both["scenario_id"], return_inverse=True)
    cells = np.zeros((len(scenarios), 3, 3))
    np.add.at(cells, (code, both["vote"].to_numpy(int), both["vote_b"].to_numpy(int)), 1)
    if not len(both):
        return Interval(math.nan, math.nan, math.nan), 0
    weights = np.random.default_rng(seed).multinomial(
        len(scenarios), np.full(len(scenarios), 1 / len(scenarios)), n_draws
    )
    draws = np.array([kappa(table) for table in np.tensordot(weights, cells, axes=1)])
    return percentile_interval(kappa(cells.sum(axis=0)), draws), len(both)


def kappa(table: np.ndarray) -> float:
    """Cohen's kappa of a square table of counts."""
    share = table / table.sum()
    expected = share.sum(axis=1) @ share.sum(axis=0)
    return float((np.trace(share) - expected) / (1 - expected)) if expected < 1 else math.nan


def krippendorff_alpha(ratings: pd.DataFrame, level: str, n_draws: int = 0, seed: int = 0) -> tuple[Interval, int]:
    """Krippendorff's alpha of several raters with missing values, and the number of units that two or more have rated.

    `ratings` has columns unit, cluster, rater, value (numbers; rows without a value are left out). `level` is nominal,
    ordinal, interval or ratio. The interval draws clusters with replacement. NaN if nothing is shared or nothing
    varies. (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.)
    """
    kept = ratings.dropna(subset=["value"])
    kept = kept[kept.groupby("unit")["rater"].transform("size") > 1]
    values, code = np.unique(kept["value"].to_numpy(float), return_inverse=True)
    units, unit = np.unique(kept["unit"].to_numpy(str), return_inverse=True)
    if not len(units):
        return Interval(math.nan, math.nan, math.nan), 0
    counts = np.zeros((len(units), len(values)))
    np.add.at(counts, (unit, code), 1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    pairs /= (counts.sum(1) - 1)[:, None, None]
    names, cluster = np.unique(kept.groupby("unit")["cluster"].first()[units].to_numpy(str), return_inverse=True)
    per_cluster = np.zeros((len(names), len(values), len(values)))
    np.add.at(per_cluster, cluster, pairs)
    rng, n = np.random.default_rng(seed), len(names)
    weights = rng.multinomial(n, np.full(n, 1 / n), n_draws)
    draws = np.array([_alpha(table, values, level) for table in np.tensordot(weights, per_cluster, axes=1)])
    return percentile_interval(_alpha(per_cluster.sum(0), values, level), draws), len(units)


def _alpha(pairs: np.ndarray, values: np.ndarray, level: str) -> float:
    """1 - observed / expected disagreement, from the coincidences of values."""
    seen = pairs.sum(0)
    low, high = np.minimum.outer(values, values), np.maximum.outer(values, values)
    if level == "nominal":
        distance = (low != high).astype(float)
    elif level == "ordinal":  # all values in between count, the two ends by half
        upto = np.cumsum(seen)
        rank = upto - seen / 2
        distance = (rank[:, None] - rank[None, :]) ** 2
    elif level == "ratio":
        distance = ((high - low) / np.where(high + low == 0, 1, high + low)) ** 2
    elif level == "interval":
        distance = (high - low) ** 2
    else:
        raise ValueError(f"level must be nominal, ordinal, interval or ratio, not {level!r}")
    expected = (np.outer(seen, seen) * distance).sum() / max(seen.sum() - 1, 1)
    return float(1 - (pairs * distance).sum() / expected) if expected > 0 else math.nan
