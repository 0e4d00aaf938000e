"""Effects of the factors, what the design can estimate, and how much another seed changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis.results import StudyResults
from telco_nb.analysis.statistics import Interval

FACTORS = ("target_modules", "rank", "epochs", "learning_rate")
TARGET_ORDER = ("qv", "attention", "mlp", "all")  # by number of adapted layers


def factor_levels(configs: pd.DataFrame, factor: str) -> list[Any]:
    """The levels of a factor in the given set, lowest first."""
    levels = list(configs[factor].dropna().unique())
    if factor == "target_modules":
        known = [level for level in TARGET_ORDER if level in levels]
        return known + sorted(str(level) for level in levels if level not in known)
    return sorted(levels)


def design_matrix(configs: pd.DataFrame, factors: Sequence[str] = FACTORS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Model matrix with an intercept and one column per contrast with the lowest level, and a table of its columns."""
    columns, described = {"intercept": np.ones(len(configs))}, []
    for factor in factors:
        levels = factor_levels(configs, factor)
        for level in levels[1:]:
            contrast = f"{_level_text(levels[0])} -> {_level_text(level)}"
            columns[f"{factor}: {contrast}"] = (configs[factor] == level).to_numpy(dtype=float)
            described.append({"factor": factor, "contrast": contrast, "column": f"{factor}: {contrast}"})
    return pd.DataFrame(columns, index=configs.index), pd.DataFrame(described, columns=["factor", "contrast", "column"])


def _level_text(level: Any) -> str:
    return f"{level:g}" if isinstance(level, (int, float, np.number)) else str(level)


def main_effects(configs: pd.DataFrame, response: pd.Series, log: bool = False) -> pd.DataFrame:
    """Effect of each factor's levels on a response: ordinary least squares with main effects only.

    The residual that all interactions and the noise share gives the intervals (t, `df_resid`). With `log` the effects
    are ratios. A contrast that the set of configurations cannot separate from others, or that leaves no residual, has
    no numbers and a `reason`.
    """
    kept = response.dropna().index.intersection(configs.index)
    x, table = design_matrix(configs.loc[kept])
    y = np.log(response[kept].astype(float)) if log else response[kept].astype(float)
    matrix = x.to_numpy()
    inverse = np.linalg.pinv(matrix)
    df_resid = len(kept) - np.linalg.matrix_rank(matrix) if len(kept) else 0
    beta = inverse @ y.to_numpy()
    residual = y.to_numpy() - matrix @ beta
    sigma2 = residual @ residual / df_resid if df_resid else math.nan
    row_space = inverse @ matrix  # e_j is estimable exactly if it lies in the row space of X
    rows = []
    for line in table.itertuples():
        j = list(x.columns).index(line.column)
        unit = np.eye(matrix.shape[1])[j]
        separable = np.allclose(row_space[j], unit, atol=1e-8)
        width = stats.t.ppf(0.975, df_resid) * math.sqrt(sigma2 * (inverse @ inverse.T)[j, j]) if df_resid else math.nan
        rows.append(_effect_row(line, beta[j], width, separable, df_resid, log))
    frame = pd.DataFrame(rows, columns=EFFECT_COLUMNS)
    return frame.assign(n=len(kept), df_resid=df_resid)


EFFECT_COLUMNS = ["factor", "contrast", "effect", "low", "high", "estimable", "reason"]


def _effect_row(line: Any, beta: float, width: float, separable: bool, df_resid: int, log: bool) -> dict[str, Any]:
    row = {"factor": line.factor, "contrast": line.contrast, "effect": math.nan, "low": math.nan, "high": math.nan}
    if not separable:
        return row | {"estimable": False, "reason": "cannot be separated from other factors in this set"}
    if df_resid < 1:
        return row | {"estimable": False, "reason": "no configuration is left over to estimate the noise"}
    scale = math.exp if log else float
    numbers = {"effect": scale(beta), "low": scale(beta - width), "high": scale(beta + width)}
    return row | numbers | {"estimable": True, "reason": ""}


def design_facts(configs: pd.DataFrame) -> pd.DataFrame:
    """What the given set of configurations can tell apart, per factor.

    Columns: factor, levels, varied, separable (from the other main effects), clear (no main effect of it is aliased
    with any two-factor interaction), leftover (residual degrees of freedom of the main-effects model).
    """
    x, table = design_matrix(configs)
    matrix = x.to_numpy()
    inverse = np.linalg.pinv(matrix)
    interactions = _interaction_columns(configs)
    row_space = inverse @ matrix
    # The alias matrix is exact for centred interaction columns; the intercept takes up their mean.
    alias = inverse @ (interactions - interactions.mean(axis=0)) if interactions.size else np.zeros((len(x.columns), 1))
    rows = []
    for factor in FACTORS:
        index = [list(x.columns).index(column) for column in table.loc[table["factor"] == factor, "column"]]
        varied = bool(index)
        separable = varied and np.allclose(row_space[index], np.eye(len(x.columns))[index], atol=1e-8)
        clear = separable and np.allclose(alias[index], 0, atol=1e-8)
        levels = ", ".join(_level_text(level) for level in factor_levels(configs, factor))
        rows.append((factor, levels, varied, separable, clear))
    frame = pd.DataFrame(rows, columns=["factor", "levels", "varied", "separable", "clear"])
    return frame.assign(leftover=len(configs) - int(np.linalg.matrix_rank(matrix)))


def _interaction_columns(configs: pd.DataFrame) -> np.ndarray:
    """Products of the centred contrast columns of every two factors, (configurations, products)."""
    coded = {}
    for factor in FACTORS:
        levels = factor_levels(configs, factor)
        one_hot = np.column_stack([(configs[factor] == level).to_numpy(float) for level in levels])
        coded[factor] = (one_hot - 1 / len(levels))[:, :-1]
    products = [
        a[:, [i]] * b[:, [j]]
        for k, a in enumerate(coded.values())
        for b in list(coded.values())[k + 1 :]
        for i in range(a.shape[1])
        for j in range(b.shape[1])
    ]
    return np.hstack(products) if products else np.empty((len(configs), 0))


class SeedNoise(NamedTuple):
    """Spread between seeds of one configuration and between configurations (standard deviations)."""

    between_seeds: Interval
    between_configs: float
    df: int
    n_runs: int

    @property
    def resolution(self) -> float:
        """Smallest difference of two single runs that exceeds seed noise (95 %, t)."""
        return float(stats.t.ppf(0.975, self.df) * math.sqrt(2) * self.between_seeds.value)


def noise_floor(results: pd.DataFrame, repeats: pd.DataFrame, column: str) -> SeedNoise | None:
    """Pooled standard deviation between seeds of `column` with its chi-square interval; None without repeats.

    `results` is indexed by configuration; its run counts as one more seed of the repeated configurations.
    """
    values = results[column].dropna().astype(float)
    repeated = repeats.dropna(subset=[column])
    groups = [
        np.append(group[column].to_numpy(float), values[config])
        for config, group in repeated.groupby("config")
        if config in values.index
    ]
    df = sum(len(group) - 1 for group in groups)
    if df < 1:
        return None
    total = sum(((group - group.mean()) ** 2).sum() for group in groups)
    low, high = (math.sqrt(total / stats.chi2.ppf(q, df)) for q in (0.975, 0.025))
    seeds = Interval(math.sqrt(total / df), low, high)
    return SeedNoise(seeds, float(values.std()), df, sum(map(len, groups)))


def effect_tables(study: StudyResults) -> pd.DataFrame:
    """Main effects on loss (difference), on each judge's score (difference, log-odds), on training energy (ratio)."""
    tables = [main_effects(study.results, study.losses).assign(response="val_loss", unit="nats per token")]
    for judge in study.judges:
        effects = main_effects(study.results, judge.scores)
        tables.append(effects.assign(response=f"{judge.name} score", unit="log-odds"))
    if len(study.energy_kinds) == 1:
        effects = main_effects(study.results, study.energy, log=True)
        tables.append(effects.assign(response=f"training energy ({study.energy_word})", unit="ratio"))
    return pd.concat(tables, ignore_index=True)[["response", "unit", *EFFECT_COLUMNS, "n", "df_resid"]]
