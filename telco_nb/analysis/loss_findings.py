"""What the validation loss says about judged quality, per judge: does it order the answers, and can it choose?"""

from __future__ import annotations

import math

import pandas as pd
from scipy.special import expit

from telco_nb.analysis import inference, results, statistics
from telco_nb.analysis.divergence import divergence_finding
from telco_nb.analysis.effects import FACTORS, factor_levels, level_text
from telco_nb.analysis.recommendation import percent
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, counted, name_list, not_estimable, p_text
from telco_nb.analysis.statistics import Interval, percentile_interval
from telco_nb.judge.ranking import interval_text

SHUFFLED = "shuffled as if no factors joined them"


def loss_findings(study: StudyResults, judge: JudgeResults, seed: int, divergence: pd.DataFrame) -> list[Finding]:
    """Loss against one judge: the rank correlation, why the two part, and the places of the extremes by loss.

    Args:
        study: the study.
        judge: the judge.
        seed: of sampled relabellings and permutations.
        divergence: the judge's `divergence_table`.
    """
    losses, draws = results.paired_draws(study, judge)
    n, id = losses.shape[1], f"tau.{judge.name}"
    if n < 2:
        text, reason = f"Whether loss predicts {judge.label} is not known", "fewer than two configurations have both"
        return [not_estimable(id, text, reason, n)]
    loss, score = study.losses[losses.columns], judge.scores[losses.columns]
    if equal := _constant(loss, score):
        parts = f"Why loss and the score of {judge.label} part cannot be told"
        return [
            not_estimable(id, f"Whether loss predicts {judge.label} cannot be told", equal, n),
            not_estimable(f"divergence.{judge.name}", parts, equal, n),
        ]
    place = score.rank(ascending=False, method="min")
    found = [_tau_finding(study, judge, losses, draws, seed), divergence_finding(study, judge, divergence)]
    pick, unpicked = loss_pick(loss), f"the lowest loss is shared by {name_list(_lowest(loss))}"
    if pick is None:
        text = f"What choosing by loss costs with {judge.label} is not known"
        return [*found, not_estimable(f"regret.{judge.name}", text, unpicked, n)]
    found += [_regret_finding(judge, pick, list(draws)), _top3_finding(judge, losses, draws)]
    found.append(_rank_finding("best", "lowest", pick, judge, place, draws))
    if (worst := loss_pick(-loss)) is not None:
        found.append(_rank_finding("worst", "highest", worst, judge, place, draws))
    return [*found, _misplaced_finding(judge, loss.rank(method="min"), place, draws)]


def _lowest(loss: pd.Series) -> list[str]:
    return [str(config) for config in loss.index[loss == loss.min()]]


def loss_pick(loss: pd.Series) -> str | None:
    """The configuration with the lowest loss; None if several share it, because then loss does not choose."""
    lowest = _lowest(loss)
    return lowest[0] if len(lowest) == 1 else None


def _constant(loss: pd.Series, score: pd.Series) -> str:
    """The reason why there is no rank correlation; empty if there is one."""
    if loss.nunique() == 1:
        return f"all {len(loss)} losses are equal"
    return f"all {len(score)} scores are equal, as if every verdict were a tie" if score.nunique() == 1 else ""


def _tau_finding(
    study: StudyResults, judge: JudgeResults, losses: pd.DataFrame, draws: pd.DataFrame, seed: int
) -> Finding:
    id, n, configs = f"tau.{judge.name}", losses.shape[1], study.results.loc[losses.columns]
    if statistics.critical_tau(n) is None:
        text = f"Whether loss predicts {judge.label} cannot be told"
        return not_estimable(id, text, f"with {counted(n, 'configuration')} no tau reaches p < .05", n)
    loss, score = study.losses[losses.columns], judge.scores[losses.columns]
    tau = statistics.tau_interval(loss, score, losses, draws)
    if tau is None:
        text = f"Whether loss predicts {judge.label} cannot be told"
        return not_estimable(id, text, "no resample has a rank correlation", n)
    p, said = design_p_text(configs, loss, score, seed)
    shown = f"Lower loss goes with {'better' if tau.value < 0 else 'worse'} answers"
    shown += ", beyond what effects of the factors with unrelated directions bring about."
    hidden = "No relation can be shown that the factors could not bring about by themselves."
    text = (
        f"Loss against the score of {judge.label}: tau-b = {tau.value:+.2f} {interval_text(*tau[1:], '+.2f')}. {said} "
        f"{_within_text(configs, loss, score)}{_reliability_text(results.retest_reliability(judge))}"
        f"{shown if p < 0.05 else hidden}"
    )
    return blockable(id, text, tau, n, "supported" if p < 0.05 else "not distinguishable", judge)


def _reliability_text(reliability: float) -> str:
    """How alike two runs are; `only` below .5, where they order fewer than 3 of 4 pairs alike."""
    if math.isnan(reliability):
        return ""
    only = "only " if reliability < 0.5 else ""
    agree = f"agree {only}to tau = {reliability:.2f}"
    return f"Because of noise, the scores of two runs of the study would on average {agree}. "


def design_p_text(configs: pd.DataFrame, a: pd.Series, b: pd.Series, seed: int) -> tuple[float, str]:
    """The p of tau that respects the design, and a sentence with it and the plain p, which ignores the design.

    Args:
        configs: the levels of the factors of the configurations in `a` and `b`.
        a, b: two scores, in the order of `configs`.
        seed: of sampled relabellings and permutations.
    """
    relabelled = inference.relabellings(configs[list(FACTORS)], seed)
    p = inference.relabelling_p(inference.relabelled_values(statistics.tau_rows, relabelled, (a, b), (True, False)))
    plain, n = statistics.permutation_p(a, b, seed), len(relabelled)
    if n < 2:
        text = "No renaming of factor levels maps this set of configurations onto itself, so its p is 1"
    else:
        text = f"With the factors' levels relabelled in the {n} ways that keep the design, a relation at least this "
        text += f"strong comes up with {p_text(p)} (no p below {1 / n:.2g} is possible)"
    return p, f"{text}; with the {len(configs)} configurations {SHUFFLED}, with {p_text(plain)}."


def _within_text(configs: pd.DataFrame, loss: pd.Series, score: pd.Series) -> str:
    """tau among configurations that are alike in one factor, factor by factor; by level for epochs."""
    parts = []
    for factor, tau in inference.taus_within(configs[list(FACTORS)], loss, score).items():
        if math.isnan(tau):
            continue
        text = f"{factor.replace('_', ' ')} {tau:+.2f}"
        if factor == "epochs":
            levels = inference.taus_by_level(configs[factor], loss, score)
            each = [f"{level_text(v)}: {levels[v]:+.2f}" for v in factor_levels(configs, factor)
                    if math.isfinite(levels[v])]  # fmt: skip
            text += f" ({', '.join(each)})" if each else ""
        parts.append(text)
    return f"Among configurations that are alike in one factor tau is: {', '.join(parts)}. " if parts else ""


def _regret_finding(judge: JudgeResults, pick: str, configs: list[str]) -> Finding:
    """The lead of the best other configuration over the choice of loss.

    The best is picked after the fact, so only the bounds that hold for all configurations at once can show a lead.
    """
    id = f"regret.{judge.name}"
    if len(judge.draws[configs].dropna()) < 2:
        text = f"What choosing by loss costs with {judge.label} is not known"
        return not_estimable(id, text, "resampled scores are missing", judge.counted_terms(pick))
    compared = judge.compared(configs, 0.05)
    best = str(compared["score"].idxmax())
    if pick == best:
        text = f"Choosing by loss loses nothing with {judge.label}: both choose {pick}."
        return blockable(id, text, Interval(0.0), judge.counted_terms(pick), "described", judge)
    low, high = compared.loc[pick, ["behind_at_least", "behind_at_most"]]
    lead = Interval(compared["score"][best] - compared["score"][pick], low, high if math.isfinite(high) else math.nan)
    shown = "that another one answers better is shown" if low > 0 else "that any other one answers better is not shown"
    text = (
        f"Choosing by loss ({pick}) instead of by {judge.label}: {best} scores higher by {lead.value:.2f} log-odds, "
        f"that is, wins {percent(float(expit(lead.value)))} of their decided comparisons. The best of "
        f"{len(compared)} is picked after the fact, so this is an upper estimate. The lead of whichever is best over "
        f"{pick} is {interval_text(*lead[1:], '.2f')}, with bounds that hold for all at once: {shown}."
    )
    verdict = "supported" if low > 0 else "not distinguishable"
    return blockable(id, text, lead, judge.counted_terms(best, pick), verdict, judge)


def _top3_finding(judge: JudgeResults, losses: pd.DataFrame, draws: pd.DataFrame) -> Finding:
    n, id = losses.shape[1], f"top3.{judge.name}"
    if n <= 3:
        reason = f"there are only {counted(n, 'configuration')}"
        return not_estimable(id, f"The top 3 of {judge.label} says nothing", reason, n)
    share = statistics.top_share(losses, draws, 3)
    text = f"The lowest-loss configuration is in the top 3 of {judge.label} with probability {percent(share)}"
    return blockable(id, f"{text} (chance: {3 / n:.0%}).", Interval(share), n, "described", judge)


def _rank_interval(judge: JudgeResults, place: pd.Series, draws: pd.DataFrame, config: str) -> Interval:
    ranks = draws.rank(axis=1, ascending=False)[config]
    value, *ends = percentile_interval(place[config], ranks, judge.terms(config))
    return Interval(round(value), *(round(end) if math.isfinite(end) else end for end in ends))


def _rank_finding(
    end: str, word: str, config: str, judge: JudgeResults, place: pd.Series, draws: pd.DataFrame
) -> Finding:
    """The judge's rank of the best or worst configuration by loss, with its chance if loss meant nothing.

    The surprising side counts: a place as far down for the lowest loss, as far up for the highest.
    """
    rank, n = _rank_interval(judge, place, draws, config), len(place)
    chance = (n - rank.value + 1) / n if end == "best" else rank.value / n
    side = f"{rank.value} or further down" if end == "best" else f"{rank.value} or further up"
    text = (
        f"The {word}-loss configuration, {config}, ranks {rank.value} of {n} with {judge.label} "
        f"{interval_text(*rank[1:], '')}; if loss meant nothing, a place of {side} would have probability {chance:.2f}."
    )
    return blockable(f"{end}_loss_rank.{judge.name}", text, rank, n, "described", judge)


def _misplaced_finding(judge: JudgeResults, by_loss: pd.Series, place: pd.Series, draws: pd.DataFrame) -> Finding:
    """The configuration whose rank by loss is furthest from its rank with the judge."""
    config, n = str((place - by_loss).abs().idxmax()), len(place)
    rank = _rank_interval(judge, place, draws, config)
    text = (
        f"Loss misplaces {config} most: {by_loss[config]:.0f} of {n} by loss, {rank.value} of {n} with "
        f"{judge.label} {interval_text(*rank[1:], '')}. It is picked after the fact as the most extreme of {n}."
    )
    return blockable(f"misplaced.{judge.name}", text, rank, n, "described", judge)
