"""The ranking with margins: equal to a direct likelihood, symmetric, and the same model where margins say nothing."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from telco_nb.judge import bradley_terry, ranking

HALF = np.array([1, 0.5, 0, -0.5, -1])  # A clearly, A, tie, B, B clearly
SEATS = ["config_first", "config_second"]


def simulate(abilities, n, *, position=0.3, tie=-0.4, clear=-0.3, terms=40, term_spread=0.0, seed=0):
    """Verdicts with margins; `term_spread` is the SD of effects of a term on each configuration."""
    rng = np.random.default_rng(seed)
    k = len(abilities)
    first = rng.integers(k, size=n)
    second, term = (first + rng.integers(1, k, size=n)) % k, rng.integers(terms, size=n)
    here = (
        np.asarray(abilities) + rng.normal(0, term_spread, (terms, k))
        if term_spread
        else np.tile(abilities, (terms, 1))
    )
    eta = here[term, first] - here[term, second] + position
    logits = eta[:, None] * HALF + np.array([clear, 0, tie, 0, clear])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kind = (rng.random((n, 1)) > shares.cumsum(1)).sum(1)
    table = {
        "config_first": [f"c{i}" for i in first],
        "config_second": [f"c{i}" for i in second],
        "verdict": np.array(["A", "A", "tie", "B", "B"])[kind],
        "margin": np.array([2, 1, 0, 1, 2])[kind],
        "term_id": [f"t{t}" for t in term],
    }
    return pd.DataFrame(table)


@pytest.fixture(scope="module")
def seen():
    return simulate([0.6, 0.2, -0.2, -0.6], 2000)


def test_the_fit_with_margins_equals_a_direct_maximum_of_the_likelihood(seen):
    """By scipy, without gradients and without this project's code."""
    first, second = (seen[seat].str[1:].astype(int).to_numpy() for seat in SEATS)
    half = np.where(seen["verdict"] == "tie", 0, np.where(seen["verdict"] == "A", 0.5, -0.5) * seen["margin"])
    kind = (half[:, None] == HALF).argmax(1)

    def loss(x):
        theta = np.append(x[:3], -x[:3].sum())
        logits = (theta[first] - theta[second] + x[3])[:, None] * HALF + np.array([x[5], 0, x[4], 0, x[5]])
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(kind)), kind]).sum()

    found = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-6})
    fitted = bradley_terry.fit_bradley_terry(seen, margins=True, ridge=0)
    ours = [*fitted.abilities[:3], fitted.position, fitted.tie, fitted.clear]
    assert ours == pytest.approx(list(found.x), abs=1e-4)
    assert fitted.log_likelihood == pytest.approx(-found.fun, abs=1e-6)


def test_planted_truth_is_recovered():
    truth = np.array([0.9, 0.3, 0.0, -0.4, -0.8])
    fitted = bradley_terry.fit_bradley_terry(simulate(truth, 40_000, seed=3), margins=True)
    assert fitted.abilities == pytest.approx(truth, abs=0.05)
    assert (fitted.position, fitted.tie, fitted.clear) == pytest.approx((0.3, -0.4, -0.3), abs=0.04)


@pytest.mark.parametrize("margin", [1, 2])
def test_without_two_kinds_of_wins_it_is_the_model_without_margins(seen, margin):
    flat = seen.assign(margin=np.where(seen["verdict"] == "tie", 0, margin))
    with_margins, plain = (bradley_terry.fit_bradley_terry(flat, margins=use) for use in (True, False))
    assert with_margins.clear is None
    assert with_margins.abilities.tolist() == plain.abilities.tolist()
    assert with_margins.log_likelihood == plain.log_likelihood


def test_exchanging_seats_or_names_changes_nothing_else(seen):
    fitted = bradley_terry.fit_bradley_terry(seen, margins=True)
    swapped = seen.rename(columns=dict(zip(SEATS, reversed(SEATS), strict=True)))
    swapped["verdict"] = swapped["verdict"].map({"A": "B", "B": "A", "tie": "tie"})
    other = bradley_terry.fit_bradley_terry(swapped, margins=True)
    assert other.abilities == pytest.approx(fitted.abilities, abs=1e-9)
    assert (other.position, other.tie, other.clear) == pytest.approx((-fitted.position, fitted.tie, fitted.clear))
    names = dict(zip(fitted.configs, reversed(fitted.configs), strict=True))
    renamed = seen.assign(**{seat: seen[seat].map(names) for seat in SEATS})
    assert bradley_terry.fit_bradley_terry(renamed, margins=True).abilities == pytest.approx(fitted.abilities[::-1])


def test_the_probabilities_of_the_three_verdicts_add_up_clear_wins(seen):
    fitted = bradley_terry.fit_bradley_terry(seen, margins=True)
    chances = fitted.probabilities("c0", "c3")
    assert sum(chances.values()) == pytest.approx(1)
    rows = seen[(seen["config_first"] == "c0") & (seen["config_second"] == "c3")]
    assert chances["A"] == pytest.approx((rows["verdict"] == "A").mean(), abs=0.08)


def test_bootstrap_and_anchor_use_the_margins():
    everything = simulate([0.5, 0.0, -0.5, 0.4], 4000, seed=5)
    anchored = (everything[SEATS] == "c3").any(axis=1)
    fitted = bradley_terry.fit_bradley_terry(everything[~anchored], margins=True)
    draws = bradley_terry.bootstrap_fit(everything[~anchored], fitted, draws=60, seed=0)
    weight = everything.loc[~anchored, "term_id"].map(dict(zip(draws.units, draws.weights[1], strict=True)))
    repeated = everything[~anchored].loc[weight.index.repeat(weight)]
    again = bradley_terry.fit_bradley_terry(repeated, fitted.configs, margins=True)
    assert draws.abilities[1] == pytest.approx(again.abilities, abs=1e-7)
    row, drawn = ranking.anchor_row(everything[anchored], "c3", fitted, draws)
    assert row["score"] == pytest.approx(0.4, abs=3 * drawn.std())  # planted against a mean of 0 of the other three


def test_intervals_with_margins_cover_the_truth_in_200_studies():
    """Effects of terms flatten the averages: the truth is what endless terms would give."""
    abilities, options = [0.7, 0.2, -0.3, -0.6], {"term_spread": 0.5}
    endless = simulate(abilities, 150_000, terms=20_000, seed=999, **options)
    truth = bradley_terry.fit_bradley_terry(endless, margins=True).abilities
    hits, tails = [], bradley_terry.interval_levels(40)
    for study in range(200):
        seen = simulate(abilities, 600, seed=study, **options)
        fitted = bradley_terry.fit_bradley_terry(seen, margins=True)
        draws = bradley_terry.bootstrap_fit(seen, fitted, draws=150, seed=study)
        low, high = np.quantile(draws.abilities, tails, axis=0)
        hits.append((low <= truth) & (truth <= high))
    assert 0.92 <= np.mean(hits) <= 0.97, np.mean(hits)
