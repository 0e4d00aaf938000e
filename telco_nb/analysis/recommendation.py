"""Which configuration to recommend, the reasons, and both in words: the findings `deploy` and `front_runner`.

The rule is written down before the run (`params/claims.yaml`). Only configurations that are fit to answer customers are
compared (`fitness`); if none is fit, all are, and the answer is that none is. Eligible is who is shown to be not worse
than the best of them by more than the margin: a bound on the lead of the best, not a test that failed to tell two
apart. Of these the highest expected score wins, and energy decides only where expected scores are as good as equal.
Where nothing is shown, the answer is that the data cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from scipy.special import expit

from telco_nb.analysis.effects import noise_floor
from telco_nb.analysis.fitness import fit_configs, fitness, lead_over, unfit_text
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.shrinkage import expected_scores
from telco_nb.analysis.statements import Finding, name_list, not_estimable, some_of
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.ranking import few_terms, interval_text
from telco_nb.study.params import Claims, load_claims

TARGETS = {"qv": "query and value", "mlp": "MLP", "all": "attention and MLP"}


def judges_text(judges: Sequence[JudgeResults]) -> str:
    """The judges by name, proxies marked as such."""
    if len(judges) > 1 and all(judge.is_proxy for judge in judges):
        return f"the offline proxy judges {name_list([judge.name for judge in judges])}"
    return name_list([judge.label for judge in judges])


def percent(share: float) -> str:
    """A share estimated from draws: never quite 0 % or 100 %; `an unknown share` where it is missing."""
    if pd.isna(share):
        return "an unknown share"
    return "over 99%" if share > 0.99 else "under 1%" if share < 0.01 else f"{share:.0%}"


def win_text(lead: Interval) -> str:
    """A lead in log-odds as the share of decided comparisons won (Bradley-Terry), with its interval."""
    value, low, high = (percent(float(expit(x))) if math.isfinite(x) else None for x in lead)
    if low or high:  # a share has limits, where log-odds are open
        low, high = low or "0%", high or "100%"
    return f"{value or percent(math.nan)} {interval_text(low, high, '')}"


class Recommendation(NamedTuple):
    """The front-runner and why.

    `candidates` are shown to be not worse than the best by more than the margin, best first; if there are none,
    `cannot_tell` says why and `config` is only the best guess. `better_than` names the configurations that are surely
    worse than it with every judge. `fit` names those that are fit; they are the ones compared, unless there are none.
    Without a `config`, `blocked_by` holds the reasons.
    """

    config: str | None
    candidates: list[str]
    reason: str
    blocked_by: list[str]
    cannot_tell: str = ""
    better_than: Sequence[str] = ()
    fit: Sequence[str] = ()

    @property
    def deploy(self) -> str | None:
        """The configuration to deploy: the front-runner, if it is fit."""
        return self.config if self.fit else None

    @property
    def is_supported(self) -> bool:
        """True if it is shown to be as good as the best, and surely better than one other at least."""
        return self.config is not None and not self.cannot_tell and len(self.better_than) > 0


def claims_of(study: StudyResults) -> Claims:
    """The claims that were written down before the run; the shipped ones if a study names none."""
    return study.claims or load_claims()


def claiming_judges(study: StudyResults) -> tuple[list[JudgeResults], list[str]]:
    """The judges on which a claim may rest, and for all others the reasons why not."""
    reasons = {judge.name: judge.blocks or _too_little(judge) for judge in study.judges}
    allowed = [judge for judge in study.judges if not reasons[judge.name]]
    return allowed, [reason for judge in study.judges for reason in reasons[judge.name]]


def why_not(study: StudyResults, choice: Recommendation) -> str:
    """Why nothing is recommended, in words: a reason that all judges share is given once, without their names."""
    starts = tuple(f"judge {judge.name}: " for judge in study.judges)
    bare = {reason.split(": ", 1)[1] if reason.startswith(starts) else reason for reason in choice.blocked_by}
    reasons = list(bare) if len(bare) == 1 else list(dict.fromkeys(choice.blocked_by))
    return "; ".join(reason.removeprefix("no ranking: ") for reason in reasons)


def _too_little(judge: JudgeResults) -> list[str]:
    found = []
    if judge.coverage is None or math.isnan(judge.coverage):
        found.append(f"judge {judge.name}: the share of answered questions is not known")
    terms = judge.judged_terms
    if reason := few_terms(None if terms is None or terms.empty else int(terms.max())):
        found.append(f"judge {judge.name}: {reason}")
    resampled = judge.draws.reindex(columns=judge.scores.index).notna().all()
    if not resampled.all():
        missing = name_list([str(config) for config in resampled.index[~resampled]])
        found.append(f"judge {judge.name}: resampled scores of {missing} are missing")
    return found


def compare(
    study: StudyResults, judges: Sequence[JudgeResults], configs: Sequence[str] | None = None
) -> dict[str, pd.DataFrame]:
    """`JudgeResults.compared` for each judge, by the judge's label.

    Args:
        study: the study, with its claims.
        judges: the judges.
        configs: those to compare with each other; None: all that a judge has ranked.
    """
    level = 1 - claims_of(study).confidence
    return {judge.label: judge.compared(configs, level) for judge in judges}


def mean_expected_scores(study: StudyResults, judges: Sequence[JudgeResults]) -> pd.Series:
    """`expected_scores` in log-odds, their mean over the judges, highest first."""
    drawn = [judge.draws if judge.error_draws is None else judge.error_draws for judge in judges]
    scores = [expected_scores(j.scores, draws, study.results) for j, draws in zip(judges, drawn, strict=True)]
    return pd.concat(scores, axis=1).dropna().mean(axis=1).sort_values(ascending=False, kind="stable")


def recommend(study: StudyResults) -> Recommendation:
    """The front-runner, by the rule in `claims_of(study)`; it is deployed only if it is fit.

    A configuration that is not fit is not eligible while another one is, and one whose interval lies below the untuned
    model with any of the judges never is.
    """
    judges, blocks = claiming_judges(study)
    if not judges:
        return Recommendation(None, [], "", blocks or ["no judge has ranked the configurations"])
    claims, expected = claims_of(study), mean_expected_scores(study, judges)
    if expected.empty:
        return Recommendation(None, [], "", ["no configuration was ranked by every judge"])
    fit = [config for config in fit_configs(study) if config in expected.index]
    pool = [config for config in expected.index if config in fit or not fit]
    eligible = [config for config in pool if not _worse_than_untuned(judges, config)]
    if not eligible:
        return Recommendation(None, [], "", _worse_than_untuned(judges, pool[0]), fit=fit)
    compared = compare(study, judges, pool)
    within = [c for c in eligible if all(t.loc[c, "behind_at_most"] <= claims.margin for t in compared.values())]
    config, by_energy = _choose(study, expected, within) if within else (eligible[0], "")
    better = _beaten_with_all(compared, config)
    if within:
        reason = _reason(study, judges, pool, within, config, by_energy)
        return Recommendation(config, within, reason, [], "", better, fit)
    reason = f"it has the highest expected score with {judges_text(judges)}"
    return Recommendation(config, [], reason, [], _cannot_tell(compared, claims, config), better, fit)


def _beaten_with_all(compared: Mapping[str, pd.DataFrame], config: str) -> list[str]:
    """The configurations that are surely worse than one with every judge: the same names, not as many."""
    first, *others = [table.loc[config, "better_than"] for table in compared.values()]
    return [name for name in first if all(name in beaten for beaten in others)]


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
    text = f"it takes {saved:.0%} less training energy than {best}, which is expected to win at most"
    return str(cheap[0]), f"{text} {percent(float(expit(claims.tie)))} of the decided comparisons with it"


def _worse_than_untuned(judges: Sequence[JudgeResults], config: str) -> list[str]:
    """The judges that place the base model above a configuration with the whole interval, as reasons."""
    reasons = []
    for judge in judges:
        gain = lead_over(judge, config, "untuned")
        if gain is not None and gain.is_below():
            share = f"{config}, the best, wins {win_text(gain)} of decided comparisons with it ({judge.label})"
            reasons.append(f"the untuned model answers better: {share}")
    return reasons


def _reason(
    study: StudyResults, judges: Sequence[JudgeResults], pool: list[str], within: list[str], config: str, by_energy: str
) -> str:
    """Why a candidate was chosen from the pool that was compared."""
    claims, n = claims_of(study), len(pool)
    noun = "configurations" if n == len(study.results) else "fit configurations"
    share = f"at most {percent(float(expit(claims.margin)))} of decided comparisons to the best of the others"
    shown = f"shown ({claims.confidence:.0%}) to lose {share} with {judges_text(judges)}"
    if n == 1:
        return "it is the only one of the configurations that is fit" if noun.startswith("fit") else "there is no other"
    if len(within) == 1:
        return f"it is the only one of {n} {noun} {shown}"
    who = f"all {n}" if len(within) == n else f"{len(within)} of {n}"
    text = f"{who} {noun} ({', '.join(within)}) are {shown}"
    return f"{text}; {by_energy}" if by_energy else f"{text}, and it has the highest expected score of them"


def _cannot_tell(compared: Mapping[str, pd.DataFrame], claims: Claims, config: str) -> str:
    """Why no configuration is shown to be within the margin of the best, in whole sentences."""
    if all((table["behind_at_most"] <= claims.margin).any() for table in compared.values()):
        return f"the judges differ in which ones are near the best ({name_list(list(compared))})"
    parts = []
    for label, table in compared.items():
        near, n = table["behind_at_most"].idxmin(), int(table["can_be_best"].sum())
        behind = table.loc[near, "behind_at_most"]
        bound = "any share" if math.isinf(behind) else f"up to {percent(float(expit(behind)))}"
        who = f"all {n}" if n == len(table) else f"{n} of {len(table)}"
        lost = f"even {near}, the safest pick, may lose {bound} of decided comparisons to the best"
        parts.append(f"with {label} {who} can be the best, and {lost}")
    return (
        f"{'; '.join(parts)}. Losing at most {percent(float(expit(claims.margin)))} of them would count as equally good"
    )


def seed_text(study: StudyResults) -> str:
    """What another training seed could change: known for the loss where runs were repeated, not for the scores."""
    known = [f"{judge.luck.sd.value:.2f} with {judge.label}" for judge in study.judges if judge.luck is not None]
    if known:
        return (
            f"Intervals include the variation between training seeds (standard deviation {name_list(known)}, log-odds)."
        )
    text = "Scores come from one training run each, so no interval includes the variation between training seeds"
    noise = noise_floor(study.results, study.repeats, "val_loss")
    if noise is not None:
        sd = noise.between_seeds.value
        text += f": that of the loss is {sd:.4f} (standard deviation), that of the score is not known"
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


def energy_text(row: pd.Series) -> str:
    """Training energy of a configuration with interval and kind; empty if it is missing."""
    value, low, high = row[["train_energy_wh", "train_energy_low_wh", "train_energy_high_wh"]]
    if pd.isna(value):
        return ""
    ends = "" if pd.isna(low) or pd.isna(high) else f" {interval_text(low, high, '.3g')}"
    kind = row["energy_kind"]
    return f"{value:.3g} Wh{ends}, {'of unknown kind' if pd.isna(kind) else kind}"


# ---------------------------------------------------------------- in words


def deploy_finding(study: StudyResults, choice: Recommendation) -> Finding:
    """The decision, in two short sentences; its value is the configuration to deploy, None if none is fit or ranked.

    What keeps all below the bar without a ranking comes first: it is known whoever ranks them.
    """
    n, unfit = len(study.results), unfit_text(study)
    if unfit or (choice.config and not choice.fit):
        return _none_fit(study, choice, unfit)
    if choice.config is None:
        return not_estimable("deploy", "No configuration can be recommended", why_not(study, choice), n, "blocked")
    fit = some_of(len(choice.fit), n, "configuration", "is", "are") + " fit to answer customers"
    if choice.cannot_tell:
        text = f"The data cannot tell which configuration is best; the best guess is {choice.config}."
        text += f" {fit}." if len(choice.fit) < n else ""
        return Finding("deploy", text, choice.config, n=n, verdict="cannot tell")
    text = f"Deploy {_described(study, choice)}."
    if len(choice.fit) == n:
        text += " It is shown to be as good as the best one, or nearly so." if n > 1 else ""
    elif len(choice.fit) > 1:
        text += f" {fit}, and {choice.config} is shown to be as good as the best of them, or nearly so."
    verdict = "supported" if choice.is_supported else "not distinguishable"
    return Finding("deploy", text, choice.config, n=n, verdict=verdict)


def _described(study: StudyResults, choice: Recommendation) -> str:
    return f"{choice.config} ({describe_config(study.results.loc[choice.config])})"


def _none_fit(study: StudyResults, choice: Recommendation, unfit: str) -> Finding:
    """The decision where no configuration is fit; `unfit` says what keeps all below the bar, or is empty."""
    all_fail = all(fitness(study, str(config)).failed for config in study.results.index)
    text = f"No configuration is {'' if all_fail else 'shown to be '}fit for customers{f': {unfit}' * bool(unfit)}."
    reasons = [] if choice.config else [why_not(study, choice)]
    if reasons:
        either = "None can be recommended" if claiming_judges(study)[0] else "They cannot be ranked either"
        text += f" {either}: {reasons[0]}."
    return Finding("deploy", text, n=len(study.results), verdict="not fit", blocked_by=reasons)


def front_runner_finding(study: StudyResults, choice: Recommendation) -> Finding | None:
    """The configuration that one would try next, fit or not, with the reasons; None without one.

    Its value is the configuration, `low` and `high` are the bounds of its place over all judges that may carry a claim.
    """
    if choice.config is None:
        return None
    judges, n = claiming_judges(study)[0], len(study.results)
    told = choice.config if choice.fit and not choice.cannot_tell else _described(study, choice)
    parts = [f"{told} is the front-runner of {n}: {choice.reason}.", f"Its place: {_places(judges, choice.config)}."]
    if choice.cannot_tell:
        parts.append(f"{'' if choice.fit else 'The data cannot tell which is best: '}{choice.cannot_tell}.")
    elif choice.better_than:
        names = name_list(choice.better_than)
        parts.append(f"It is surely better than {len(choice.better_than)} of the others ({names}).")
    else:
        parts.append("It is not surely better than any other one.")
    held = fitness(study, choice.config)
    parts += [f"{reason}." for reason in held.reasons if reason not in held.below.values()]
    parts += [f"Training: {energy_text(study.results.loc[choice.config]) or 'its energy is not known'}."]
    text = " ".join([parts[0], *(part[:1].upper() + part[1:] for part in parts[1:])])
    verdict = "cannot tell" if choice.cannot_tell else "supported" if choice.is_supported else "not distinguishable"
    places = pd.DataFrame([judge.ranking.loc[choice.config, ["rank_low", "rank_high"]] for judge in judges])
    ends = (places["rank_low"].min(), places["rank_high"].max())
    return Finding("front_runner", f"{text} {seed_text(study)}", choice.config, *ends, n, verdict)


def _places(judges: Sequence[JudgeResults], config: str) -> str:
    """`1 of 16 [1, 11] with checklist`, for each judge that has ranked the configuration."""
    texts = []
    for judge in (judge for judge in judges if config in judge.scores.index):
        place, *ends = judge.ranking.loc[config, ["rank", "rank_low", "rank_high"]]
        texts.append(f"{place:g} of {len(judge.scores)} {interval_text(*ends, 'g')} with {judge.label}")
    return name_list(texts)
