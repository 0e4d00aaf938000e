"""Points on trained and on other problems: planted shares, bounds that cover, and what cannot be told."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import charts
from telco_nb.analysis.taught import ALL, is_taught, taught_finding, taught_table

matplotlib.use("Agg")


def checks_of(shares, n_taught=24, n_untaught=12, noise=0.0, seed=0):
    """Coverage of one question a term: `shares` gives (taught, untaught) of each configuration."""
    rng, rows = np.random.default_rng(seed), []
    for taught, terms in ((True, range(n_taught)), (False, range(100, 100 + n_untaught))):
        easy = rng.normal(0, noise, len(terms))  # a hard question is hard for all
        for config, pair in shares.items():
            made = pair[not taught] + easy + rng.normal(0, noise, len(terms))
            rows += [(config, f"t{term}", value, taught) for term, value in zip(terms, made, strict=True)]
    return pd.DataFrame(rows, columns=["config", "term_id", "coverage", "taught"]).astype({"taught": "boolean"})


def test_a_question_is_taught_if_training_has_its_problem_and_unknown_without_one():
    train = pd.DataFrame({"term_id": ["esim", "sla"], "problem_id": ["slow", "late"]})
    asked = [("a", "esim", "slow"), ("b", "esim", "late"), ("c", "sla", "late"), ("d", "esim", None)]
    found = is_taught(pd.DataFrame(asked, columns=["prompt_id", "term_id", "problem_id"]), train)
    assert found.iloc[:3].to_dict() == {"a": True, "b": False, "c": True} and found.isna().tolist() == [False] * 3 + [
        True
    ]


def test_the_shares_are_the_planted_ones_and_the_mean_is_that_of_the_configurations_alone():
    table = taught_table(checks_of({"c1": (0.4, 0.1), "c2": (0.2, 0.1), "nearest": (0.9, 0.0)}), ["c1", "c2"], 200, 1)
    assert list(table.index) == [ALL, "c1", "c2", "nearest"]
    assert table["taught"].tolist() == pytest.approx([0.3, 0.4, 0.2, 0.9])
    assert table["difference"].tolist() == pytest.approx([0.2, 0.3, 0.1, 0.9])
    assert table[["n_taught", "n_untaught", "n_terms"]].drop_duplicates().to_numpy().tolist() == [[24, 12, 12]]


def test_a_question_whose_problem_is_not_known_does_not_count():
    known = checks_of({"c1": (0.4, 0.1)})
    unknown = known.assign(coverage=1.0, taught=pd.array([pd.NA] * len(known), dtype="boolean"))
    one, other = (taught_table(rows, ["c1"], 200, 1) for rows in (known, pd.concat([known, unknown])))
    assert one.equals(other)


def test_the_bounds_cover_the_planted_difference_in_about_95_of_100_studies():
    held = []
    for seed in range(300):
        rows = checks_of({"c1": (0.3, 0.2), "c2": (0.25, 0.2)}, noise=0.1, seed=seed)
        low, high = taught_table(rows, ["c1", "c2"], 400, seed).loc[ALL, ["low", "high"]]
        held.append(low <= 0.075 <= high)
    assert 0.91 <= np.mean(held) <= 0.985


def test_no_difference_is_rarely_called_one():
    claims = 0
    for seed in range(200):
        rows = checks_of({"c1": (0.2, 0.2), "c2": (0.2, 0.2)}, noise=0.1, seed=seed)
        claims += taught_finding(taught_table(rows, ["c1", "c2"], 400, seed), ["c1", "c2"]).verdict == "supported"
    assert claims <= 0.08 * 200


def test_the_finding_names_shares_questions_the_best_and_what_needs_no_training():
    rows = checks_of({"c1": (0.4, 0.1), "c2": (0.2, 0.1), "nearest": (0.9, 0.0), "untuned": (0.01, 0.0)})
    found = taught_finding(taught_table(rows, ["c1", "c2"], 200, 1), ["c1", "c2"])
    assert (found.id, found.verdict, found.n) == ("taught", "supported", 12) and found.value == pytest.approx(0.2)
    shares = ("(24 questions)", "30.0%", "(12 questions) 10.0%", "20.0 points [20.0, 20.0]", "40% and 10%")
    beside = ("training conversation makes 90% and 0%", "the untuned model makes 1% and 0%")
    for words in (*shares, "c1, picked after the fact", *beside):
        assert words in found.statement


EARLIER = checks_of({"c1": (0.4, 0.1)}).drop(columns="taught")
TRAINED_ALONE = checks_of({"c1": (0.4, 0.1)}, n_untaught=0)


@pytest.mark.parametrize("checks", [None, EARLIER, TRAINED_ALONE, TRAINED_ALONE.iloc[:0]])
def test_without_both_kinds_of_questions_nothing_is_claimed(checks):
    table = taught_table(checks, ["c1"], 200, 1)
    found = taught_finding(table, ["c1"])
    assert table.empty and found.verdict == "not estimable" and found.value is None


def test_the_figure_has_a_row_for_each_and_both_kinds_in_the_legend():
    table = taught_table(checks_of({"c1": (0.4, 0.1), "nearest": (0.9, 0.0)}), ["c1"], 200, 1).loc[["c1", "nearest"]]
    fig = charts.taught_dots(table, {"nearest": "nearest training answer"})
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["c1", "nearest training answer"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "problem stands in training",
        "problem was not trained on",
    ]
    dots = fig.axes[0].collections[1].get_offsets()
    assert dots[:, 0].tolist() == pytest.approx([40, 90]) and dots[0, 1] > dots[1, 1]
