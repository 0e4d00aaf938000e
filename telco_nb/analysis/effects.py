"""Effects of the factors, what the design can estimate, and the spread between seeds."""

from __future__ import annotations

import math
import warnings
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis.inference import FEWEST_CONTRASTS, Error, lack_of_fit, lenth_error, pure_error
from telco_nb.analysis.results import ENERGY_COLUMNS, StudyResults
from telco_nb.analysis.statistics import MISSING, Interval, Luck
from telco_nb.judge.ranking import holm

FACTORS = ("target_modules", "rank", "epochs", "learning_rate")
TARGET_ORDER = ("qv", "attention", "mlp", "all")  # by number of adapted layers
EFFECT_COLUMNS = ["factor", "contrast", "effect", "low", "high", "p", "p_holm", "error", "stands_out", "estimable",
                  "reason"]  # fmt: skip
ORDER_SHARE = 0.5  # of the place in the order of runs: from here on a drift of the machine looks like the factor


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


def main_effects(
    configs: pd.DataFrame, response: pd.Series, log: bool = False, repeats: pd.Series | None = None
) -> pd.DataFrame:
    """Effect of each factor's levels on a response: ordinary least squares with main effects only.

    The error is that between runs of one configuration where there are some (pure error), else Lenth's pseudo standard
    error, which counts most interactions as noise. The residual is not used: it holds the interactions.

    Args:
        configs: the levels of FACTORS, indexed by configuration.
        response: by configuration; missing values are left out.
        log: fit the logarithm and give the effects as ratios.
        repeats: more runs of some configurations, indexed by configuration.

    Returns:
        One row per contrast: EFFECT_COLUMNS, lack_of_fit_f, lack_of_fit_p, lack_of_fit_df, n. `p_holm` is adjusted over
        the contrasts; `error` names the error; `stands_out` says whether an effect exceeds Lenth's margin, and so most
        interactions. A contrast that the configurations cannot separate from others, or that has no error, has no
        numbers and a `reason`.
    """
    y = response[response.dropna().index.intersection(configs.index)].astype(float)
    x, table = design_matrix(configs.loc[y.index])
    more = pd.Series(dtype=float) if repeats is None else repeats[repeats.index.isin(y.index)].dropna().astype(float)
    runs = pd.concat([y, more])
    if log and (runs <= 0).any():
        return _without_numbers(table, x, f"{runs.idxmin()} has a value of {runs.min():g}, so there is no ratio")
    y, runs = (np.log(y), np.log(runs)) if log else (y, runs)
    pseudo = lenth_error(configs.loc[y.index, list(FACTORS)], y) if len(y) else None
    error = pure_error(runs) or pseudo
    if error is None or table.empty:
        few = len(y) <= FEWEST_CONTRASTS
        reason = "Lenth's method needs eight configurations" if few else "nothing that could be noise is left over"
        return _without_numbers(table, x, f"no run was repeated, and {reason}")
    table = pd.concat([table, _estimates(x, y, error, pseudo).loc[table["column"]].reset_index(drop=True)], axis=1)
    if log:
        table[["effect", "low", "high"]] = np.exp(table[["effect", "low", "high"]])
    fit = lack_of_fit(x, runs)
    return table[EFFECT_COLUMNS].assign(lack_of_fit_f=fit.f, lack_of_fit_p=fit.p, lack_of_fit_df=fit.df, n=len(y))


def _estimates(x: pd.DataFrame, y: pd.Series, error: Error, pseudo: Error | None) -> pd.DataFrame:
    """By column of the model matrix: effect, interval, p, Holm's p over all effects, and what can be estimated."""
    from statsmodels.regression.linear_model import OLS
    from statsmodels.tools.sm_exceptions import SingularMatrixWarning

    with warnings.catch_warnings(category=SingularMatrixWarning, action="ignore"):  # `reason` says it
        fit = OLS(y, x).fit()
    scale = np.sqrt(np.diag(fit.normalized_cov_params))
    half = stats.t.ppf(0.975, error.df) * error.sd * scale
    table = pd.DataFrame({"effect": fit.params, "low": fit.params - half, "high": fit.params + half}, index=x.columns)
    table["p"] = 2 * stats.t.sf(np.abs(fit.params) / (error.sd * scale), error.df)
    table["estimable"] = _is_separable(x)
    table.loc[~table["estimable"], ["effect", "low", "high", "p"]] = math.nan
    tested = table.index[table["estimable"] & (table.index != "intercept")]
    table["p_holm"] = pd.Series(holm(table.loc[tested, "p"].to_numpy()), tested) if len(tested) else math.nan
    margin = stats.t.ppf(0.975, pseudo.df) * pseudo.sd * scale if pseudo else math.nan
    table["stands_out"] = table["effect"].abs() > margin
    reason = np.where(table["estimable"], "", "cannot be separated from other factors in this set")
    return table.assign(error=error.source, reason=reason)


def _without_numbers(table: pd.DataFrame, x: pd.DataFrame, reason: str) -> pd.DataFrame:
    """Effects that have a reason instead of numbers."""
    separable = table["column"].map(_is_separable(x)).astype(bool)
    table = table.assign(**dict.fromkeys(("effect", "low", "high", "p", "p_holm"), math.nan), error="", estimable=False)
    table["reason"] = np.where(separable, reason, "cannot be separated from other factors in this set")
    table = table.assign(stands_out=False)[EFFECT_COLUMNS]
    return table.assign(lack_of_fit_f=math.nan, lack_of_fit_p=math.nan, lack_of_fit_df=0, n=len(x))


def effect_tables(study: StudyResults) -> pd.DataFrame:
    """Main effects on loss (difference), on each judge's score (difference, log-odds), on training energy (ratio)."""
    return study.once("effects", lambda: _effect_tables(study))


def _effect_tables(study: StudyResults) -> pd.DataFrame:
    outcomes = [("val_loss", "nats per token", study.losses, "val_loss")]
    outcomes += [(f"{j.name} score", "log-odds", j.first_scores, f"{j.name}_score") for j in study.judges]
    if len(study.energy_kinds) == 1:
        outcomes.append((f"training energy ({study.energy_word})", "ratio", study.energy, "train_energy_wh"))
    tables = []
    for name, unit, values, column in outcomes:
        repeats = study.repeats.set_index("config")[column] if column in study.repeats else None
        effects = main_effects(study.results, values, unit == "ratio", repeats)
        if unit == "log-odds":
            effects["error"] += np.where(effects["error"] == "", "", ", noise of judging included")
        tables.append(effects.assign(response=name, unit=unit))
    table = pd.concat(tables, ignore_index=True)
    return table[["response", "unit", *table.columns.drop(["response", "unit"])]]


def order_is_known(configs: pd.DataFrame) -> bool:
    """True if every configuration has the time at which its training started."""
    return "train_started_at" in configs and bool(configs["train_started_at"].notna().all())


def order_shares(configs: pd.DataFrame) -> dict[str, float]:
    """How far each factor determines the place of a configuration in the order of runs, 0 to 1.

    Args:
        configs: the levels of FACTORS, by configuration, and train_started_at. Where a start is missing, the order in
            which they are listed is taken for that of the runs (`order_is_known`).
    """
    if order_is_known(configs):
        configs = configs.sort_values("train_started_at", kind="stable")
    place = pd.Series(np.arange(len(configs), dtype=float), configs.index)
    total = float(((place - place.mean()) ** 2).sum())
    if not total:
        return dict.fromkeys(FACTORS, 0.0)
    shares = {}
    for factor in FACTORS:
        means = place.groupby(configs[factor], dropna=False).transform("mean")
        shares[factor] = float(((means - place.mean()) ** 2).sum()) / total
    return shares


def energy_spread(study: StudyResults) -> Error | None:
    """The standard deviation of the logarithm of a training energy from run to run; None without repeated runs."""
    repeats = study.repeats.set_index("config")["train_energy_wh"]
    runs = pd.concat([study.energy, repeats[repeats.index.isin(study.energy.index)].dropna().astype(float)])
    return pure_error(np.log(runs[runs > 0]))


def energy_ratio(study: StudyResults, most: str, least: str) -> Interval:
    """Training energy of configuration `most` over that of `least`.

    The interval holds the error from run to run, and the bounds of the two energies as far as they do not move
    together (watts per core do). It is missing where no run was repeated, and the ratio where an energy is 0.
    """
    if not (study.energy[[most, least]] > 0).all():
        return MISSING
    value, spread = float(study.energy[most] / study.energy[least]), energy_spread(study)
    if spread is None:
        return Interval(value)
    half = float(stats.t.ppf(0.975, spread.df)) * math.sqrt(2) * spread.sd
    bounds = study.results.loc[[most, least], list(ENERGY_COLUMNS[1:3])].astype(float)
    shared = [r for r in bounds.loc[most] / bounds.loc[least].where(bounds.loc[least] > 0) if math.isfinite(r)]
    return Interval(value, min([value, *shared]) * math.exp(-half), max([value, *shared]) * math.exp(half))


def design_facts(configs: pd.DataFrame) -> pd.DataFrame:
    """A table, by factor, of what the given configurations can estimate.

    Columns: factor, levels, varied, separable (from the other main effects), clear (no main effect of it is aliased
    with any two-factor interaction).
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
    return pd.DataFrame(rows, columns=["factor", "levels", "varied", "separable", "clear"])


ARRAY_TEXT = """These 16 configurations are an orthogonal array: every main effect is clear of every two-factor
interaction, but some interactions cannot be told from each other. `learning_rate` is aliased with the three-factor
interaction of `target_modules`, `rank` and `epochs`, and in part of `target_modules` the pairs *target x rank* and
*epochs x learning rate*, *target x epochs* and *rank x learning rate*, *target x learning rate* and *rank x epochs*
coincide. No statement is made about interactions."""


def is_16_run_array(configs: pd.DataFrame) -> bool:
    """True for 16 configurations of 4 x 2 x 2 x 2 levels whose main effects are clear of all two-factor interactions.

    Args:
        configs: the levels of FACTORS, indexed by configuration.
    """
    levels = [len(factor_levels(configs, factor)) for factor in FACTORS]
    return len(configs) == 16 and levels == [4, 2, 2, 2] and bool(design_facts(configs)["clear"].all())


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
        None if no configuration was repeated, or if repeats do not differ.
    """
    values = results[column].dropna().astype(float)
    seeds = repeats[["config", column]].dropna()
    seeds = seeds[seeds["config"].isin(values.index)]
    original = values[seeds["config"].unique()].rename_axis("config").reset_index()
    runs = pd.concat([seeds, original]).set_index("config")[column]
    error = pure_error(runs)
    if error is None:
        return None
    between_seeds = Luck(error.sd**2, 0.0, int(error.df)).sd
    return SeedNoise(between_seeds, float(values.std()), int(error.df), len(runs))
