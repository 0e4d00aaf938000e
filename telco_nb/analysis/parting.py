"""Why loss and judged quality part: each explanation a statement of its own, with its interval.

Shift of distribution, overfitting and style come from `divergence`. Knowledge and forgetting are measured here, without
a judge: what a model chooses by likelihood between texts of the cards, and how much more general texts surprise it than
they surprise the untuned model. Either goes with the parting if, at equal validation loss, it goes with the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis import results
from telco_nb.analysis.divergence import FEWEST, Side, compared, shown_explanations
from telco_nb.analysis.effects import FACTORS
from telco_nb.analysis.inference import partial_tau_rows, relabellings
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, not_estimable, p_text
from telco_nb.analysis.statistics import Interval, cluster_weights, percentile_interval, share_interval, tau_rows
from telco_nb.judge.ranking import interval_text

UNTUNED = "untuned"
NAMES = {
    "shift": ("Shift of distribution", "shift"),
    "overfitting": ("Overfitting", "overfitting"),
    "style": ("Style instead of content", "style instead of content"),
}
MEASURED = {
    "knowledge": ("Knowledge", "card_choice", "right choices about the cards", ".0%"),
    "forgetting": ("Forgetting", "forgetting", "nats per token lost on general texts", "+.3f"),
}


LESS_SURPRISED = "less surprised than the untuned model"


class Measure(NamedTuple):
    """Columns value, low, high and n per configuration (and the untuned model), and paired draws (draws, the same)."""

    table: pd.DataFrame
    draws: pd.DataFrame


def card_choice(choices: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> Measure:
    """The share of right choices about the cards; whole terms are drawn, the same for all.

    Args:
        choices: by configuration and `untuned`, columns item_id, kind, term_id and right, as 04 writes them.
        n_draws, seed: of the bootstrap.

    Returns:
        Bounds are those of `share_interval`, as in 04.
    """
    of_cards = {name: table[table["kind"] != "general"].assign(sum=table["right"]) for name, table in choices.items()}
    found = _means(of_cards, "term_id", n_draws, seed)
    for name, table in of_cards.items():
        found.table.loc[name, ["value", "low", "high"]] = list(share_interval(table["right"], table["term_id"], seed))
    return found


def forgetting(general_losses: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> Measure:
    """The loss of general texts less that of the untuned model, nats per token; texts are drawn, the same for all.

    Args:
        general_losses: by configuration and `untuned`, columns text_id and loss, as 04 writes them.
        n_draws, seed: of the bootstrap.
    """
    before = general_losses[UNTUNED].set_index("text_id")["loss"]
    gained = {
        name: table.assign(sum=table["loss"] - table["text_id"].map(before))
        for name, table in general_losses.items()
        if name != UNTUNED
    }
    return _means(gained, "text_id", n_draws, seed)


def forgetting_text(measure: Measure) -> str:
    """How many configurations general texts surprise more, and less, than the untuned model, surely or not."""
    rows = measure.table.dropna(subset=["value"])
    if rows.empty:
        return "What the configurations have forgotten is not known."
    less, more = rows[rows["value"] < 0], rows[rows["value"] > 0]
    surely = int((less["high"] < 0).sum()), int((more["low"] > 0).sum())
    return (
        f"{len(more)} of {len(rows)} configurations are more surprised by general texts than the untuned model "
        f"({surely[1]} of them surely), {len(less)} are {LESS_SURPRISED} ({surely[0]} surely)."
    )


def _means(tables: Mapping[str, pd.DataFrame], cluster: str, n_draws: int, seed: int) -> Measure:
    """The mean of column `sum` per configuration: value, low, high, n; whole clusters are drawn."""
    clusters = sorted(set().union(*(table[cluster] for table in tables.values())))
    weights = cluster_weights(len(clusters), n_draws, seed) if clusters else np.empty((n_draws, 0))
    rows, draws = {}, {}
    for name, table in tables.items():
        sums = table.groupby(cluster)["sum"].agg(["sum", "size"]).reindex(clusters, fill_value=0).to_numpy(float)
        drawn = weights @ sums if len(clusters) else np.zeros((n_draws, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            draws[name] = drawn[:, 0] / drawn[:, 1]
        value = float(table["sum"].mean()) if len(table) else math.nan
        rows[name] = (*percentile_interval(value, draws[name], len(clusters)), len(table))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])
    return Measure(table.rename_axis("config"), pd.DataFrame(draws))


def parting_findings(
    study: StudyResults, divergence: pd.DataFrame, measures: Mapping[str, Measure], seed: int = 0
) -> list[Finding]:
    """Five statements per judge: shift, overfitting, style, knowledge and forgetting.

    Args:
        study: the study.
        divergence: the table of `divergence.divergence_tables`.
        measures: `card_choice` and `forgetting` by these names; one that is missing was not measured.
        seed: of sampled relabellings.
    """
    found = []
    for judge in study.judges:
        rows = divergence[divergence["judge"] == judge.label] if len(divergence) else divergence
        shown = shown_explanations(rows) if len(rows) else []
        found += [_of_table(judge, reason, rows, reason in shown, len(study.losses)) for reason in NAMES]
        found += [_of_measure(study, judge, reason, measures.get(MEASURED[reason][1]), seed) for reason in MEASURED]
    return found


def _of_table(judge: JudgeResults, reason: str, rows: pd.DataFrame, shown: bool, n: int) -> Finding:
    name, row_name = NAMES[reason]
    id, unknown = f"parting.{reason}.{judge.name}", f"{name} cannot be told with {judge.label}"
    row = rows[rows["name"] == row_name]
    if row.empty:
        return not_estimable(id, unknown, f"fewer than {FEWEST} configurations are ranked", n)
    first = row.iloc[0]
    if first["reason"]:
        return not_estimable(id, unknown, first["reason"], n)
    interval = Interval(first["value"], first["low"], first["high"])
    text = f"{name} is {'shown' if shown else 'not shown'} with {judge.label}: {first['measure']} "
    text += f"{interval.value:+.2f} {interval_text(*interval[1:], '+.2f')}, {p_text(first['p'])} by relabelled factors."
    return blockable(id, text, interval, n, "supported" if shown else "not distinguishable", judge)


def _of_measure(study: StudyResults, judge: JudgeResults, reason: str, measure: Measure | None, seed: int) -> Finding:
    """Whether a measure goes with the score at equal validation loss, with the extremes among configurations."""
    name, column, words, digits = MEASURED[reason]
    id, unknown = f"parting.{reason}.{judge.name}", f"{name} cannot be told with {judge.label}"
    configs = list(results.paired_draws(study, judge)[0].columns)
    if measure is None or not set(configs) <= set(measure.table["value"].dropna().index):
        reason_why = f"{column.replace('_', ' ')} is not known for every configuration"
        return not_estimable(id, unknown, reason_why, len(configs))
    if len(configs) < FEWEST:
        return not_estimable(id, unknown, f"{len(configs)} configurations are too few", len(configs))
    plain, partial, p = _relations(study, judge, measure, configs, seed)
    if plain is None or partial is None:
        return not_estimable(id, unknown, f"{column.replace('_', ' ')} or the score is the same for all", len(configs))
    shown = partial.excludes() and p < 0.05
    held, simple = (f"{tau.value:+.2f} {interval_text(*tau[1:], '+.2f')}" for tau in (partial, plain))
    text = (
        f"{name} is {'shown' if shown else 'not shown'} with {judge.label}: partial tau of {words} and score at equal "
        f"validation loss {held}, {p_text(p)} by relabelled factors (plain tau {simple}). "
        f"{_extremes(measure, configs, words, digits)}"
    )
    return blockable(id, text, partial, len(configs), "supported" if shown else "not distinguishable", judge)


def _relations(
    study: StudyResults, judge: JudgeResults, measure: Measure, configs: list[str], seed: int
) -> tuple[Interval | None, Interval | None, float]:
    """tau of a measure and the score, the partial tau at equal validation loss, and the p of the latter.

    An interval is None where one side is constant.
    """
    losses, draws = results.paired_draws(study, judge)
    n_draws = min(len(measure.draws), len(losses))
    numbers = (measure.table.loc[configs, "value"], study.losses[configs], judge.scores[configs])
    drawn = (table[configs].iloc[:n_draws] for table in (measure.draws, losses, draws))
    own, loss, score = map(Side, numbers, drawn)
    relabelled = relabellings(study.results.loc[configs, list(FACTORS)], seed)
    plain, _ = compared(tau_rows, [own, score], relabelled)
    partial, p = compared(lambda a, given, b: partial_tau_rows(a, b, given), [own, loss, score], relabelled)
    return plain, partial, p


def _extremes(measure: Measure, configs: list[str], words: str, digits: str) -> str:
    """The highest and the lowest configuration, and the untuned model where it is measured."""
    values = measure.table.loc[configs, "value"]
    named = {"most": str(values.idxmax()), "least": str(values.idxmin())}
    if UNTUNED in measure.table.index:
        named["untuned model"] = UNTUNED
    parts = []
    for word, config in named.items():
        interval = Interval(*measure.table.loc[config, ["value", "low", "high"]])
        who = word if config == UNTUNED else f"{word} {config}"
        less = f" ({LESS_SURPRISED})" if config != UNTUNED and interval.value < 0 else ""
        parts.append(f"{who} {interval.value:{digits}} {interval_text(*interval[1:], digits)}{less}")
    return f"{words[0].upper()}{words[1:]}: {', '.join(parts)}; extremes are picked after the fact."
