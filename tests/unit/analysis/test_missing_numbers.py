"""No sentence holds `nan`, `inf` or `None`: what is missing is said to be missing."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import charts, findings, recommendation, rows
from telco_nb.analysis.claims import primary_finding
from telco_nb.analysis.correction import Correction, correction_text
from telco_nb.analysis.statements import p_text
from telco_nb.analysis.statistics import Interval, hull_interval
from telco_nb.judge.ranking import interval_text

CONFIGS = [f"c{i:02d}" for i in range(1, 9)]
PLANTED = pd.Series(np.linspace(-1, 1, 8), CONFIGS)
NOT_A_NUMBER = re.compile(r"\b(nan|inf|NaT)\b|<NA>|\bNone\b(?! of)")


def all_texts(study):
    found = [primary_finding(study), *findings.all_findings(study)]
    return [f.statement for f in found] + [rows.untuned_text(study), rows.rows_text(study, rows.compare_rows(study))]


def without(judge, column):
    return dataclasses.replace(judge, ranking=judge.ranking.assign(**{column: math.nan}))


def degenerate():
    """Studies in which a number is missing, by what is missing."""
    judge = make_judge(pd.concat([PLANTED, pd.Series({"untuned": -3.0})]), 0.2)
    judge.ranking.loc["untuned", "is_anchor"] = True
    judge.ranking["n_terms"] = 20
    flat = make_judge(PLANTED * 0, 0.0)
    draws = dataclasses.replace(judge, draws=judge.draws * math.nan)
    some = judge.draws.copy()
    some["c03"] = math.nan
    whole = make_study(8, [judge])
    losses = whole.loss_draws * math.nan
    repeats = pd.DataFrame({"config": ["c01", "c01"], "seed": [1, 2], "val_loss": math.nan, "train_energy_wh": 1.0})
    return {
        "nothing": whole,
        "all scores": make_study(8, [without(judge, "score")]),
        "bounds": make_study(8, [without(without(judge, "low"), "high")]),
        "terms": make_study(8, [without(judge, "n_terms")]),
        "resamples": make_study(8, [draws]),
        "resamples of one": make_study(8, [dataclasses.replace(judge, draws=some)]),
        "any difference": make_study(8, [flat]),
        "coverage": make_study(8, [dataclasses.replace(judge, coverage=math.nan)]),
        "one loss": make_study(8, [judge], val_loss=[math.nan, *np.linspace(0.5, 0.7, 7)]),
        "all losses": make_study(8, [judge], val_loss=math.nan),
        "resamples of losses": dataclasses.replace(whole, loss_draws=losses),
        "bounds of losses": make_study(8, [judge], val_loss_low=math.nan, val_loss_high=math.nan),
        "energy": make_study(8, [judge], train_energy_wh=math.nan),
        "bounds of energy": make_study(8, [judge], train_energy_low_wh=math.nan, train_energy_high_wh=math.nan),
        "kind of energy": make_study(8, [judge], energy_kind=None),
        "losses of repeats": dataclasses.replace(whole, repeats=repeats),
        "parameters": make_study(8, [judge], rank=math.nan, learning_rate=math.nan),
        "judges": make_study(8, []),
        "configurations but one": make_study(1, [make_judge(PLANTED.head(1))]),
    }


def test_a_judge_without_all_resamples_carries_no_claim_and_says_why():
    for missing, named in (("resamples of one", "of c03 are"), ("resamples", "of c01, c02, c03")):
        choice = recommendation.recommend(degenerate()[missing])
        assert choice.config is None and named in choice.blocked_by[0]


@pytest.mark.parametrize("missing", list(degenerate()))
def test_no_statement_prints_a_number_that_is_none(missing):
    study = degenerate()[missing]
    wrong = [text for text in all_texts(study) if NOT_A_NUMBER.search(text)]
    assert not wrong, wrong


def test_the_smallest_helpers_say_what_is_missing():
    assert interval_text(math.nan, math.nan) == "(no interval)" and interval_text(None, 1.0) == "[open, +1.00]"
    assert p_text(math.nan) == "p not known"
    assert recommendation.percent(math.nan) == "an unknown share"
    assert recommendation.win_text(Interval(math.nan)) == "an unknown share (no interval)"
    assert recommendation.win_text(Interval(0.0, -1.0)) == "50% [27%, 100%]"
    assert recommendation.win_text(Interval(0.0, math.nan, 1.0)) == "50% [0%, 73%]"


@pytest.mark.parametrize(("value", "draws"), [(math.nan, [0.1, 0.2]), (0.1, [math.nan, math.nan]), (0.1, [])])
def test_an_interval_that_lacks_a_part_is_none_and_no_full_range(value, draws):
    assert hull_interval(value, draws) is None


@pytest.mark.parametrize(
    ("width", "word"),
    [(0.5, "narrower: 0.50 times"), (0.99, "hardly another width"), (1.5, "wider"), (math.nan, "open")],
)
def test_how_much_narrower_votes_become_is_printed_from_the_figures(width, word):
    table = pd.DataFrame({"config": ["a", "b", "c"], "judge_score": [0.0, 1, 2], "score": [0.0, 1, 2], "low": -width,
                          "high": width, "votes_low": -1.0, "votes_high": 1.0})  # fmt: skip
    told = correction_text(Correction("checklist", "ann", table, 0.3, 200, 20))
    assert word in told and not NOT_A_NUMBER.search(told)
    constant = correction_text(Correction("checklist", "ann", table.assign(score=0.0), 0.3, 200, 20))
    assert "not known" in constant and not NOT_A_NUMBER.search(constant)


def test_any_two_columns_ring_what_no_other_beats_and_leave_out_what_is_missing():
    frame = pd.DataFrame({"x": [1.0, 2, 3, None], "y": [1, 3, 2, 9]}, index=["c01", "c02", "c03", "c04"])
    axes = charts.any_two(frame, "x", "y").axes[0]
    assert axes.lines[-1].get_xydata().tolist() == [[1, 1], [2, 3]]
    assert {text.get_text() for text in axes.texts} == {"c01", "c02", "c03"}
    assert charts.any_two(frame.loc[["c04"]], "x", "y").axes[0].lines[:] == []


@pytest.mark.parametrize("y", ["train_energy_wh", "train_joules_per_token", "train_mean_w", "score"])
def test_any_two_columns_ring_nothing_where_energies_are_of_two_kinds(y):
    frame = pd.DataFrame({"x": [1.0, 2, 3], y: [1.0, 3, 2]}, index=["c01", "c02", "c03"])
    for kinds, ringed in ((["measured"] * 3, True), (["measured", "estimated", "measured"], y == "score")):
        axes = charts.any_two(frame.assign(energy_kind=kinds), "x", y).axes[0]
        assert bool(axes.lines[:]) == ringed and ("kinds" in axes.get_title()) != ringed
    mixed = frame.assign(energy_kind=["measured", "estimated", "measured"])
    assert charts.any_two(mixed.loc[["c01", "c03"]], "x", y).axes[0].lines[:], "of those shown"
    missing = mixed.assign(**{y: [1.0, None, 2]})
    assert charts.any_two(missing, "x", y).axes[0].lines[:], "a point that is not drawn has no say"


def test_energies_of_two_kinds_have_no_cheapest():
    bars = pd.DataFrame(
        {"total_wh": [3.0, 1, 2], "low_wh": [2.9, 0.9, 1.9], "high_wh": [3.1, 1.1, 2.1], "cpu_kind": "estimated",
         "gpu_kind": ["measured", "measured", "measured"]}, index=["c01", "c02", "c03"],
    )  # fmt: skip
    assert "(c02, c01) do not overlap" in charts.extremes_text(bars)
    assert "(c02, c01) overlap" in charts.extremes_text(bars.assign(high_wh=3.0))
    mixed = charts.extremes_text(bars.assign(gpu_kind=["measured", None, "measured"]))
    assert "different kinds" in mixed and "c02" not in mixed
    assert charts.extremes_text(bars.iloc[:1]) == ""
