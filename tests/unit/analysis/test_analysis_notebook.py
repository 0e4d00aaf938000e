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


@pytest.mark.parametrize(
    ("n", "judges", "repeats"),
    [(2, ("checklist",), 0), (5, ("checklist", "embedding", "third"), 1), (24, ("embedding",), 2)],
)
def test_06_runs_for_any_number_of_configurations_and_judges(tmp_path, monkeypatch, n, judges, repeats):
    root = fake_study.build_study(tmp_path, n, judges, repeats)
    folder = fake_study.run_analysis(root, n, judges, repeats, monkeypatch)
    results = pd.read_csv(root / "results.csv")
    assert list(results.columns) == result_columns(judges)
    assert len(results) == n
    assert json.loads((root / "findings.json").read_text())
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    pairs = pd.read_parquet(folder / "tables" / "row_pairs.parquet")
    assert len(pairs) == len(judges) * len(one_factor_pairs(fake_study.design(n)))
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
