"""How loss and judged quality go together on each test set, and with content and style: rank correlations.

Why they part, if they do, is asked in `parting`. A correlation counts as shown if its interval excludes 0 and the
factors could not bring it about with unrelated directions (`inference.relabelling_p`). That is an association over the
configurations of one design, and no experiment on causes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis import results
from telco_nb.analysis.effects import FACTORS
from telco_nb.analysis.inference import relabelled_values, relabelling_p, relabellings
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, counted, name_list, not_estimable
from telco_nb.analysis.statistics import MISSING, Interval, cluster_weights, hull_interval, ratio_draws, tau_rows
from telco_nb.judge.ranking import interval_text

SETS = {"val_loss": "validation", "test_loss": "test", "noisy_loss": "noisy", "unseen_loss": "unseen"}
JUDGED = ("score", "content", "style")  # sides that judges and checks give: they stay, the others are relabelled
TABLE_COLUMNS = ["name", "measure", "value", "low", "high", "p", "reason"]
CONSTANT = "one side is constant, or in every resample"
FEWEST = 5  # configurations: with fewer no rank correlation can be told from chance


class Side(NamedTuple):
    """A number per configuration and its draws, (draws, configurations)."""

    values: pd.Series
    draws: pd.DataFrame


class Compared(NamedTuple):
    """A measure of sides: its interval (None where one side is constant), and its value under every relabelling."""

    interval: Interval | None
    relabelled: np.ndarray

    @property
    def p(self) -> float:
        """The p by relabelling, NaN without an interval."""
        return math.nan if self.interval is None else relabelling_p(self.relabelled)


def divergence_table(study: StudyResults, judge: JudgeResults, seed: int = 0) -> pd.DataFrame:
    """What loss and quality have to do with each other on each test set, and validation loss with content and style.

    Args:
        study: the study; `set_draws` and `checks` may be missing.
        judge: whose score is the quality.
        seed: of the bootstrap of the checks and of sampled relabellings.

    Returns:
        One row each: name (a loss, content, style), measure, value, low, high, p (by relabelling) and reason (why there
        are no numbers).
    """
    sides, relabelled = sides_of(study, judge, seed), relabellings_of(study, judge, seed)
    rows = []
    for name, measure, needed in _measures():
        if reason := absent_text(needed, sides):
            rows.append((name, measure, *MISSING, math.nan, reason))
            continue
        found = compared(tau_rows, needed, sides, relabelled)
        rows.append((name, measure, *(found.interval or MISSING), found.p, "" if found.interval else CONSTANT))
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def divergence_tables(study: StudyResults, seed: int = 0) -> pd.DataFrame:
    """The `divergence_table` of every judge that has ranked at least FEWEST configurations, with a column judge."""
    judges = [judge for judge in study.judges if len(configs_of(study, judge)) >= FEWEST]
    tables = [divergence_table(study, judge, seed).assign(judge=judge.label) for judge in judges]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["judge", *TABLE_COLUMNS])


def _measures() -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Name, measure in words, and the two sides."""
    for column, word in SETS.items():
        yield column, f"tau of {word} loss and score", (column, "score")
    for kind in ("content", "style"):
        yield kind, f"tau of validation loss and {kind}", ("val_loss", kind)


def configs_of(study: StudyResults, judge: JudgeResults) -> list[str]:
    """The configurations that have a loss, a score and draws of both."""
    return list(results.paired_draws(study, judge)[0].columns)


def relabellings_of(study: StudyResults, judge: JudgeResults, seed: int) -> np.ndarray:
    """The relabellings of the configurations that a judge has ranked, (relabellings, configurations)."""
    return relabellings(study.results.loc[configs_of(study, judge), list(FACTORS)], seed)


def absent_text(needed: Sequence[str], sides: Mapping[str, Side]) -> str:
    """Which of the needed sides are missing, in words; empty if none is."""
    absent = name_list([side.replace("_", " ") for side in needed if side not in sides])
    return f"{absent} not known for every configuration" if absent else ""


def compared(
    compare: Callable[..., np.ndarray],
    needed: Sequence[str],
    sides: Mapping[str, Side],
    relabelled: np.ndarray,
    most: float = 1.0,
) -> Compared:
    """A measure with its interval over paired draws, and its values under relabelling.

    Args:
        compare: the measure, a function of sides row by row.
        needed: the names of its sides, in its order. Those in JUDGED stay, the others are relabelled together.
        sides: the sides by name.
        relabelled: from `inference.relabellings`.
        most: how far from 0 the measure can lie.
    """
    own = [sides[name] for name in needed]
    value = float(compare(*(side.values.to_numpy(float)[None, :] for side in own))[0])
    interval = hull_interval(value, compare(*(side.draws.to_numpy(float) for side in own)), most=most)
    moved = [name not in JUDGED for name in needed]
    return Compared(interval, relabelled_values(compare, relabelled, [side.values for side in own], moved))


def sides_of(study: StudyResults, judge: JudgeResults, seed: int) -> dict[str, Side]:
    """The sides that are known for every configuration: score, losses, gap, content and style.

    Args:
        study: the study; `gap` is the validation loss less the training loss at the end.
        judge: whose score it is.
        seed: of the bootstrap of the checks.
    """
    losses, draws = results.paired_draws(study, judge)
    configs = list(losses.columns)
    sides = {"score": Side(judge.scores[configs], draws)} | dict(_loss_sides(study, configs, losses))
    return sides | _check_sides(study, configs, len(losses), seed)


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
        drawn = ratio_draws(cluster_weights(len(sums), n_draws, seed), sums.to_numpy(), sizes.to_numpy())
        sides[column] = Side(own.groupby("config")[column].mean()[configs], pd.DataFrame(drawn, columns=configs))
    return sides


def divergence_finding(study: StudyResults, judge: JudgeResults, table: pd.DataFrame) -> Finding:
    """Whether loss and quality part: value is `together`, `apart` (a lower validation loss goes with a worse score) or
    `not shown`. `table` is the judge's `divergence_table`."""
    id, text = f"divergence.{judge.name}", f"Whether loss and the score of {judge.label} part is not known"
    n, rows = len(configs_of(study, judge)), {str(row["name"]): row for _, row in table.iterrows()}
    if n < FEWEST:
        return not_estimable(id, text, f"rank correlations need {FEWEST} configurations, and {n} can be compared", n)
    val = rows["val_loss"]
    tau, shown = Interval(val["value"], val["low"], val["high"]), val["p"] < 0.05
    value, end = "not shown", "That a lower validation loss goes with a better score is not shown"
    if shown and tau.is_below():
        value, end = "together", "A lower validation loss goes with a better score: the two do not part"
    elif shown and tau.is_above():
        value, end = "apart", "A lower validation loss goes with a worse score: the two part"
    sets = [
        f"{row['value']:+.2f} {interval_text(row['low'], row['high'], '+.2f')} for the {word} loss"
        for column, word in SETS.items()
        if not (row := rows[column])["reason"]
    ]
    said = f"Over {counted(n, 'configuration')} tau-b with the score of {judge.label} is "
    said += f"{name_list(sets) or 'not known'} (below 0: a lower loss goes with a better score). {end}."
    verdict = "not distinguishable" if value == "not shown" else "supported"
    blocked = blockable(id, said, MISSING, n, verdict, judge)
    return Finding(id, said, value, n=n, verdict=blocked.verdict, blocked_by=blocked.blocked_by)
