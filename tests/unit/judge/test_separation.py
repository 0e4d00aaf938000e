"""What the verdicts do not limit is open, exact or missing, and never a number of the ridge."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from telco_nb.judge import bradley_terry, ranking, separation
from telco_nb.judge.best import compare_with_best


def table(rows):
    return pd.DataFrame(rows, columns=["config_first", "config_second", "verdict", "term_id"])


def both_seats(winner, loser, terms):
    """The winner wins in both seats, once a term."""
    seats = [(winner, loser, "A"), (loser, winner, "B")]
    return table([(*seats[t % 2], f"t{t}") for t in range(terms)])


def coin(configs, terms, seed=0):
    rng = np.random.default_rng(seed)
    pairs = list(itertools.permutations(configs, 2))
    return table([(*pair, rng.choice(["A", "B"]), f"t{t}") for t in range(terms) for pair in pairs])


def ranked(seen, draws=200):
    fitted = bradley_terry.fit_bradley_terry(seen)
    drawn = bradley_terry.bootstrap_fit(seen, fitted, draws=draws, seed=0)
    found = ranking.ranking_table(seen, fitted, drawn).set_index("config")
    frame = pd.DataFrame(drawn.abilities, columns=fitted.configs)
    return found, ranking.pair_tests(fitted, drawn), compare_with_best(found["score"], frame, found["n_terms"])


def test_eight_of_eight_wins_are_open_above_and_exact_below():
    found, tests, _ = ranked(both_seats("a", "b", 8))
    share = stats.binomtest(8, 8).proportion_ci(0.95, "exact").low  # Clopper and Pearson: .631
    lead = np.log(share / (1 - share))  # without ties; half of it is the score, because both have mean 0
    assert found.loc["a", "low"] == pytest.approx(lead / 2, abs=0.06)  # but for the ridge
    assert np.isnan(found.loc["a", "high"]) and np.isnan(found.loc["b", "low"])
    assert found.loc["b", "high"] == pytest.approx(-found.loc["a", "low"], abs=1e-6)
    (test,) = tests.to_dict("records")
    assert test["p"] == pytest.approx(stats.binomtest(8, 8).pvalue)  # .0078, not 8e-87
    assert np.isnan(test["low"]) and np.isnan(test["high"])


def test_eight_wins_on_one_term_are_one_observation():
    found, tests, best = ranked(both_seats("a", "b", 8).assign(term_id="t0"))
    assert found[["low", "high", "rank_low", "rank_high", "p_best"]].isna().all().all()
    assert tests["p"].tolist() == [1.0] and best["can_be_best"].all() and not best["worse_than"].map(len).any()
    assert best.loc["b", "behind_at_most"] == np.inf


def test_ties_alone_give_equal_ranks_over_the_whole_range():
    names = [f"c{i}" for i in range(5)]
    found, tests, best = ranked(
        table([(*p, "tie", f"t{t}") for t in range(9) for p in itertools.combinations(names, 2)])
    )
    assert set(found["rank"]) == {1} and set(found["rank_low"]) == {1} and set(found["rank_high"]) == {5}
    assert found[["low", "high"]].isna().all().all()
    assert (tests["p"] == 1).all() and best["can_be_best"].all() and not best["worse_than"].map(len).any()


def test_one_configuration_that_lost_everything_leaves_the_others_their_intervals():
    names = list("abcdef")
    seen = pd.concat([coin(names, 12), *(both_seats(name, "z", 12) for name in names)], ignore_index=True)
    found, tests, best = ranked(seen)
    assert np.isnan(found.loc["z", "low"]) and found.loc["z", "high"] < found.loc[names, "low"].min()
    assert found.loc[names, ["low", "high"]].notna().all().all()
    assert (found.loc["z", "rank_low"], found.loc["z", "rank_high"]) == (7, 7)
    assert tests.loc[tests["config_b"] == "z", "told_apart"].all()
    assert best["can_be_best"].tolist() == [True] * 6 + [False]


def test_a_configuration_with_two_verdicts_cannot_be_called_first():
    seen = pd.concat([coin(list("abc"), 20), table([("d", "a", "A", "t0"), ("b", "d", "B", "t1")])], ignore_index=True)
    found, tests, best = ranked(seen)
    assert found.index[0] == "d"  # by its score, which only the ridge limits
    assert found.loc["d", "rank_high"] == 4 and np.isnan(found.loc["d", "high"]) and np.isnan(found.loc["d", "p_best"])
    assert not tests["told_apart"].any() and best["can_be_best"].all()


def test_a_bound_that_rests_on_one_term_is_open():
    """One loss in one of 40 terms: a resample without this term limits nothing, and there are many of those."""
    seen = both_seats("a", "b", 40)
    seen.loc[0, "verdict"] = "B"
    found, _, _ = ranked(seen)
    assert np.isnan(found.loc["a", "high"]) and found.loc["a", "low"] > 0


def test_an_anchor_that_won_everything_gets_the_exact_lower_bound():
    seen = coin(list("abc"), 20)
    fitted = bradley_terry.fit_bradley_terry(seen)
    draws = bradley_terry.bootstrap_fit(seen, fitted, draws=50, seed=0)
    won = pd.concat([both_seats("gold", name, 20) for name in "abc"], ignore_index=True)
    row, _ = ranking.anchor_row(won, "gold", fitted, draws)
    share = stats.binomtest(20, 20).proportion_ci(0.95, "exact").low
    assert np.isnan(row["high"]) and row["low"] == pytest.approx(np.log(share / (1 - share)), abs=0.1)
    lost = pd.concat([both_seats(name, "echo", 20) for name in "abc"], ignore_index=True)
    other, _ = ranking.anchor_row(lost, "echo", fitted, draws)
    assert np.isnan(other["low"]) and other["high"] == pytest.approx(-row["low"], abs=0.1)
    alone, _ = ranking.anchor_row(won.assign(term_id="t0"), "gold", fitted, draws)
    assert np.isnan(alone["low"]) and np.isnan(alone["high"])


def test_who_limits_whom_equals_a_search_for_chains():
    rng = np.random.default_rng(0)
    names = list("abcde")
    seen = coin(names, 1, seed=4).sample(9, random_state=1).reset_index(drop=True)
    weights = rng.integers(0, 2, (20, 9))
    found = separation.limited(seen, names, weights, np.arange(9))
    for drawn, limits in zip(weights, found, strict=True):
        edges = {n: set() for n in names}
        for (first, second, verdict, _), used in zip(seen.itertuples(index=False), drawn, strict=True):
            if used:
                edges[first if verdict == "A" else second].add(second if verdict == "A" else first)
        for i, j in itertools.permutations(range(5), 2):
            reached, due = set(), [names[i]]
            while due:
                due += edges[here] - reached if (here := due.pop()) not in reached and not reached.add(here) else []
            assert limits[i, j] == (names[j] in reached)


def test_no_configuration_differs_so_the_best_is_kept_and_none_is_called_worse():
    """The joint error rates of the comparison with the best, with few clusters: 400 studies of 8 configurations."""
    rng, kept, wrong = np.random.default_rng(1), [], []
    for _ in range(400):
        terms = 12
        values = rng.normal(0, 1, (terms, 8)) + rng.normal(0, 1, (terms, 1))
        weights = rng.multinomial(terms, np.full(terms, 1 / terms), 300)
        frame = pd.DataFrame(weights @ values / terms)
        found = compare_with_best(pd.Series(values.mean(0)), frame, pd.Series(terms, range(8)))
        kept.append(found.loc[3, "can_be_best"])  # any of them is a best one
        wrong.append(found["worse_than"].map(len).any())
    assert np.mean(kept) >= 0.93 and np.mean(wrong) <= 0.07, (np.mean(kept), np.mean(wrong))


def test_the_bound_of_the_lead_holds_for_all_configurations_at_once():
    rng, held = np.random.default_rng(2), []
    truth = np.linspace(0, 1, 8)
    for _ in range(300):
        terms = 30
        values = truth + rng.normal(0, 1.5, (terms, 8))
        weights = rng.multinomial(terms, np.full(terms, 1 / terms), 300)
        found = compare_with_best(
            pd.Series(values.mean(0)), pd.DataFrame(weights @ values / terms), pd.Series(terms, range(8))
        )
        behind = np.array([max(np.delete(truth, i)) - truth[i] for i in range(8)])
        held.append((found["behind_at_most"].reindex(range(8)) >= behind - 1e-12).all())
    assert np.mean(held) >= 0.92, np.mean(held)


@pytest.mark.parametrize(("terms", "told"), [(1, True), (7, True), (8, False)])
def test_fewer_than_eight_terms_carry_no_claim(terms, told):
    reason = ranking.few_terms(terms)
    assert (reason is not None) == told and (not told or "a ranking needs 8" in reason)


def test_a_missing_bound_is_shown_as_open():
    assert ranking.interval_text(0.27, np.nan) == "[+0.27, open]"
    assert ranking.interval_text(pd.NA, 3, "d") == "[open, 3]"


@pytest.mark.parametrize(("n_terms", "known"), [(7, False), (8, True)])
def test_with_few_terms_a_rank_has_no_interval_and_nobody_a_share_of_first_places(n_terms, known):
    found, _, _ = ranked(coin(list("abc"), n_terms))
    assert found[["rank_low", "rank_high", "p_best"]].notna().all().all() == known
    assert found["rank"].notna().all()
