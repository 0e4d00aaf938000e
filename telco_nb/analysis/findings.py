"""The statements of the study: what to deploy, what loss alone would choose, what can and cannot be said.

Each is a Finding: a sentence with its value, interval, number of observations and verdict, and whatever forbids it to
be a headline. The statistics are in `analysis`; here they are put into words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.analysis import effects, results, statistics
from telco_nb.analysis.recommendation import (
    Recommendation,
    describe_config,
    gain_over_untuned,
    judges_text,
    name_list,
    percent,
    recommend,
    win_text,
)
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statistics import Interval

RUBRIC = ("factual", "resolves", "on_policy", "tone", "concise")
# Published in arXiv:2606.05176: facts to set beside ours, not targets.
PAPER = {
    "base model": "Qwen2.5-3B",
    "judges": "Claude Sonnet 4.5, GPT-5.2",
    "n": 16,
    "best_loss": 0.5024,
    "best_loss_rank": "6th-7th",
    "worst_loss": 0.6807,
    "worst_loss_rank": "1st with both",
    "energy_wh": (284.0, 1371.0),
}


@dataclass(frozen=True)
class Finding:
    """One statement. `verdict`: supported, not distinguishable, described, not estimable or blocked."""

    id: str
    statement: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: str = "described"
    blocked_by: list[str] = field(default_factory=list)


def all_findings(study: StudyResults, seed: int = 0) -> list[Finding]:
    """Every statement of the study, the decision first."""
    found = [*decision_findings(study), *_loss_findings(study, seed), *_agreement_findings(study)]
    return [*found, *_energy_findings(study), *_noise_findings(study), *_effect_findings(study)]


def to_json(found: Sequence[Finding]) -> str:
    """findings.json as text: strict JSON, NaN as null."""
    rows = [{key: _plain(value) for key, value in asdict(finding).items()} for finding in found]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_frame(found: Sequence[Finding]) -> pd.DataFrame:
    """The findings as a table; `value` is text because a decision's value is a configuration's name."""
    frame = pd.DataFrame([asdict(finding) for finding in found])
    frame["value"] = [None if _plain(v) is None else str(_plain(v)) for v in frame["value"]]
    frame["blocked_by"] = frame["blocked_by"].map("; ".join)
    return frame


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_estimable(id: str, text: str, reason: str, n: int | None = None, verdict: str = "not estimable") -> Finding:
    """A finding that says why there are no numbers."""
    return Finding(id, f"{text}: {reason}.", n=n, verdict=verdict, blocked_by=[reason])


def _judged(judge: JudgeResults, id: str, text: str, interval: Interval, n: int, verdict: str) -> Finding:
    """A finding that rests on a judge: blocked if the judge is."""
    return Finding(id, text, *interval, n, "blocked" if judge.blocks else verdict, judge.blocks)


def _excludes_zero(interval: Interval) -> str:
    return "supported" if interval.low > 0 or interval.high < 0 else "not distinguishable"


def decision_findings(study: StudyResults) -> list[Finding]:
    """What to deploy, what loss alone would have chosen, and how sure the difference is."""
    choice = recommend(study)
    found = [_deploy_finding(study, choice)]
    if not len(study.losses):
        text = "Loss alone cannot choose"
        return [*found, _not_estimable("loss_choice", text, "no configuration has a validation loss", 0, "blocked")]
    loss_pick = str(study.losses.idxmin())
    return [*found, _loss_choice(study, loss_pick), _confidence(study, choice, loss_pick), *_gains(study, choice)]


def _deploy_finding(study: StudyResults, choice: Recommendation) -> Finding:
    n = len(study.results)
    if choice.config is None:
        return _not_estimable(
            "deploy", "No configuration can be recommended", "; ".join(choice.blocked_by), n, "blocked"
        )
    energy = energy_text(study.results.loc[choice.config]) or "its training energy is not known"
    text = f"Deploy {choice.config} ({describe_config(study.results.loc[choice.config])}): {choice.reason}. Training: {energy}."
    better = choice.agreed and len(choice.candidates) < n  # than at least one other configuration, with every judge
    return Finding("deploy", text, choice.config, n=n, verdict="supported" if better else "not distinguishable")


def energy_text(row: pd.Series) -> str:
    """Training energy of a configuration with interval and kind; empty if it is missing."""
    if pd.isna(row["train_energy_wh"]):
        return ""
    bounds = row[["train_energy_low_wh", "train_energy_high_wh"]]
    interval = "" if bounds.isna().any() else f" [{bounds.iloc[0]:.3g}, {bounds.iloc[1]:.3g}]"
    return f"{row['train_energy_wh']:.3g} Wh{interval}, {row['energy_kind']}"


def _loss_choice(study: StudyResults, loss_pick: str) -> Finding:
    row = study.results.loc[loss_pick]
    text = f"Loss alone would choose {loss_pick} ({describe_config(row)}): {row['val_loss']:.4f} nats per token "
    text += f"[{row['val_loss_low']:.4f}, {row['val_loss_high']:.4f}]"
    energy = energy_text(row)
    return Finding(
        "loss_choice", f"{text}. Training: {energy}." if energy else f"{text}.", loss_pick, n=len(study.losses)
    )


def _confidence(study: StudyResults, choice: Recommendation, loss_pick: str) -> Finding:
    """How often the choice scores above loss's choice over the draws; the least sure judge counts."""
    if choice.config is None:
        return _not_estimable("confidence", "How sure is not known", "; ".join(choice.blocked_by), verdict="blocked")
    n = min(len(judge.draws) for judge in study.passed)
    if choice.config == loss_pick:
        return Finding("confidence", f"Loss and judges choose the same configuration, {loss_pick}.", n=n)
    shares = {j.label: float((j.draws[choice.config] > j.draws[loss_pick]).mean()) for j in study.passed}
    told = name_list([f"{percent(share)} with {judge}" for judge, share in shares.items()])
    text = f"Resampled, {choice.config} scores above loss's choice, {loss_pick}, this often: {told}."
    sure = min(shares.values())
    if sure < 0.5:
        text += f" {loss_pick} may answer better, but not distinguishably; the recommendation rests on energy."
    return Finding("confidence", text, sure, n=n, verdict="supported" if sure >= 0.975 else "not distinguishable")


def _gains(study: StudyResults, choice: Recommendation) -> list[Finding]:
    """The choice (or else the judge's best) against the untuned model, per judge that has placed it."""
    found = []
    for judge in study.judges:
        if judge.scores.empty:
            continue
        config = choice.config or str(judge.scores.idxmax())
        interval = gain_over_untuned(judge, config)
        if interval is None:
            continue
        text = (
            f"Against the untuned model {config} wins {win_text(interval)} of decided comparisons with {judge.label}."
        )
        found.append(_judged(judge, f"gain.{judge.name}", text, interval, len(judge.draws), _excludes_zero(interval)))
    return found


def _loss_findings(study: StudyResults, seed: int) -> list[Finding]:
    found = []
    for judge in study.judges:
        losses, draws = results.paired_draws(study, judge)
        if losses.shape[1] < 2:
            text = f"Whether loss predicts {judge.label} is not known"
            found.append(
                _not_estimable(f"tau.{judge.name}", text, "fewer than two configurations have both", losses.shape[1])
            )
            continue
        found += [_tau_finding(study, judge, losses, draws, seed), _regret_finding(study, judge, draws)]
        found += [_top3_finding(judge, losses, draws), *_rank_findings(study, judge, draws)]
        found.append(_misplaced_finding(study, judge, draws))
    return found


def _tau_finding(
    study: StudyResults, judge: JudgeResults, losses: pd.DataFrame, draws: pd.DataFrame, seed: int
) -> Finding:
    n, needed = losses.shape[1], statistics.critical_tau(losses.shape[1])
    if needed is None:
        text = f"Whether loss predicts {judge.label} cannot be told"
        return _not_estimable(f"tau.{judge.name}", text, f"with {n} configurations no tau reaches p < .05", n)
    interval = statistics.tau_interval(study.losses, judge.scores, losses, draws)
    p = statistics.permutation_p(study.losses[losses.columns], judge.scores[losses.columns], seed)
    if not math.isfinite(p):
        return _not_estimable(
            f"tau.{judge.name}", f"Whether loss predicts {judge.label} is not known", "all values are equal", n
        )
    text = (
        f"Loss against the score of {judge.label}: tau-b = {interval.value:+.2f} "
        f"[{interval.low:+.2f}, {interval.high:+.2f}], permutation p = {p:.2g}. "
        f"At n = {n} |tau| must reach {needed:.3f} for p < .05; this judge's own noise "
        f"caps it near {results.noise_ceiling(judge):.2f}. {_tau_words(interval.value, p)}"
    )
    return _judged(judge, f"tau.{judge.name}", text, interval, n, "supported" if p < 0.05 else "not distinguishable")


def _tau_words(tau: float, p: float) -> str:
    if p >= 0.05:
        return "No relation can be shown."
    return "Lower loss goes with better answers." if tau < 0 else "Lower loss goes with worse answers."


def _regret_finding(study: StudyResults, judge: JudgeResults, draws: pd.DataFrame) -> Finding:
    pick = str(study.losses[draws.columns].idxmin())
    best = str(judge.scores[draws.columns].idxmax())
    id, n = f"regret.{judge.name}", len(draws)
    if pick == best:
        text = f"Choosing by loss loses nothing with {judge.label}: both choose {pick}."
        return _judged(judge, id, text, Interval(0.0, math.nan, math.nan), n, "described")
    lead = judge.scores[best] - judge.scores[pick]
    interval = statistics.percentile_interval(lead, (draws[best] - draws[pick]).to_numpy())
    text = (
        f"Choosing by loss ({pick}) instead of by {judge.label}: {best} is better by {interval.value:.2f} log-odds "
        f"[{interval.low:.2f}, {interval.high:.2f}], that is, wins {win_text(interval)} of their decided comparisons. "
        "The best of many is picked after the fact, so this is an upper estimate."
    )
    return _judged(judge, id, text, interval, n, _excludes_zero(interval))


def _top3_finding(judge: JudgeResults, losses: pd.DataFrame, draws: pd.DataFrame) -> Finding:
    n, id = losses.shape[1], f"top3.{judge.name}"
    if n <= 3:
        return _not_estimable(id, f"The top 3 of {judge.label} says nothing", f"there are only {n} configurations", n)
    share = statistics.top_share(losses, draws, 3)
    text = f"The lowest-loss configuration is in the top 3 of {judge.label} with probability {percent(share)}"
    text += f" (chance: {3 / n:.0%})."
    return _judged(judge, id, text, Interval(share, math.nan, math.nan), len(draws), "described")


def _rank_findings(study: StudyResults, judge: JudgeResults, draws: pd.DataFrame) -> list[Finding]:
    """Ranks of the lowest- and highest-loss configuration, with the chance of such a rank if loss meant nothing."""
    found, n, ranks = [], draws.shape[1], statistics.rank_draws(draws)
    place, losses = judge.scores[draws.columns].rank(ascending=False), study.losses[draws.columns]
    for end, word, config in (("best", "lowest", losses.idxmin()), ("worst", "highest", losses.idxmax())):
        drawn = statistics.percentile_interval(place[config], ranks[config].to_numpy())
        interval = Interval(*(round(x) for x in drawn))
        chance = (n - interval.value + 1) / n if end == "best" else interval.value / n
        text = (
            f"The {word}-loss configuration, {config}, ranks {interval.value} of {n} with {judge.label} "
            f"[{interval.low}, {interval.high}]; if loss meant nothing, this rank or "
            f"{'a lower' if end == 'best' else 'a higher'} one would have probability {chance:.2f}."
        )
        found.append(_judged(judge, f"{end}_loss_rank.{judge.name}", text, interval, n, "described"))
    return found


def _misplaced_finding(study: StudyResults, judge: JudgeResults, draws: pd.DataFrame) -> Finding:
    """The configuration whose rank by loss is furthest from its rank with the judge."""
    place = judge.scores[draws.columns].rank(ascending=False)
    by_loss = study.losses[draws.columns].rank()
    config = str((place - by_loss).abs().idxmax())
    drawn = statistics.percentile_interval(place[config], statistics.rank_draws(draws)[config].to_numpy())
    interval, n = Interval(*(round(x) for x in drawn)), draws.shape[1]
    text = (
        f"Loss misplaces {config} most: {by_loss[config]:.0f} of {n} by loss, {interval.value} of {n} with "
        f"{judge.label} [{interval.low}, {interval.high}]. It is picked after the fact as the most extreme of {n}."
    )
    return _judged(judge, f"misplaced.{judge.name}", text, interval, n, "described")


def _agreement_findings(study: StudyResults) -> list[Finding]:
    pairs = [(a, b) for k, a in enumerate(study.judges) for b in study.judges[k + 1 :]]
    return [_agreement(a, b) for a, b in pairs]


def _agreement(a: JudgeResults, b: JudgeResults) -> Finding:
    configs = [c for c in a.scores.index if c in b.scores.index]
    id, n, n_draws = f"judges.{a.name}.{b.name}", len(configs), min(len(a.draws), len(b.draws))
    needed = statistics.critical_tau(n) if n >= 2 else None
    if needed is None:
        text = f"Whether {a.label} and {b.label} rank alike cannot be told"
        return _not_estimable(id, text, f"with {n} configurations no tau reaches p < .05", n)
    draws_a, draws_b = a.draws[configs].iloc[:n_draws], b.draws[configs].iloc[:n_draws]
    interval = statistics.tau_interval(a.scores, b.scores, draws_a, draws_b)
    text = f"Rankings of {a.label} and {b.label}: tau-b = {interval.value:+.2f} "
    text += f"[{interval.low:+.2f}, {interval.high:+.2f}]."
    blocks = [*a.blocks, *b.blocks]
    verdict = "supported" if interval.value >= needed else "not distinguishable"
    return Finding(id, text, *interval, n, "blocked" if blocks else verdict, blocks)


def kappa_finding(a: JudgeResults, b: JudgeResults, kappa: Interval, n: int) -> Finding:
    """Agreement of two judges verdict by verdict (`analysis.cohen_kappa`)."""
    id = f"kappa.{a.name}.{b.name}"
    if not n or not math.isfinite(kappa.value):
        return _not_estimable(
            id, f"Verdicts of {a.label} and {b.label} cannot be compared", "no shared comparison that varies", n
        )
    text = f"Verdict by verdict, {a.label} and {b.label} agree with Cohen's kappa {kappa.value:.2f} "
    text += f"[{kappa.low:.2f}, {kappa.high:.2f}] over {n:,} shared comparisons."
    blocks = [*a.blocks, *b.blocks]
    return Finding(id, text, *kappa, n, "blocked" if blocks else _excludes_zero(kappa), blocks)


def rubric_findings(panel: Sequence[JudgeResults], ratings: pd.DataFrame, n_draws: int, seed: int) -> list[Finding]:
    """Agreement of all judges that rate (column `rater`) on each criterion of the rubric, by Krippendorff's alpha."""
    criteria = [column for column in RUBRIC if column in ratings]
    raters = [judge for judge in panel if (ratings["rater"] == judge.name).any()]
    if len(raters) < 2:
        reason = "fewer than two judges rate answers"
        return [_not_estimable("alpha.rubric", "Whether judges rate answers alike is not known", reason, 0)]
    unit = ratings["prompt_id"] + "|" + ratings["config"]
    long = pd.DataFrame({"unit": unit, "cluster": ratings["scenario_id"], "rater": ratings["rater"]})
    found = []
    for name in criteria:
        table = long.assign(value=ratings[name].astype(float))
        rating = [judge for judge in raters if table.loc[table["rater"] == judge.name, "value"].notna().any()]
        found.append(_alpha_finding(name, rating, *statistics.krippendorff_alpha(table, "ordinal", n_draws, seed)))
    return found


def _alpha_finding(criterion: str, judges: Sequence[JudgeResults], alpha: Interval, n: int) -> Finding:
    id = f"alpha.{criterion}"
    if not n or not math.isfinite(alpha.value):
        reason = "fewer than two judges have rated it on the same answers" if not n else "all ratings are equal"
        return _not_estimable(id, f"Whether judges rate {criterion} alike is not known", reason, n)
    text = f"On {criterion} {judges_text(judges)} agree with Krippendorff's alpha {alpha.value:.2f} "
    text += f"[{alpha.low:.2f}, {alpha.high:.2f}] (ordinal, {n:,} answers)."
    return Finding(id, text, *alpha, n, _excludes_zero(alpha))


def self_preference_finding(judge: JudgeResults, own: set[str], gap: Interval, n: int) -> Finding:
    """Whether a judge favours its own answers (`analysis.self_preference`)."""
    id, whose = (
        f"self_preference.{judge.name}",
        name_list(sorted(own)) if len(own) < 4 else f"{len(own)} configurations",
    )
    if not n:
        text = f"Whether {judge.label} favours its own answers ({whose}) is not known"
        return _not_estimable(id, text, "no other judge has decided the same comparisons", n)
    text = f"{judge.label} prefers its own answers ({whose}) {100 * gap.value:+.0f} points "
    text += (
        f"[{100 * gap.low:+.0f}, {100 * gap.high:+.0f}] more often than the other judges do, over {n:,} comparisons."
    )
    return Finding(id, text, *gap, n, _excludes_zero(gap))


def _energy_findings(study: StudyResults) -> list[Finding]:
    energy, text = study.energy, "Energies cannot be compared"
    if len(energy) < 2:
        reason = f"{len(energy)} of {len(study.results)} configurations have a training energy"
        return [_not_estimable("energy_ratio", text, reason, len(energy))]
    if len(study.energy_kinds) != 1:
        return [_not_estimable("energy_ratio", text, study.energy_blocks[0], len(energy), "blocked")]
    least, most = str(energy.idxmin()), str(energy.idxmax())
    ratio = results.energy_ratio(study.results, most, least)
    low, high = PAPER["energy_wh"]
    text = (
        f"Training energy ({study.energy_word}) runs from {energy[least]:.3g} Wh ({least}) to {energy[most]:.3g} Wh "
        f"({most}): a factor of {ratio.value:.1f}. The paper has {low:g}-{high:g} Wh, a factor of {high / low:.1f}."
    )
    if study.energy_word == "estimated":
        text += " Ranking by an estimate is ranking by processor time."
    blocks = study.energy_blocks
    verdict = "blocked" if blocks else "described"
    return [Finding("energy_ratio", text, *ratio, len(energy), verdict, blocks), *_pareto_findings(study)]


def _pareto_findings(study: StudyResults) -> list[Finding]:
    found = []
    for judge in study.judges:
        front = statistics.pareto_front(study.energy, judge.scores)
        if front:
            shares = statistics.pareto_shares(study.energy, judge.draws[list(judge.scores.index)])
            told = name_list([f"{config} ({percent(shares[config])})" for config in front])
            text = f"No configuration is both better with {judge.label} and cheaper to train than these "
            text += f"(in brackets, in how many draws): {told}."
            size = Interval(len(front), math.nan, math.nan)
            blocks = [*judge.blocks, *study.energy_blocks]
            verdict = "blocked" if blocks else "described"
            found.append(Finding(f"pareto.{judge.name}", text, *size, len(study.energy), verdict, blocks))
    return found


def _noise_findings(study: StudyResults) -> list[Finding]:
    noise = effects.noise_floor(study.results, study.repeats, "val_loss")
    if noise is None:
        return [
            _not_estimable(
                "noise_floor", "The seed noise is not known", "no configuration was repeated with another seed"
            )
        ]
    seeds, losses = noise.between_seeds, study.losses.sort_values()
    near = [c for c in losses.index if losses[c] - losses.iloc[0] <= noise.resolution]
    text = (
        f"Another seed moves the validation loss by {seeds.value:.4f} (standard deviation, [{seeds.low:.4f}, "
        f"{seeds.high:.4f}], {noise.n_runs} runs); configurations differ by {noise.between_configs:.4f}. Two single "
        f"runs closer than {noise.resolution:.4f} are not distinguishable: {len(near)} of {len(losses)} are that close "
        f"to the lowest loss{f' ({name_list(near)})' if len(near) <= 8 else ''}."
    )
    verdict = "supported" if noise.between_configs > seeds.high else "not distinguishable"
    return [Finding("noise_floor", text, *seeds, noise.n_runs, verdict)]


def _effect_findings(study: StudyResults) -> list[Finding]:
    blocks = {f"{judge.name} score": judge.blocks for judge in study.judges}
    blocks[f"training energy ({study.energy_word})"] = study.energy_blocks
    return [_effect(row, blocks.get(row.response, [])) for row in effects.effect_tables(study).itertuples()]


def _effect(row: Any, blocks: list[str]) -> Finding:
    id = f"effect.{row.response}.{row.factor}.{row.contrast}".replace(" ", "")
    name = f"{row.factor} {row.contrast} on {row.response}"
    if not row.estimable:
        return _not_estimable(id, f"The effect of {name} is not estimable", row.reason, row.n)
    neutral, digits = (1.0, ".2f") if row.unit == "ratio" else (0.0, "+.3f")
    text = f"Effect of {name}: {row.effect:{digits}} {row.unit} [{row.low:{digits}}, {row.high:{digits}}]."
    verdict = "not distinguishable" if row.low <= neutral <= row.high else "supported"
    return Finding(id, text, row.effect, row.low, row.high, row.n, "blocked" if blocks else verdict, blocks)


def paper_table(study: StudyResults, base_model: str | None = None) -> pd.DataFrame:
    """The paper's published facts beside ours, as text: quantity, paper, this study."""
    losses, energy, n = study.losses, study.energy, len(study.losses)
    low, high = PAPER["energy_wh"]
    rows = [
        ("configurations", f"{PAPER['n']}", f"{len(study.results)}"),
        ("base model", PAPER["base model"], base_model or "-"),
        ("judges", PAPER["judges"], name_list([j.label for j in study.judges]) or "-"),
        ("lowest validation loss", f"{PAPER['best_loss']}", f"{losses.min():.4f} ({losses.idxmin()})" if n else "-"),
        ("its rank with the judges", PAPER["best_loss_rank"], _rank_text(study, "idxmin")),
        ("probability of rank 6 or lower if loss meant nothing", "11/16", f"{n - 5}/{n}" if n > 5 else "-"),
        ("highest validation loss", f"{PAPER['worst_loss']}", f"{losses.max():.4f} ({losses.idxmax()})" if n else "-"),
        ("its rank with the judges", PAPER["worst_loss_rank"], _rank_text(study, "idxmax")),
        ("probability of rank 1 if loss meant nothing", "1/16", f"1/{n}" if n else "-"),
        ("|tau| needed for p < .05", _needed_text(PAPER["n"]), _needed_text(n)),
        (
            "training energy per configuration",
            f"{low:g}-{high:g} Wh (factor {high / low:.1f})",
            _range_text(study, energy),
        ),
    ]
    return pd.DataFrame(rows, columns=["quantity", "paper", "this study"])


def _range_text(study: StudyResults, energy: pd.Series) -> str:
    if len(energy) < 2:
        return "-"
    return f"{energy.min():.3g}-{energy.max():.3g} Wh, {study.energy_word} (factor {energy.max() / energy.min():.1f})"


def _needed_text(n: int) -> str:
    needed = statistics.critical_tau(n) if n >= 2 else None
    return "cannot be reached" if needed is None else f"{needed:.3f}"


def _rank_text(study: StudyResults, end: str) -> str:
    told = []
    for judge in study.judges:
        losses, _ = results.paired_draws(study, judge)
        if losses.shape[1]:
            config = getattr(study.losses[losses.columns], end)()
            place = judge.scores[losses.columns].rank(ascending=False)[config]
            told.append(f"{place:g} of {losses.shape[1]} ({judge.name}{', not valid' if judge.blocks else ''})")
    return "; ".join(told) or "-"
