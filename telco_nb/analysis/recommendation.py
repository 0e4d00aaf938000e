"""Which configuration to recommend, and the reasons.

The rule is written down before the run (`params/claims.yaml`). Eligible is who is shown to be not worse than the best
by more than the margin: a bound on the lead of the best, not a test that failed to tell two apart. Of these the highest
expected score wins, and energy decides only where expected scores are as good as equal. Where nothing is shown, the
answer is that the data cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from scipy.special import expit

from telco_nb.analysis.fitness import lead_over
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statistics import Interval
from telco_nb.analysis.utility import expected_scores
from telco_nb.judge.best import compare_with_best
from telco_nb.judge.ranking import few_terms
from telco_nb.study.params import Claims, load_claims

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
    value, low, high = ("open" if math.isnan(x) else percent(float(expit(x))) for x in lead)
    return f"{value} [{low}, {high}]"


class Recommendation(NamedTuple):
    """The recommended configuration and why.

    `candidates` are shown to be not worse than the best by more than the margin, best first; if there are none,
    `cannot_tell` says why and `config` is only the best guess. `better_than` is the number of configurations that are
    surely worse than it with every judge. Without a `config`, `blocked_by` holds the reasons.
    """

    config: str | None
    candidates: list[str]
    reason: str
    blocked_by: list[str]
    cannot_tell: str = ""
    better_than: int = 0

    @property
    def is_supported(self) -> bool:
        """True if it is shown to be as good as the best, and surely better than one other at least."""
        return self.config is not None and not self.cannot_tell and self.better_than > 0


def claims_of(study: StudyResults) -> Claims:
    """The claims that were written down before the run; the shipped ones if a study names none."""
    return study.claims or load_claims()


def claiming_judges(study: StudyResults) -> tuple[list[JudgeResults], list[str]]:
    """The judges on which a claim may rest, and for all others the reasons why not."""
    reasons = {judge.name: judge.blocks or _too_little(judge) for judge in study.judges}
    allowed = [judge for judge in study.judges if not reasons[judge.name]]
    return allowed, [reason for judge in study.judges for reason in reasons[judge.name]]


def _too_little(judge: JudgeResults) -> list[str]:
    found = []
    if judge.coverage is None or math.isnan(judge.coverage):
        found.append(f"judge {judge.name}: the share of answered questions is not known")
    terms = judged_terms(judge)
    if terms is not None and len(terms) and (reason := few_terms(int(terms.max()))):
        found.append(f"judge {judge.name}: {reason}")
    return found


def judged_terms(judge: JudgeResults) -> pd.Series | None:
    """The number of terms in which each configuration was compared; None if the ranking does not say."""
    if "n_terms" not in judge.ranking:
        return None
    return judge.ranking["n_terms"].reindex(judge.scores.index).fillna(0).astype(int)


def compare(study: StudyResults, judges: Sequence[JudgeResults]) -> dict[str, pd.DataFrame]:
    """`compare_with_best` for each judge, by the judge's label."""
    level = 1 - claims_of(study).confidence
    return {j.label: compare_with_best(j.scores, j.draws[list(j.scores.index)], judged_terms(j), level) for j in judges}


def utilities(study: StudyResults, judges: Sequence[JudgeResults]) -> pd.Series:
    """The expected score in log-odds, its mean over the judges, highest first."""
    scores = [expected_scores(judge.scores, judge.draws, study.results) for judge in judges]
    return pd.concat(scores, axis=1).dropna().mean(axis=1).sort_values(ascending=False, kind="stable")


def recommend(study: StudyResults) -> Recommendation:
    """The configuration to deploy, by the rule in `claims_of(study)`.

    A configuration whose interval lies below the untuned model with any of the judges is not eligible.
    """
    judges, blocks = claiming_judges(study)
    if not judges:
        return Recommendation(None, [], "", blocks or ["no judge has ranked the configurations"])
    claims, compared, expected = claims_of(study), compare(study, judges), utilities(study, judges)
    eligible = [config for config in expected.index if not _worse_than_untuned(judges, config)]
    if not eligible:
        return Recommendation(None, [], "", _worse_than_untuned(judges, str(expected.index[0])))
    within = [c for c in eligible if all(t.loc[c, "behind_at_most"] <= claims.margin for t in compared.values())]
    config, by_energy = _choose(study, expected, within) if within else (eligible[0], "")
    better = min(int(table.loc[config, "better_than"]) for table in compared.values())
    if within:
        return Recommendation(config, within, _reason(study, judges, within, config, by_energy), [], "", better)
    reason = f"it has the highest expected score with {judges_text(judges)}"
    return Recommendation(config, [], reason, [], _cannot_tell(compared, claims, config), better)


def _choose(study: StudyResults, expected: pd.Series, within: list[str]) -> tuple[str, str]:
    """The choice among the eligible and, if energy made it, in which words."""
    claims, best = claims_of(study), within[0]
    equal = [config for config in within if expected[config] >= expected[best] - claims.tie]
    energy = study.energy.reindex(equal)
    if study.energy_blocks or energy.isna().any() or (energy <= 0).any():
        return best, ""
    cheap = energy[energy <= energy.min() / (1 - claims.energy_saving)].index
    if best in cheap:
        return best, ""
    saved = 1 - energy[cheap[0]] / energy[best]
    text = f"it takes {saved:.0%} less training energy than {best}, which is expected to be better by at most"
    return str(cheap[0]), f"{text} {claims.tie:g} log-odds"


def _worse_than_untuned(judges: Sequence[JudgeResults], config: str) -> list[str]:
    """The judges that place the base model above a configuration with the whole interval, as reasons."""
    reasons = []
    for judge in judges:
        gain = lead_over(judge, config, "untuned")
        if gain is not None and gain.high < 0:
            share = f"{config}, the best, wins {win_text(gain)} of decided comparisons with it ({judge.label})"
            reasons.append(f"the untuned model answers better: {share}")
    return reasons


def _reason(study: StudyResults, judges: Sequence[JudgeResults], within: list[str], config: str, by_energy: str) -> str:
    claims, n = claims_of(study), len(study.results)
    share = f"{claims.margin:g} log-odds ({percent(float(expit(claims.margin)))} of decided comparisons)"
    shown = f"shown ({claims.confidence:.0%}) to be behind the best by less than {share} with {judges_text(judges)}"
    if len(within) == 1:
        return f"it is the only configuration {shown}"
    who = f"all {n}" if len(within) == n else f"{len(within)} of {n}"
    text = f"{who} configurations ({', '.join(within)}) are {shown}"
    return f"{text}; {by_energy}" if by_energy else f"{text}, and it has the highest expected score of them"


def _cannot_tell(compared: Mapping[str, pd.DataFrame], claims: Claims, config: str) -> str:
    """Why no configuration is shown to be within the margin of the best."""
    parts = []
    for label, table in compared.items():
        near = table["behind_at_most"].idxmin()
        behind, rivals = table.loc[near, "behind_at_most"], int(table["can_be_best"].sum())
        bound = "by any amount" if math.isinf(behind) else f"by up to {behind:.2f} log-odds"
        parts.append(f"with {label} {rivals} of {len(table)} can be the best, and even {near} can be behind it {bound}")
    if all((table["behind_at_most"] <= claims.margin).any() for table in compared.values()):
        parts = [f"the judges differ in which ones are near the best ({name_list(list(compared))})"]
    return f"{'; '.join(parts)} (margin {claims.margin:g})"


def seed_text(study: StudyResults) -> str:
    """What another training seed could change: known for the loss where runs were repeated, not for the scores."""
    known = [f"{judge.luck.sd.value:.2f} with {judge.label}" for judge in study.judges if judge.luck is not None]
    if known:
        return f"Intervals hold the chance of training where it is known: SD {name_list(known)}, between seeds."
    text = "Scores come from one training run each, so no interval holds the chance of training"
    spread = study.repeats.groupby("config")["val_loss"].agg(["std", "size"]) if len(study.repeats) else pd.DataFrame()
    if len(spread) and (spread["size"] > 1).any():
        sd = math.sqrt((spread["std"] ** 2).mean())
        text += f": between seeds the loss varies by {sd:.4f} (SD), and by how much the score does is not known"
    return f"{text}."


def describe_config(row: pd.Series) -> str:
    """The parameters of a configuration in words."""
    parts = {
        "target_modules": f"LoRA on {TARGETS.get(row['target_modules'], row['target_modules'])}",
        "rank": f"rank {row['rank']:g}",
        "epochs": f"{row['epochs']:g} epoch{'' if row['epochs'] == 1 else 's'}",
        "learning_rate": f"learning rate {row['learning_rate']:g}",
    }
    return ", ".join(text for column, text in parts.items() if not pd.isna(row[column]))
