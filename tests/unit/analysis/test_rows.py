"""Comparisons of rows, counts of useless answers, and statements as Markdown."""

import dataclasses
from itertools import combinations

import fake_study
import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import charts, findings, rows
from telco_nb.analysis.effects import FACTORS
from telco_nb.analysis.results import answers_table


@pytest.mark.parametrize("n", [16, 40])
def test_pairs_are_exactly_the_rows_that_differ_in_one_factor(n):
    configs = fake_study.design(n)
    expected = set()
    for a, b in combinations(configs.index, 2):
        different = [factor for factor in FACTORS if configs.loc[a, factor] != configs.loc[b, factor]]
        if len(different) == 1:
            expected.add((different[0], frozenset((a, b))))
    pairs = rows.one_factor_pairs(configs)
    assert {(p.factor, frozenset((p.config_a, p.config_b))) for p in pairs.itertuples()} == expected
    assert len(pairs) == len(expected)
    assert [(p.level_a, p.level_b) for p in pairs.itertuples() if p.config_a == "c01" and p.config_b == "c13"] == [
        ("qv", "all")
    ]


def two_rows(loss: tuple[float, float], score: tuple[float, float]):
    """A study of two configurations that differ in the number of epochs only."""
    configs = ["c01", "c02"]
    levels = {factor: fake_study.design(2).iloc[0][factor] for factor in FACTORS} | {"epochs": [1, 4]}
    study = make_study(2, [make_judge(pd.Series(score, configs), 0.05)], val_loss=loss, **levels)
    drawn = np.array(loss) + np.random.default_rng(0).normal(0, 0.005, (400, 2))
    return dataclasses.replace(study, loss_draws=pd.DataFrame(drawn, columns=configs))


@pytest.mark.parametrize(
    ("loss", "score", "shows"),
    [
        ((0.6, 0.5), (0.0, 1.0), "the lower loss goes with better answers"),
        ((0.6, 0.5), (1.0, 0.0), "the lower loss goes with worse answers"),
        ((0.6, 0.5), (0.5, 0.5), "the loss differs, the answers are not distinguishable"),
        ((0.5, 0.5), (0.0, 1.0), "the answers differ, the loss is not distinguishable"),
        ((0.5, 0.5), (0.5, 0.5), "neither the loss nor the answers are distinguishable"),
    ],
)
def test_a_pair_shows_only_what_its_intervals_support(loss, score, shows):
    study = two_rows(loss, score)
    table = rows.compare_rows(study)
    (row,) = table.to_dict("records")
    assert (row["factor"], row["level_a"], row["level_b"], row["shows"]) == ("epochs", "1", "4", shows)
    assert row["loss_change"] == pytest.approx(loss[1] - loss[0])
    assert row["loss_low"] < row["loss_change"] < row["loss_high"]
    text = rows.rows_text(study, table)
    assert "1. **c01 against c02**: only the number of epochs differs, 1 and 4." in text
    assert f"in 1 {shows}" in text and "rank or learning rate" in text


def test_the_reading_leaves_out_judges_without_a_headline_while_there_is_another():
    planted = fake_study.truth(fake_study.design())["quality"]
    blocked = make_judge(planted, name="bad", headline_blocks=("failed its validity gate (x)",))
    both, alone = make_study(16, [make_judge(planted), blocked]), make_study(16, [blocked])
    assert "bad" not in rows.rows_text(both, rows.compare_rows(both))
    assert "bad, not valid" in rows.rows_text(alone, rows.compare_rows(alone))
    assert set(rows.compare_rows(both)["judge"]) == {"checklist", "bad"}


def test_without_pairs_and_with_many_the_reading_says_so_and_stays_short():
    few, many = make_study(2), make_study(24)
    text = rows.rows_text(few, rows.compare_rows(few))
    assert "target modules, rank, epochs or learning rate" in text and "1." not in text
    comparisons = rows.compare_rows(many)
    text = rows.rows_text(many, comparisons, most=6)
    assert text.count(" against ") == 6  # three factors have pairs, each gets its share
    assert text.count("the number of epochs differs") == text.count("the learning rate differs") == 2
    assert f"Of {len(comparisons)} pairs" in text


def test_configurations_below_the_untuned_model_are_counted_with_those_that_surely_are():
    score = pd.Series({"c01": 1.0, "c02": -0.05, "c03": -1.0, "untuned": 0.0})
    judge = make_judge(score, 0.1)
    judge.ranking.loc["untuned", "is_anchor"] = True
    text = rows.untuned_text(make_study(3, [judge]))
    assert "**2 of 3 configurations score below the untuned model** (c02 and c03); for 1 of them" in text
    assert "has not placed the untuned model" in rows.untuned_text(make_study(3))


def test_useless_answers_are_counted_by_kind():
    table = pd.DataFrame(
        {
            "answer": ["restart the phone " * 8, "", "Please restart the phone and call again."],
            "finish_reason": ["length", "stop", "stop"],
            "n_tokens": [96, 1, 10],
        }
    )
    assert answers_table({"c01": table}).to_dict("records") == [
        {"config": "c01", "answers": 3, "empty": 1, "looping": 1, "cut off": 1, "broken": 2, "median tokens": 10.0}
    ]


def test_blocked_statements_fold_away_with_their_reasons_and_the_others_stay():
    blocked = findings.Finding("a", "tau < 0 with bad", 0.1, verdict="blocked", blocked_by=["judge bad: <gate>"])
    refused = findings.Finding("b", "No configuration.", verdict="blocked", blocked_by=["no judge"])
    text = findings.as_markdown([blocked, refused, findings.Finding("c", "Shown.", 1.0)])
    shown, folded = text.split("<details>")
    assert "- No configuration. *(blocked)*" in shown and "- Shown. *(described)*" in shown and "tau" not in shown
    assert folded.startswith("<summary>1 statement without a headline: judge bad: &lt;gate&gt;</summary>")
    assert "tau &lt; 0 with bad" in folded
    assert findings.as_markdown([]) == "No statement can be made."


@pytest.mark.parametrize(("kinds", "labels"), [(["estimated"] * 4, 4), (["measured", *["estimated"] * 3], 0)])
def test_only_energies_of_one_kind_get_points(kinds, labels):
    study = make_study(4, energy_kind=kinds)
    fig, data = charts.score_panels(study, "train_energy_wh", "energy (Wh)", {"c01": "front-runner"})
    assert len(fig.axes[0].texts) == labels
    assert list(data.columns[:2]) == ["config", "train_energy_wh"] and len(data) == 4


def test_a_pair_has_the_interval_of_its_terms_and_none_of_one_term():
    scores = pd.Series(np.linspace(0.5, -0.5, 16), fake_study.design(16).index)
    judge = make_judge(scores, 0.2)

    def width(n_terms: int) -> pd.Series:
        ranking = judge.ranking.assign(n_terms=n_terms)
        table = rows.compare_rows(make_study(16, [dataclasses.replace(judge, ranking=ranking)]))
        return table["score_high"] - table["score_low"]

    ratio = width(8) / width(10_000)
    assert len(ratio) and ratio.median() > 1.2  # t of 7 degrees of freedom instead of the normal: 2.53 / 1.96
    assert width(1).isna().all()


@pytest.mark.parametrize(("n", "terms"), [(6, 6), (7, 7), (40, 7)])
def test_with_few_conversations_or_terms_no_loss_is_called_distinguishable_from_the_lowest(n, terms):
    losses = pd.Series({"c01": 0.5, "c02": 0.9})
    draws = pd.DataFrame({"c01": [0.5] * 50, "c02": [0.9] * 50})
    said = rows.lowest_loss_text(losses, draws, n, terms)
    assert said.startswith("**c01 has the lowest loss.**") and "distinguishable" not in said
    assert f"{n} scenarios about {terms} terms: too few to tell" in said


def test_with_enough_terms_the_losses_that_differ_from_the_lowest_are_told_from_those_that_do_not():
    losses = pd.Series({"c01": 0.5, "c02": 0.9, "c03": 0.51})
    rng = np.random.default_rng(1)
    draws = losses + pd.DataFrame(rng.normal(0, 0.02, (400, 3)), columns=losses.index)
    assert "1 of 2 others is not distinguishable from it (c03)" in rows.lowest_loss_text(losses, draws, 24, 8)
    assert "distinguishable from the other one: no" in rows.lowest_loss_text(losses[:2], draws, 24, 8)
    three = pd.Series({"c01": 0.5, "c02": 0.9, "c03": 0.95})
    far = three + pd.DataFrame(rng.normal(0, 0.02, (400, 3)), columns=three.index)
    assert "distinguishable from all 2 others: no" in rows.lowest_loss_text(three, far, 24, 8)
