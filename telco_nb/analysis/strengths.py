"""Adapters made weaker or stronger after training: does another strength lower the loss of the gold answers?"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from telco_nb.analysis.statements import Finding, counted, excludes_zero, not_estimable
from telco_nb.analysis.statistics import Interval, cluster_weights, joint_interval, percentile_interval, ratio_draws
from telco_nb.judge.ranking import interval_text

COLUMNS = ["config", "role", "strength", "answers", "terms", "loss", "change", "low", "high"]


def strength_roles(top: str | None, losses: pd.Series) -> dict[str, str]:
    """Which configurations are looked at and why: the one with the lowest loss, and `top`, the front-runner."""
    roles = {str(losses.idxmin()): "with the lowest loss"} if len(losses) else {}
    if top is not None:
        roles[top] = "front-runner, with the lowest loss" if top in roles else "front-runner"
    return roles


def strength_table(
    tables: Mapping[str, pd.DataFrame], roles: Mapping[str, str], n_draws: int, seed: int
) -> pd.DataFrame:
    """The loss at every strength, and its change from strength 1.

    Args:
        tables: by configuration, columns strength, prompt_id, term_id, n_tokens and loss_sum, as 04 writes them.
        roles: why a configuration is shown, by configuration; those without several strengths are left out.
        n_draws, seed: of the bootstrap over terms, the same for all strengths.

    Returns:
        Columns COLUMNS: answers and terms are their numbers, losses are in nats per token. The bounds of the changes of
        one configuration hold together, because the best strength is picked from all of them.
    """
    rows = []
    for config, role in roles.items():
        table = tables[config]
        if table["strength"].nunique() < 2 or not (table["strength"] == 1).any():
            continue
        sums = table.pivot_table(["loss_sum", "n_tokens"], "term_id", "strength", aggfunc="sum")
        weights = cluster_weights(len(sums), n_draws, seed)
        drawn = ratio_draws(weights, sums["loss_sum"].to_numpy(), sums["n_tokens"].to_numpy())
        losses = sums["loss_sum"].sum() / sums["n_tokens"].sum()
        own = list(losses.index).index(1)
        for k, (strength, loss) in enumerate(losses.items()):
            moved = drawn[:, k] - drawn[:, own]
            alone = percentile_interval(loss - losses[1], moved, len(sums))
            change = joint_interval(alone, moved, len(sums), len(losses) - 1)
            rows.append((config, role, strength, table["prompt_id"].nunique(), len(sums), loss, *change))
    return pd.DataFrame(rows, columns=COLUMNS)


def strength_findings(table: pd.DataFrame, roles: Mapping[str, str]) -> list[Finding]:
    """Per configuration, the strength with the lowest loss beside strength 1 (or, if that is it, the next lowest)."""
    found = []
    for config, role in roles.items():
        rows, id = table[table["config"] == config].set_index("strength"), f"strength.{config}"
        if rows.empty:
            text = f"Whether another strength of {config} ({role}) lowers its loss is not known"
            found.append(not_estimable(id, text, "only one strength was computed"))
            continue
        found.append(_finding(id, config, role, rows))
    return found


def _finding(id: str, config: str, role: str, rows: pd.DataFrame) -> Finding:
    """The strength with the lowest loss beside another one; `rows` are those of a configuration, by strength.

    The value is the change from strength 1 to the other of the two.
    """
    best, names = rows["loss"].idxmin(), ", ".join(f"{strength:g}" for strength in rows.index)
    other = 1 if best != 1 else rows["loss"].drop(best).idxmin()
    moved, n = best if best != 1 else other, int(rows["answers"].iloc[0])
    change = Interval(*rows.loc[moved, ["change", "low", "high"]])
    text = (
        f"Of the strengths {names} of {config} ({role}) the loss of the gold answers is lowest at {best:g}: "
        f"{rows.loc[best, 'loss']:.3f} nats per token, against {rows.loc[other, 'loss']:.3f} at {other:g}. Strength "
        f"{moved:g} changes it by {change.value:+.3f} {interval_text(*change[1:], '+.3f')} against strength 1, "
    )
    text += f"on {counted(n, 'answer')}" if change.excludes() else f"not told apart on {counted(n, 'answer')}"
    if best != 1:
        text += "; picked after the fact, and what the answers are like there was not judged"
    return Finding(id, f"{text}.", *change, n=int(rows["terms"].iloc[0]), verdict=excludes_zero(change))
