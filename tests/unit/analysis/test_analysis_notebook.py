"""The figures, and 06_analysis itself for any number of configurations and judges."""

from __future__ import annotations

import json
import math

import fake_study
import matplotlib
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import charts
from telco_nb.analysis.results import (
    result_columns,
)
from telco_nb.analysis.rows import one_factor_pairs
from telco_nb.analysis.statistics import kendall_tau

matplotlib.use("Agg")


def test_spread_keeps_order_and_distance():
    values = [0.0, 0.01, 0.02, 5.0]
    placed = charts.spread(values, 1.0)
    assert (np.diff(placed) >= 1.0 - 1e-9).all()
    assert placed[3] == pytest.approx(5.0)
    assert placed[:3].mean() == pytest.approx(0.01)


def test_a_component_without_a_meter_gets_no_bar_of_zero():
    wide = charts.energy_by_component(fake_study.energy_table("train", 1.0).assign(config="c01"), ["c01", "c02"])
    assert wide.loc["c01", "cpu_wh"] == pytest.approx(1.0)
    assert math.isnan(wide.loc["c01", "gpu_wh"])
    assert wide.loc["c02"].isna().all()
    assert charts.kinds_text(wide) == "estimated"


def placed() -> pd.DataFrame:
    """Two configurations and an anchor, each open on a side or bounded far outside the others."""
    rows = [
        ("c01", 1.0, -0.5, np.nan, False),
        ("c02", -1.0, np.nan, -0.4, False),
        ("reference", 9.0, 0.9, np.nan, True),
        ("nearest", 1.4, -0.6, 14.3, True),
        ("echo", 0.0, np.nan, np.nan, True),
    ]
    table = pd.DataFrame(rows, columns=["config", "score", "low", "high", "is_anchor"])
    return table.assign(rank=[1, 2, pd.NA, pd.NA, pd.NA], rank_low=pd.NA, rank_high=pd.NA)


def arrows(ax):
    """(row, side of the rim) of every arrow."""
    shown = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    return {(text.xyann[1], text.xy[0]) for text in shown}


def test_every_score_and_bound_lies_inside_the_ranking_figure_with_open_sides_drawn_as_arrows_to_the_rim():
    table = placed()
    ax = charts.ranking_intervals(table, "scores").axes[0]
    left, right = ax.get_xlim()
    known = table[["score", "low", "high"]].stack()
    assert left < known.min() and known.max() < right
    order = list(table.sort_values("score")["config"])
    drawn = {x: y for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn[9.0] == order.index("reference")  # where its score is, not at the rim
    sides = {("c01", 1.0), ("c02", 0.0), ("reference", 1.0)}
    assert arrows(ax) == {(order.index(config), side) for config, side in sides}  # none for echo: nothing is known
    assert {text.get_text() for text in ax.texts} >= {"rank 1", "rank 2", "anchor"}


def test_a_whisker_reaches_each_known_bound_and_an_open_side_has_none():
    ax = matplotlib.pyplot.subplots()[1]
    charts.draw_intervals(ax, [1.0, 2.0, 3.0], [0, 1, 2], [0.5, np.nan, np.nan], [1.5, 2.5, np.nan], "y")
    ends = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert ends == [[0.5, 1.5], [2.0, 2.5], [3.0, 3.0]]
    (arrow,) = [text for text in ax.texts if text.arrow_patch is not None]
    assert arrow.xy == (1, 0.0) and arrow.xyann == (1, 2.0)  # from the point straight down to the rim


@pytest.mark.parametrize(
    ("n", "judges", "repeats"),
    [
        (2, ("checklist",), 0),
        (5, ("checklist", "embedding", "third"), 1),
        pytest.param(24, ("embedding",), 2, marks=pytest.mark.nightly),
    ],
)
def test_06_runs_for_any_number_of_configurations_and_judges(tmp_path, monkeypatch, n, judges, repeats):
    root = fake_study.build_study(tmp_path, n, judges, repeats)
    maps, draw = [], charts.tau_map
    monkeypatch.setattr(charts, "tau_map", lambda ax, taus: (maps.append(taus), draw(ax, taus)))
    folder = fake_study.run_analysis(root, n, judges, repeats, monkeypatch)
    results = pd.read_csv(root / "results.csv")
    assert list(results.columns) == result_columns(judges)
    assert len(results) == n
    assert json.loads((root / "findings.json").read_text())
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    pairs = pd.read_parquet(folder / "tables" / "row_pairs.parquet")
    assert len(pairs) == len(judges) * len(one_factor_pairs(fake_study.design(n)))
    assert len(maps) == (len(judges) > 1)  # with one judge there is no second ordering to compare
    for taus in maps:  # a judge that puts the lowest losses first agrees with the loss: +, not -
        loss, score = -results.set_index("config")["val_loss"], results.set_index("config")["checklist_score"]
        assert taus.loc["lowest loss first", "checklist"] == pytest.approx(kendall_tau(loss, score))
    assert {"loss_vs_quality", "rank_slopes", "judge_agreement", "energy_quality", "energy", "loss_curves"} <= figures


def test_06_runs_with_a_judge_that_was_stopped_before_it_ranked_anything(tmp_path, monkeypatch):
    root = fake_study.build_study(tmp_path, 5, ("checklist",), 1)
    builder, planted = fake_study.Builder(tmp_path), fake_study.truth(fake_study.design(5))["quality"]
    fake_study.add_judge(builder, np.random.default_rng(1), "silent", planted * np.nan, passed=False)
    fake_study.run_analysis(root, 5, ("checklist", "silent"), 1, monkeypatch)
    results = pd.read_csv(root / "results.csv")
    assert results["silent_score"].isna().all() and (results["silent_gate"] == "failed").all()
    assert results["checklist_score"].notna().all()
    told = {row["id"]: row for row in json.loads((root / "findings.json").read_text())}
    assert told["tau.silent"]["value"] is None and told["tau.checklist"]["value"] is not None
    gate = pd.read_csv(root / "study" / "06_analysis" / "tables" / "gate.csv")
    assert gate["silent"].str.contains("FAILED").all()
