"""Why loss and judged quality part: five explanations, each a statement of its own, and one sentence over all.

A shift of distribution, overfitting and style are differences of rank correlations that they would move. Knowledge and
forgetting are measured without a judge: what a model chooses by likelihood between texts of the cards, and how much
more general texts surprise it than they surprise the untuned model. Each is tested by relabelled factors, and the p are
adjusted over the explanations of one judge (`inference.step_down_p`). What is shown is an association over the
configurations of one design, not a cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis.divergence import (
    CONSTANT,
    FEWEST,
    Compared,
    Side,
    absent_text,
    compared,
    configs_of,
    relabellings_of,
    sides_of,
)
from telco_nb.analysis.inference import partial_tau_rows, step_down_p
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.statements import Finding, blockable, counted, name_list, not_estimable, p_text, some_of
from telco_nb.analysis.statistics import (
    Interval,
    cluster_weights,
    least_choices,
    percentile_interval,
    ratio_draws,
    share_interval,
    share_text,
    tau_rows,
)
from telco_nb.judge.ranking import interval_text

UNTUNED = "untuned"
LESS_SURPRISED = "less surprised than the untuned model"


def _difference(a: np.ndarray, b: np.ndarray, other: np.ndarray) -> np.ndarray:
    return tau_rows(a, other) - tau_rows(b, other)


def _at_equal_loss(a: np.ndarray, loss: np.ndarray, score: np.ndarray) -> np.ndarray:
    return partial_tau_rows(a, score, loss)


class Explanation(NamedTuple):
    """An explanation of why loss and quality part, and the measure that it would move away from 0."""

    name: str  # at the start of a sentence
    measure: str
    compare: Callable[..., np.ndarray]
    sides: tuple[str, ...]  # of the measure, in its order
    below: str  # what a value below 0 says of the configurations
    above: str


_EQUAL = "configurations that {} are judged {} at equal validation loss"
EXPLANATIONS = {
    "shift": Explanation(
        "A shift of distribution",
        "tau with test loss less tau with validation loss",
        _difference,
        ("test_loss", "val_loss", "score"),
        "a lower test loss goes with better answers, more so than a lower validation loss does",
        "a lower test loss goes with better answers less than a lower validation loss does",
    ),
    "overfitting": Explanation(
        "Overfitting",
        "partial tau of the gap (validation less training loss) and score",
        _at_equal_loss,
        ("gap", "val_loss", "score"),
        _EQUAL.format("have a larger gap between training and validation loss", "worse"),
        _EQUAL.format("have a larger gap between training and validation loss", "better"),
    ),
    "style": Explanation(
        "Style instead of content",
        "tau of validation loss with style less that with content",
        _difference,
        ("style", "content", "val_loss"),
        "a lower validation loss goes with better style, more so than with better content",
        "a lower validation loss goes with better style less than with better content",
    ),
    "knowledge": Explanation(
        "Knowledge",
        "partial tau of right choices about the cards and score",
        _at_equal_loss,
        ("card_choice", "val_loss", "score"),
        _EQUAL.format("choose rightly about the cards more often", "worse"),
        _EQUAL.format("choose rightly about the cards more often", "better"),
    ),
    "forgetting": Explanation(
        "Forgetting",
        "partial tau of the loss on general texts and score",
        _at_equal_loss,
        ("forgetting", "val_loss", "score"),
        _EQUAL.format("lose more on general texts", "worse"),
        _EQUAL.format("lose more on general texts", "better"),
    ),
}
MEASURED = {"knowledge": "Right choices about the cards", "forgetting": "Nats per token lost on general texts"}


class Measure(NamedTuple):
    """Columns value, low, high and n per configuration (and the untuned model), and paired draws (draws, the same)."""

    table: pd.DataFrame
    draws: pd.DataFrame


class Told(NamedTuple):
    """What is known of one explanation with one judge: its measure, the adjusted p, and why there are no numbers."""

    found: Compared | None = None
    p: float = math.nan
    shown: bool = False
    reason: str = ""


def card_choice(choices: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> Measure:
    """The share of right choices about the cards; whole terms are drawn, the same for all.

    Args:
        choices: by configuration and `untuned`, columns item_id, kind, term_id and right, as 04 writes them.
        n_draws, seed: of the bootstrap.

    Returns:
        Value and bounds are those of `share_interval`, as in 04: missing with too few choices.
    """
    of_cards = {name: table[table["kind"] != "general"].assign(sum=table["right"]) for name, table in choices.items()}
    found = _means(of_cards, "term_id", n_draws, seed)
    for name, table in of_cards.items():
        found.table.loc[name, ["value", "low", "high"]] = list(share_interval(table["right"], table["term_id"], seed))
    return Measure(found.table.assign(right={name: int(table["right"].sum()) for name, table in of_cards.items()}),
                   found.draws)  # fmt: skip


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
    counts = some_of(len(more), len(rows), "configuration", "is", "are")
    return (
        f"{counts[0].upper()}{counts[1:]} more surprised by general texts than the untuned model "
        f"({surely[1] or 'none'} of them surely), {len(less) or 'none'} {'are' if len(less) > 1 else 'is'} "
        f"{LESS_SURPRISED} ({surely[0] or 'none'} surely)."
    )


def _means(tables: Mapping[str, pd.DataFrame], cluster: str, n_draws: int, seed: int) -> Measure:
    """The mean of column `sum` per configuration: value, low, high, n; whole clusters are drawn."""
    clusters = sorted(set().union(*(table[cluster] for table in tables.values())))
    weights = cluster_weights(len(clusters), n_draws, seed) if clusters else np.empty((n_draws, 0))
    rows, draws = {}, {}
    for name, table in tables.items():
        sums = table.groupby(cluster)["sum"].agg(["sum", "size"]).reindex(clusters, fill_value=0).to_numpy(float)
        draws[name] = ratio_draws(weights, *sums.T)
        value = float(table["sum"].mean()) if len(table) else math.nan
        rows[name] = (*percentile_interval(value, draws[name], len(clusters)), len(table))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])
    return Measure(table.rename_axis("config"), pd.DataFrame(draws))


def parting_findings(study: StudyResults, measures: Mapping[str, Measure], seed: int = 0) -> list[Finding]:
    """Six statements per judge: one over all explanations, then each of them.

    Args:
        study: the study.
        measures: `card_choice` and `forgetting` by these names; one that is missing was not measured.
        seed: of the bootstrap of the checks and of sampled relabellings.
    """
    found = []
    for judge in study.judges:
        told, n = explanations(study, judge, measures, seed), len(configs_of(study, judge))
        found.append(_summary(judge, told, n))
        found += [_finding(judge, name, told, measures, n) for name in told]
    return found


def explanations(
    study: StudyResults, judge: JudgeResults, measures: Mapping[str, Measure], seed: int = 0
) -> dict[str, Told]:
    """What is known of each explanation, by the names of EXPLANATIONS. The arguments are as for `parting_findings`."""
    configs = configs_of(study, judge)
    if len(configs) < FEWEST:
        reason = f"rank correlations need {FEWEST} configurations, and {len(configs)} can be compared"
        return dict.fromkeys(EXPLANATIONS, Told(reason=reason))
    sides = _with_measures(sides_of(study, judge, seed), measures, configs)
    relabelled, found, told = relabellings_of(study, judge, seed), {}, {}
    for name, one in EXPLANATIONS.items():
        reason = _too_few(measures.get(one.sides[0])) or absent_text(one.sides, sides)
        told[name] = Told(reason=reason or CONSTANT)
        if not reason:
            measured = compared(one.compare, one.sides, sides, relabelled, 2.0 if one.compare is _difference else 1.0)
            found |= {name: measured} if measured.interval else {}
    adjusted = step_down_p(np.array([one.relabelled for one in found.values()])) if found else []
    for (name, one), p in zip(found.items(), adjusted, strict=True):
        told[name] = Told(one, float(p), bool(p < 0.05) and _holds(name, one, sides))
    return told


def _with_measures(sides: dict[str, Side], measures: Mapping[str, Measure], configs: list[str]) -> dict[str, Side]:
    """The sides and the measures that every configuration has. Draws are paired by number: all are as many."""
    for name, measure in measures.items():
        if set(configs) <= set(measure.table["value"].dropna().index):
            sides = sides | {name: Side(measure.table.loc[configs, "value"], measure.draws[configs])}
    n_draws = min(len(side.draws) for side in sides.values())
    return {name: Side(side.values, side.draws.iloc[:n_draws]) for name, side in sides.items()}


def _too_few(measure: Measure | None) -> str:
    """That choices are too few to tell a share, in words; empty for another measure, or if they are enough."""
    most = 0 if measure is None or "right" not in measure.table else int(measure.table["n"].max())
    if not most or most >= least_choices():
        return ""
    return f"fewer than {least_choices()} choices about the cards tell no share, and {most} were asked"


def _holds(name: str, found: Compared, sides: Mapping[str, Side]) -> bool:
    """Does the interval of an explanation lie where the explanation puts it?

    A shift: test loss orders the answers, and more than validation loss does. Style: validation loss orders style, and
    content less so and not distinguishably. The others: the interval excludes 0, in whatever direction.
    """
    assert found.interval is not None

    def is_below(*needed: str) -> bool:
        tau = compared(tau_rows, needed, sides, np.arange(len(sides["score"].values))[None, :]).interval
        return tau is not None and tau.is_below()

    if name == "shift":
        return found.interval.is_below() and is_below("test_loss", "score")
    if name == "style":
        return found.interval.is_below() and is_below("val_loss", "style") and not is_below("val_loss", "content")
    return found.interval.excludes()


def _summary(judge: JudgeResults, told: Mapping[str, Told], n: int) -> Finding:
    """One sentence over all explanations: which are shown, which are not, and which cannot be told."""
    id, known = f"parting.all.{judge.name}", [name for name, one in told.items() if one.found]
    if not known:
        reasons = "; ".join(dict.fromkeys(one.reason for one in told.values()))
        return not_estimable(id, f"Why loss and the score of {judge.label} part cannot be told", reasons, n)
    shown = [name for name in known if told[name].shown]
    groups = {
        "shown": [f"{_names([name])} ({_told_direction(name, told[name])})" for name in shown],
        "not shown": [_names([name]) for name in known if name not in shown],
        "not to be told from what was measured": [_names([name]) for name in told if name not in known],
    }
    parts = [
        f"{name_list(names)} {'are' if len(names) > 1 else 'is'} {word}" for word, names in groups.items() if names
    ]
    over = f"adjusted over {counted(len(known), 'explanation')} by Westfall and Young's step-down"
    text = (
        f"Of {len(told)} things that could make loss and the score of {judge.label} part, {'; '.join(parts)} (p by "
        f"relabelled factors, {over}). These are associations over {counted(n, 'configuration')}, not causes."
    )
    verdict = "supported" if shown else "not distinguishable"
    value = "+".join(shown) or "none"
    blocked = blockable(id, text, Interval(math.nan), n, verdict, judge)
    return Finding(id, text, value, n=n, verdict=blocked.verdict, blocked_by=blocked.blocked_by)


def _names(names: list[str]) -> str:
    """The names of explanations within a sentence."""
    return name_list([f"{EXPLANATIONS[name].name[0].lower()}{EXPLANATIONS[name].name[1:]}" for name in names])


def _finding(
    judge: JudgeResults, name: str, told: Mapping[str, Told], measures: Mapping[str, Measure], n: int
) -> Finding:
    """One explanation: shown or not, the direction in words, the numbers, and the extremes of what was measured."""
    one, own, extremes = EXPLANATIONS[name], told[name], _extremes(name, measures)
    id, tested = f"parting.{name}.{judge.name}", sum(other.found is not None for other in told.values())
    if own.found is None or own.found.interval is None:
        found = not_estimable(id, f"{one.name} cannot be told with {judge.label}", own.reason, n)
        return replace(found, statement=found.statement + extremes)
    tau = own.found.interval
    text = (
        f"{one.name} as a reason is {'shown' if own.shown else 'not shown'} with {judge.label}: "
        f"{_direction(one, own, tau)} "
        f"({one.measure} {tau.value:+.2f} {interval_text(*tau[1:], '+.2f')}, {p_text(own.p)} by relabelled factors, "
        f"adjusted over {counted(tested, 'explanation')}).{extremes}"
    )
    return blockable(id, text, tau, n, "supported" if own.shown else "not distinguishable", judge)


def _told_direction(name: str, own: Told) -> str:
    assert own.found is not None and own.found.interval is not None  # only what was measured is shown
    return _direction(EXPLANATIONS[name], own, own.found.interval)


def _direction(one: Explanation, own: Told, tau: Interval) -> str:
    """What the configurations are like, in words, and whether that may be chance."""
    if tau.value == 0:
        return "it leans neither way"
    words = one.below if tau.value < 0 else one.above
    if own.shown:
        return words
    if own.p >= 0.05 or not tau.excludes():
        return f"it may be chance that {words}"
    against = tau.value > 0 and one.name in (EXPLANATIONS["shift"].name, EXPLANATIONS["style"].name)
    return f"{words}, which {'speaks against it' if against else 'alone does not show it'}"


def _extremes(name: str, measures: Mapping[str, Measure]) -> str:
    """The highest and the lowest configuration, and the untuned model, of a measure that needs no judge."""
    measure = measures.get(EXPLANATIONS[name].sides[0])
    if measure is None:
        return ""
    table = measure.table[measure.table["n"] > 0]
    order = (
        (table["right"] / table["n"] if "right" in table else table["value"]).drop(UNTUNED, errors="ignore").dropna()
    )
    if order.empty:
        return ""
    named = {f"most {order.idxmax()}": order.idxmax(), f"least {order.idxmin()}": order.idxmin()}
    named |= {"the untuned model": UNTUNED} if UNTUNED in table.index else {}
    parts = [f"{who} {_measured_text(table.loc[config])}" for who, config in named.items()]
    return f" {MEASURED[name]}: {', '.join(parts)}; extremes are picked after the fact."


def _measured_text(row: pd.Series) -> str:
    """Right choices of all with their share, or nats per token."""
    interval = Interval(*row[["value", "low", "high"]])
    if "right" in row:
        right, n = int(row["right"]), int(row["n"])
        return f"{right} of {n}" if math.isnan(interval.value) else share_text(right, n, interval)
    less = f" ({LESS_SURPRISED})" if interval.value < 0 else ""
    return f"{interval.value:+.3f} {interval_text(*interval[1:], '+.3f')}{less}"
