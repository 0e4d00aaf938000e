"""Points on trained and on other problems: planted shares, bounds that cover, and what cannot be told."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import charts
from telco_nb.analysis.taught import ALL, is_taught, taught_finding, taught_table

matplotlib.use("Agg")
HARD = 0.05  # points fewer that everybody makes on the problems that were not trained on
PLANTED = {"c1": (0.4, 0.1), "c2": (0.2, 0.1), "nearest": (0.9, 0.0), "untuned": (0.06, 0.01)}


def checks_of(shares, n_taught=24, n_untaught=12, questions=1, noise=0.0, seed=0):
    """Points of each question: `shares` gives those of a configuration on taught and on other problems."""
    rng, rows = np.random.default_rng(seed), []
    for taught, terms in ((True, range(n_taught)), (False, range(100, 100 + n_untaught))):
        for term in terms:
            easy = rng.exponential(noise) - noise  # a hard term is hard for all; few are easy
            for config, pair in shares.items():
                for made in pair[not taught] + easy + rng.exponential(noise, questions) - noise:
                    rows.append((config, f"t{term}", made, taught))
    return pd.DataFrame(rows, columns=["config", "term_id", "coverage", "taught"]).astype({"taught": "boolean"})


def test_a_question_is_taught_if_training_has_its_problem_and_one_of_ones_own_is_not_known():
    train = pd.DataFrame({"term_id": ["esim", "sla"], "problem_id": ["slow", "late"]})
    asked = [("a", "test", "esim", "slow"), ("b", "unseen", "esim", "late"), ("c", "noisy", "sla", "late")]
    asked += [("d", "own", "esim", "slow"), ("e", "own", "esim", ""), ("f", "own", "", "")]
    found = is_taught(pd.DataFrame(asked, columns=["prompt_id", "test_set", "term_id", "problem_id"]), train)
    assert found.iloc[:3].to_dict() == {"a": True, "b": False, "c": True}
    assert found.isna().tolist() == [False] * 3 + [True] * 3


def test_the_shares_are_the_planted_ones_and_the_gain_is_that_beyond_the_untuned_model():
    table = taught_table(checks_of(PLANTED), ["c1", "c2"], 200, 1)
    assert list(table.index) == [ALL, "c1", "c2", "nearest", "untuned"]
    assert table["taught"].tolist() == pytest.approx([0.3, 0.4, 0.2, 0.9, 0.06])
    assert table["gain"].tolist()[:4] == pytest.approx([0.15, 0.25, 0.05, 0.85]) and np.isnan(table["gain"].iloc[4])
    assert table[["n_taught", "n_untaught", "n_terms"]].drop_duplicates().to_numpy().tolist() == [[24, 12, 12]]


def test_a_question_whose_problem_is_not_known_does_not_count():
    known = checks_of(PLANTED)
    unknown = known.assign(coverage=1.0, taught=pd.array([pd.NA] * len(known), dtype="boolean"))
    one, other = (taught_table(rows, ["c1", "c2"], 200, 1) for rows in (known, pd.concat([known, unknown])))
    assert one.equals(other)


@pytest.mark.parametrize(("untaught", "questions"), [(12, 1), (4, 2)])  # 4 terms with 2 questions: the laptop profile
def test_the_bounds_cover_the_planted_gain_in_about_95_of_100_studies(untaught, questions):
    shares = {"c1": (0.3, 0.2 - HARD), "c2": (0.25, 0.2 - HARD), "untuned": (0.1, 0.1 - HARD)}
    held = []
    for seed in range(200):
        rows = checks_of(shares, 24, untaught, questions, 0.1, seed)
        low, high = taught_table(rows, ["c1", "c2"], 400, seed).loc[ALL, ["low", "high"]]
        held.append(low <= 0.075 <= high)
    assert 0.91 <= np.mean(held) <= 0.995


def test_what_is_only_harder_is_rarely_called_taught():
    """All models make fewer points on the problems that were not trained on, the untuned one as well."""
    shares, claims = {"c1": (0.2, 0.2 - HARD), "c2": (0.2, 0.2 - HARD), "untuned": (0.1, 0.1 - HARD)}, 0
    for seed in range(150):
        rows = checks_of(shares, noise=0.02, seed=seed)
        claims += taught_finding(taught_table(rows, ["c1", "c2"], 400, seed)).verdict == "supported"
    assert claims <= 0.08 * 150


def test_the_finding_names_shares_questions_the_gain_and_the_look_up():
    found = taught_finding(taught_table(checks_of(PLANTED), ["c1", "c2"], 200, 1))
    assert (found.id, found.verdict, found.n) == ("taught", "supported", 12) and found.value == pytest.approx(0.15)
    shares = ("30.0%", "24 questions", "10.0%", "12 questions", "the untuned model 6.0% and 1.0%")
    gain = "added 24.0 percentage points on trained problems and 9.0 on others, a difference of +15.0 [+15.0, +15.0]."
    for words in (*shares, gain, "The look-up makes 90% and 0%", "By the checklist it did"):
        assert words in found.statement


NOT_TOLD = {
    "no checklist": None,
    "a record of an earlier version": checks_of(PLANTED).drop(columns="taught"),
    "no untrained problem": checks_of(PLANTED, n_untaught=0),
    "no question": checks_of(PLANTED).iloc[:0],
    "no untuned model": checks_of(PLANTED).query("config != 'untuned'"),
    "a configuration without answers": checks_of(PLANTED).query("config != 'c2'"),
}


@pytest.mark.parametrize("checks", NOT_TOLD.values(), ids=NOT_TOLD)
def test_where_it_was_not_measured_nothing_is_claimed(checks):
    table = taught_table(checks, ["c1", "c2"], 200, 1)
    found = taught_finding(table)
    assert table.empty and found.verdict == "not estimable" and found.value is None


def test_two_terms_are_too_few_for_a_verdict_and_their_shares_stay_in_the_table():
    table = taught_table(checks_of(PLANTED, n_untaught=2), ["c1", "c2"], 200, 1)
    found = taught_finding(table)
    assert len(table) and found.verdict == "not estimable" and "about 2 terms only" in found.statement


def test_the_figure_has_a_row_for_each_and_both_kinds_in_the_legend():
    table = taught_table(checks_of(PLANTED), ["c1", "c2"], 200, 1).loc[["c1", "nearest"]]
    fig = charts.taught_dots(table, {"nearest": "most similar training answer"})
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["c1", "most similar training answer"]
    legend = {text.get_text() for text in fig.legends[0].get_texts()}
    assert legend == {"problem was in training (line: 95 % interval)", "problem was not in training"}
    others = fig.axes[0].collections[-1].get_offsets()
    assert others[:, 0].tolist() == pytest.approx([10, 0]) and others[0, 1] > others[1, 1]
