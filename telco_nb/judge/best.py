"""Comparison of every configuration with the best of the others, for all of them at once.

These are multiple comparisons with the best (Hsu 1996, Multiple Comparisons, chapter 4). A statement about all of them
needs the distribution of the largest standardised error. Its errors are the joint draws of the scores. The standard
errors that they are divided by are estimates themselves, from as many values as there are clusters; so each draw is
divided by a standard error drawn from its own distribution (Wishart), which makes the quantile one like t.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.judge import separation

MANY = 10_000  # clusters from which on standard errors count as known
_TINY = 1e-12


class _Errors(NamedTuple):
    """Standard errors of all differences (n, n), and the factors that make joint bounds of them, (n, n)."""

    errors: np.ndarray
    of_one: np.ndarray  # one-sided, over the leads of the row's configuration, by the draws
    of_all: np.ndarray  # two-sided, over all pairs, by Bonferroni: the draws' own quantile is wrong in 7 % of studies


def compare_with_best(
    scores: pd.Series, draws: pd.DataFrame, n_terms: pd.Series | None = None, level: float = 0.05
) -> pd.DataFrame:
    """Compares every configuration with the best of the others, whichever that is.

    Args:
        scores: score by configuration.
        draws: scores as (draws, configurations).
        n_terms: the clusters in which each was compared; None: as if there were many.
        level: the share of studies in which a statement may be wrong.

    Returns:
        By configuration, best first: score; can_be_best; behind_at_least and behind_at_most, the bounds of the lead of
        the best of the others over it, in log-odds. These hold together. better_than and worse_than are lists of the
        configurations that surely differ from it; over all pairs, so that all are empty in 95 % of the studies in
        which all are equal.
    """
    names = list(scores.sort_values(ascending=False, kind="stable").index)
    gaps = scores[names].to_numpy(float)[:, None] - scores[names].to_numpy(float)
    units = np.full(len(names), MANY) if n_terms is None else n_terms[names].to_numpy(int)
    found = _largest_errors(draws[names].to_numpy(float), gaps, units, level)
    known, errors = np.isfinite(found.errors), np.where(np.isfinite(found.errors), found.errors, 0.0)
    lead_at_most = np.where(known, gaps + found.of_one * errors, np.inf)  # of the row over the column
    np.fill_diagonal(lead_at_most, np.inf)
    can_be_best = np.all(lead_at_most >= 0, axis=1)
    np.fill_diagonal(lead_at_most, -np.inf)
    behind = np.where(can_be_best.reshape(-1, 1), lead_at_most, -np.inf).max(0)
    np.fill_diagonal(lead_at_most, np.inf)
    surely = known & (gaps - found.of_all * errors > 0)
    table = {
        "score": scores[names],
        "can_be_best": can_be_best,
        "behind_at_least": np.maximum(0.0, -lead_at_most.min(1)),
        "behind_at_most": np.maximum(0.0, behind),
        "better_than": [[names[j] for j in np.flatnonzero(row)] for row in surely],
        "worse_than": [[names[i] for i in np.flatnonzero(column)] for column in surely.T],
    }
    return pd.DataFrame(table, index=pd.Index(names, name="config"))


def _largest_errors(drawn: np.ndarray, gaps: np.ndarray, units: np.ndarray, level: float) -> _Errors:
    """An error is at least so large that no difference passes here that could not pass a sign test over the clusters.

    A pair with fewer clusters than others has a larger factor with the same tail of t; with one cluster it has no
    error at all.
    """
    n, fewest, most = len(units), np.minimum(units[:, None], units), int(max(units.max(initial=2), 2))
    df = np.maximum(fewest - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.abs(gaps) / stats.t.isf(separation.least_p(fewest) / 2, df)
    sample = _normal_sample(np.atleast_2d(np.cov(drawn, rowvar=False)), len(drawn), most - 1)
    squares = None if sample is None else (sample**2).mean(1)
    errors, of_one = np.full((n, n), np.inf), np.zeros(n)
    for i in range(n):
        off = np.delete(np.arange(n), i)
        error = drawn[:, [i]] - drawn[:, off]
        spread = np.maximum(error.std(0), _TINY)
        error = (error - error.mean(0)) / spread
        if sample is not None and squares is not None:
            products = (sample[:, None, :, i] @ sample)[:, 0] / sample.shape[1]
            squared = (squares[:, [i]] + squares - 2 * products)[:, off]  # of differences, by products: much faster
            error /= np.maximum(np.sqrt(np.maximum(squared, 0.0)) / spread, _TINY)
        of_one[i] = np.quantile(-error.min(1, initial=0.0), 1 - level)
        here = np.maximum(spread * np.sqrt(fewest / df)[i, off], least[i, off])
        errors[i, off] = np.where(fewest[i, off] > 1, here, np.inf)
    tails = stats.t.sf(of_one, most - 1)
    both = 1 / (1 / df + 1 / max(len(drawn) - 1, 1))  # the error is estimated from clusters, and that from draws
    return _Errors(errors, stats.t.isf(tails[:, None], both), stats.t.isf(level / max(1, n * (n - 1)), both))


def _normal_sample(covariance: np.ndarray, draws: int, df: int) -> np.ndarray | None:
    """Normal values (draws, df, n) with a covariance, to estimate it from; None for so many that all is known."""
    if df >= MANY - 1:
        return None
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.random.default_rng(0).normal(size=(draws, df, len(covariance))) @ root.T
