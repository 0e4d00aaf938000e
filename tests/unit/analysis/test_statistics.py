"""Rank correlation, agreement and fronts against independent computations."""

from __future__ import annotations

import dataclasses
import itertools
import math

import fake_study
import krippendorff
import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge
from sklearn.metrics import cohen_kappa_score

from telco_nb.analysis import loss_findings, statistics
from telco_nb.analysis.results import (
    retest_reliability,
)
from telco_nb.judge.ranking import tied_top


def tau_b_by_counting(a, b) -> float:
    """The definition, pair by pair."""
    score = ties_a = ties_b = 0
    pairs = list(itertools.combinations(range(len(a)), 2))
    for i, j in pairs:
        x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        score, ties_a, ties_b = score + x * y, ties_a + (x == 0), ties_b + (y == 0)
    return score / math.sqrt((len(pairs) - ties_a) * (len(pairs) - ties_b))


@pytest.mark.parametrize("n", [2, 3, 5, 16, 40])
def test_tau_b_equals_counting_pairs_with_and_without_ties(n):
    rng = np.random.default_rng(n)
    for a, b in ((rng.normal(size=n), rng.normal(size=n)), (np.arange(n) // 2, rng.permutation(n) // 3)):
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert statistics.kendall_tau(a, b) == pytest.approx(tau_b_by_counting(a, b))


def test_tau_of_a_constant_or_of_one_item_is_missing_not_zero():
    assert math.isnan(statistics.kendall_tau([1, 1, 1], [1, 2, 3]))
    assert math.isnan(statistics.kendall_tau([1, 1], [1, 2]))
    assert math.isnan(statistics.kendall_tau([1], [1]))


def p_by_enumeration(a, b) -> float:
    observed = abs(tau_b_by_counting(a, b))
    taus = [abs(tau_b_by_counting(a, order)) for order in itertools.permutations(b)]
    return np.mean([tau >= observed - 1e-12 for tau in taus])


def test_permutation_p_is_exact_without_ties():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.normal(size=6), rng.normal(size=6)
        assert statistics.permutation_p(a, b) == pytest.approx(p_by_enumeration(a, b))


def test_permutation_p_with_ties_is_near_full_enumeration_and_repeatable():
    a, b = np.array([1, 1, 2, 3, 3, 4]), np.array([2.0, 1, 3, 3, 5, 4])
    p = statistics.permutation_p(a, b, seed=1)
    assert p == pytest.approx(p_by_enumeration(a, b), abs=0.015)
    assert p == statistics.permutation_p(a, b, seed=1)


def test_critical_tau_is_the_smallest_with_exact_p_below_5_percent():
    assert statistics.critical_tau(16) == pytest.approx(46 / 120)
    # One step less, 44 of 120 (0.367, which the normal approximation would accept), has exact p = 0.052.
    for discordant, below in ((37, True), (38, False)):
        left, order, due = list(range(16)), [], discordant
        while left:  # an order with exactly `discordant` inversions, by its Lehmer code
            step = min(due, len(left) - 1)
            order.append(left.pop(step))
            due -= step
        p = statistics.permutation_p(np.arange(16.0), np.array(order, float))
        assert (p < 0.05) == below


@pytest.mark.parametrize(("n", "expected"), [(2, None), (3, None), (4, None), (5, 1.0)])
def test_few_configurations_can_never_reach_significance(n, expected):
    assert statistics.critical_tau(n) == expected


def test_tau_interval_covers_a_planted_correlation_and_percentiles_alone_do_not():
    """Noise a third of the spread, a strong true relation: the hull must cover it, although each draw adds noise."""
    rng, hits, n = np.random.default_rng(1), 0, 16
    names = [f"c{i}" for i in range(n)]
    for _ in range(50):
        quality = rng.normal(size=n)
        loss = -0.7 * quality + 0.7 * rng.normal(size=n)
        seen = quality + 0.3 * rng.normal(size=n)
        draws_a = pd.DataFrame(loss + 0.05 * rng.normal(size=(120, n)), columns=names)
        draws_b = pd.DataFrame(seen + 0.3 * rng.normal(size=(120, n)), columns=names)
        interval = statistics.tau_interval(pd.Series(loss, names), pd.Series(seen, names), draws_a, draws_b)
        hits += interval.low <= statistics.kendall_tau(loss, quality) <= interval.high
        assert interval.low <= interval.value <= interval.high
    assert hits >= 44


def test_reliability_falls_with_the_judges_noise():
    score = fake_study.truth(fake_study.design())["quality"]
    quiet, loud = (retest_reliability(make_judge(score, noise)) for noise in (0.01, 0.5))
    assert quiet > 0.9 > loud


@pytest.mark.parametrize("noise", [0.2, 0.6, 1.5])
def test_the_reliability_is_the_mean_tau_of_two_runs_of_the_study(noise):
    """Runs share true scores. The spread of a run's scores holds its errors, which must not count twice."""
    rng, told, true = np.random.default_rng(4), [], []
    names = [f"c{i:02d}" for i in range(16)]
    for _ in range(60):
        truth = rng.normal(size=16)
        one, other = (pd.Series(truth + noise * rng.normal(size=16), names) for _ in range(2))
        draws = pd.DataFrame(one.to_numpy() + noise * rng.normal(size=(200, 16)), columns=names)
        told.append(retest_reliability(dataclasses.replace(make_judge(one), draws=draws)))
        true.append(statistics.kendall_tau(one, other))
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.06)


@pytest.mark.parametrize(
    ("reliability", "said"), [(0.31, "agree only to tau = 0.31"), (0.9, "agree to tau = 0.90"), (math.nan, "")]
)
def test_reliability_is_said_as_how_alike_two_runs_would_be(reliability, said):
    text = loss_findings._reliability_text(reliability)
    assert said in text and bool(text) == bool(said)


def test_the_reliability_rests_on_errors_as_they_were_estimated_and_not_on_wider_draws_for_intervals():
    score = fake_study.truth(fake_study.design())["quality"]
    quiet, wide = make_judge(score, 0.2), make_judge(score, 0.8)
    both = dataclasses.replace(wide, error_draws=quiet.draws)
    assert retest_reliability(both) == retest_reliability(quiet) > retest_reliability(wide)


def test_pareto_front_keeps_exactly_the_undominated():
    rng = np.random.default_rng(5)
    names = [f"c{i}" for i in range(30)]
    energy, score = pd.Series(rng.integers(1, 9, 30), names), pd.Series(rng.integers(1, 9, 30), names)
    front = statistics.pareto_front(energy, score)
    for config in names:
        beaten = any(
            energy[o] <= energy[config]
            and score[o] >= score[config]
            and (energy[o], score[o]) != (energy[config], score[config])
            for o in names
        )
        assert (config in front) == (not beaten)


def test_configurations_without_energy_are_left_out_of_the_front_not_put_at_zero():
    energy, score = pd.Series({"a": math.nan, "b": 2.0}), pd.Series({"a": 9.0, "b": 1.0})
    assert statistics.pareto_front(energy, score) == ["b"]


def test_front_membership_shares_follow_the_draws():
    energy = pd.Series({"a": 1.0, "b": 2.0, "c": 3.0})
    draws = pd.DataFrame({"a": [0.0, 0.0], "b": [1.0, -1.0], "c": [0.5, -2.0]})
    assert statistics.pareto_shares(energy, draws).to_dict() == {"a": 1.0, "b": 0.5, "c": 0.0}


def test_tied_top_set_holds_what_noise_cannot_separate():
    judge = make_judge(pd.Series({"a": 1.0, "b": 0.95, "c": -1.0}), noise=0.1)
    assert tied_top(judge.scores, judge.draws) == ["a", "b"]
    assert tied_top(judge.scores[["a"]], judge.draws[["a"]]) == ["a"]


def test_kappa_equals_scikit_learn_and_counts_shared_comparisons():
    rng = np.random.default_rng(7)
    rows = [{"prompt_id": f"p{i}", "scenario_id": f"s{i // 2}", "purpose": "ranking"} for i in range(120)]
    a = pd.DataFrame(rows).assign(config_first="x", config_second="y", winner=rng.choice(["x", "y", "tie"], 120))
    b = a.assign(winner=np.where(rng.random(120) < 0.5, a["winner"], "tie"))
    swapped = b.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    kappa, n = statistics.cohen_kappa(a, swapped.iloc[:100], 200, 0)
    assert kappa.value == pytest.approx(cohen_kappa_score(a["winner"][:100], b["winner"][:100]))
    assert n == 100
    assert kappa.low < kappa.value < kappa.high
    assert math.isnan(statistics.cohen_kappa(a.iloc[:0], b, 10, 0)[0].value)
    same, n = statistics.cohen_kappa(a.assign(winner="x"), b.assign(winner="x"), 10, 0)
    assert n == 120 and math.isnan(same.value)


def test_kappa_by_kind_finds_the_kind_in_which_two_judges_part():
    rng = np.random.default_rng(7)
    rows = [{"prompt_id": f"p{i}", "scenario_id": f"s{i // 2}", "purpose": "ranking"} for i in range(240)]
    a = pd.DataFrame(rows).assign(config_first="x", config_second="y", winner=rng.choice(["x", "y", "tie"], 240))
    kinds = pd.Series(["charge"] * 120 + ["fraud"] * 120 + ["safety"], index=[*a["prompt_id"], "not compared"])
    b = a.assign(winner=np.where(kinds[a["prompt_id"]] == "charge", a["winner"], rng.choice(["x", "y", "tie"], 240)))
    table = statistics.kappa_by_kind(a, b, kinds, 200, 0).set_index("kind")
    assert list(table["comparisons"]) == [120, 120]
    assert table.loc["charge", "kappa"] == 1
    assert table.loc["fraud", "kappa"] == pytest.approx(cohen_kappa_score(a["winner"][120:], b["winner"][120:]))
    assert table.loc["fraud", "kappa_low"] < 0 < table.loc["fraud", "kappa_high"]


# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section D: four observers, twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, np.nan, np.nan, np.nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, np.nan, 3],
        [np.nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, np.nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, np.nan],
    ]
)


def long_ratings(matrix: np.ndarray, clusters: int = 100) -> pd.DataFrame:
    rows = [(f"u{u:02d}", f"k{u % clusters}", f"r{r}", v) for r, line in enumerate(matrix) for u, v in enumerate(line)]
    return pd.DataFrame(rows, columns=["unit", "cluster", "rater", "value"])


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_alpha_of_krippendorffs_own_example(level, published):
    alpha, n = statistics.krippendorff_alpha(long_ratings(KRIPPENDORFF), level)
    assert alpha.value == pytest.approx(published, abs=5e-4) and n == 11
    assert alpha.value == pytest.approx(krippendorff.alpha(KRIPPENDORFF, level_of_measurement=level), abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval", "ratio"])
def test_alpha_equals_the_package_on_ratings_with_holes(level):
    rng = np.random.default_rng(8)
    truth = rng.integers(1, 6, 60)
    seen = np.clip(truth + rng.integers(-1, 2, (3, 60)), 1, 5).astype(float)
    seen[rng.random(seen.shape) < 0.3] = np.nan
    alpha, _ = statistics.krippendorff_alpha(long_ratings(seen, 20), level, 200, 1)
    assert alpha.value == pytest.approx(krippendorff.alpha(seen, level_of_measurement=level), abs=1e-12)
    assert alpha.low < alpha.value < alpha.high


def test_alpha_of_nothing_shared_or_nothing_varying_is_missing():
    alone = long_ratings(np.array([[1.0, np.nan], [np.nan, 2.0]]))
    assert statistics.krippendorff_alpha(alone, "ordinal")[1] == 0
    same, n = statistics.krippendorff_alpha(long_ratings(np.ones((2, 5))), "ordinal", 10)
    assert n == 5 and math.isnan(same.value)
