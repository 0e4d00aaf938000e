"""Why loss and judged quality part: a shift of distribution, overfitting, style, or nothing that can be shown.

Each explanation is a difference of rank correlations that it would move. It counts as shown if its interval excludes 0
on the right side and the factors could not bring it about with unrelated directions (`inference.relabelling_p`). That
is an association over the configurations of one design, and no experiment on causes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis import results
from telco_nb.analysis.effects import FACTORS
from telco_nb.analysis.inference import partial_tau_rows, relabelling_p, relabellings
from telco_nb.analysis.recommendation import name_list
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, not_estimable, p_text
from telco_nb.analysis.statistics import MISSING, Interval, cluster_weights, hull_interval, tau_rows
from telco_nb.judge.ranking import interval_text

SETS = {"val_loss": "validation", "test_loss": "test", "noisy_loss": "noisy", "unseen_loss": "unseen"}
WORDS = {"shift": "a shift of distribution", "overfitting": "overfitting", "style": "style instead of content"}
TABLE_COLUMNS = ["name", "measure", "value", "low", "high", "p", "reason"]
CONSTANT = "one side is constant, or in every resample"
FEWEST = 5  # configurations: with fewer no rank correlation can be told from chance


class Side(NamedTuple):
    """A number per configuration and its draws, (draws, configurations)."""

    values: pd.Series
    draws: pd.DataFrame


def divergence_table(study: StudyResults, judge: JudgeResults, seed: int = 0) -> pd.DataFrame:
    """What loss and quality have to do with each other on each test set, and the test of each explanation.

    Args:
        study: the study; `set_draws`, `train_losses` and `checks` may be missing.
        judge: whose score is the quality.
        seed: of the bootstrap of the checks and of sampled relabellings.

    Returns:
        One row each: name (a loss, content, style, shift, overfitting, style instead of content), measure, value, low,
        high, p (by relabelling) and reason (why there are no numbers).
    """
    losses, draws = results.paired_draws(study, judge)
    configs = list(losses.columns)
    relabelled = relabellings(study.results.loc[configs, list(FACTORS)], seed)
    sides = {"score": Side(judge.scores[configs], draws)} | dict(_loss_sides(study, configs, losses))
    sides |= _check_sides(study, configs, len(losses), seed)
    rows = []
    for name, measure, compare, needed in _measures():
        absent = [side for side in needed if side not in sides]
        if absent:
            missing = name_list([side.replace("_", " ") for side in absent])
            rows.append((name, measure, *MISSING, math.nan, f"{missing} not known for every configuration"))
            continue
        found, p = compared(compare, [sides[side] for side in needed], relabelled)
        rows.append((name, measure, *(found or MISSING), p if found else math.nan, "" if found else CONSTANT))
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def divergence_tables(study: StudyResults, seed: int = 0) -> pd.DataFrame:
    """The `divergence_table` of every judge that has ranked at least FEWEST configurations, with a column judge."""
    judges = [judge for judge in study.judges if results.paired_draws(study, judge)[0].shape[1] >= FEWEST]
    tables = [divergence_table(study, judge, seed).assign(judge=judge.label) for judge in judges]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["judge", *TABLE_COLUMNS])


def _measures() -> Iterator[tuple[str, str, Callable[..., np.ndarray], list[str]]]:
    """Name, measure in words, function of sides row by row, and the sides. The last side is never relabelled."""
    for column, word in SETS.items():
        yield column, f"tau of {word} loss and score", tau_rows, [column, "score"]
    for kind in ("content", "style"):
        yield kind, f"tau of validation loss and {kind}", tau_rows, [kind, "val_loss"]
    yield "shift", "tau with test loss less tau with validation loss", _difference, ["test_loss", "val_loss", "score"]
    words = "partial tau of the gap (validation less training loss) and score, at equal validation loss"
    yield (
        "overfitting",
        words,
        lambda gap, loss, score: partial_tau_rows(gap, score, loss),
        ["gap", "val_loss", "score"],
    )
    words = "tau of validation loss with style less that with content"
    yield "style instead of content", words, _difference, ["style", "content", "val_loss"]


def _difference(a: np.ndarray, b: np.ndarray, other: np.ndarray) -> np.ndarray:
    return tau_rows(a, other) - tau_rows(b, other)


def compared(
    compare: Callable[..., np.ndarray], sides: list[Side], relabelled: np.ndarray
) -> tuple[Interval | None, float]:
    """The value of a measure with its interval over paired draws, and its p by relabelling all sides but the last.

    The interval is None where one side is constant.
    """
    *moved, fixed = sides
    value = float(compare(*(side.values.to_numpy(float)[None, :] for side in sides))[0])
    most = 2.0 if compare is _difference else 1.0  # a correlation, or the difference of two
    interval = hull_interval(value, compare(*(side.draws.to_numpy(float) for side in sides)), most=most)
    still = fixed.values.to_numpy(float)[None, :]
    return interval, relabelling_p(lambda *x: compare(*x, still), relabelled, *(side.values for side in moved))


def _loss_sides(study: StudyResults, configs: list[str], losses: pd.DataFrame) -> Iterator[tuple[str, Side]]:
    """The losses that every configuration has, with their draws; a loss without draws is held at its value."""
    for column in SETS:
        values = study.results[column].reindex(configs) if column in study.results else pd.Series(dtype=float)
        if values.notna().all() and len(values):
            drawn = losses if column == "val_loss" else study.set_draws.get(column)
            held = pd.DataFrame([values.astype(float)] * len(losses))
            drawn = held if drawn is None else drawn[configs].iloc[: len(losses)]
            yield column, Side(values.astype(float), drawn)
    if study.train_losses is not None and set(configs) <= set(study.train_losses.dropna().index):
        trained = study.train_losses[configs]
        yield "gap", Side(study.losses[configs] - trained, losses - trained)


def _check_sides(study: StudyResults, configs: list[str], n_draws: int, seed: int) -> dict[str, Side]:
    """Mean content and style of the checked answers of each configuration; whole terms are drawn."""
    checks = study.checks
    if checks is None or not set(configs) <= set(checks["config"]):
        return {}
    sides, own = {}, checks[checks["config"].isin(configs)]
    for column in ("content", "style"):
        sums = own.pivot_table(index="term_id", columns="config", values=column, aggfunc="sum", fill_value=0)[configs]
        sizes = own.pivot_table(index="term_id", columns="config", values=column, aggfunc="size", fill_value=0)[configs]
        weights = cluster_weights(len(sums), n_draws, seed)
        drawn = (weights @ sums.to_numpy(float)) / np.maximum(1, weights @ sizes.to_numpy(float))
        values = own.groupby("config")[column].mean()[configs]
        sides[column] = Side(values, pd.DataFrame(drawn, columns=configs))
    return sides


def shown_explanations(table: pd.DataFrame) -> list[str]:
    """The explanations that a `divergence_table` shows, by the rules at the head of this module.

    A shift: test loss orders the answers, and more than validation loss does. Overfitting: at equal validation loss the
    gap goes with the score, in whatever direction. Style: validation loss orders style, and content less so and not
    distinguishably.
    """
    by_name = {row["name"]: Interval(row["value"], row["low"], row["high"]) for _, row in table.iterrows()}
    p = table.set_index("name")["p"]
    shift, style, gap = by_name["shift"], by_name["style instead of content"], by_name["overfitting"]
    holds = {
        "shift": shift.is_below() and by_name["test_loss"].is_below() and p["shift"] < 0.05,
        "overfitting": gap.excludes() and p["overfitting"] < 0.05,
        "style": style.is_below() and by_name["style"].is_below() and not by_name["content"].is_below()
        and p["style instead of content"] < 0.05,
    }  # fmt: skip
    return [name for name, shown in holds.items() if shown]


def divergence_finding(study: StudyResults, judge: JudgeResults, table: pd.DataFrame) -> Finding:
    """Whether loss and quality part, and what goes with it: value is `shift`, `overfitting`, `style` (joined by +),
    `none` if the two do not part, or `not explained`. `table` is the judge's `divergence_table`."""
    id, text = f"divergence.{judge.name}", f"Why loss and the score of {judge.label} part is not known"
    configs = results.paired_draws(study, judge)[0].columns
    if len(configs) < FEWEST:
        return not_estimable(id, text, f"{len(configs)} configurations are too few", len(configs))
    rows = {str(row["name"]): row for _, row in table.iterrows()}
    shown, val = shown_explanations(table), rows["val_loss"]
    together = Interval(val["value"], val["low"], val["high"]).is_below() and val["p"] < 0.05
    sets = [
        f"{_number(rows[column])} for the {word} loss" for column, word in SETS.items() if not rows[column]["reason"]
    ]
    tests = [f"{word}: {_said(rows[name], key in shown)}" for key, name, word in (
        ("shift", "shift", "Shift of distribution"), ("overfitting", "overfitting", "Overfitting"),
        ("style", "style instead of content", "Style instead of content"))]  # fmt: skip
    if shown:
        value, end = "+".join(shown), f"Where loss and score part, it goes with {name_list([WORDS[s] for s in shown])}"
    elif together:
        value, end = "none", "Loss and score do not part: a lower loss goes with a better score"
    else:
        value, end = "not explained", "None of these is shown to go with where loss and score part"
    said = f"tau-b with the score of {judge.label} is {name_list(sets) or 'not known'}. {'. '.join(tests)}. {end}; "
    said += f"these are associations over {len(configs)} configurations, not causes."
    blocked = blockable(
        id, said, MISSING, len(configs), "supported" if shown or together else "not distinguishable", judge
    )
    return Finding(id, said, value, n=blocked.n, verdict=blocked.verdict, blocked_by=blocked.blocked_by)


def _number(row: pd.Series) -> str:
    return f"{row['value']:+.2f} {interval_text(row['low'], row['high'], '+.2f')}"


def _said(row: pd.Series, shown: bool) -> str:
    if row["reason"]:
        return f"not known ({row['reason']})"
    return f"{'shown' if shown else 'not shown'} ({row['measure']}: {_number(row)}, {p_text(row['p'])})"
