"""What the verdicts do not limit: leads that only the ridge of the fit keeps finite, and bounds that need no fit.

If no chain of wins and ties leads from configuration b up to a, then a has no largest lead over b that the verdicts
speak against (Ford 1957: otherwise the maximum of the likelihood is finite). Such a bound is missing or exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, sparse, stats

LEAST_TERMS = 8  # with fewer no ranking is claimed: the least p of a sign test over 8 terms is .008, over 5 it is .06
_FAR = 40.0  # log-odds beyond which every share is 0 or 1
_CHUNK = 4_000_000


def limited(verdicts: pd.DataFrame, configs: Sequence[str], weights: np.ndarray, unit_of_row: np.ndarray) -> np.ndarray:
    """Which leads the verdicts limit, in each resample.

    Args:
        verdicts: the verdicts of a fit.
        configs: the configurations.
        weights: (draws, units), how often each unit was drawn.
        unit_of_row: the unit of every verdict.

    Returns:
        (draws, n, n) booleans: [d, i, j] is true if i limits the lead of j, by a chain of wins and ties from i up to j.
        All are false in a draw with ties only: any difference fits, if ties are likely enough.
    """
    n, units = len(configs), weights.shape[1]
    first, second = (pd.Index(configs).get_indexer(verdicts[f"config_{seat}"]) for seat in ("first", "second"))
    verdict = verdicts["verdict"].to_numpy(dtype=object)
    up, down = verdict != "B", verdict != "A"
    edges = np.append((first * n + second)[up], (second * n + first)[down])
    of_edge = np.append(unit_of_row[up], unit_of_row[down])
    per_unit = sparse.coo_array((np.ones(len(edges)), (of_edge, edges)), shape=(units, n * n)).tocsr()
    decided = np.bincount(unit_of_row, weights=up != down, minlength=units)
    size = max(1, _CHUNK // (n * n))
    chunks = (weights[i : i + size] for i in range(0, len(weights), size))
    return np.concatenate(
        [_closure((w @ per_unit).reshape(-1, n, n)) & (w @ decided > 0)[:, None, None] for w in chunks]
    )


def _closure(edges: np.ndarray) -> np.ndarray:
    """The transitive closure of (draws, n, n) graphs, by squaring."""
    reached = (edges > 0) | np.eye(edges.shape[1], dtype=bool)
    while True:
        further = (reached.astype(np.float32) @ reached.astype(np.float32)) > 0
        if (further == reached).all():
            return reached
        reached = further


def open_sides(limited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whose score has no upper and no lower bound, as (draws, n) booleans.

    A score has none if at least half of the other configurations do not limit the lead over (or behind) them.
    """
    others = max(1, limited.shape[1] - 1)
    free = ~limited
    return 2 * free.sum(1) >= others, 2 * free.sum(2) >= others


def cluster_counts(
    verdicts: pd.DataFrame, configs: Sequence[str], limits: np.ndarray, unit_of_row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The clusters behind each configuration.

    Args:
        verdicts, configs: of a fit.
        limits: (n, n), of all verdicts (`limited`).
        unit_of_row: the cluster of every verdict.

    Returns:
        The number of clusters in which each was compared; and the number in which those that limit its lead, and
        itself, met the others: if the lead is unlimited they won all these comparisons.
    """
    first, second = (pd.Index(configs).get_indexer(verdicts[f"config_{seat}"]) for seat in ("first", "second"))
    compared, cut = [], []
    for i in range(len(configs)):
        above = limits[:, i].copy()
        above[i] = True
        compared.append(len(np.unique(unit_of_row[(first == i) | (second == i)])))
        cut.append(len(np.unique(unit_of_row[above[first] != above[second]])))
    return np.array(compared), np.array(cut)


def least_p(units: np.ndarray) -> np.ndarray:
    """The smallest two-sided p that a test with clusters as its units can reach: all of them on one side."""
    return np.minimum(1.0, 2.0 ** (1 - np.asarray(units, dtype=float)))


def won_all_bound(share: Callable[[float], float], units: int) -> float:
    """The lower 95 % bound (one side of it, 2.5 %) of the ability of a configuration that won all comparisons.

    Clopper and Pearson's lower bound of n wins in n is .025^(1/n). With n the number of clusters it holds even if all
    verdicts of a cluster are copies of one.

    Args:
        share: the expected share of wins, by ability.
        units: the clusters.

    Returns:
        The ability at which the expected share equals the bound; NaN with fewer than two clusters.
    """
    if units < 2:
        return float("nan")
    bound = float(stats.beta.ppf(0.025, units, 1))
    if not share(-_FAR) < bound < share(_FAR):
        return float("nan")
    return float(optimize.brentq(lambda ability: share(ability) - bound, -_FAR, _FAR))
