"""The judges read together: how many independent ones they amount to, and one score from all.

Judges that give the same verdicts say the same thing twice. If their verdicts correlate by r on average, k judges
amount to k / (1 + (k - 1) r) independent ones. The correlation holds what is true about the answers as well as shared
errors; verdicts cannot tell the two apart, so the number is a lower limit of what the judges add to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis.results import JudgeResults

LEAST_SHARED = 20  # comparisons that two judges share, or their correlation is not known


class Panel(NamedTuple):
    """The joint reading: correlations of verdicts and weights by judge, the effective number of judges, and `table` by
    configuration, best first: score, low, high, rank, and spread (the SD between the judges)."""

    correlations: pd.DataFrame
    weights: pd.Series
    effective: float
    table: pd.DataFrame


def verdict_table(judgements: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The verdicts of all judges side by side.

    Args:
        judgements: by judge, comparisons with prompt_id, config_first, config_second, purpose and verdict (or winner).

    Returns:
        One row per prompt and pair, a column per judge: the mean of 1 (for the pair's first in the alphabet), 0 (tie)
        and -1; missing where a judge has not compared it.
    """
    columns = {}
    for name, rows in judgements.items():
        rows = rows[rows["purpose"].isin(("ranking", "swap"))]
        first, second = rows["config_first"].to_numpy(dtype=object), rows["config_second"].to_numpy(dtype=object)
        if "verdict" in rows:
            lead = rows["verdict"].map({"A": 1.0, "tie": 0.0, "B": -1.0}).to_numpy(dtype=float)
        else:
            lead = np.where(rows["winner"] == first, 1.0, np.where(rows["winner"] == second, -1.0, 0.0))
        swapped = first > second
        keys = {
            "prompt_id": rows["prompt_id"].to_numpy(),
            "low": np.where(swapped, second, first),
            "high": np.where(swapped, first, second),
        }
        frame = pd.DataFrame(keys | {"lead": np.where(swapped, -lead, lead)})
        columns[name] = frame.groupby(["prompt_id", "low", "high"])["lead"].mean()
    return pd.DataFrame(columns)


def effective_number(correlations: pd.DataFrame) -> float:
    """k squared over the sum of the correlations: k for independent judges, 1 for copies; NaN if one is not known."""
    r = np.clip(correlations.to_numpy(float), 0.0, 1.0)
    return float(len(r) ** 2 / r.sum()) if len(r) else float("nan")


def panel_weights(correlations: pd.DataFrame) -> pd.Series:
    """The weights of the mean with the least variance, none below 0; equal ones if a correlation is not known."""
    k, r = len(correlations), correlations.to_numpy(float)
    if np.isnan(r).any():
        return pd.Series(1 / k, correlations.index)
    weights = np.maximum(np.linalg.pinv(r) @ np.ones(k), 0.0)
    return pd.Series(weights / weights.sum(), correlations.index)


def read_together(judges: Sequence[JudgeResults], judgements: Mapping[str, pd.DataFrame]) -> Panel | None:
    """The joint reading of judges; None for fewer than two, or without a configuration that all have ranked.

    The interval has two parts: the noise of each score over terms (judges with the same resamples keep what they share)
    and the disagreement of the judges, as far as the effective number of judges averages it out.

    Args:
        judges: those that may carry a headline.
        judgements: their comparisons, by name.
    """
    configs = [c for c in judges[0].scores.index if all(c in judge.scores.index for judge in judges)] if judges else []
    if len(judges) < 2 or not configs:
        return None
    table = verdict_table({judge.name: judgements[judge.name] for judge in judges})
    correlations = table.corr(min_periods=LEAST_SHARED)
    weights, effective = panel_weights(correlations), effective_number(correlations)
    scores = pd.DataFrame({judge.name: judge.scores[configs] - judge.scores[configs].mean() for judge in judges})
    draws = sum(weights[j.name] * _centred(j.draws[configs], min(len(i.draws) for i in judges)) for j in judges)
    joint = scores @ weights
    between = ((scores.sub(joint, axis=0) ** 2) @ weights).mean() * len(judges) / (len(judges) - 1)
    spread = 1.0 if np.isnan(effective) else effective
    half = stats.norm.ppf(0.975) * np.sqrt(draws.var(0) + between / spread)
    found = pd.DataFrame({"score": joint, "low": joint - half, "high": joint + half})
    found["rank"], found["spread"] = joint.round(8).rank(ascending=False, method="min").astype(int), scores.std(axis=1)
    return Panel(correlations, weights, effective, found.rename_axis("config").sort_values(["rank", "config"]))


def _centred(draws: pd.DataFrame, n: int) -> np.ndarray:
    values = draws.to_numpy(float)[:n]
    return values - values.mean(1, keepdims=True)


def panel_text(panel: Panel | None) -> str:
    """The joint reading in words."""
    if panel is None:
        return "Fewer than two judges may carry a headline, so there is nothing to read together."
    k, best = len(panel.weights), panel.table.iloc[0]
    number = "not known" if np.isnan(panel.effective) else f"{panel.effective:.1f}"
    shares = ", ".join(f"{name} {weight:.0%}" for name, weight in panel.weights.items())
    text = f"By the correlation of their verdicts the {k} judges amount to **{number} independent ones** (weights: "
    interval = f"{best['score']:+.2f} [{best['low']:+.2f}, {best['high']:+.2f}]"
    return f"{text}{shares}). Read together they put {best.name} first, with {interval} log-odds."
