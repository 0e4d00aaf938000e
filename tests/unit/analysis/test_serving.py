"""What a million answers cost, against values worked out by hand."""

import math

import pytest

from telco_nb.analysis.serving import Rates, million_answers, serving_finding

RATES = Rates(usd_per_kwh=0.25, carbon_g_per_kwh=400, carbon_source="a grid, 2022")
ONE = "answer_energy{}_per_answer_wh"


def answering(wh: float | None = 0.02, kind: str = "estimated") -> dict:
    ends = {"": wh, "_low": wh and wh / 2, "_high": wh and wh * 2}
    return {"c01": {ONE.format(end): value for end, value in ends.items()} | {"energy_kind": kind}}


def training(kind: str = "estimated") -> dict:
    return {"c01": {"train_energy_wh": 3.0, "energy_kind": kind}}


def test_a_million_answers_agree_with_values_worked_out_by_hand():
    row = million_answers(answering(), training(), RATES).loc["c01"]
    answers = {"kwh": 20, "kwh_low": 10, "kwh_high": 40, "usd": 5, "co2e_kg": 8}
    assert row.drop("energy_kind").to_dict() == pytest.approx(
        answers | {"break_even_answers": 150, "train_co2e_g": 1.2, "pue": 1.0}
    )


def test_the_overhead_of_a_site_is_in_money_and_carbon_and_in_no_energy():
    rates = RATES._replace(pue=1.5)
    table = million_answers(answering(), training(), rates)
    one = million_answers(answering(), training(), RATES).loc["c01"].drop("energy_kind")
    ratios = table.loc["c01"].drop("energy_kind") / one
    more = {"usd", "co2e_kg", "train_co2e_g", "pue"}
    assert ratios.to_dict() == pytest.approx({name: 1.5 if name in more else 1.0 for name in ratios.index})
    assert (
        "at 400 g a kWh (a grid, 2022) and a PUE of 1.5, on this machine"
        in serving_finding(table, "c01", rates).statement
    )


def test_a_configuration_that_was_not_trained_has_no_break_even():
    table = million_answers({"untuned": answering()["c01"]}, {}, RATES)
    assert table.loc["untuned", "kwh"] == pytest.approx(20)
    assert table.loc["untuned", ["break_even_answers", "train_co2e_g"]].isna().all()


@pytest.mark.parametrize("wh", [None, 0.0])
def test_energy_that_is_missing_or_none_never_becomes_a_division(wh):
    row = million_answers(answering(wh), training(), RATES).loc["c01"]
    assert math.isnan(row["break_even_answers"]) and (math.isnan(row["kwh"]) if wh is None else row["kwh"] == 0)


def test_the_finding_says_price_carbon_kind_and_break_even():
    found = serving_finding(million_answers(answering(), training(), RATES), "c01", RATES)
    assert found.statement == (
        "A million answers of c01 take 20 kWh [10, 40] (estimated): 5 USD of electricity at 0.25 USD a kWh and 8 kg "
        "CO2e at 400 g a kWh (a grid, 2022), on this machine, without idle servers. After 150 answers, answering has "
        "taken more energy than training."
    )
    assert (found.value, found.low, found.high) == pytest.approx((20, 10, 40))


@pytest.mark.parametrize("kind", ["measured", "allocated"])
def test_the_kind_is_that_of_answering_and_kinds_that_differ_have_no_break_even(kind):
    found = serving_finding(million_answers(answering(kind=kind), training("estimated"), RATES), "c01", RATES)
    assert f"[10, 40] ({kind})" in found.statement and "estimated" not in found.statement
    assert "more energy than training" not in found.statement
    assert (
        "(energy of unknown kind)"
        in serving_finding(million_answers({"c01": {ONE.format(""): 0.02}}, {}, RATES), "c01", RATES).statement
    )


@pytest.mark.parametrize(("config", "wh"), [(None, 0.02), ("c01", None), ("c09", 0.02)])
def test_without_a_figure_the_finding_gives_the_reason_and_no_number(config, wh):
    found = serving_finding(million_answers(answering(wh), {}, RATES), config, RATES)
    assert found.verdict == "not estimable" and "nan" not in found.statement and found.value is None
