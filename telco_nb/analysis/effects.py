"""Effects of the factors, what the design can estimate, and the spread between seeds."""

from __future__ import annotations

import math
import warnings
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis.results import StudyResults
from telco_nb.analysis.statistics import Interval

FACTORS = ("target_modules", "rank", "epochs", "learning_rate")
TARGET_ORDER = ("qv", "attention", "mlp", "all")  # by number of adapted layers
EFFECT_COLUMNS = ["factor", "contrast", "effect", "low", "high", "estimable", "reason"]


def factor_levels(configs: pd.DataFrame, factor: str) -> list[Any]:
    """The levels of a factor in the given set, lowest first."""
    levels = sorted(configs[factor].dropna().unique())
    if factor == "target_modules":
        return sorted(levels, key=lambda level: TARGET_ORDER.index(level) if level in TARGET_ORDER else len(levels))
    return levels


def level_text(level: Any) -> str:
    return f"{level:g}" if isinstance(level, (int, float, np.number)) else str(level)


def design_matrix(configs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Model matrix with an intercept and one column per contrast with the lowest level, and a table of its columns."""
    columns, described = {"intercept": np.ones(len(configs))}, []
    for factor in FACTORS:
        lowest, *others = factor_levels(configs, factor) or [None]
        for level in others:
            contrast = f"{level_text(lowest)} -> {level_text(level)}"
            columns[f"{factor}: {contrast}"] = (configs[factor] == level).to_numpy(dtype=float)
            described.append((factor, contrast, f"{factor}: {contrast}"))
    return pd.DataFrame(columns, index=configs.index), pd.DataFrame(described, columns=["factor", "contrast", "column"])


def _is_separable(x: pd.DataFrame) -> pd.Series:
    """By column: is the coefficient estimable, that is, does its unit vector lie in the row space of the matrix?"""
    row_space = np.linalg.pinv(x.to_numpy()) @ x.to_numpy()
    return pd.Series(np.isclose(row_space, np.eye(len(row_space)), rtol=1e-5, atol=1e-8).all(axis=1), index=x.columns)


def main_effects(configs: pd.DataFrame, response: pd.Series, log: bool = False) -> pd.DataFrame:
    """Effect of each factor's levels on a response: ordinary least squares with main effects only.

    The intervals (t, `df_resid`) come from the residual, which contains all interactions and the noise.

    Args:
        configs: the levels of FACTORS, indexed by configuration.
        response: by configuration; missing values are left out.
        log: fit the logarithm and give the effects as ratios.

    Returns:
        One row per contrast: EFFECT_COLUMNS, n, df_resid. A contrast that the configurations cannot separate from
        others, or that leaves no residual, has no numbers and a `reason`.
    """
    from statsmodels.regression.linear_model import OLS
    from statsmodels.tools.sm_exceptions import SingularMatrixWarning

    y = response[response.dropna().index.intersection(configs.index)].astype(float)
    x, table = design_matrix(configs.loc[y.index])
    df_resid = int(len(x) - np.linalg.matrix_rank(x.to_numpy())) if len(x) else 0
    table[["effect", "low", "high"]] = math.nan
    separable = table["column"].map(_is_separable(x)).astype(bool)
    if df_resid and len(table):
        with warnings.catch_warnings(category=SingularMatrixWarning, action="ignore"):  # `reason` says it
            fit = OLS(np.log(y) if log else y, x).fit()
        numbers = fit.conf_int().set_axis(["low", "high"], axis=1).assign(effect=fit.params)
        numbers = (np.exp(numbers) if log else numbers).loc[table["column"], ["effect", "low", "high"]]
        table.loc[separable, ["effect", "low", "high"]] = numbers.to_numpy()[separable]
    reason = "" if df_resid else "no configuration is left over to estimate the noise"
    table["estimable"] = separable & (df_resid > 0)
    table["reason"] = np.where(separable, reason, "cannot be separated from other factors in this set")
    return table[EFFECT_COLUMNS].assign(n=len(y), df_resid=df_resid)


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


def design_facts(configs: pd.DataFrame) -> pd.DataFrame:
    """A table, by factor, of what the given configurations can estimate.

    Columns: factor, levels, varied, separable (from the other main effects), clear (no main effect of it is aliased
    with any two-factor interaction), leftover (residual degrees of freedom of the main-effects model).
    """
    x, table = design_matrix(configs)
    separable = _is_separable(x)
    interactions = _interaction_columns(configs)
    # The alias matrix is exact for centred interaction columns; the intercept takes up their mean.
    alias = np.linalg.pinv(x.to_numpy()) @ (interactions - interactions.mean(axis=0))
    clear = separable & np.isclose(alias, 0, atol=1e-8).all(axis=1)
    rows = []
    for factor in FACTORS:
        columns = table.loc[table["factor"] == factor, "column"]
        levels = ", ".join(map(level_text, factor_levels(configs, factor)))
        varied = len(columns) > 0
        rows.append((factor, levels, varied, varied and separable[columns].all(), varied and clear[columns].all()))
    frame = pd.DataFrame(rows, columns=["factor", "levels", "varied", "separable", "clear"])
    return frame.assign(leftover=len(configs) - int(np.linalg.matrix_rank(x.to_numpy())))


def _interaction_columns(configs: pd.DataFrame) -> np.ndarray:
    """Products of the centred contrast columns of every two factors, (configurations, products)."""
    coded = []
    for factor in FACTORS:
        levels = factor_levels(configs, factor)
        coded.append([(configs[factor] == level).to_numpy(float) - 1 / len(levels) for level in levels[:-1]])
    products = [a * b for first, second in combinations(coded, 2) for a, b in product(first, second)]
    return np.array(products).T if products else np.empty((len(configs), 0))


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
    """Pooled standard deviation between seeds of a column, with its chi-square interval.

    Args:
        results: indexed by configuration; its run counts as one more seed of the repeated configurations.
        repeats: one row per repeat, with columns config and `column`.
        column: such as `val_loss`.

    Returns:
        None if no configuration was repeated.
    """
    values = results[column].dropna().astype(float)
    seeds = repeats[["config", column]].dropna()
    seeds = seeds[seeds["config"].isin(values.index)]
    original = values[seeds["config"].unique()].rename_axis("config").reset_index()
    runs = pd.concat([seeds, original]).groupby("config")[column].agg(["var", "count"])
    df = int((runs["count"] - 1).sum())
    if df < 1:
        return None
    total = float((runs["var"] * (runs["count"] - 1)).sum())
    low, high = (math.sqrt(total / stats.chi2.ppf(q, df)) for q in (0.975, 0.025))
    spread = Interval(math.sqrt(total / df), low, high)
    return SeedNoise(spread, float(values.std()), df, int(runs["count"].sum()))
