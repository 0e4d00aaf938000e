"""The luck of training: how much another seed changes a score, and what that does to every interval.

05_judge ranks runs: each configuration once and, where there are some, its repeats with other seeds. Here the runs of a
configuration become one score, their mean. Runs of one configuration differ by more than the noise of the verdicts;
the rest is luck. Its variance is pooled over the repeated configurations and enters the draws of all of them, so that
intervals of scores and ranks, tau, comparisons with the best and the recommendation hold it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb.analysis import effects
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable
from telco_nb.analysis.statistics import Luck
from telco_nb.judge.best import MANY
from telco_nb.judge.bradley_terry import interval_levels
from telco_nb.judge.ranking import few_terms, interval_text


def config_of(run: str) -> str:
    """The configuration of a run: `c06` for `c06` and for `c06-seed1`."""
    return run.partition("-seed")[0]


def training_luck(scores: pd.Series, draws: pd.DataFrame | None = None) -> Luck | None:
    """The variance that training brings in, from runs of the same configuration.

    Args:
        scores: by run.
        draws: (draws, runs), which hold the noise of the scores; None: they have none.

    Returns:
        None if no configuration has two runs.
    """
    groups = scores.index.map(config_of)
    df = len(scores) - groups.nunique()
    if df < 1 or scores.isna().any():
        return None
    within = scores - scores.groupby(groups).transform("mean")
    noise = 0.0
    if draws is not None:
        drawn = draws[list(scores.index)].T
        noise = float((drawn - drawn.groupby(groups).transform("mean")).var(axis=1).sum()) / df
    return Luck(float((within**2).sum()) / df, noise, df)


def merge_runs(judge: JudgeResults, seed: int = 0) -> JudgeResults:
    """One row, and one column of draws, for each configuration instead of each run.

    Args:
        judge: as 05_judge ranked the runs; returned as it is if no configuration was repeated.
        seed: of the drawn luck.

    Returns:
        Scores are means over runs, centred again; draws hold the luck of training. `runs` and
        `run_draws` keep those by run, `luck` is the variance between seeds.
    """
    ranked = judge.ranking[~judge.ranking["is_anchor"].astype(bool)]
    runs = ranked["score"].astype(float)
    groups = runs.index.map(config_of)
    configs = [name for name in runs.index if name == config_of(name)]
    if len(configs) == len(runs) or set(groups) != set(configs):
        return judge
    anchors = [name for name in judge.ranking.index if name not in runs.index]
    if runs.isna().any() or not set(runs.index) <= set(judge.draws):
        kept = [name for name in judge.draws if name in configs or name in anchors]
        return replace(judge, ranking=judge.ranking.loc[[*configs, *anchors]], draws=judge.draws[kept])
    luck = training_luck(runs, judge.draws)
    draws = judge.draws[list(runs.index)].T.groupby(groups).mean().T[configs]
    n_runs = pd.Series(groups).value_counts()[configs].to_numpy()
    rng = np.random.default_rng(seed)
    spread = luck.draw(len(draws), rng) if luck else np.zeros(len(draws))
    draws = draws + spread[:, None] * rng.normal(size=draws.shape) / np.sqrt(n_runs)
    draws = draws.join(judge.draws[[name for name in anchors if name in judge.draws]])
    draws = draws.sub(draws[configs].mean(axis=1), axis=0)
    table = _merged_table(judge.ranking, ranked, configs, draws)
    return replace(judge, ranking=table, draws=draws, runs=runs, run_draws=judge.draws[list(runs.index)], luck=luck)


def _merged_table(ranking: pd.DataFrame, ranked: pd.DataFrame, configs: list[str], draws: pd.DataFrame) -> pd.DataFrame:
    """The ranking by configuration: scores, bounds and ranks anew; the number of judgements is that of all runs."""
    groups = ranked.index.map(config_of)
    means = ranked[["score", "low", "high"]].astype(float).groupby(groups).agg(lambda values: values.mean(skipna=False))
    means = means.loc[configs]
    centre = means["score"].mean()
    table = ranking.loc[[*configs, *ranking.index.difference(ranked.index, sort=False)]].copy()
    table[["score", "low", "high"]] = table[["score", "low", "high"]].astype(float) - centre
    table.loc[configs, "score"] = means["score"] - centre
    terms = table.loc[configs, "n_terms"] if "n_terms" in table else pd.Series(MANY, configs)
    exact = means[["low", "high"]].to_numpy(float) - centre
    found = [_bounds(draws[c].to_numpy(), *row, int(terms[c])) for c, row in zip(configs, exact, strict=True)]
    table.loc[configs, ["low", "high"]] = np.array(found)
    _rank(table, configs, draws, int(terms.max()))
    if "n_judgements" in table:
        table.loc[configs, "n_judgements"] = ranked["n_judgements"].groupby(groups).sum()[configs]
    return table


def _bounds(drawn: np.ndarray, low: float, high: float, n_terms: int) -> tuple[float, float]:
    """The bounds of one score from its draws; `low` and `high` are those of its runs, missing on an open side.

    Where one side is open, the draws of the other one hang on the ridge of the fit: the runs' own bound counts as well.
    """
    if n_terms < 2 or (math.isnan(low) and math.isnan(high)):
        return math.nan, math.nan
    least, most = np.quantile(drawn, interval_levels(n_terms))
    if math.isnan(low):
        return math.nan, max(most, high)
    return (min(least, low), math.nan) if math.isnan(high) else (least, most)


def _rank(table: pd.DataFrame, configs: list[str], draws: pd.DataFrame, n_terms: int) -> None:
    """Ranks with their intervals, and how often each is the best, into the rows of the configurations.

    With few terms (`few_terms`) the ranks stand alone.
    """
    table.loc[configs, "rank"] = (-table.loc[configs, "score"].round(8)).rank(method="min")
    if few_terms(n_terms):
        table.loc[configs, [name for name in ("rank_low", "rank_high", "p_best") if name in table]] = np.nan
        return
    levels = interval_levels(n_terms)
    scores = np.round(-draws[configs].to_numpy(float), 8)
    best, worst = (stats.rankdata(scores, method=end, axis=1) for end in ("min", "max"))
    table.loc[configs, "rank_low"] = np.quantile(best, levels[0], axis=0, method="lower")
    table.loc[configs, "rank_high"] = np.quantile(worst, levels[1], axis=0, method="higher")
    if "p_best" in table:
        is_open = table.loc[configs, ["low", "high"]].isna().any(axis=1)
        shares = pd.Series(((best == 1) / (best == 1).sum(1, keepdims=True)).mean(0), configs)
        table.loc[configs, "p_best"] = shares.where(~is_open)


def with_loss_luck(study: StudyResults, seed: int = 0) -> StudyResults:
    """The study with the luck of training in the draws of all losses: the same luck in all losses of a configuration.

    The losses themselves stay those of the first runs.
    """
    noise = effects.noise_floor(study.results, study.repeats, "val_loss")
    if noise is None:
        return study
    rng, shape = np.random.default_rng(seed), study.loss_draws.shape
    luck = Luck(noise.between_seeds.value**2, 0.0, noise.df)
    moves = pd.DataFrame(luck.draw(shape[0], rng)[:, None] * rng.normal(size=shape), columns=study.loss_draws.columns)
    moved = {name: drawn + moves.reindex(drawn.index)[list(drawn)] for name, drawn in study.set_draws.items()}
    return replace(study, loss_draws=study.loss_draws + moves, set_draws=moved)


def with_scores(repeats: pd.DataFrame, panel: list[JudgeResults]) -> pd.DataFrame:
    """The table of repeats with one more column per judge that ranked them: the score of each repeat."""
    runs = repeats["config"].astype(str) + "-seed" + repeats["seed"].astype(str)
    scores = {f"{j.name}_score": runs.map(j.runs).astype(float) for j in panel if j.runs is not None}
    return repeats.assign(**scores)


def luck_findings(study: StudyResults) -> list[Finding]:
    """Per judge, how much another seed moves a score, beside how much configurations differ."""
    found = []
    for judge in study.judges:
        if judge.luck is None or judge.runs is None:
            continue
        spread, luck, n = float(judge.scores.std()), judge.luck.sd, len(judge.runs)
        repeated = judge.runs.groupby(judge.runs.index.map(config_of)).size()
        text = (
            f"Another training seed moves the score of {judge.label} by {luck.value:.2f} log-odds (standard deviation, "
            f"{interval_text(*luck[1:], '.2f')}, {(repeated > 1).sum()} configurations with "
            f"{repeated[repeated > 1].sum()} runs); configurations differ by {spread:.2f}. "
            f"Every interval and comparison with this judge holds that luck."
        )
        verdict = "supported" if spread > luck.high else "not distinguishable"
        found.append(blockable(f"luck.{judge.name}", text, luck, n, verdict, judge))
    return found
