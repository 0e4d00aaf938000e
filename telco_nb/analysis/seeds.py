"""The luck of training: how much another seed changes a score, and what that does to every interval.

05_judge ranks runs: each configuration once and, where there are some, its repeats with other seeds. Here the runs of a
configuration become one score, their mean. Runs of one configuration differ by more than the noise of the verdicts;
the rest is luck. Its variance is pooled over the repeated configurations and enters the draws of all of them, so that
intervals of scores and ranks, tau, comparisons with the best and the recommendation hold it.

Luck is drawn for each configuration by its name, and independently for the loss and for each judge. Weights that are
better by luck are so for every judge and for the loss, but so few repeats do not tell how much of the luck is common.
Drawn in common it would let rankings agree by itself; drawn apart it makes intervals of tau wider and claims none.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from telco_nb.analysis import effects
from telco_nb.analysis.inference import pure_error
from telco_nb.analysis.results import JudgeFiles, JudgeResults, StudyResults, read_judge
from telco_nb.analysis.statements import Finding, blockable, counted, name_list, not_estimable, some_of
from telco_nb.analysis.statistics import Luck
from telco_nb.judge.best import MANY
from telco_nb.judge.bradley_terry import interval_levels
from telco_nb.judge.ranking import interval_text, rank_bounds
from telco_nb.study.params import config_of, repeat_name

# Intervals are as wide as those of Student's t, made of normal draws of luck. With 1 or 2 degrees of freedom t has no
# finite variance (it is df / (df - 2): Johnson, Kotz and Balakrishnan 1995, Continuous Univariate Distributions 2,
# chapter 28), so draws of whatever variance have too thin tails where several configurations are compared at once. Of
# 138 simulated studies of equal configurations 19 % (with 1) and 10 % (with 2) wrongly call one better than another;
# with 4 or 6 about 5 %.
LEAST_DF = 3


def training_luck(scores: pd.Series, draws: pd.DataFrame | None = None) -> Luck | None:
    """The variance that training brings in, from runs of the same configuration.

    Args:
        scores: by run.
        draws: (draws, runs), which hold the noise of the scores; None: they have none.

    Returns:
        None if no configuration has two runs, or if their runs do not differ (`inference.pure_error`).
    """
    groups = scores.index.map(config_of)
    error = None if scores.isna().any() else pure_error(scores.set_axis(groups))
    if error is None:
        return None
    noise = 0.0
    if draws is not None:
        drawn = draws[list(scores.index)].T
        noise = float((drawn - drawn.groupby(groups).transform("mean")).var(axis=1).sum()) / error.df
    return Luck(error.sd**2, noise, int(error.df))


def read_panel(judges: Sequence[str], files: JudgeFiles, seed: int) -> list[JudgeResults]:
    """The results of the judges, one row for each configuration: what 06_analysis and the model card rest on.

    Args:
        judges: their names.
        files: where their files are.
        seed: of the analysis, for the drawn luck of training.
    """
    return [merge_runs(read_judge(name, files(name)), seed) for name in judges]


def merge_runs(judge: JudgeResults, seed: int = 0) -> JudgeResults:
    """One row, and one column of draws, for each configuration instead of each run.

    Args:
        judge: as 05_judge ranked the runs; returned as it is if no configuration was repeated.
        seed: of the drawn luck.

    Returns:
        Scores are means over runs, centred again; draws hold the luck of training, wide enough for intervals, and
        `error_draws` as much as was estimated. `runs` and `run_draws` are by run, `luck` is the variance between seeds.
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
    luck, run_draws = training_luck(runs, judge.draws), judge.draws[list(runs.index)]
    of_prompts = run_draws.T.groupby(groups).mean().T[configs]
    n_runs = pd.Series(groups).value_counts()[configs].to_numpy()
    terms = judge.ranking.loc[configs, "n_terms"] if "n_terms" in judge.ranking else pd.Series(MANY, configs)
    drawn = drawn_luck(seed, f"judge {judge.name}", configs, len(of_prompts)).set_index(of_prompts.index)
    wide = luck.widened(of_prompts.var().to_numpy(), n_runs, terms.to_numpy(int)) if luck else 0.0
    estimated = luck.sd.value / np.sqrt(n_runs) if luck else 0.0
    placed = judge.draws[[name for name in anchors if name in judge.draws]]
    draws, error_draws = (_centred((of_prompts + drawn * sd).join(placed), configs) for sd in (wide, estimated))
    table = _merged_table(judge.ranking, ranked, draws[configs], terms)
    return replace(
        judge, ranking=table, draws=draws, error_draws=error_draws, runs=runs, run_draws=run_draws, luck=luck
    )


def drawn_luck(seed: int, stream: str, configs: Iterable[str], n_draws: int) -> pd.DataFrame:
    """Standard normal luck (draws, configurations), the same for a seed, a stream and the name of a configuration."""
    keys = {name: [seed, *(zlib.crc32(part.encode()) for part in (stream, name))] for name in map(str, configs)}
    return pd.DataFrame({name: np.random.default_rng(key).normal(size=n_draws) for name, key in keys.items()})


def _centred(draws: pd.DataFrame, configs: list[str]) -> pd.DataFrame:
    return draws.sub(draws[configs].mean(axis=1), axis=0)


def _merged_table(ranking: pd.DataFrame, ranked: pd.DataFrame, draws: pd.DataFrame, terms: pd.Series) -> pd.DataFrame:
    """The ranking by configuration: scores, bounds and ranks anew; the number of judgements is that of all runs."""
    groups, configs = ranked.index.map(config_of), list(draws)
    means = ranked[["score", "low", "high"]].astype(float).groupby(groups).agg(lambda values: values.mean(skipna=False))
    means = means.loc[configs]
    centre = means["score"].mean()
    table = ranking.loc[[*configs, *ranking.index.difference(ranked.index, sort=False)]].copy()
    table[["score", "low", "high"]] = table[["score", "low", "high"]].astype(float) - centre
    table.loc[configs, "score"] = means["score"] - centre
    exact = means[["low", "high"]].to_numpy(float) - centre
    bounds = [_bounds(draws[c].to_numpy(), *row, int(terms[c])) for c, row in zip(configs, exact, strict=True)]
    table.loc[configs, ["low", "high"]] = np.array(bounds)
    places = rank_bounds(draws.to_numpy(float), np.array(bounds), terms.to_numpy(int), int(terms.max()))
    table.loc[configs, "rank"] = (-table.loc[configs, "score"].round(8)).rank(method="min")
    for name, column in zip(("rank_low", "rank_high", "p_best"), places.T, strict=True):
        table.loc[configs, name] = column
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


def with_loss_luck(study: StudyResults, seed: int = 0) -> StudyResults:
    """The study with the luck of training in the draws of all losses: the same luck in all losses of a configuration.

    The losses themselves stay those of the first runs.
    """
    noise = effects.noise_floor(study.results, study.repeats, "val_loss")
    if noise is None:
        return study
    luck, losses = Luck(noise.between_seeds.value**2, 0.0, noise.df), study.loss_draws
    once, many = np.ones(losses.shape[1], int), np.full(losses.shape[1], study.n_scenarios or MANY)
    moves = drawn_luck(seed, "loss", losses, len(losses)) * luck.widened(losses.var().to_numpy(), once, many)
    moved = {name: drawn + moves.reindex(drawn.index)[list(drawn)] for name, drawn in study.set_draws.items()}
    return replace(study, loss_draws=losses + moves, set_draws=moved)


def with_scores(repeats: pd.DataFrame, panel: list[JudgeResults]) -> pd.DataFrame:
    """The table of repeats with one more column per judge that ranked them: the score of each repeat."""
    runs = pd.Series(list(map(repeat_name, repeats["config"], repeats["seed"])), repeats.index, dtype=object)
    scores = {f"{j.name}_score": runs.map(j.runs).astype(float) for j in panel if j.runs is not None}
    return repeats.assign(**scores)


def noise_finding(study: StudyResults) -> Finding:
    """How much another seed moves the validation loss, beside how much configurations differ."""
    noise = effects.noise_floor(study.results, study.repeats, "val_loss")
    if noise is None:
        reason = "no configuration was repeated with another seed"
        return not_estimable("noise_floor", "The standard deviation between seeds is not known", reason)
    seeds, losses = noise.between_seeds, study.losses.sort_values()
    near = list(losses.index[losses - losses.iloc[0] <= noise.resolution])
    differ = noise.between_configs
    close = some_of(len(near), len(losses), "configuration", "lies", "lie")
    text = (
        f"The standard deviation between seeds of the validation loss is {seeds.value:.4f} "
        f"{interval_text(*seeds[1:], '.4f')} ({counted(noise.n_runs, 'run')}); between configurations it is "
        f"{'not known' if math.isnan(differ) else f'{differ:.4f}'}. Two single runs closer than "
        f"{noise.resolution:.4f} are not distinguishable: {close} "
        f"that close to the lowest loss, the lowest one included{f' ({name_list(near)})' if len(near) <= 8 else ''}."
    )
    verdict = "supported" if seeds.is_below(differ) else "not distinguishable"
    return Finding("noise_floor", text, *seeds, noise.n_runs, verdict)


def luck_findings(study: StudyResults) -> list[Finding]:
    """Per judge, how much another seed moves a score, beside how much configurations differ."""
    found = []
    for judge in study.judges:
        if judge.luck is None or judge.runs is None:
            continue
        spread, luck = float(judge.scores.std()), judge.luck.sd
        sizes = judge.runs.index.map(config_of).value_counts().to_numpy()
        repeated, n = int((sizes > 1).sum()), int(sizes[sizes > 1].sum())
        text = (
            f"The standard deviation between seeds of the score of {judge.label} is {luck.value:.2f} log-odds "
            f"{interval_text(*luck[1:], '.2f')} (noise of judging taken out; {counted(repeated, 'configuration')} with "
            f"{counted(n, 'run')}); between configurations it is {spread:.2f}, noise of judging included. "
            "The intervals of its scores and ranks, tau, and the comparison with the best hold that luck; kappa, "
            "alpha, self-preference and what votes correct do not: they are about the runs that there are."
        )
        if judge.luck.df < LEAST_DF:
            text += (
                f" Fewer than {LEAST_DF} runs beyond the first ones tell too little of it: with {judge.luck.df} the "
            )
            text += "intervals are wide, and still hold the truth less often than they say."
        verdict = "supported" if spread > luck.high else "not distinguishable"
        found.append(blockable(f"luck.{judge.name}", text, luck, n, verdict, judge))
    return found
