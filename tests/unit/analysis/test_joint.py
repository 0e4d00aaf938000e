"""The judges read together: copies count once, independent ones each, and the score is the mean of what they say."""

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge

from telco_nb.analysis.joint import effective_number, panel_text, panel_weights, read_together, verdict_table


def comparisons(noise, n=400, seed=0, truth_seed=9):
    """Verdicts on the same questions: the true lead of a pair on a prompt plus this judge's noise."""
    plan, rng = np.random.default_rng(truth_seed), np.random.default_rng(seed)
    pairs = [plan.choice(["c01", "c02", "c03"], 2, replace=False) for _ in range(n)]
    skill = {"c01": 0.5, "c02": 0.0, "c03": -0.5}
    lead = np.array([skill[a] - skill[b] for a, b in pairs]) + plan.normal(0, 1, n) + rng.normal(0, noise, n)
    table = pd.DataFrame(pairs, columns=["config_first", "config_second"])
    verdict = np.where(lead > 0.2, "A", np.where(lead < -0.2, "B", "tie"))
    return table.assign(prompt_id=[f"p{i}" for i in range(n)], purpose="ranking", verdict=verdict)


def equicorrelated(k, r):
    return pd.DataFrame(np.full((k, k), r) + (1 - r) * np.eye(k), index=range(k), columns=range(k))


@pytest.mark.parametrize(("k", "r", "expected"), [(3, 0.0, 3.0), (3, 1.0, 1.0), (4, 0.5, 1.6), (2, -0.3, 2.0)])
def test_the_effective_number_is_that_of_equally_correlated_judges(k, r, expected):
    assert effective_number(equicorrelated(k, r)) == pytest.approx(expected)  # k / (1 + (k - 1) r)


def test_two_copies_and_one_other_weigh_as_two():
    r = pd.DataFrame([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]], index=list("abc"), columns=list("abc"))
    assert panel_weights(r).tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert effective_number(r) == pytest.approx(9 / 5)


def test_exchanged_seats_give_the_same_verdicts_and_a_name_cannot_be_taken_for_a_tie():
    rows = comparisons(0.5)
    swapped = rows.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    swapped["verdict"] = swapped["verdict"].map({"A": "B", "B": "A", "tie": "tie"})
    table = verdict_table({"a": rows, "b": swapped})
    assert table["a"].tolist() == table["b"].tolist()
    named = rows.replace({"config_first": {"c01": "tie"}, "config_second": {"c01": "tie"}})
    assert sorted(verdict_table({"a": named})["a"].abs()) == sorted(table["a"].abs())


def test_noisy_judges_amount_to_more_than_one_and_copies_to_one():
    judges = [make_judge(pd.Series({"c01": 0.5, "c02": 0.1, "c03": -0.6}), 0.1, name) for name in ("one", "two")]
    same = read_together(judges, {"one": comparisons(0.5), "two": comparisons(0.5)})
    differ = read_together(judges, {"one": comparisons(2.0, seed=1), "two": comparisons(2.0, seed=2)})
    assert same.effective == pytest.approx(1) and 1.3 < differ.effective <= 2
    assert differ.table.index[0] == "c01" and differ.table.loc["c01", "low"] < 0.5 < differ.table.loc["c01", "high"]
    assert differ.table["score"].sum() == pytest.approx(0, abs=1e-9)
    assert "2 judges amount to **1.0 independent ones**" in panel_text(same)


def test_judges_that_disagree_have_a_wider_joint_interval():
    score = pd.Series({"c01": 1.0, "c02": 0.0, "c03": -1.0})
    rows = {"one": comparisons(1, seed=1), "two": comparisons(1, seed=2)}
    alike, apart = (
        read_together([make_judge(score, 0.1, "one"), make_judge(factor * score, 0.1, "two")], rows).table
        for factor in (1, -1)
    )
    width = [(table["high"] - table["low"]).mean() for table in (alike, apart)]
    assert width[1] > 3 * width[0] and apart["spread"].max() > 1


def test_one_judge_or_too_few_shared_comparisons_are_no_panel():
    judges = [make_judge(pd.Series({"c01": 0.5, "c02": -0.5}), 0.1, name) for name in ("one", "two")]
    assert read_together(judges[:1], {"one": comparisons(1)}) is None
    assert "nothing to read together" in panel_text(None)
    few = read_together(judges, {"one": comparisons(1).head(9), "two": comparisons(1).head(9)})
    assert np.isnan(few.effective) and few.weights.tolist() == [0.5, 0.5]
    assert "not known" in panel_text(few)
