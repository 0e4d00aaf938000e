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
from telco_nb.analysis.parting import EXPLANATIONS, Measure, explanations, parting_findings
from telco_nb.analysis.results import StudyResults


def choices(rng: np.random.Generator, share: float, terms: int = 20, per_term: int = 5) -> pd.DataFrame:
    """Items about cards whose terms are easier or harder, and general ones that are always wrong."""
    level = np.clip(share + rng.uniform(-0.2, 0.2, terms), 0, 1)
    right = rng.random((terms, per_term)) < level[:, None]
    rows = [(f"i{t}.{k}", "problem", f"t{t:02d}", bool(right[t, k])) for t in range(terms) for k in range(per_term)]
    rows += [(f"g{k}", "general", "letters", False) for k in range(9)]
    return pd.DataFrame(rows, columns=["item_id", "kind", "term_id", "right"])


def told(study: StudyResults, **measures: Measure) -> dict:
    return {f.id: f for f in parting_findings(study, measures)}


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


def test_too_few_choices_give_counts_and_no_share_and_the_least_number_is_where_an_interval_spans_half_of_all():
    width = {n: max(np.subtract(*statistics.exact_bounds(k, n)[::-1]) for k in range(n + 1)) for n in (16, 17)}
    assert statistics.least_choices() == 17 and width[17] < 0.5 < width[16]
    rng = np.random.default_rng(4)
    few = {c: choices(rng, 0.6, terms=2, per_term=3) for c in (*DESIGN.index, "untuned")}
    measure = parting.card_choice(few, 100, 1)
    assert measure.table[["value", "low", "high"]].isna().all(axis=None)
    found = told(measured(rng), card_choice=measure)["parting.knowledge.checklist"]
    assert found.verdict == "not estimable" and found.value is None
    assert "fewer than 17 choices about the cards tell no share, and 6 were asked" in found.statement
    assert f"the untuned model {few['untuned']['right'].sum()} of 6; extremes" in found.statement
    enough = statistics.share_interval(pd.Series([True] * 20), pd.Series(range(20)), 1)
    assert statistics.share_text(20, 20, enough) == "20 of 20 (100% [83%, 100%])"


def test_a_share_of_a_draw_without_items_is_missing_and_not_0():
    drawn = statistics.ratio_draws(np.array([[2, 0], [0, 2], [1, 1]]), np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert drawn.tolist()[::2] == [0.5, 0.5] and np.isnan(drawn[1])


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
    column = EXPLANATIONS[reason].sides[0]
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
    assert list(found) == [f"parting.{reason}.checklist" for reason in ("all", *EXPLANATIONS)]
    alone = [found[f"parting.{reason}.checklist"] for reason in EXPLANATIONS]
    assert all(f.low <= f.value <= f.high and f.verdict == "not distinguishable" and f.n == 16 for f in alone)
    assert all("adjusted over 5 explanations" in f.statement for f in alone)
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
    assert "need 5 configurations, and 3 can be compared" in told(few)["parting.all.checklist"].statement
    empty = parting.forgetting({"untuned": pd.DataFrame({"text_id": [], "loss": []}), **{
        c: pd.DataFrame({"text_id": [], "loss": []}) for c in DESIGN.index}}, 50, 1)  # fmt: skip
    assert told(study, forgetting=empty)["parting.forgetting.checklist"].verdict == "not estimable"


def test_a_configuration_that_general_texts_surprise_less_is_called_that_and_not_a_loss_below_0():
    table = pd.DataFrame({"value": [-0.2, -0.1, 0.3], "low": [-0.3, -0.2, 0.1], "high": [-0.1, 0.1, 0.5], "n": 6})
    said = parting.forgetting_text(Measure(table, pd.DataFrame()))
    assert "1 of 3 configurations is more surprised" in said and "(1 of them surely)" in said
    assert "2 are less surprised than the untuned model (1 surely)" in said


@pytest.mark.parametrize(("sign", "word"), [(1, "better"), (-1, "worse")])
def test_a_statement_says_in_words_which_configurations_are_judged_better(sign, word):
    """Planted both ways, and shown: the words follow the sign of the number."""
    rng = np.random.default_rng(3)
    val, lost = (driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3) for _ in range(2))
    study = measured(rng, val=val, score=sign * 2 * lost - val)
    finding = told(study, forgetting=of(rng, lost))["parting.forgetting.checklist"]
    assert np.sign(finding.value) == sign
    assert f"configurations that lose more on general texts are judged {word}" in finding.statement
    assert ("it may be chance" in finding.statement) == (finding.verdict != "supported")


def test_the_words_of_a_shift_and_of_style_follow_the_sign_too():
    rng = np.random.default_rng(5)
    val = driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3)
    less = told(measured(rng, val=val, test=-val, score=-val))["parting.shift.checklist"]
    more = told(measured(rng, val=val, test=-val, score=val))["parting.shift.checklist"]
    assert less.value > 0 and "goes with better answers less than a lower validation loss does" in less.statement
    assert more.value < 0 and "more so than a lower validation loss does" in more.statement
    assert less.verdict != "supported", "a test loss that orders answers worse is no shift"
    style = told(measured(rng, val=val, style=-val, content=val))["parting.style.checklist"]
    assert style.value < 0 and "goes with better style, more so than with better content" in style.statement


def test_one_sentence_over_all_names_what_is_shown_and_agrees_with_each_statement():
    rng, seen = np.random.default_rng(3), set()
    for _ in range(8):
        val, other = (driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3) for _ in range(2))
        found = told(measured(rng, val=val, score=2 * other - val), forgetting=of(rng, other))
        summary = found.pop("parting.all.checklist")
        shown = [id.split(".")[1] for id, f in found.items() if f.verdict == "supported"]
        assert summary.value == ("+".join(shown) or "none")
        assert summary.verdict == ("supported" if shown else "not distinguishable")
        assert "knowledge is not to be told from what was measured" in summary.statement
        assert "adjusted over 4 explanations" in summary.statement and "not causes" in summary.statement
        seen |= set(shown)
    assert "forgetting" in seen


def test_an_explanation_is_adjusted_for_the_others_that_were_tested_beside_it():
    rng, grown = np.random.default_rng(6), 0
    for _ in range(10):
        study = measured(rng)
        more = {name: of(rng, driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3)) for name in ("card_choice", "forgetting")}
        bare = dataclasses.replace(study, checks=None, train_losses=None)
        alone, among = explanations(bare, study.judges[0], {}), explanations(study, study.judges[0], more)
        assert [name for name, one in alone.items() if one.found] == ["shift"]
        assert alone["shift"].p == alone["shift"].found.p
        assert all(one.p >= one.found.p for one in among.values())
        grown += among["overfitting"].p > among["overfitting"].found.p
    assert grown >= 8
