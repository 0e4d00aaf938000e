"""What a study of this size can tell: the least difference it finds, and what telling the best two apart would take.

The error of a difference between two scores has two sources. That of prompts falls with their number, if terms grow
with them. That of training falls with the seeds of each configuration alone: more prompts never outweigh it. The error
of prompts is taken from the draws of single runs; that further seeds make it a little smaller is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats
from scipy.special import expit

from telco_nb.analysis.recommendation import claims_of, percent
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, counted, not_estimable
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.best import MANY
from telco_nb.judge.ranking import interval_text
from telco_nb.study.params import config_of

LEVEL, POWER = 0.05, 0.8
SEEDS = (1, 2, 3, 5)
FAR = 30.0  # standard errors: found with near certainty
FORGONE = 4.6  # log-odds: winning 99 of 100 decided comparisons
MOST = 1e6  # times the prompts: more are as good as never


class Errors(NamedTuple):
    """The variance of a difference between two configurations of one run each: of prompts, and of training."""

    prompts: float
    terms: int
    training: float | None  # None: no run was repeated, so it is not known
    df_training: int
    configs: int

    @property
    def counted_terms(self) -> int | None:
        """The number of terms, for the `n` of a finding: None where it is not known."""
        return None if self.terms >= MANY else self.terms

    def of(self, times: float = 1.0, runs: tuple[int, int] = (1, 1)) -> tuple[float, float]:
        """The standard error and its degrees of freedom (Satterthwaite).

        Args:
            times: as many prompts, and terms, as the study has.
            runs: of the two configurations.
        """
        prompts, df_prompts = self.prompts / times, max(1.0, self.terms * times - 1)
        training = (self.training or 0.0) / 2 * sum(1 / n for n in runs)
        planned = self.configs * (min(runs) - 1)  # if all configurations had as many runs
        parts = prompts**2 / df_prompts + (training**2 / max(self.df_training, planned) if training else 0.0)
        return math.sqrt(prompts + training), (prompts + training) ** 2 / parts


def errors_of(judge: JudgeResults) -> Errors | None:
    """The errors of a judge's scores; None without a ranking, or with fewer than two terms."""
    drawn = judge.draws[list(judge.scores.index)] if judge.run_draws is None else judge.run_draws
    names = [name for name in drawn if name == config_of(name)]
    terms = judge.judged_terms
    n_terms = MANY if terms is None else 0 if terms.empty else int(terms.median())
    if len(names) < 2 or n_terms < 2 or drawn[names].isna().any().any():
        return None
    covariance = np.cov(drawn[names].to_numpy(), rowvar=False)
    variances = np.diag(covariance)
    of_pairs = np.add.outer(variances, variances) - 2 * covariance  # of the difference of every two
    spread = float(np.median(of_pairs[np.triu_indices(len(names), 1)]))
    luck = judge.luck
    training = None if luck is None else 2 * luck.sd.value**2
    return Errors(spread * n_terms / (n_terms - 1), n_terms, training, luck.df if luck else 0, len(names))


def power_of(difference: float, error: float, df: float) -> float:
    """The chance that a two-sided t test finds a difference."""
    away, least = min(difference / error, FAR), stats.t.isf(LEVEL / 2, df)
    wrong_side = stats.nct.cdf(-least, df, away)  # scipy's is not finite in places where it is below 1e-9
    return float(stats.nct.sf(least, df, away) + np.nan_to_num(wrong_side))


def least_difference(error: float, df: float) -> float:
    """The difference, in log-odds, that a two-sided t test finds with a chance of POWER."""
    return float(optimize.brentq(lambda x: power_of(x, error, df) - POWER, 1e-9 * error, FAR * error))


def equivalence_power(margin: float, error: float, df: float) -> float:
    """The chance that two one-sided tests show a difference of 0 to be within the margin."""
    return max(0.0, 2 * float(stats.t.cdf(margin / error - stats.t.isf(LEVEL, df), df)) - 1)


def prompts_needed(errors: Errors, runs: tuple[int, int], difference: float, margin: float | None = None) -> float:
    """As many times the prompts of the study as a chance of POWER takes, infinite if no number is enough.

    Args:
        errors: of the study.
        runs: of the two configurations.
        difference: to find; unused with a margin.
        margin: of an equivalence to show.
    """

    def lacking(log_times: float) -> float:
        error, df = errors.of(math.exp(log_times), runs)
        return POWER - (power_of(difference, error, df) if margin is None else equivalence_power(margin, error, df))

    ends = math.log(2 / errors.terms), math.log(MOST)
    if lacking(ends[1]) > 0:
        return math.inf
    return math.exp(optimize.brentq(lacking, *ends)) if lacking(ends[0]) > 0 else math.exp(ends[0])


def top_two(judge: JudgeResults) -> tuple[str, str]:
    """The two configurations with the highest scores."""
    first, second = judge.scores.sort_values(ascending=False, kind="stable").index[:2]
    return str(first), str(second)


def power_table(study: StudyResults, judge: JudgeResults, n_prompts: int) -> pd.DataFrame:
    """What the study could tell with other numbers of seeds.

    Args:
        study: the study.
        judge: whose scores; of a judge that saw no repeats only one seed is known.
        n_prompts: the prompts of the study.

    Returns:
        By seeds: seeds, least_difference (log-odds, at the present prompts), prompts_top_two (to tell the best two
        apart if their lead is real) and prompts_equivalent (to show two equal ones to be within the margin). Missing
        where no number is enough. No rows without a ranking.
    """
    errors, rows = errors_of(judge), []
    for seeds in SEEDS if errors and errors.training is not None else SEEDS[:1]:
        if errors is None:
            break
        first, second = top_two(judge)
        runs, lead = (seeds, seeds), float(judge.scores[first] - judge.scores[second])
        times = [
            prompts_needed(errors, runs, lead) if lead > 0 else math.inf,
            prompts_needed(errors, runs, 0.0, claims_of(study).margin),
        ]
        needed = [math.ceil(n_prompts * x) if math.isfinite(x) else math.nan for x in times]
        rows.append((seeds, least_difference(*errors.of(1.0, runs)), *needed))
    columns = ["seeds", "least_difference", "prompts_top_two", "prompts_equivalent"]
    return pd.DataFrame(rows, columns=columns).astype({"prompts_top_two": "Int64", "prompts_equivalent": "Int64"})


def power_findings(study: StudyResults, n_prompts: int) -> list[Finding]:
    """Per judge: the least difference that this study finds, if the best two are equal, and what parting them takes."""
    found = []
    for judge in study.judges:
        errors, text = errors_of(judge), f"What this study can tell with {judge.label} is not known"
        if errors is None:
            found.append(not_estimable(f"power.{judge.name}", text, "there is no ranking with two terms or more"))
            continue
        found += [_least(judge, errors, n_prompts), _equivalence(study, judge)]
        found.append(_apart(judge, errors, power_table(study, judge, n_prompts), n_prompts))
    return found


def _least(judge: JudgeResults, errors: Errors, n_prompts: int) -> Finding:
    least = least_difference(*errors.of())
    if least > FORGONE:
        text = f"With {counted(n_prompts, 'prompt')} only a configuration that wins practically always would be noticed"
        text += f" (by {judge.label}; one comparison alone, 5 % level)."
        return blockable(f"power.{judge.name}", text, Interval(least), errors.counted_terms, "described", judge)
    share = percent(float(expit(least)))
    text = (
        f"With {counted(n_prompts, 'prompt')} and one training run each, a difference between two configurations must "
        f"be at least {least:.2f} log-odds ({share} of decided comparisons by {judge.label}) to be noticed with "
        f"{POWER:.0%} power (one comparison alone, 5 % level)"
    )
    luck = "the luck of training is in it" if errors.training is not None else "the luck of training is not known"
    text = f"{text}; {luck}."
    return blockable(f"power.{judge.name}", text, Interval(least), errors.counted_terms, "described", judge)


def _apart(judge: JudgeResults, errors: Errors, table: pd.DataFrame, n_prompts: int) -> Finding:
    first, second = top_two(judge)
    lead = Interval(float(judge.scores[first] - judge.scores[second]))
    parts = [
        f"{counted(row['prompts_top_two'], 'prompt')} with {counted(row['seeds'], 'seed')} each"
        for row in table.to_dict("records")
        if not pd.isna(row["prompts_top_two"])
    ]
    text = f"{first} and {second}, the best two with {judge.label}, lie {lead.value:.2f} log-odds apart. "
    if parts:
        text += f"If that lead is real, to tell them apart with {POWER:.0%} chance takes {', or '.join(parts)} (this "
        text += f"study has {n_prompts}). The lead of a best of many is too large, so these numbers are too small."
    else:
        seeds = counted(int(table["seeds"].max()), "seed")
        text += f"No number of prompts with up to {seeds} each tells them apart with {POWER:.0%} "
        text += "chance, even if that lead is real."
    return blockable(f"power_top.{judge.name}", text, lead, errors.counted_terms, "described", judge)


def _equivalence(study: StudyResults, judge: JudgeResults) -> Finding:
    """Two one-sided tests of the best two against the margin that was claimed before the run, by their own draws.

    Low and high of a finding are those of 95 %, so these bounds stand in the text alone.
    """
    margin, (first, second) = claims_of(study).margin, top_two(judge)
    terms = judge.terms(first, second)
    n_terms = MANY if terms is None else terms
    lead, half = float(judge.scores[first] - judge.scores[second]), math.nan
    if n_terms > 1:
        error = float((judge.draws[first] - judge.draws[second]).std()) * math.sqrt(n_terms / (n_terms - 1))
        half = float(stats.t.isf(LEVEL, n_terms - 1)) * error
    within = lead + half < margin and lead - half > -margin
    shown = within and judge.luck is not None
    text = (
        f"{first} and {second}, the best two with {judge.label}, are {'' if shown else 'not '}shown to be equivalent "
        f"within {margin:g} log-odds: they differ by {lead:+.2f} {interval_text(lead - half, lead + half)} (90 %: two "
        f"one-sided tests at 5 %). They are picked after the fact."
    )
    if judge.luck is None:
        text += " The luck of training is not known and not in these bounds, so they cannot show it."
    verdict = "supported" if shown else "not distinguishable"
    n = judge.counted_terms(first, second)
    return blockable(f"equivalence.{judge.name}", text, Interval(lead), n, verdict, judge)
