"""Why loss and quality part: knowledge and forgetting are found where planted, and each reason is its own statement."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study
from test_divergence import drawn, measured
from test_inference import DESIGN, driven

from telco_nb.analysis import parting, statistics
from telco_nb.analysis.divergence import divergence_tables
from telco_nb.analysis.parting import Measure, parting_findings
from telco_nb.analysis.results import StudyResults

REASONS = ("shift", "overfitting", "style", "knowledge", "forgetting")


def choices(rng: np.random.Generator, share: float, terms: int = 20, per_term: int = 5) -> pd.DataFrame:
    """Items about cards whose terms are easier or harder, and general ones that are always wrong."""
    level = np.clip(share + rng.uniform(-0.2, 0.2, terms), 0, 1)
    right = rng.random((terms, per_term)) < level[:, None]
    rows = [(f"i{t}.{k}", "problem", f"t{t:02d}", bool(right[t, k])) for t in range(terms) for k in range(per_term)]
    rows += [(f"g{k}", "general", "letters", False) for k in range(9)]
    return pd.DataFrame(rows, columns=["item_id", "kind", "term_id", "right"])


def told(study: StudyResults, **measures: Measure) -> dict:
    return {f.id: f for f in parting_findings(study, divergence_tables(study), measures)}


def of(rng: np.random.Generator, values: np.ndarray) -> Measure:
    table = pd.DataFrame({"value": values, "low": values - 0.2, "high": values + 0.2, "n": 30}, index=DESIGN.index)
    return Measure(table, drawn(rng, values, 0.1))


def test_card_choice_leaves_general_items_out_and_its_bounds_cover_the_truth():
    rng, held = np.random.default_rng(1), []
    for _ in range(200):
        found = parting.card_choice({"c01": choices(rng, 0.6)}, 300, 1)
        held.append(found.table.loc["c01", "low"] <= 0.6 <= found.table.loc["c01", "high"])
    assert found.table.loc["c01", "n"] == 100 and 0.93 <= np.mean(held) <= 0.99
    table = choices(rng, 0.6)
    assert parting.card_choice({"c01": table}, 300, 1).table.loc["c01", "value"] == table["right"][:100].mean()


def test_the_interval_of_right_choices_is_the_one_that_04_shows_whatever_is_compared_beside_it():
    rng = np.random.default_rng(2)
    tables = {"c01": choices(rng, 0.6), "untuned": choices(rng, 0.4)}
    own = tables["c01"].query("kind != 'general'")
    shown = statistics.share_interval(own["right"], own["term_id"], 1)
    assert tuple(parting.card_choice(tables, 100, 1).table.loc["c01", ["value", "low", "high"]]) == tuple(shown)


def test_all_choices_right_still_has_an_interval():
    table = choices(np.random.default_rng(1), 0.6).assign(right=True)
    row = parting.card_choice({"c01": table}, 300, 1).table.loc["c01"]
    assert row["value"] == row["high"] == 1 and 0.95 < row["low"] < 0.97  # exact: .025 ** (1 / 100)


def test_forgetting_is_the_loss_beyond_that_of_the_untuned_model_text_by_text():
    texts = [f"g{i}" for i in range(20)]
    base = np.linspace(2, 5, 20)
    noise = np.random.default_rng(1).normal(0, 0.01, 20)
    tables = {name: pd.DataFrame({"text_id": texts, "loss": base + more}) for name, more in
              (("untuned", 0.0), ("c01", 0.3 + noise), ("c02", 0.0))}  # fmt: skip
    found = parting.forgetting(tables, 300, 1)
    assert list(found.table.index) == ["c01", "c02"]
    assert found.table.loc["c01", "value"] == pytest.approx(0.3, abs=0.01) and found.table.loc["c02", "value"] == 0
    row = found.table.loc["c01"]
    assert 0 < row["high"] - row["low"] < 0.02, "paired: how hard a text is drops out"


@pytest.mark.parametrize("reason", ["knowledge", "forgetting"])
def test_a_planted_measure_is_found_and_unrelated_ones_are_not(reason):
    rng, found, false, n = np.random.default_rng(3), 0, 0, 30
    column = parting.MEASURED[reason][1]
    for _ in range(n):
        val, other = (driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3) for _ in range(2))
        study = measured(rng, val=val, score=2 * other - val)
        found += told(study, **{column: of(rng, other)})[f"parting.{reason}.checklist"].verdict == "supported"
        unrelated = of(rng, driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3))
        false += told(study, **{column: unrelated})[f"parting.{reason}.checklist"].verdict == "supported"
    assert found >= 0.3 * n and false <= 0.1 * n


def test_each_reason_is_a_statement_with_its_own_interval():
    rng = np.random.default_rng(1)
    study = measured(rng)
    values = {name: of(rng, driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3)) for name in ("card_choice", "forgetting")}
    found = told(study, **values)
    assert list(found) == [f"parting.{reason}.checklist" for reason in REASONS]
    assert all(f.low <= f.value <= f.high and f.verdict == "not distinguishable" for f in found.values())
    best = values["card_choice"].table["value"].idxmax()
    assert f"most {best}" in found["parting.knowledge.checklist"].statement
    assert "picked after the fact" in found["parting.forgetting.checklist"].statement


def test_what_was_not_measured_has_a_reason_and_no_number():
    study = measured(np.random.default_rng(1))
    found = told(dataclasses.replace(study, checks=None))
    for reason in ("style", "knowledge", "forgetting"):
        finding = found[f"parting.{reason}.checklist"]
        assert finding.verdict == "not estimable" and finding.value is None and "not known" in finding.statement
    few = make_study(3, [make_judge(pd.Series([1.0, 0.0, -1.0], make_study(3).results.index))])
    assert {f.verdict for f in told(few).values()} == {"not estimable"}
    empty = parting.forgetting({"untuned": pd.DataFrame({"text_id": [], "loss": []}), **{
        c: pd.DataFrame({"text_id": [], "loss": []}) for c in DESIGN.index}}, 50, 1)  # fmt: skip
    assert told(study, forgetting=empty)["parting.forgetting.checklist"].verdict == "not estimable"


def test_a_configuration_that_general_texts_surprise_less_is_called_that_and_not_a_loss_below_0():
    table = pd.DataFrame({"value": [-0.2, -0.1, 0.3], "low": [-0.3, -0.2, 0.1], "high": [-0.1, 0.1, 0.5], "n": 6})
    said = parting.forgetting_text(Measure(table, pd.DataFrame()))
    assert "1 of 3 configurations are more surprised" in said and "(1 of them surely)" in said
    assert "2 are less surprised than the untuned model (1 surely)" in said
