"""To how many independent judges several ones amount, by what their verdicts share beside the configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.analysis.results import JudgeResults
from telco_nb.analysis.statements import Finding, counted, name_list, not_estimable
from telco_nb.analysis.statistics import Interval, cluster_weights, percentile_interval, read_comparisons
from telco_nb.judge.ranking import interval_text

FEWEST = 30  # shared comparisons: of fewer, a correlation says nothing


def effective_judges(judgements: Sequence[pd.DataFrame], n_draws: int, seed: int) -> tuple[Interval, Interval, int]:
    """The number of independent judges whose mean would be as sure as that of these, J / (1 + (J - 1) r).

    r is the mean correlation of two judges' verdicts (1, 0 or -1 for a configuration) on one comparison, after the mean
    over all comparisons of the same two configurations is taken off each judge's. What is left says nothing about the
    configurations: it is the luck of a prompt. Judges that share it are fooled together, and r is near 1. Below 0 it
    counts as 0. (Kish 1965, Survey Sampling: the design effect of a cluster.)

    Args:
        judgements: of two or more judges; columns as in `statistics.cohen_kappa`.
        n_draws, seed: of the bootstrap over scenarios.

    Returns:
        The number of judges and r, each with its interval, NaN where no verdicts vary; and the number of comparisons
        that all have judged.
    """
    shared = _shared_verdicts(judgements)
    missing = Interval(math.nan)
    if shared.empty:
        return missing, missing, 0
    columns = [name for name in shared if name not in ("prompt_id", "scenario_id", "pair")]
    left = shared[columns] - shared.groupby("pair")[columns].transform("mean")
    scenarios, code = np.unique(shared["scenario_id"], return_inverse=True)
    products = np.zeros((len(scenarios), len(columns), len(columns)))
    np.add.at(products, code, left.to_numpy()[:, :, None] * left.to_numpy()[:, None, :])
    r = _mean_correlation(products.sum(axis=0))
    weights = cluster_weights(len(scenarios), n_draws, seed)
    drawn = np.array([_mean_correlation(table) for table in np.tensordot(weights, products, axes=1)])
    drawn = drawn[np.isfinite(drawn)]
    if not math.isfinite(r) or not len(drawn):
        return missing, missing, len(shared)
    counts = [percentile_interval(f(r), f(drawn), len(scenarios)) for f in (_count(len(columns)), lambda x: x)]
    return counts[0], counts[1], len(shared)


def _shared_verdicts(judgements: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The comparisons that all judges have judged, with one column of verdicts, 1, 0 or -1, for each judge."""
    tables = []
    for i, table in enumerate(judgements):
        rows = read_comparisons(table)
        seats = rows[["config_first", "config_second"]]
        low, high = seats.min(axis=1), seats.max(axis=1)
        verdict = np.select([rows["winner"] == low, rows["winner"] == high], [1.0, -1.0], 0.0)
        tables.append(rows[["prompt_id", "scenario_id"]].assign(pair=low + "|" + high, **{str(i): verdict}))
    return reduce(lambda a, b: a.merge(b, on=["prompt_id", "scenario_id", "pair"]), tables)


def _mean_correlation(products: np.ndarray) -> float:
    """The mean correlation of all pairs of columns, from their sums of products (columns, columns)."""
    sizes = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = products / np.outer(sizes, sizes)
    return float(np.mean([correlations[a, b] for a, b in combinations(range(len(sizes)), 2)]))


def _count(judges: int) -> Callable[[Any], Any]:
    return lambda r: judges / (1 + (judges - 1) * np.clip(r, 0.0, 1.0))


def effective_finding(panel: Sequence[JudgeResults], number: Interval, r: Interval, n: int) -> Finding:
    """How many independent judges the panel amounts to. `number`, `r` and `n` are from `effective_judges`."""
    labels, id = name_list([judge.label for judge in panel]), "effective_judges"
    if n < FEWEST or not math.isfinite(number.value):
        reason = f"they share {counted(n, 'comparison')}; {FEWEST} that vary are needed"
        return not_estimable(id, f"To how many independent judges {labels} amount is not known", reason, n)
    text = f"For the luck of single prompts {labels} count as {number.value:.2f} {interval_text(*number[1:], '.2f')} "
    text += (
        f"independent judges: between answers of the same two configurations their verdicts correlate {r.value:.2f} "
    )
    text += f"{interval_text(*r[1:], '.2f')} over {counted(n, 'shared comparison')}."
    return Finding(id, text, *number, n)
