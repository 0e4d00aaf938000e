"""Which configuration to recommend, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from telco_nb.analysis import results, statistics
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statistics import Interval

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
    """A lead in log-odds, told as the share of decided comparisons won."""
    value, low, high = (results.expected_win_share(x) for x in lead)
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


@dataclass(frozen=True)
class Recommendation:
    """The recommended configuration, the tied ones it was chosen from, and why."""

    config: str | None
    candidates: list[str]
    reason: str
    blocked_by: list[str]
    agreed: bool = True


def recommend(study: StudyResults) -> Recommendation:
    """The configuration to deploy: of those in the tied top set of every judge that passed its gate, keep those within
    25 % of the least training energy; the highest mean standardised score among them wins. A configuration that a judge
    places below the untuned model for sure is not eligible.
    """
    if not study.judges:
        return Recommendation(None, [], "", ["no judge has ranked the configurations"])
    if not study.passed:
        return Recommendation(None, [], "", [block for judge in study.judges for block in judge.blocks])
    sets = [results.tied_top_set(judge) for judge in study.passed]
    common = [config for config in sets[0] if all(config in other for other in sets[1:])]
    ranked = _mean_score(study)
    if not common:
        best = str(ranked.index[0])
        text = "no configuration is at the top with every judge; this one has the highest mean standardised score"
        worse = _worse_than_untuned(study, best)
        return Recommendation(None, [], "", worse) if worse else Recommendation(best, [best], text, [], agreed=False)
    tied = [config for config in ranked.index if config in common]
    candidates = [config for config in tied if not _worse_than_untuned(study, config)]
    if not candidates:
        return Recommendation(None, [], "", _worse_than_untuned(study, tied[0]))
    energy = _comparable_energy(study, candidates)
    cheap = candidates if energy is None else list(energy[energy <= energy.min() * (1 + ENERGY_TOLERANCE)].index)
    return Recommendation(cheap[0], candidates, _reason(study, candidates, cheap, energy is not None), [])


def _worse_than_untuned(study: StudyResults, config: str) -> list[str]:
    """Why a configuration is not worth deploying: judges that place the base model itself above it for sure."""
    found = []
    for judge in study.passed:
        gain = gain_over_untuned(judge, config)
        if gain is not None and gain.high < 0:
            share = f"{config}, the best, wins {win_text(gain)} of decided comparisons with it ({judge.label})"
            found.append(f"the untuned model answers better: {share}")
    return found


def gain_over_untuned(judge: JudgeResults, config: str) -> Interval | None:
    """Lead of a configuration over the untuned model in log-odds; None where the judge has not placed it."""
    if "untuned" not in judge.ranking.index or not {config, "untuned"} <= set(judge.draws):
        return None
    value = judge.ranking.loc[config, "score"] - judge.ranking.loc["untuned", "score"]
    return statistics.percentile_interval(value, (judge.draws[config] - judge.draws["untuned"]).to_numpy())


def _mean_score(study: StudyResults) -> pd.Series:
    scores = pd.DataFrame({judge.name: judge.scores for judge in study.passed})
    spread = scores.std().replace(0, np.nan)
    return ((scores - scores.mean()) / spread).fillna(0).mean(axis=1).sort_values(ascending=False, kind="stable")


def _comparable_energy(study: StudyResults, configs: Sequence[str]) -> pd.Series | None:
    """Training energies of the configurations; None if one is missing or they may not be compared."""
    energy = study.energy.reindex(list(configs))
    return None if study.energy_blocks or energy.isna().any() else energy


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
    plural = "" if row["epochs"] == 1 else "s"
    parts = {
        "target_modules": f"LoRA on {TARGETS.get(row['target_modules'], row['target_modules'])}",
        "rank": f"rank {row['rank']:g}",
        "epochs": f"{row['epochs']:g} epoch{plural}",
        "learning_rate": f"learning rate {row['learning_rate']:g}",
    }
    return ", ".join(text for column, text in parts.items() if not pd.isna(row[column]))
