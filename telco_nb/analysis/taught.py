"""Has training taught facts? Points made where training has the question's problem, and where it has not.

A question of `test` or `noisy` may be about a problem that stands in training in another context; those of `unseen` are
about terms that were never trained on. A model that has learned only how to sound gains as much on the one as on the
other. The two kinds differ in difficulty as well, so what counts is the gain over the untuned model. A simple look-up,
the answer of the most similar training conversation, stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from telco_nb.analysis.fitness import ECHO, LOOKUP
from telco_nb.analysis.statements import Finding, counted, excludes_zero, not_estimable
from telco_nb.analysis.statistics import Interval, cluster_weights, percentile_interval, ratio_draws
from telco_nb.judge.ranking import interval_text

ALL, UNTUNED = "all configurations", "untuned"
FEWEST_TERMS = 4  # of either kind of question: with 4 the bounds cover .95 (tests), with 2 .83


def is_taught(prompts: pd.DataFrame, train: pd.DataFrame) -> pd.Series:
    """Whether the problem of each question stands in training.

    Args:
        prompts: one row each, with prompt_id, test_set, term_id and problem_id.
        train: the training conversations, with term_id and problem_id.

    Returns:
        True or False by prompt_id; NA for prompts of one's own, whose context is not known, and often not the problem.
    """
    known = set(zip(train["term_id"], train["problem_id"], strict=True))
    asked = zip(prompts["test_set"], prompts["term_id"], prompts["problem_id"], strict=True)
    found = [pd.NA if test_set == "own" else (term, problem) in known for test_set, term, problem in asked]
    return pd.Series(found, index=prompts["prompt_id"], dtype="boolean")


def taught_table(checks: pd.DataFrame | None, configs: Sequence[str], n_draws: int, seed: int) -> pd.DataFrame:
    """The share of a full answer's points on taught and on other problems, and what training adds to the first alone.

    Args:
        checks: what the checklist found in each answer: config, term_id, coverage (0 to 1) and taught; None without it.
        configs: the configurations.
        n_draws: resamples of whole terms.
        seed: of the resamples.

    Returns:
        One row for `ALL` (the mean), each configuration, `LOOKUP`, `ECHO` and `UNTUNED`: taught and untaught (shares,
        0 to 1), taught_low and taught_high (95 % bounds), gain (the difference of the two less that of the untuned
        model) with bounds low and high, n_taught and n_untaught (questions) and n_terms, the smaller of the two numbers
        of terms.
        Empty without questions of both kinds, or without the untuned model.
    """
    rows = pd.DataFrame() if checks is None or "taught" not in checks else checks.dropna(subset=["taught"])
    names = [name for name in (*configs, LOOKUP, ECHO, UNTUNED) if len(rows) and name in set(rows["config"])]
    if not {*configs, UNTUNED} <= set(names) or rows["taught"].nunique() < 2:
        return pd.DataFrame()
    grid = rows.pivot_table("coverage", "term_id", ["taught", "config"], ["sum", "count"], observed=True).fillna(0)
    weights, kinds = cluster_weights(len(grid), n_draws, seed), {}
    for kind in (True, False):
        sums, counts = (_with_mean(grid[part][kind][names], configs) for part in ("sum", "count"))
        kinds[kind] = sums.sum() / counts.sum(), ratio_draws(weights, sums.to_numpy(), counts.to_numpy()), counts[ALL]
    n_terms = min(int((sizes > 0).sum()) for _, _, sizes in kinds.values())
    table = pd.DataFrame({"taught": kinds[True][0], "untaught": kinds[False][0]})
    table[["taught_low", "taught_high"]] = _bounds(table["taught"], kinds[True][1], n_terms)
    untuned = table.index.get_loc(UNTUNED)
    gap, drawn = table["taught"] - table["untaught"], kinds[True][1] - kinds[False][1]
    table["gain"] = gap - gap[UNTUNED]
    table[["low", "high"]] = _bounds(table["gain"], drawn - drawn[:, [untuned]], n_terms)
    table.loc[UNTUNED, ["gain", "low", "high"]] = np.nan
    n_taught, n_untaught = (int(kinds[kind][2].sum()) for kind in (True, False))
    return table.assign(n_taught=n_taught, n_untaught=n_untaught, n_terms=n_terms).rename_axis("config")


def _with_mean(cells: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """The columns with the mean of the configurations before them."""
    return pd.concat([cells[list(configs)].mean(axis=1).rename(ALL), cells], axis=1)


def _bounds(values: pd.Series, draws: np.ndarray, n_terms: int) -> np.ndarray:
    return np.array([percentile_interval(value, draws[:, i], n_terms)[1:] for i, value in enumerate(values)])


def taught_finding(table: pd.DataFrame) -> Finding:
    """What training taught, in words. `value` is the mean gain of the configurations, a share."""
    what = "Whether training has taught facts is not known"
    if not len(table):
        reason = "it takes a checklist that passed its gate, and questions about problems that training has and has not"
        return not_estimable("taught", what, reason)
    mean, untuned = table.loc[ALL], table.loc[UNTUNED]
    if (n := int(mean["n_terms"])) < FEWEST_TERMS:
        return not_estimable("taught", what, f"one kind of question is about {counted(n, 'term')} only", n)
    gain = Interval(*mean[["gain", "low", "high"]])
    asked, others = (counted(int(mean[key]), "question") for key in ("n_taught", "n_untaught"))
    added, elsewhere = (100 * (mean[key] - untuned[key]) for key in ("taught", "untaught"))
    more = f"{100 * gain.value:+.1f} {interval_text(100 * gain.low, 100 * gain.high, '+.1f')}"
    text = (
        f"Did training teach facts? {'By the checklist it did' if gain.is_above() else 'Not shown'}. On {asked} whose "
        f"problem was in training, in another context, the configurations make {mean['taught']:.1%} of the points, on "
        f"{others} about terms never trained on {mean['untaught']:.1%}; the untuned model {untuned['taught']:.1%} and "
        f"{untuned['untaught']:.1%}. Training added {added:.1f} percentage points on trained problems and "
        f"{elsewhere:.1f} on others, a difference of {more}{'' if gain.excludes() else ', which can be chance'}."
    )
    if LOOKUP in table.index:
        look = table.loc[LOOKUP]
        text += f" The look-up makes {look['taught']:.0%} and {look['untaught']:.0%}."
    return Finding("taught", text, *gain, n, excludes_zero(gain))
