"""Has training taught anything? Points made where training has the question's problem, and where it has not.

Every question of `test` and `noisy` is about a problem that stands in training in another context; those of `unseen`
are about terms that were never trained on. A model that has learned only how to sound makes as few points on the one
as on the other. The answer of the most similar training conversation stands beside: what the texts themselves hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from telco_nb.analysis.statements import Finding, counted, excludes_zero, not_estimable
from telco_nb.analysis.statistics import Interval, cluster_weights, percentile_interval, ratio_draws
from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.ranking import interval_text

ALL = "all configurations"
BESIDE = ("nearest", "untuned")  # what stands beside the configurations


def is_taught(prompts: pd.DataFrame, train: pd.DataFrame) -> pd.Series:
    """Whether the problem of each question stands in training.

    Args:
        prompts: one row each, with prompt_id, term_id and problem_id (None: not known, as of prompts of one's own).
        train: the training conversations, with term_id and problem_id.

    Returns:
        True, False or NA by prompt_id.
    """
    known = set(zip(train["term_id"], train["problem_id"], strict=True))
    asked = zip(prompts["term_id"], prompts["problem_id"], strict=True)
    found = [pd.NA if pd.isna(problem) else (term, problem) in known for term, problem in asked]
    return pd.Series(found, index=prompts["prompt_id"], dtype="boolean")


def taught_table(checks: pd.DataFrame | None, configs: Sequence[str], n_draws: int, seed: int) -> pd.DataFrame:
    """The share of a full answer's points on taught and on other problems, with the difference.

    Args:
        checks: what the checklist found in each answer: config, term_id, coverage (0 to 1) and taught; None without it.
        configs: the configurations.
        n_draws: resamples of whole terms.
        seed: of the resamples.

    Returns:
        One row for `ALL` (the mean), each configuration and `BESIDE`: taught, untaught (shares, 0 to 1), difference
        with 95 % bounds low and high, n_taught and n_untaught (questions) and n_terms, the smaller of the two numbers
        of terms. Empty where there are not both kinds of questions.
    """
    known = checks is not None and "taught" in checks  # a record of an earlier version has no such column
    rows = checks.dropna(subset=["taught"]) if known else pd.DataFrame()
    if not len(rows) or rows["taught"].nunique() < 2:
        return pd.DataFrame()
    names = [*configs, *(name for name in BESIDE if name in set(rows["config"]))]
    grid = rows.pivot_table("coverage", "term_id", ["taught", "config"], ["sum", "count"], observed=True).fillna(0)
    weights, shares, draws, sizes = cluster_weights(len(grid), n_draws, seed), {}, {}, {}
    for kind in (True, False):
        sums, counts = (grid[part][kind][names] for part in ("sum", "count"))
        sums, counts = (part.assign(**{ALL: part[list(configs)].mean(axis=1)}) for part in (sums, counts))
        shares[kind], sizes[kind] = sums.sum() / counts.sum(), counts[ALL]
        draws[kind] = ratio_draws(weights, sums.to_numpy(), counts.to_numpy())
    n_terms = min(int((size > 0).sum()) for size in sizes.values())
    table = pd.DataFrame({"taught": shares[True], "untaught": shares[False]})
    moved = draws[True] - draws[False]
    bounds = [percentile_interval(v, moved[:, i], n_terms) for i, v in enumerate(shares[True] - shares[False])]
    table[["difference", "low", "high"]] = pd.DataFrame(bounds, index=table.index)
    table = table.assign(n_taught=int(sizes[True].sum()), n_untaught=int(sizes[False].sum()), n_terms=n_terms)
    return table.loc[[ALL, *names]].rename_axis("config")


def taught_finding(table: pd.DataFrame, configs: Sequence[str]) -> Finding:
    """What training taught, in one sentence. `value` is the mean difference over the configurations, a share."""
    if not len(table):
        reason = "a checklist that passed its gate must read answers to problems that training has and to others"
        return not_estimable("taught", "Whether training taught facts is not known", reason)
    mean, best = table.loc[ALL], table.loc[table.loc[list(configs), "taught"].idxmax()]
    moved = Interval(*(100 * mean[["difference", "low", "high"]]))
    verdict = excludes_zero(moved)
    beside = "; ".join(f"{ANCHORS[name]} makes {_pair(table.loc[name])}" for name in BESIDE if name in table.index)
    asked, others = (counted(int(mean[n]), "question") for n in ("n_taught", "n_untaught"))
    text = (
        f"Where training has the problem of a question, in another context ({asked}), the configurations make "
        f"{mean['taught']:.1%} of a full answer's points, elsewhere ({others}) {mean['untaught']:.1%}: a difference of "
        f"{moved.value:.1f} points {interval_text(moved.low, moved.high, '.1f')}. The most on trained problems makes "
        f"{best.name}, picked after the fact: {_pair(best)}."
    )
    text += f" Beside it, untrained: {beside}." if beside else ""
    return Finding("taught", text, float(mean["difference"]), float(mean["low"]), float(mean["high"]),
                   int(mean["n_terms"]), verdict)  # fmt: skip


def _pair(row: pd.Series) -> str:
    return f"{row['taught']:.0%} and {row['untaught']:.0%}"
