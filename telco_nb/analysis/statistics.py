"""Statistics of the analysis: intervals, rank correlation, agreement, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.judge.bradley_terry import interval_levels
from telco_nb.judge.ranking import interval_text

Numbers = Sequence[float] | np.ndarray | pd.Series


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN where the data do not determine a number."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def is_above(self, point: float = 0.0) -> bool:
        """True if the whole interval lies above a point: with 0, the one is surely more than the other."""
        return bool(self.low > point)

    def is_below(self, point: float = 0.0) -> bool:
        """True if the whole interval lies below a point. A bound that is missing shows nothing."""
        return bool(self.high < point)

    def excludes(self, point: float = 0.0) -> bool:
        """True if the two surely differ: the one rule for it in this project."""
        return self.is_above(point) or self.is_below(point)


MISSING = Interval(math.nan)
SHARE_DRAWS = 2000  # resamples behind the interval of a share
CHANCE_TO_PERFECT = 0.5  # the shares of right choices between two: guessing has .5, perfect knowledge 1


def percentile_interval(value: float, draws: Numbers, n_clusters: int | None = None) -> Interval:
    """95 % percentile interval of bootstrap draws around a value; draws that are NaN are left out.

    With the number of resampled clusters the percentiles are expanded, because those of few clusters are too narrow;
    one cluster tells no interval.
    """
    finite = np.asarray(draws, dtype=float)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0 or (n_clusters is not None and n_clusters < 2):
        return Interval(float(value))
    low, high = np.quantile(finite, (0.025, 0.975) if n_clusters is None else interval_levels(n_clusters))
    return Interval(float(value), float(low), float(high))


def joint_interval(interval: Interval, draws: Numbers, n_clusters: int, family: int) -> Interval:
    """An interval made so wide that as many as `family` of its kind hold together (Bonferroni, t over clusters).

    For one that was picked after the fact from so many, or that stands in a family of so many. Percentiles of a few
    hundred draws do not reach that far, so the bounds are those of t, and at least those of the interval.
    """
    finite = np.asarray(draws, dtype=float)
    finite = finite[np.isfinite(finite)]
    if family < 2 or n_clusters < 2 or finite.size == 0:
        return interval
    error = finite.std(ddof=1) * math.sqrt(n_clusters / (n_clusters - 1)) * stats.t.isf(0.025 / family, n_clusters - 1)
    value, low, high = interval
    return Interval(value, min(low, value - error), max(high, value + error))


def cluster_weights(n: int, n_draws: int, seed: int) -> np.ndarray:
    """Bootstrap of n clusters: how often each draw with replacement takes each of them, (draws, clusters)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws)


def ratio_draws(weights: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The ratio of two resampled sums, such as a mean over the items of the drawn clusters.

    Args:
        weights: from `cluster_weights`, (draws, clusters).
        sums: the numerators of each cluster, (clusters,) or (clusters, columns).
        sizes: the denominators, of the same shape.

    Returns:
        (draws,) or (draws, columns); NaN, never 0, where a draw holds nothing to divide by.
    """
    above, below = weights @ np.asarray(sums, float), weights @ np.asarray(sizes, float)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def exact_bounds(right: int, n: int) -> tuple[float, float]:
    """The exact binomial 95 % bounds of a share of independent items (Clopper and Pearson)."""
    bounds = stats.binomtest(right, n).proportion_ci(method="exact")
    return float(bounds.low), float(bounds.high)


@cache
def least_choices(width: float = CHANCE_TO_PERFECT) -> int:
    """The least number of choices between two whose exact 95 % interval is narrower than `width`, however many are
    right. With fewer, an interval can be as wide as the way from guessing to perfect knowledge: it tells little."""
    for n in count(1):
        bounds = (exact_bounds(right, n) for right in range(n + 1))
        if max(high - low for low, high in bounds) < width:
            return n
    raise AssertionError("the width falls with n")


def share_interval(right: pd.Series, clusters: pd.Series, seed: int) -> Interval:
    """The share of right choices with the wider of two 95 % intervals: of whole clusters (bootstrap), of independent
    items (exact).

    Args:
        right: True or False, one per choice between two.
        clusters: the cluster of each choice, such as its term.
        seed: of the bootstrap.

    Returns:
        The share, 0 to 1, with its bounds; missing with fewer than `least_choices()`.
    """
    if len(right) < least_choices():
        return MISSING
    sums = right.groupby(clusters.to_numpy()).agg(["sum", "size"]).to_numpy(float)
    drawn = ratio_draws(cluster_weights(len(sums), SHARE_DRAWS, seed), *sums.T)
    whole = percentile_interval(float(right.mean()), drawn, len(sums))
    low, high = exact_bounds(int(right.sum()), len(right))
    return Interval(whole.value, float(np.fmin(whole.low, low)), float(np.fmax(whole.high, high)))


def share_text(right: int, n: int, share: Interval) -> str:
    """`120 of 150 (80% [73%, 86%])`; with too few choices the counts alone, and that they tell no share."""
    if math.isnan(share.value):
        return f"{right} of {n} (fewer than {least_choices()} choices tell no share)"
    return f"{right} of {n} ({share.value:.0%} {interval_text(*share[1:], '.0%')})"


def kendall_tau(a: Numbers, b: Numbers) -> float:
    """Kendall's tau-b; NaN with fewer than two items or when one side is constant."""
    if len(a) < 3:  # scipy divides by n - 2
        return float(np.sign(np.diff(a) * np.diff(b))[0]) or math.nan if len(a) == 2 else math.nan
    return float(stats.kendalltau(a, b, method="asymptotic").statistic)


def tau_rows(a: Numbers | pd.DataFrame, b: Numbers | pd.DataFrame) -> np.ndarray:
    """tau-b of every row of two (rows, items) tables; a side with one row meets all rows of the other.

    NaN where a row is constant or has a missing value.
    """
    x, y = (np.atleast_2d(np.asarray(side, dtype=float)) for side in (a, b))
    first, second = np.triu_indices(x.shape[1], 1)
    taus = []
    for start in range(0, max(len(x), len(y)), 256):  # a few rows at a time: pairs are many
        parts = [side if len(side) == 1 else side[start : start + 256] for side in (x, y)]
        sign_x, sign_y = (np.sign(part[:, first] - part[:, second]) for part in parts)
        untied = np.abs(sign_x).sum(axis=1) * np.abs(sign_y).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 if one side is constant
            taus.append((sign_x * sign_y).sum(axis=1) / np.sqrt(untied))
    return np.concatenate(taus) if taus else np.empty(0)


def permutation_p(a: Numbers, b: Numbers, seed: int = 0, n_permutations: int = 9999) -> float:
    """Two-sided permutation p-value of tau-b.

    The value is exact without ties and for at most 33 items. Otherwise it is the Monte Carlo value (1 + k) / (1 + m).
    A permutation changes neither the ties nor the denominator of tau-b, so the numerators are compared.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(x)
    if n < 2:
        return math.nan
    if n <= 33 and len(np.unique(x)) == n and len(np.unique(y)) == n:
        return float(stats.kendalltau(x, y, method="exact").pvalue)
    sign_x, sign_y = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    observed = abs((sign_x * sign_y).sum())
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(n) for _ in range(n_permutations))
    extreme = sum(abs((sign_x * sign_y[np.ix_(order, order)]).sum()) >= observed for order in orders)
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


def tau_interval(a: pd.Series, b: pd.Series, draws_a: pd.DataFrame, draws_b: pd.DataFrame) -> Interval | None:
    """tau-b of two scores over configurations with an interval from paired draws of both.

    In simulation at n = 16 it covers 91-98 % of true tau, where percentiles alone cover 73-96 %, while the noise stays
    under 40 % of the spread between configurations; with more noise and a strong true tau it is still too narrow
    (75-86 %). It holds the configurations fixed: other ones are another question, which `inference` asks.

    Args:
        a, b: scores, indexed by configuration.
        draws_a, draws_b: draws of the scores, both (draws, configurations) with the same columns.

    Returns:
        None where `hull_interval` has none.
    """
    configs = list(draws_a.columns)
    return hull_interval(kendall_tau(a[configs], b[configs]), tau_rows(draws_a, draws_b))


def hull_interval(value: float, draws: Numbers, most: float = 1.0) -> Interval | None:
    """The hull of the percentile interval and its mirror image about the value (the basic bootstrap), within +-most.

    Draws of a rank correlation contain the noise twice, which pulls them towards 0; the mirror image makes up for it.

    Returns:
        None if there is no value, or no draw has one: one side is constant. The caller says so.
    """
    low, high = percentile_interval(value, draws)[1:]
    if not math.isfinite(value + low + high):
        return None
    return Interval(value, max(-most, min(low, 2 * value - high)), min(most, max(high, 2 * value - low)))


def top_share(losses: pd.DataFrame, draws: pd.DataFrame, k: int) -> float:
    """Share of paired draws in which the configuration with the lowest loss is among the k highest scores."""
    lowest = losses.to_numpy().argmin(axis=1)
    ranks = draws.rank(axis=1, ascending=False).to_numpy()
    return float((ranks[np.arange(len(draws)), lowest] <= k).mean())


def pareto_front(energy: pd.Series, score: pd.Series) -> list[str]:
    """Configurations that no other one beats on both energy and score (ties on both keep both), by rising energy."""
    frame = pd.DataFrame({"energy": energy, "score": score}).dropna()
    costs, scores = frame["energy"].to_numpy(), frame["score"].to_numpy()
    as_good = (costs <= costs[:, None]) & (scores >= scores[:, None])
    better = (costs < costs[:, None]) | (scores > scores[:, None])
    return list(frame[~(as_good & better).any(axis=1)].sort_values("energy").index)


def pareto_shares(energy: pd.Series, draws: pd.DataFrame, spread: float = 0.0, seed: int = 0) -> pd.Series:
    """Share of the draws in which each configuration is on the front.

    Args:
        energy: by configuration; those without one are left out.
        draws: of the scores, (draws, configurations).
        spread: standard deviation of the logarithm of an energy from run to run; 0 holds energies at their value.
        seed: of the drawn energies.
    """
    configs = [c for c in energy.dropna().sort_values(kind="stable").index if c in draws]
    noise = np.random.default_rng(seed).normal(0, spread, (len(draws), len(configs)))
    order = np.argsort(energy[configs].to_numpy(float) * np.exp(noise), axis=1, kind="stable")
    scores = np.take_along_axis(draws[configs].to_numpy(float), order, axis=1)
    before = np.maximum.accumulate(scores, axis=1)[:, :-1]
    by_cost = np.column_stack([np.ones(len(scores), bool), scores[:, 1:] > before])
    on_front = np.empty_like(by_cost)
    np.put_along_axis(on_front, order, by_cost, axis=1)
    return pd.Series(on_front.mean(axis=0), index=configs)


def cohen_kappa(a: pd.DataFrame, b: pd.DataFrame, n_draws: int, seed: int) -> tuple[Interval, int]:
    """Cohen's kappa of two judges over the comparisons that both have judged.

    Args:
        a, b: judgements with columns prompt_id, scenario_id, config_first, config_second, purpose, winner.
        n_draws, seed: of the bootstrap over scenarios.

    Returns:
        Kappa with its interval, NaN without shared comparisons or if both judges always give the same verdict; and the
        number of shared comparisons.
    """
    both = _verdicts_by_pair(a).merge(_verdicts_by_pair(b), on=["prompt_id", "pair"], suffixes=("", "_b"))
    if both.empty:
        return MISSING, 0
    scenarios, code = np.unique(both["scenario_id"], return_inverse=True)
    tables = np.zeros((len(scenarios), 3, 3))
    np.add.at(tables, (code, both["verdict"].to_numpy(int), both["verdict_b"].to_numpy(int)), 1)
    draws = np.tensordot(cluster_weights(len(scenarios), n_draws, seed), tables, axes=1)
    drawn = [_kappa(table) for table in draws]
    return percentile_interval(_kappa(tables.sum(axis=0)), drawn, len(scenarios)), len(both)


def kappa_by_kind(a: pd.DataFrame, b: pd.DataFrame, kinds: pd.Series, n_draws: int, seed: int) -> pd.DataFrame:
    """Cohen's kappa of two judges for every kind of problem: a judge may see a charge and miss a danger.

    Args:
        a, b, n_draws, seed: as in `cohen_kappa`.
        kinds: the kind of problem, by prompt_id.

    Returns:
        One row per kind with shared comparisons: kind, comparisons, kappa, kappa_low, kappa_high.
    """
    rows = []
    for kind, prompts in kinds.groupby(kinds):
        chosen = [table[table["prompt_id"].isin(prompts.index)] for table in (a, b)]
        kappa, n = cohen_kappa(*chosen, n_draws, seed)
        rows.append((kind, n, *kappa))
    columns = ["kind", "comparisons", "kappa", "kappa_low", "kappa_high"]
    return pd.DataFrame([row for row in rows if row[1]], columns=columns)


def read_comparisons(judgements: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of the ranking that the judge has read.

    Answers that lose by rule, empty or looping, are left out (`source`, where it is known): all judges agree on them.
    """
    rows = judgements[judgements["purpose"] == "ranking"]
    return rows[rows["source"] != "rule"] if "source" in rows else rows


def _verdicts_by_pair(judgements: pd.DataFrame) -> pd.DataFrame:
    """The judgements for the ranking with the pair in alphabetical order and the verdict 0, 1 (tie) or 2."""
    rows = read_comparisons(judgements)
    seats = rows[["config_first", "config_second"]]
    low, high = seats.min(axis=1), seats.max(axis=1)
    verdict = np.select([rows["winner"] == low, rows["winner"] == high], [0, 2], 1)
    return rows[["prompt_id", "scenario_id"]].assign(pair=low + "|" + high, verdict=verdict)


def _kappa(table: np.ndarray) -> float:
    from statsmodels.stats.inter_rater import cohens_kappa

    with np.errstate(invalid="ignore"):  # 0 / 0 if both judges always give the same verdict
        return float(cohens_kappa(table, return_results=False))


def krippendorff_alpha(
    ratings: pd.DataFrame, level: str, n_draws: int = 0, seed: int = 0, family: int = 1
) -> tuple[Interval, int]:
    """Krippendorff's alpha of several raters with missing values (Krippendorff 2011, Computing Alpha-Reliability).

    Args:
        ratings: columns unit, cluster, rater, value (numbers; rows without a value are left out).
        level: nominal, ordinal, interval or ratio.
        n_draws, seed: of the bootstrap over clusters.
        family: how many such intervals hold together.

    Returns:
        Alpha with its interval, NaN if no unit is shared or all values are equal; and the number of units that two or
        more have rated.
    """
    rated = ratings.dropna(subset=["value"])
    rated = rated[rated.groupby("unit")["rater"].transform("size") > 1]
    values, code = np.unique(rated["value"].to_numpy(float), return_inverse=True)
    units, unit = np.unique(rated["unit"].to_numpy(str), return_inverse=True)
    if not len(units):
        return MISSING, 0
    counts = np.zeros((len(units), len(values)))
    np.add.at(counts, (unit, code), 1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    pairs /= (counts.sum(1) - 1)[:, None, None]
    names, cluster = np.unique(rated.groupby("unit")["cluster"].first()[units].to_numpy(str), return_inverse=True)
    per_cluster = np.zeros((len(names), len(values), len(values)))
    np.add.at(per_cluster, cluster, pairs)
    tables = np.tensordot(cluster_weights(len(names), n_draws, seed), per_cluster, axes=1)
    draws = [_alpha(table, values, level) for table in tables]
    alone = percentile_interval(_alpha(per_cluster.sum(0), values, level), draws, len(names))
    together = joint_interval(alone, draws, len(names), family)
    return together._replace(high=min(together.high, 1.0)), len(units)  # no agreement is more than complete


def _alpha(pairs: np.ndarray, values: np.ndarray, level: str) -> float:
    """1 - observed / expected disagreement, from the coincidences of values."""
    seen = pairs.sum(0)
    rank = np.cumsum(seen) - seen / 2  # ordinal: all values in between count, the two ends by half
    total = np.add.outer(values, values)
    distances = {
        "nominal": np.not_equal.outer(values, values).astype(float),
        "ordinal": np.subtract.outer(rank, rank) ** 2,
        "interval": np.subtract.outer(values, values) ** 2,
        "ratio": (np.subtract.outer(values, values) / np.where(total == 0, 1, total)) ** 2,
    }
    if level not in distances:
        raise ValueError(f"level must be {', '.join(distances)}, not {level!r}")
    distance = distances[level]
    expected = (np.outer(seen, seen) * distance).sum() / max(seen.sum() - 1, 1)
    return float(1 - (pairs * distance).sum() / expected) if expected > 0 else math.nan


class Luck(NamedTuple):
    """The variance between runs of one configuration, pooled: `total`, and `noise`, the part that verdicts explain."""

    total: float
    noise: float
    df: int

    @property
    def sd(self) -> Interval:
        """The standard deviation between seeds with its interval (chi-square), 0 where noise explains all."""
        tails = (1.0, *(self.df / stats.chi2.ppf(q, self.df) for q in (0.975, 0.025)))
        return Interval(*(math.sqrt(max(0.0, self.total * factor - self.noise)) for factor in tails))

    def widened(self, prompts: np.ndarray, runs: np.ndarray, terms: np.ndarray) -> np.ndarray:
        """Standard deviations of the normal luck that makes percentiles of draws t intervals.

        The variance of a score is that of prompts and that of luck, with Satterthwaite's degrees of freedom. Luck drawn
        from its own uncertain variance would give the same percentiles, but below 3 degrees of freedom no variance.

        Args:
            prompts: the variance of draws without luck, (n,).
            runs: of each configuration, (n,).
            terms: the clusters in which each was compared, (n,); the percentiles are those of `interval_levels`.
        """
        terms = np.maximum(terms, 2)
        of_prompts, of_runs = prompts * terms / (terms - 1), self.total / runs
        variance = of_prompts + self.sd.value**2 / runs
        noise = of_prompts**2 / (terms - 1) + of_runs**2 / self.df  # with the runs' total: luck is what is left of it
        df = np.maximum(variance**2 / np.maximum(noise, 1e-300), 1.0)
        wider = stats.t.ppf(0.975, df) / (stats.t.ppf(0.975, terms - 1) * np.sqrt(terms / (terms - 1)))
        return np.sqrt(np.maximum(0.0, wider**2 * variance - prompts))
