"""Which configuration to recommend, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit

from telco_nb.analysis.fitness import lead_over
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.ranking import tied_top

ENERGY_TOLERANCE = 0.25  # training is paid once: a saving of less than a quarter does not outweigh a better score
TARGETS = {"qv": "query and value", "mlp": "MLP", "all": "attention and MLP"}


def name_list(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def judges_text(judges: Sequence[JudgeResults]) -> str:
    """The judges by name, proxies marked as such."""
    if len(judges) > 1 and all(judge.is_proxy for judge in judges):
        return f"the offline proxy judges {name_list([judge.name for judge in judges])}"
    return name_list([judge.label for judge in judges])


def percent(share: float) -> str:
    """A share estimated from draws: never quite 0 % or 100 %."""
    return "over 99%" if share > 0.99 else "under 1%" if share < 0.01 else f"{share:.0%}"


def win_text(lead: Interval) -> str:
    """A lead in log-odds as the share of decided comparisons won (Bradley-Terry), with its interval."""
    value, low, high = (percent(float(expit(log_odds))) for log_odds in lead)
    return f"{value} [{low}, {high}]"


class Recommendation(NamedTuple):
    """The recommended configuration, the tied ones it was chosen from, and the reason.

    `agreed` is false if no configuration is at the top with every judge.
    """

    config: str | None
    candidates: list[str]
    reason: str
    blocked_by: list[str]
    agreed: bool = True


def recommend(study: StudyResults) -> Recommendation:
    """The configuration to deploy.

    Of those in the tied top set of every judge that passed its gate, it keeps those within 25 % of the least training
    energy; the highest mean standardised score among them wins. A configuration whose interval lies below the untuned
    model with any of these judges is not eligible.
    """
    if not study.passed:
        blocks = [block for judge in study.judges for block in judge.blocks]
        return Recommendation(None, [], "", blocks or ["no judge has ranked the configurations"])
    top_sets = [tied_top(judge.scores, judge.draws) for judge in study.passed]
    ranked = _mean_score(study)
    tied = [str(config) for config in ranked.index if all(config in top for top in top_sets)]
    best = tied[0] if tied else str(ranked.index[0])
    candidates = [config for config in tied or [best] if not _worse_than_untuned(study, config)]
    if not candidates:
        return Recommendation(None, [], "", _worse_than_untuned(study, best))
    if not tied:
        text = "no configuration is at the top with every judge; this one has the highest mean standardised score"
        return Recommendation(best, candidates, text, [], agreed=False)
    energy = study.energy.reindex(candidates)
    comparable = not study.energy_blocks and not energy.isna().any()
    cheap = list(energy[energy <= energy.min() * (1 + ENERGY_TOLERANCE)].index) if comparable else candidates
    return Recommendation(cheap[0], candidates, _reason(study, candidates, cheap, comparable), [])


def _mean_score(study: StudyResults) -> pd.Series:
    """Mean standardised score over the judges that passed, highest first."""
    scores = pd.DataFrame({judge.name: judge.scores for judge in study.passed})
    standardised = (scores - scores.mean()) / scores.std().replace(0, np.nan)
    return standardised.fillna(0).mean(axis=1).sort_values(ascending=False, kind="stable")


def _worse_than_untuned(study: StudyResults, config: str) -> list[str]:
    """The judges that place the base model above a configuration with the whole interval, as reasons."""
    reasons = []
    for judge in study.passed:
        gain = lead_over(judge, config, "untuned")
        if gain is not None and gain.high < 0:
            share = f"{config}, the best, wins {win_text(gain)} of decided comparisons with it ({judge.label})"
            reasons.append(f"the untuned model answers better: {share}")
    return reasons


def _reason(study: StudyResults, candidates: list[str], cheap: list[str], comparable: bool) -> str:
    judges = judges_text(study.passed)
    if len(candidates) == 1:
        return f"it is the only configuration at the top with {judges}"
    who = f"{len(candidates)} of {len(study.results)} configurations ({', '.join(candidates)})"
    text = f"{who} are tied at the top with {judges}"
    if not comparable:
        return f"{text}, and it has the highest mean score (energies cannot be compared)"
    if len(cheap) == 1:
        return f"{text}, and it takes the least training energy of them"
    return f"{text}; of the {len(cheap)} within {ENERGY_TOLERANCE:.0%} of the least training energy it scores highest"


def describe_config(row: pd.Series) -> str:
    """The parameters of a configuration in words."""
    parts = {
        "target_modules": f"LoRA on {TARGETS.get(row['target_modules'], row['target_modules'])}",
        "rank": f"rank {row['rank']:g}",
        "epochs": f"{row['epochs']:g} epoch{'' if row['epochs'] == 1 else 's'}",
        "learning_rate": f"learning rate {row['learning_rate']:g}",
    }
    return ", ".join(text for column, text in parts.items() if not pd.isna(row[column]))
