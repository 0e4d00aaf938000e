"""The preview by lists: an exact design, a fit equal to another implementation, and ties that are no decision."""

import itertools
from collections import Counter
from pathlib import Path

import choix
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from telco_nb.judge import judging, lists, ranking


def prompts(n, per_term=1):
    ids = {"prompt_id": [f"p{i:03d}" for i in range(n)], "scenario_id": [f"s{i:03d}" for i in range(n)]}
    return pd.DataFrame(ids | {"term_id": [f"t{i // per_term:02d}" for i in range(n)]})


def simulate(abilities, orders_of, n, seed=0):
    """Lists drawn from the model: best first with probability proportional to exp(ability)."""
    rng, drawn = np.random.default_rng(seed), []
    for k in range(n):
        members = list(orders_of[k % len(orders_of)])
        noise = np.asarray(abilities)[members] + rng.gumbel(size=len(members))
        drawn.append([[f"c{members[i]:02d}"] for i in np.argsort(-noise)])
    return drawn


# ---------------------------------------------------------------- the design


def test_in_the_affine_plane_every_two_of_sixteen_meet_in_exactly_one_list():
    rounds = lists.rounds(16)
    assert [len(blocks) for blocks in rounds] == [4] * 5
    met = Counter(pair for blocks in rounds for block in blocks for pair in itertools.combinations(sorted(block), 2))
    assert met == {pair: 1 for pair in itertools.combinations(range(16), 2)}


@given(st.integers(2, 24))
@settings(max_examples=23, deadline=None)
def test_any_number_of_configurations_gets_lists_of_two_to_four_in_rounds(n):
    rounds = lists.rounds(n)
    assert rounds == lists.rounds(n)
    for blocks in rounds:
        seated = [i for block in blocks for i in block]
        assert len(seated) == len(set(seated)) >= n - 1 and set(seated) <= set(range(n))
        assert all(2 <= len(block) <= 4 for block in blocks)
    assert set(range(n)) == {i for blocks in rounds for block in blocks for i in block}


def test_the_plan_balances_seats_and_uses_a_fifth_of_the_calls_of_the_pairs():
    configs = [f"c{i:02d}" for i in range(16)]
    plan = judging.plan_lists(prompts(156, 3), configs, lists_per_prompt=1, seed=1)
    assert len(plan) == 624 == 3120 / 5
    seats = Counter((config, seat) for row in plan["configs"] for seat, config in enumerate(row))
    assert max(seats.values()) - min(seats.values()) <= 3
    pd.testing.assert_frame_equal(plan, judging.plan_lists(prompts(156, 3), configs, lists_per_prompt=1, seed=1))
    assert judging.plan_lists(prompts(3), configs, lists_per_prompt=0, seed=1).empty


# ---------------------------------------------------------------- the fit


def test_plackett_luce_equals_choix_without_a_ridge():
    blocks = [block for blocks in lists.rounds(16) for block in blocks]
    orders = simulate(np.linspace(-1, 1, 16), blocks, 160)
    fitted = lists.fit(orders, [f"c{i:02d}" for i in range(16)], ridge=0)
    data = [[int(group[0][1:]) for group in order] for order in orders]
    for theirs in (
        choix.ilsr_rankings(16, data, max_iter=1000, tol=1e-12),
        choix.opt_rankings(16, data, tol=1e-10),
    ):
        assert np.abs(theirs - theirs.mean() - fitted.abilities).max() < 1e-6


def test_plackett_luce_reproduces_the_published_estimates_of_the_36_races_of_nascar_2002():
    # Hunter (2004, The Annals of Statistics 32:384), Table 2, as printed with two decimals by Turner, van Etten, Firth
    # and Kosmidis (2020, Computational Statistics 35:1027): log-worths relative to driver 1. A line of the file is a
    # race; the four drivers who came last wherever they drove have no finite estimate and are left out.
    lines = (Path(__file__).parent / "data" / "nascar2002.txt").read_text().splitlines()
    races = [[[driver] for driver in line.split()] for line in lines]
    drivers = sorted({driver for race in races for [driver] in race}, key=int)
    assert (len(races), len(drivers)) == (36, 83)
    worth = dict(zip(drivers, lists.fit(races, drivers, ridge=0).abilities, strict=True))
    published = {"58": 4.15, "68": 3.62, "51": 2.08, "15": 0.03, "17": -0.31, "40": -0.15}
    assert {driver: round(worth[driver] - worth["1"], 2) for driver in published} == published


def test_the_ridge_is_that_of_choix():
    orders = simulate([0.8, 0.0, -0.8], [(0, 1, 2)], 40)
    fitted = lists.fit(orders, ["c00", "c01", "c02"], ridge=0.5)
    data = [[int(group[0][1:]) for group in order] for order in orders]
    theirs = choix.opt_rankings(3, data, alpha=0.25, tol=1e-12)  # it penalises alpha times the squares, not half
    assert np.abs(theirs - theirs.mean() - fitted.abilities).max() < 1e-6


def test_lists_of_two_are_bradley_terry_with_ties_as_half_wins():
    rng = np.random.default_rng(3)
    outcomes = [("a", "b"), ("b", "c"), ("a", "c")]
    rows = [(*outcomes[rng.integers(3)], rng.choice(["A", "tie", "B"], p=[0.5, 0.2, 0.3])) for _ in range(300)]
    pairs = pd.DataFrame(rows, columns=["config_first", "config_second", "verdict"])
    orders = [[[a], [b]] if v == "A" else [[b], [a]] if v == "B" else [[a, b]] for a, b, v in rows]
    theirs = ranking.fit(pairs, ties=False, position=False, ridge=0)
    assert lists.fit(orders, ["a", "b", "c"], ridge=0).abilities == pytest.approx(theirs.abilities, abs=1e-8)


def test_a_list_of_ties_decides_nothing():
    orders = [*simulate([0.5, 0.0, -0.5], [(0, 1, 2)], 50), [["c00", "c01", "c02"]]]
    tied = lists.fit(orders * 3, ["c00", "c01", "c02"])
    assert (tied.abilities[:-1] > tied.abilities[1:]).all()
    even = lists.fit([[["c00", "c01", "c02"]]], ["c00", "c01", "c02"])
    assert even.abilities == pytest.approx(np.zeros(3), abs=1e-9)


def test_planted_abilities_are_recovered_within_their_intervals():
    truth = np.linspace(-1, 1, 16)
    blocks = [block for blocks in lists.rounds(16) for block in blocks]
    orders = simulate(truth, blocks, 624, seed=4)
    fitted = lists.fit(orders, [f"c{i:02d}" for i in range(16)])
    terms = pd.Series([f"t{i // 12:02d}" for i in range(624)], name="term_id")
    draws = lists.bootstrap(orders, terms, fitted, draws=200, seed=0)
    error = (fitted.abilities - truth) / draws.abilities.std(0)
    assert np.abs(error).max() < 3.2 and np.sqrt((error**2).mean()) < 1.5
    assert kendalltau(fitted.abilities, truth).statistic > 0.8


def test_bootstrap_fits_equal_fits_on_resampled_lists():
    orders = simulate([0.5, 0.0, -0.5, 0.2], [(0, 1, 2), (1, 2, 3)], 60)
    terms = pd.Series([f"t{i % 12:02d}" for i in range(60)], name="term_id")
    fitted = lists.fit(orders, [f"c{i:02d}" for i in range(4)])
    draws = lists.bootstrap(orders, terms, fitted, draws=3, seed=2)
    repeated = [o for o, t in zip(orders, terms, strict=True) for _ in range(draws.weights[1][draws.units.get_loc(t)])]
    assert draws.abilities[1] == pytest.approx(lists.fit(repeated, fitted.configs).abilities, abs=1e-8)


def test_lists_that_connect_nobody_are_refused():
    with pytest.raises(ranking.RankingError, match=r"a, b \| c, d"):
        lists.fit([[["a"], ["b"]], [["c"], ["d"]]], ["a", "b", "c", "d"])
    with pytest.raises(ranking.RankingError, match="no lists"):
        lists.fit([], ["a", "b"])


def test_orders_of_seats_become_orders_of_configurations():
    judged = pd.DataFrame({"configs": [["x", "y", "z"]], "verdict": ["C>A=B"]})
    assert judging.list_orders(judged) == [[["z"], ["x", "y"]]]
