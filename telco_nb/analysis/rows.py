"""Comparisons of rows of the results: two configurations that differ in one factor, and each with the untuned model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from telco_nb.analysis.effects import FACTORS, factor_levels, level_text
from telco_nb.analysis.fitness import lead_over
from telco_nb.analysis.recommendation import win_text
from telco_nb.analysis.results import JudgeResults, StudyResults, paired_draws
from telco_nb.analysis.statements import counted, name_list, some_of
from telco_nb.analysis.statistics import Interval, percentile_interval
from telco_nb.judge.ranking import interval_text
from telco_nb.judge.separation import LEAST_TERMS

PAIR_COLUMNS = ["factor", "config_a", "config_b", "level_a", "level_b"]
ROW_COLUMNS = ["loss_a", "loss_b", "loss_change", "loss_low", "loss_high", "score_a", "score_b", "score_change",
               "score_low", "score_high", "shows"]  # fmt: skip
DIFFERS = {
    "target_modules": "the target modules differ",
    "rank": "the rank differs",
    "epochs": "the number of epochs differs",
    "learning_rate": "the learning rate differs",
}


def one_factor_pairs(configs: pd.DataFrame) -> pd.DataFrame:
    """Every two configurations that differ in one of FACTORS only: PAIR_COLUMNS, level_a is the lower level.

    `lora_alpha` and other columns may differ as well.
    """
    rows = []
    for factor in FACTORS:
        levels = factor_levels(configs, factor)
        others = [name for name in FACTORS if name != factor]
        for _, group in configs.groupby(others, sort=False, dropna=False):
            ordered = sorted(group[factor].dropna().items(), key=lambda item: levels.index(item[1]))
            pairs = combinations(ordered, 2)
            rows += [(factor, a, b, level_text(low), level_text(high)) for (a, low), (b, high) in pairs if low != high]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def compare_rows(study: StudyResults) -> pd.DataFrame:
    """Loss and score of every pair of `one_factor_pairs` with paired intervals, one row per pair and judge.

    Returns:
        PAIR_COLUMNS, judge and ROW_COLUMNS. A change is b minus a, in nats per token and in log-odds. `shows` says what
        the pair shows: a change counts if its interval excludes 0.
    """
    rows = []
    for judge in study.judges:
        losses, draws = paired_draws(study, judge)
        for pair in one_factor_pairs(study.results.loc[losses.columns]).to_dict("records"):
            a, b = pair["config_a"], pair["config_b"]
            values = [study.losses[a], study.losses[b], judge.scores[a], judge.scores[b]]
            loss = percentile_interval(values[1] - values[0], losses[b] - losses[a], study.n_scenarios)
            score = percentile_interval(values[3] - values[2], draws[b] - draws[a], judge.terms(a, b))
            numbers = [*values[:2], *loss, *values[2:], *score, _shows(loss, score)]
            rows.append(pair | {"judge": judge.name} | dict(zip(ROW_COLUMNS, numbers, strict=True)))
    return pd.DataFrame(rows, columns=[*PAIR_COLUMNS, "judge", *ROW_COLUMNS])


def _shows(loss: Interval, score: Interval) -> str:
    loss_changes, score_changes = (x.excludes() for x in (loss, score))
    if loss_changes and score_changes:
        return f"the lower loss goes with {'better' if loss.value * score.value < 0 else 'worse'} answers"
    if loss_changes:
        return "the loss differs, the answers are not distinguishable"
    if score_changes:
        return "the answers differ, the loss is not distinguishable"
    return "neither the loss nor the answers are distinguishable"


def rows_text(study: StudyResults, comparisons: pd.DataFrame, most: int = 12) -> str:
    """A numbered Markdown list with one sentence per pair, and a summary per judge.

    Args:
        study: the study. Judges without a headline are left out while there is another one.
        comparisons: from `compare_rows`.
        most: pairs in the list, shared by the factors; the summary counts all.
    """
    judges = study.passed or study.judges
    rows = comparisons[comparisons["judge"].isin([judge.name for judge in judges])]
    pairs = rows.drop_duplicates(["config_a", "config_b"])
    listed = pairs.groupby("factor", sort=False).head(max(1, most // max(1, pairs["factor"].nunique())))
    tables = [
        rows[(rows["config_a"] == a) & (rows["config_b"] == b)] for a, b in listed[["config_a", "config_b"]].values
    ]
    lines = [f"{k}. {_pair_text(table, judges)}" for k, table in enumerate(tables, 1)] + [""]
    for judge in judges if len(pairs) else []:
        shown = rows.loc[rows["judge"] == judge.name, "shows"].value_counts()
        counts = "; ".join(f"in {n} {text}" for text, n in shown.items())
        lines.append(
            f"- Of {counted(int(shown.sum()), 'pair')} with {_name(judge)}: {counts or 'nothing can be compared'}."
        )
    absent = [factor.replace("_", " ") for factor in FACTORS if factor not in set(rows["factor"])]
    if absent:
        text = (
            f"- No two rows differ only in {name_list(absent).replace(' and ', ' or ')}: such a comparison needs the "
        )
        lines.append(f"{text}main effects, which average over the other factors.")
    return "\n".join(lines)


def _name(judge: JudgeResults) -> str:
    return f"{judge.label}{', not valid' if judge.blocks else ''}"


def _pair_text(table: pd.DataFrame, judges: Sequence[JudgeResults]) -> str:
    """The sentences on one pair; `table` has one row per judge."""
    first = table.iloc[0]
    text = (
        f"**{first.config_a} against {first.config_b}**: only {DIFFERS[first.factor]}, {first.level_a} and "
        f"{first.level_b}. The loss is {first.loss_a:.3f} and {first.loss_b:.3f}, a difference of "
        f"{first.loss_change:+.3f} {interval_text(first.loss_low, first.loss_high, '+.3f')}."
    )
    for judge in judges:
        for _, row in table[table["judge"] == judge.name].iterrows():
            lead = Interval(row["score_change"], row["score_low"], row["score_high"])
            text += f" With {_name(judge)} the score is {row['score_a']:+.2f} and {row['score_b']:+.2f}: "
            text += f"{row['config_b']} wins {win_text(lead)} of decided comparisons; {row['shows']}."
    return text


def lowest_loss_text(losses: pd.Series, draws: pd.DataFrame, n_scenarios: int, n_terms: int) -> str:
    """The configuration with the lowest validation loss, and the others that are not distinguishable from it.

    Args:
        losses: by configuration, nats per token.
        draws: their paired bootstrap draws, (draws, configurations).
        n_scenarios, n_terms: of the validation set. With as few as carry no ranking either, nothing is told apart.
    """
    lowest, *others = losses.sort_values().index
    text = f"**{lowest} has the lowest loss.** "
    if min(n_scenarios, n_terms) < LEAST_TERMS:
        few = f"{counted(n_scenarios, 'scenario')} about {counted(n_terms, 'term')}"
        return f"{text}{few}: too few to tell whether another is as low."
    gaps = draws.sub(draws[lowest], axis=0)
    paired = {c: percentile_interval(losses[c] - losses[lowest], gaps[c], n_scenarios) for c in others}
    near = [config for config, gap in paired.items() if not gap.excludes()]
    if near:
        text += (
            f"{len(near)} of {counted(len(others), 'other')} {'are' if len(near) > 1 else 'is'} not distinguishable "
        )
        text += f"from it ({name_list(near)}): "
        return f"{text}the interval of the paired difference contains 0."
    if others:
        all_others = "the other one" if len(others) == 1 else f"all {len(others)} others"
        text += f"It is distinguishable from {all_others}: no interval of a paired difference contains 0."
    return text


def untuned_text(study: StudyResults) -> str:
    """A Markdown list: per judge, how many configurations score below the untuned model."""
    lines = []
    for judge in study.judges:
        gains = {config: lead_over(judge, config, "untuned") for config in judge.scores.index}
        placed = {config: gain for config, gain in gains.items() if gain is not None}
        below = [config for config, gain in placed.items() if gain.value < 0]
        surely = [config for config in below if placed[config].is_below()]
        count = some_of(len(below), len(placed), "configuration", "scores", "score")
        text = f"- With {_name(judge)}, **{count} below the untuned model**"
        if not placed:
            text = f"- {_name(judge)} has not placed the untuned model"
        elif below:
            text += f" ({name_list(below)}); for {len(surely) or 'none'} of them the whole interval lies below"
        lines.append(f"{text}.")
    return "\n".join(lines)
