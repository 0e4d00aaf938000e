"""The statements of the study: the decision, the front-runner, the choice by loss alone, and how sure each of them is.

Each is a Finding: a sentence with its value, interval, number of observations and verdict, and the reasons that forbid
to use it as a headline. The statistics are in the modules below; here they are put into words.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.analysis import effects, results, statistics
from telco_nb.analysis.agreement import effective_finding, effective_judges
from telco_nb.analysis.divergence import divergence_tables
from telco_nb.analysis.fitness import bar_findings, floor_findings, floor_rankings, lead_over
from telco_nb.analysis.loss_findings import design_p_text, loss_findings, loss_pick
from telco_nb.analysis.recommendation import (
    Recommendation,
    claiming_judges,
    compare,
    deploy_finding,
    describe_config,
    energy_text,
    front_runner_finding,
    judges_text,
    percent,
    recommend,
    win_text,
)
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.rules import rule_agreement, rule_finding
from telco_nb.analysis.seeds import noise_finding
from telco_nb.analysis.statements import (
    Finding,
    blockable,
    counted,
    excludes_zero,
    name_list,
    not_estimable,
    p_text,
    some_of,
)
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.cases import CRITERIA
from telco_nb.judge.ranking import interval_text

# Published in arXiv:2606.05176: facts to set beside ours, not targets.
PAPER: dict[str, Any] = {
    "base model": "Qwen2.5-3B",
    "judges": "Claude Sonnet 4.5, GPT-5.2",
    "n": 16,
    "best_loss": 0.5024,
    "best_loss_rank": "6th-7th",
    "worst_loss": 0.6807,
    "worst_loss_rank": "1st with both judges",
    "energy_wh": (284.0, 1371.0),
}
UNSURE = "How sure it is that another configuration answers better than the choice of loss is not known"


def all_findings(study: StudyResults, seed: int = 0, divergence: pd.DataFrame | None = None) -> list[Finding]:
    """Every statement of the study, the decision first.

    Args:
        study: the study.
        seed: of sampled relabellings, permutations and resamples.
        divergence: from `divergence_tables(study, seed)`; None: it is computed here.
    """
    parts = divergence_tables(study, seed) if divergence is None else divergence
    judged = [
        finding
        for judge in study.judges
        for finding in loss_findings(study, judge, seed, parts[parts["judge"] == judge.label])
    ]
    agreement = [_agreement(study, a, b, seed) for a, b in combinations(study.judges, 2)]
    rest = [*_energy_findings(study), noise_finding(study), *_effect_findings(study)]
    return [*decision_findings(study), *judged, *agreement, *rest]


def to_json(findings: Sequence[Finding]) -> str:
    """findings.json as text: strict JSON, NaN as null."""
    rows = [{key: _plain(value) for key, value in asdict(finding).items()} for finding in findings]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """The findings as a table; `value` is text because a decision's value is a configuration's name."""
    frame = pd.DataFrame([asdict(finding) for finding in findings])
    frame["value"] = [None if _plain(v) is None else str(_plain(v)) for v in frame["value"]]
    frame["blocked_by"] = frame["blocked_by"].map("; ".join)
    return frame


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown list. Blocked ones that have a value fold away; the summary names the reasons."""
    if not findings:
        return "No statement can be made."
    folded = [f for f in findings if f.verdict == "blocked" and f.value is not None]
    lines = [f"- {f.statement} *({f.verdict})*" for f in findings if f not in folded]
    if folded:
        reasons = "; ".join(dict.fromkeys(reason for f in folded for reason in f.blocked_by))
        count = f"{len(folded)} statement{'s' if len(folded) > 1 else ''} without a headline"
        items = "".join(f"<li>{html.escape(f.statement)} <em>(blocked)</em></li>" for f in folded)
        lines.append(f"\n<details><summary>{count}: {html.escape(reasons)}</summary><ul>{items}</ul></details>")
    return "\n".join(lines)


def decision_findings(study: StudyResults) -> list[Finding]:
    """The configuration to deploy and how fit it is, or all are if none is; the front-runner, that by loss alone, how
    sure the difference is, and the gain over the untuned model."""
    choice, every = recommend(study), [str(config) for config in study.results.index]
    bar = bar_findings(study, [choice.deploy] if choice.deploy else every, choice.config)
    first = front_runner_finding(study, choice)
    first = [first] if first else []
    return [
        deploy_finding(study, choice),
        *bar,
        *floor_findings(study.checks, every),
        *floor_rankings(study.passed),
        *first,
        *_decisions(study, choice),
    ]


def _decisions(study: StudyResults, choice: Recommendation) -> list[Finding]:
    """The choice by loss alone, and what the front-runner gains over it and over the untuned model."""
    if study.losses.empty:
        reason = "no configuration has a validation loss"
        unknown = not_estimable("loss_choice", "Loss alone cannot choose", reason, 0, "blocked")
        return [unknown, *_gains(study, choice)]
    pick = loss_pick(study.losses)
    if pick is None:
        reason = (
            f"{(study.losses == study.losses.min()).sum()} of {len(study.losses)} configurations share the lowest loss"
        )
        unsure = not_estimable("confidence", "There is no choice of loss to compare with", reason)
        loss_choice = not_estimable("loss_choice", "Loss alone cannot choose", reason, len(study.losses))
        return [loss_choice, unsure, *_gains(study, choice)]
    return [_loss_choice(study, pick), _confidence(study, choice, pick), *_gains(study, choice)]


def _loss_choice(study: StudyResults, pick: str) -> Finding:
    row = study.results.loc[pick]
    loss = Interval(*row[["val_loss", "val_loss_low", "val_loss_high"]])
    text = f"Loss alone would choose {pick} ({describe_config(row)}): {loss.value:.4f} nats per token "
    text += f"{interval_text(*loss[1:], '.4f')}."
    if energy := energy_text(row):
        text += f" Training: {energy}."
    return Finding("loss_choice", text, pick, n=len(study.losses))


def _confidence(study: StudyResults, choice: Recommendation, pick: str) -> Finding:
    """The share of draws in which the choice scores above the choice of loss; the least sure judge counts."""
    if choice.config is None:
        return not_estimable("confidence", UNSURE, "; ".join(choice.blocked_by), verdict="blocked")
    judges, own = claiming_judges(study)[0], choice.config
    placed = [judge for judge in judges if pick in judge.scores.index]
    counts = [judge.counted_terms(own, pick) for judge in placed]
    n = min((terms for terms in counts if terms is not None), default=None)
    if own == pick:
        return Finding("confidence", f"Loss and judges choose the same configuration, {pick}.", n=n)
    if not placed:
        return not_estimable("confidence", UNSURE, f"no judge has ranked {pick}", n)
    leads = {judge.label: (judge.draws[own] - judge.draws[pick]).dropna() for judge in placed}
    if any(lead.empty for lead in leads.values()):
        return not_estimable("confidence", UNSURE, f"{pick} has no resampled score", n)
    shares = {label: float((lead > 0).mean() + (lead == 0).mean() / 2) for label, lead in leads.items()}
    text, verdict = _ahead_of_loss(study, choice, placed, pick, shares)
    return Finding("confidence", text, min(shares.values()), n=n, verdict=verdict)


def _ahead_of_loss(
    study: StudyResults, choice: Recommendation, placed: list[JudgeResults], pick: str, shares: dict[str, float]
) -> tuple[str, str]:
    """The sentence on how often the choice scores above that of loss, and its verdict."""
    own, tables = str(choice.config), list(compare(study, placed).values())
    often = name_list([f"{percent(share)} with {judge}" for judge, share in shares.items()])
    text = f"How often {own} scores above loss's choice, {pick}, over resamples of the prompts: {often}."
    ahead, behind = (
        all(loser in table.loc[winner, "better_than"] for table in tables)
        for winner, loser in ((own, pick), (pick, own))
    )
    if behind:
        text += f" {pick} answers better"
        text += ", but is not fit." if choice.fit and pick not in choice.fit else "."
    elif min(shares.values()) < 0.5:
        both = max(shares.values()) >= 0.5  # the judges lean to different sides
        text += " Neither is shown to answer better." if both else f" {pick} may answer better, but is not shown to."
    elif not ahead:
        text += f" With so many pairs compared, its lead can still be chance: {own} is not shown to be ahead."
    return text, "supported" if ahead else "refuted" if behind else "not distinguishable"


def _gains(study: StudyResults, choice: Recommendation) -> list[Finding]:
    """The choice (or else the judge's best) against the untuned model, per judge that has placed it.

    It was picked after the fact, so its interval is as wide as one that holds for all configurations at once.
    """
    findings = []
    for judge in (judge for judge in study.judges if len(judge.scores)):
        config = choice.config or str(judge.scores.idxmax())
        n = len(judge.scores)
        gain = lead_over(judge, config, "untuned", picked_from=n)
        if gain is not None:
            text = (
                f"Against the untuned model {config} wins {win_text(gain)} of decided comparisons with {judge.label}."
            )
            if n > 1:
                text += (
                    f" It was picked from {n} after the fact: the share is too high, the interval holds for all {n}."
                )
            verdict = excludes_zero(gain)
            terms = judge.counted_terms(config, "untuned")
            findings.append(blockable(f"gain.{judge.name}", text, gain, terms, verdict, judge))
    return findings


def _agreement(study: StudyResults, a: JudgeResults, b: JudgeResults, seed: int) -> Finding:
    configs = [c for c in a.scores.index if c in b.scores.index]
    id, n, n_draws = f"judges.{a.name}.{b.name}", len(configs), min(len(a.draws), len(b.draws))
    text = f"Whether {a.label} and {b.label} rank alike cannot be told"
    if n < 2 or statistics.critical_tau(n) is None:
        return not_estimable(id, text, f"with {counted(n, 'configuration')} no tau reaches p < .05", n)
    if 1 in (a.scores[configs].nunique(), b.scores[configs].nunique()):
        return not_estimable(id, text, "all scores of a judge are equal", n)
    draws_a, draws_b = a.draws[configs].iloc[:n_draws], b.draws[configs].iloc[:n_draws]
    tau = statistics.tau_interval(a.scores, b.scores, draws_a, draws_b)
    if tau is None:
        return not_estimable(id, text, "no resample has a rank correlation", n)
    p, said = design_p_text(study.results.loc[configs], a.scores[configs], b.scores[configs], seed)
    text = f"Rankings of {a.label} and {b.label}: tau-b = {tau.value:+.2f} {interval_text(*tau[1:], '+.2f')}. {said}"
    alike = tau.value > 0 and p < 0.05
    return blockable(id, text, tau, n, "supported" if alike else "not distinguishable", a, b)


def kappa_finding(a: JudgeResults, b: JudgeResults, kappa: Interval, n: int) -> Finding:
    """Agreement of two judges verdict by verdict.

    Args:
        a, b: the judges.
        kappa, n: from `statistics.cohen_kappa`.
    """
    id = f"kappa.{a.name}.{b.name}"
    if not n or not math.isfinite(kappa.value):
        text = f"Verdicts of {a.label} and {b.label} cannot be compared"
        return not_estimable(id, text, "no shared comparison that varies", n)
    text = f"Verdict by verdict, {a.label} and {b.label} agree with Cohen's kappa {kappa.value:.2f} "
    text += f"{interval_text(*kappa[1:], '.2f')} over {counted(n, 'shared comparison')}."
    return blockable(id, text, kappa, n, excludes_zero(kappa), a, b)


def effective_findings(
    panel: Sequence[JudgeResults], judgements: Mapping[str, pd.DataFrame], n_draws: int, seed: int
) -> list[Finding]:
    """To how many independent judges the panel amounts; nothing of one judge. `judgements` are by the judge's name."""
    if len(panel) < 2:
        return []
    return [effective_finding(panel, *effective_judges([judgements[judge.name] for judge in panel], n_draws, seed))]


def rule_findings(
    panel: Sequence[JudgeResults], checks: pd.DataFrame | None, judgements: Mapping[str, pd.DataFrame], seed: int
) -> tuple[pd.DataFrame, list[Finding]]:
    """The rules beside every judge that is no checklist: `rules.rule_agreement` with the column judge, and in words.

    Args:
        panel: the judges.
        checks: `checklist.checks_table`; None where there is no checklist, and nothing is said.
        judgements: by the judge's name.
        seed: of the bootstrap.
    """
    tables, told = [], []
    for judge in panel:
        if checks is not None and judge.kind != "checklist":
            table = rule_agreement(checks, judgements[judge.name], seed)
            if len(table):
                tables.append(table.assign(judge=judge.label))
                told.append(rule_finding(judge, table))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), told


def rubric_findings(panel: Sequence[JudgeResults], ratings: pd.DataFrame, n_draws: int, seed: int) -> list[Finding]:
    """Agreement of all judges that rate on each criterion of the rubric, by Krippendorff's alpha.

    Args:
        panel: the judges.
        ratings: columns rater (name of the judge), prompt_id, scenario_id, config and the criteria (1 to 5).
        n_draws, seed: of the bootstrap over scenarios.
    """
    if sum((ratings["rater"] == judge.name).any() for judge in panel) < 2:
        reason = "fewer than two judges rate answers"
        return [not_estimable("alpha.rubric", "Whether judges rate answers alike is not known", reason, 0)]
    unit = ratings["prompt_id"] + "|" + ratings["config"]
    long = pd.DataFrame({"unit": unit, "cluster": ratings["scenario_id"], "rater": ratings["rater"]})
    findings, rated = [], [name for name in CRITERIA if name in ratings]
    for name in rated:
        table = long.assign(value=ratings[name].astype(float))
        raters = set(table.loc[table["value"].notna(), "rater"])
        alpha, n = statistics.krippendorff_alpha(table, "ordinal", n_draws, seed, len(rated))
        findings.append(_alpha_finding(name, [judge for judge in panel if judge.name in raters], alpha, n))
    return findings


def _alpha_finding(criterion: str, judges: Sequence[JudgeResults], alpha: Interval, n: int) -> Finding:
    id = f"alpha.{criterion}"
    if not n or not math.isfinite(alpha.value):
        reason = "fewer than two judges have rated it on the same answers" if not n else "all ratings are equal"
        return not_estimable(id, f"Whether judges rate {criterion} alike is not known", reason, n)
    text = f"On {criterion} {judges_text(judges)} agree with Krippendorff's alpha {alpha.value:.2f} "
    text += f"{interval_text(*alpha[1:], '.2f')} (ordinal, {counted(n, 'answer')}; bounds hold for all criteria)."
    return Finding(id, text, *alpha, n, excludes_zero(alpha))


def self_preference_finding(judge: JudgeResults, own: set[str], gap: Interval, n: int) -> Finding:
    """The preference of a judge for its own answers.

    Args:
        judge: the judge.
        own: names of its own answers (`results.own_answers`).
        gap, n: from `results.self_preference`.
    """
    id = f"self_preference.{judge.name}"
    whose = name_list(sorted(own)) if len(own) < 4 else f"{len(own)} configurations"
    if not n:
        text = f"Whether {judge.label} favours its own answers ({whose}) is not known"
        return not_estimable(id, text, "no other judge has decided the same comparisons", n)
    points = Interval(*(100 * share for share in gap))
    text = f"{judge.label} prefers its own answers ({whose}) {points.value:+.0f} points "
    text += (
        f"{interval_text(*points[1:], '+.0f')} more often than the other judges do, over {counted(n, 'comparison')}."
    )
    return Finding(id, text, *gap, n, excludes_zero(gap))


def _energy_findings(study: StudyResults) -> list[Finding]:
    energy, text = study.energy, "Energies cannot be compared"
    if len(energy) < 2:
        reason = some_of(len(energy), len(study.results), "configuration", "has", "have") + " a training energy"
        return [not_estimable("energy_ratio", text, reason, len(energy))]
    if len(study.energy_kinds) != 1:
        return [not_estimable("energy_ratio", text, study.energy_blocks[0], len(energy), "blocked")]
    least, most = str(energy.idxmin()), str(energy.idxmax())
    if energy[least] <= 0:
        return [not_estimable("energy_ratio", text, f"{least} has an energy of {energy[least]:g} Wh", len(energy))]
    ratio, spread = effects.energy_ratio(study, most, least), effects.energy_spread(study)
    low, high = PAPER["energy_wh"]
    unknown = " (no run was repeated, so its error from run to run is not known)"
    run_error = unknown if spread is None else f" {interval_text(*ratio[1:], '.1f')}"
    text = (
        f"Training energy ({study.energy_word}) runs from {energy[least]:.3g} Wh ({least}) to {energy[most]:.3g} Wh "
        f"({most}): a factor of {ratio.value:.1f}{run_error}. The two "
        f"are picked after the fact. The paper has {low:g}-{high:g} Wh, a factor of {high / low:.1f}."
    )
    if study.energy_word == "estimated":
        text += " Ranking by an estimate is ranking by processor time."
    first = blockable("energy_ratio", text, ratio, len(energy), "described", blocks=study.energy_blocks)
    return [first, *_pareto_findings(study)]


def _pareto_findings(study: StudyResults) -> list[Finding]:
    findings, spread = [], effects.energy_spread(study)
    held = "energies held fixed, because no run was repeated" if spread is None else "of scores and energies"
    for judge in study.judges:
        front = statistics.pareto_front(study.energy, judge.scores)
        if front:
            drawn = judge.draws[list(judge.scores.index)]
            shares = statistics.pareto_shares(study.energy, drawn, 0.0 if spread is None else spread.sd)
            members = name_list([f"{config} ({percent(shares[config])})" for config in front])
            text = f"No configuration is both better with {judge.label} and cheaper to train than these "
            text += f"(in brackets, in how many draws; {held}): {members}."
            size, blocks = Interval(len(front)), study.energy_blocks
            id, n = f"pareto.{judge.name}", len(study.energy)
            findings.append(blockable(id, text, size, n, "described", judge, blocks=blocks))
    return findings


def _effect_findings(study: StudyResults) -> list[Finding]:
    blocks = {f"{judge.name} score": judge.blocks for judge in study.judges}
    energy, order = f"training energy ({study.energy_word})", effects.order_shares(study.results)
    blocks[energy] = study.energy_blocks
    rows = effects.effect_tables(study).to_dict("records")
    family = pd.Series([row["response"] for row in rows if row["estimable"]], dtype=object).value_counts()
    return [
        _effect(
            row, blocks.get(row["response"], []), int(family.get(row["response"], 0)),
            order[row["factor"]] if row["response"] == energy else 0.0, effects.order_is_known(study.results),
        )
        for row in rows
    ]  # fmt: skip


def _effect(row: dict[Any, Any], blocks: list[str], family: int, order: float, known: bool) -> Finding:
    """One effect. It is supported if Holm's p is below .05 and, where main effects do not fit, if it stands out.

    Args:
        row: of `effects.effect_tables`.
        blocks: what blocks the response.
        family: the number of effects that Holm adjusts over.
        order: the share of the order of runs that the factor explains; 0 for a response that no drift moves.
        known: whether that order is recorded.
    """
    factor, contrast, response, unit, n = (row[key] for key in ("factor", "contrast", "response", "unit", "n"))
    id = f"effect.{response}.{factor}.{contrast}".replace(" ", "")
    name = f"{factor} {contrast} on {response}".replace("val_loss", "validation loss").replace("_", " ")
    if not row["estimable"]:
        return not_estimable(id, f"The effect of {name} is not estimable", row["reason"], n)
    digits = ".2f" if unit == "ratio" else "+.3f"
    effect = Interval(row["effect"], row["low"], row["high"])
    text = f"Effect of {name}: {effect.value:{digits}} {unit} {interval_text(*effect[1:], digits)}, "
    text += (
        f"{p_text(row['p_holm'])} by Holm over {counted(family, 'effect')} (error: {row['error']}). {_fit_text(row)}"
    )
    if order >= effects.ORDER_SHARE:
        when = "" if known else "Start times are missing; if the runs took the order of the list, then "
        ran = f"{when}{'c' if when else 'C'}onfigurations ran in the order of {factor}"
        text += f" {ran} (it explains {order:.0%} of the variance of a run's place): a drift of the machine would look "
        text += "like this effect."
    rejected = row["lack_of_fit_p"] < 0.05
    holds = row["p_holm"] < 0.05 and (row["stands_out"] or not rejected)
    return blockable(id, text, effect, n, "supported" if holds else "not distinguishable", blocks=blocks)


def _fit_text(row: dict[Any, Any]) -> str:
    """What the lack of fit of main effects says about one of them."""
    if not math.isfinite(row["lack_of_fit_p"]):
        return "Without repeated runs it cannot be tested whether effects add up."
    test = f"(lack of fit F = {row['lack_of_fit_f']:.1f}, {p_text(row['lack_of_fit_p'])})"
    if row["lack_of_fit_p"] >= 0.05:
        return f"That effects do not add up is not shown {test}."
    out = "stands out from" if row["stands_out"] else "does not stand out from"
    return f"Effects do not add up {test}: this one is an average over the design, and it {out} the interactions."


def paper_table(study: StudyResults, base_model: str | None = None) -> pd.DataFrame:
    """The paper's published facts beside ours, as text: quantity, paper, this study."""
    losses, energy, n = study.losses, study.energy, len(study.losses)
    rows = [
        ("configurations", f"{PAPER['n']}", f"{len(study.results)}"),
        ("base model", PAPER["base model"], base_model or "-"),
        ("judges", PAPER["judges"], name_list([j.label for j in study.judges]) or "-"),
        ("lowest validation loss", f"{PAPER['best_loss']}", f"{losses.min():.4f} ({losses.idxmin()})" if n else "-"),
        ("its rank with the judges", PAPER["best_loss_rank"], _rank_text(study, "lowest")),
        ("probability of 6th place or further down if loss meant nothing", "11/16", f"{n - 5}/{n}" if n > 5 else "-"),
        ("highest validation loss", f"{PAPER['worst_loss']}", f"{losses.max():.4f} ({losses.idxmax()})" if n else "-"),
        ("its rank with the judges", PAPER["worst_loss_rank"], _rank_text(study, "highest")),
        ("probability of rank 1 if loss meant nothing", "1/16", f"1/{n}" if n else "-"),
        ("|tau| needed for p < .05 if configurations were exchangeable", _needed_text(PAPER["n"]), _needed_text(n)),
        ("training energy per configuration", _range_text(pd.Series(PAPER["energy_wh"]), "g"),
         _range_text(energy, ".3g", f", {study.energy_word}")),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["quantity", "paper", "this study"])


def _range_text(energy: pd.Series, digits: str, kind: str = "") -> str:
    low, high = energy.min(), energy.max()
    factor = f" (factor {high / low:.1f})" if low > 0 else ""
    return f"{low:{digits}}-{high:{digits}} Wh{kind}{factor}" if len(energy) > 1 else "-"


def _needed_text(n: int) -> str:
    needed = statistics.critical_tau(n) if n >= 2 else None
    return "cannot be reached" if needed is None else f"{needed:.3f}"


def _rank_text(study: StudyResults, end: str) -> str:
    ranks = []
    for judge in study.judges:
        losses, _ = results.paired_draws(study, judge)
        if losses.shape[1]:
            config = loss_pick(study.losses[losses.columns] * (1 if end == "lowest" else -1))
            if config is None:
                continue
            place = judge.scores[losses.columns].rank(ascending=False, method="min")[config]
            ranks.append(f"{place:g} of {losses.shape[1]} ({judge.name}{', not valid' if judge.blocks else ''})")
    return "; ".join(ranks) or "-"
