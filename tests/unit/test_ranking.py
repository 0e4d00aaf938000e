"""The ranking: equal to other implementations, symmetric, honest about what the verdicts cannot say."""

import time

import choix
import evalica
import numpy as np
import pandas as pd
import pytest

from telco_nb import ranking


def simulate(
    abilities, n, *, position=0.0, tie=-0.7, length=0.0, missing=0.0, terms=52, per_term=3, spread=0.0, seed=0
):
    """Verdicts drawn from the model; `spread` is the SD of an effect that scenarios have on each configuration."""
    rng = np.random.default_rng(seed)
    k = len(abilities)
    first = rng.integers(k, size=n)
    second = (first + rng.integers(1, k, size=n)) % k
    scenario = rng.integers(terms * per_term, size=n)
    words = rng.integers(20, 90, size=(n, 2))
    local = rng.normal(0, spread, (terms * per_term, k))
    eta = np.asarray(abilities)[first] - np.asarray(abilities)[second] + position
    eta = eta + local[scenario, first] - local[scenario, second]
    eta = eta + length * np.log((words[:, 0] + 1) / (words[:, 1] + 1))
    shares = np.exp(np.stack([eta / 2, np.full(n, tie), -eta / 2], axis=1))
    drawn = (rng.random((n, 1)) > np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)).sum(1)
    frame = pd.DataFrame(
        {
            "config_first": np.array([f"c{i:02d}" for i in first]),
            "config_second": np.array([f"c{i:02d}" for i in second]),
            "verdict": np.array(["A", "tie", "B"])[drawn],
            "words_first": words[:, 0],
            "words_second": words[:, 1],
            "scenario_id": [f"s{s:05d}" for s in scenario],
            "term_id": [f"t{s // per_term:05d}" for s in scenario],
        }
    )
    return frame[rng.random(n) >= missing].reset_index(drop=True)


def centred(values):
    return np.asarray(values) - np.mean(values)


@pytest.fixture(scope="module")
def verdicts():
    return simulate(centred(np.linspace(-1, 1, 8)), 1500, position=0.3)


def test_plain_bradley_terry_equals_choix(verdicts):
    decided = verdicts[verdicts["verdict"] != "tie"]
    fitted = ranking.fit(decided, ties=False, position=False, ridge=0)
    place = {config: i for i, config in enumerate(fitted.configs)}
    won = [
        (place[r.config_first], place[r.config_second])[:: 1 if r.verdict == "A" else -1] for r in decided.itertuples()
    ]
    theirs = choix.ilsr_pairwise(len(place), won, max_iter=1000, tol=1e-12)
    assert np.abs(centred(theirs) - fitted.abilities).max() < 1e-6


def test_ties_as_half_wins_equal_evalica(verdicts):
    fitted = ranking.fit(verdicts, ties=False, position=False, ridge=0)
    winner = {"A": evalica.Winner.X, "B": evalica.Winner.Y, "tie": evalica.Winner.Draw}
    theirs = evalica.bradley_terry(
        verdicts["config_first"],
        verdicts["config_second"],
        [winner[v] for v in verdicts["verdict"]],
        tolerance=1e-12,
        limit=100_000,
    )
    logs = np.log(theirs.scores.reindex(list(fitted.configs)).to_numpy())
    assert np.abs(centred(logs) - fitted.abilities).max() < 1e-6


def test_the_fit_is_a_maximum_of_what_it_says_it_maximises(verdicts):
    fitted = ranking.fit(verdicts, ridge=0)
    chances = {(a, b): fitted.probabilities(a, b) for a in fitted.configs for b in fitted.configs if a != b}
    by_hand = sum(np.log(chances[r.config_first, r.config_second][r.verdict]) for r in verdicts.itertuples())
    assert by_hand == pytest.approx(fitted.log_likelihood, abs=1e-8)
    for step in (-1e-3, 1e-3):
        moved = ranking.Fit(
            fitted.configs, fitted.abilities + step * np.eye(8)[2], fitted.position, fitted.tie, None, 0.0, 0
        )
        other = sum(
            np.log(moved.probabilities(r.config_first, r.config_second)[r.verdict]) for r in verdicts.itertuples()
        )
        assert other < by_hand


def test_renaming_configurations_renames_the_scores_and_changes_nothing_else(verdicts):
    fitted = ranking.fit(verdicts)
    names = dict(zip(fitted.configs, reversed(fitted.configs), strict=True))
    renamed = verdicts.assign(
        config_first=verdicts["config_first"].map(names), config_second=verdicts["config_second"].map(names)
    )
    assert ranking.fit(renamed).abilities == pytest.approx(fitted.abilities[::-1], abs=1e-9)


def test_exchanging_all_seats_flips_the_position_term_only(verdicts):
    fitted = ranking.fit(verdicts)
    swapped = verdicts.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    swapped["verdict"] = swapped["verdict"].map({"A": "B", "B": "A", "tie": "tie"})
    other = ranking.fit(swapped)
    assert other.abilities == pytest.approx(fitted.abilities, abs=1e-9)
    assert (other.position, other.tie) == pytest.approx((-fitted.position, fitted.tie), abs=1e-9)


def test_planted_truth_is_recovered_within_two_standard_errors():
    truth = centred(np.linspace(-1.2, 1.2, 16) ** 3)
    seen = simulate(truth, 3120, position=0.3, length=0.2, missing=0.03, seed=5)
    fitted = ranking.fit(seen, length=True)
    draws = ranking.bootstrap(seen, fitted, draws=200, seed=1)
    error = (fitted.abilities - truth) / draws.abilities.std(0)
    assert np.sqrt((error**2).mean()) < 1.5 and np.abs(error).max() < 3
    assert abs(fitted.position - 0.3) < 2 * draws.position.std()
    assert abs(fitted.length - 0.2) < 2 * draws.length.std()
    assert abs(fitted.tie + 0.7) < 2 * draws.tie.std()


def test_cluster_intervals_cover_the_truth_where_single_verdict_intervals_do_not():
    abilities = centred(np.linspace(-1, 1, 6))
    # An effect of the scenario flattens the averages: the truth is what endless scenarios would give.
    truth = ranking.fit(simulate(abilities, 150_000, terms=20_000, per_term=1, spread=0.8, seed=999)).abilities
    hits = {"cluster": [], "row": []}
    for study in range(200):
        seen = simulate(abilities, 1200, terms=52, per_term=1, spread=0.8, seed=study)
        fitted = ranking.fit(seen)
        for name, by in (("cluster", ["term_id", "scenario_id"]), ("row", [])):
            draws = ranking.bootstrap(seen, fitted, draws=150, seed=study, by=by)
            low, high = np.quantile(draws.abilities, ranking.INTERVAL, axis=0)
            hits[name].append((low <= truth) & (truth <= high))
    cluster, row = np.mean(hits["cluster"]), np.mean(hits["row"])
    assert 0.92 <= cluster <= 0.97, cluster
    assert row < cluster - 0.05


def test_groups_that_never_meet_are_refused():
    seen = pd.DataFrame(
        [("a", "b", "A"), ("b", "a", "A"), ("c", "d", "tie")], columns=["config_first", "config_second", "verdict"]
    )
    with pytest.raises(ranking.RankingError, match=r"a, b \| c, d"):
        ranking.fit(seen)


def test_an_undefeated_configuration_gets_a_finite_score_by_the_ridge_and_is_refused_without():
    seen = pd.DataFrame(
        [("a", "b", "A"), ("b", "a", "B"), ("b", "c", "A"), ("c", "b", "A")],
        columns=["config_first", "config_second", "verdict"],
    )
    assert ranking.fit(seen).abilities[0] > 1
    with pytest.raises(ranking.RankingError, match="both directions"):
        ranking.fit(seen, ties=False, position=False, ridge=0)


def test_two_thousand_draws_for_sixteen_configurations_take_seconds():
    seen = simulate(centred(np.linspace(-1, 1, 16)), 3120)
    started = time.perf_counter()
    draws = ranking.bootstrap(seen, ranking.fit(seen), draws=2000, seed=0)
    assert draws.abilities.shape == (2000, 16)
    assert time.perf_counter() - started < 20


def test_bootstrap_fits_equal_fits_on_resampled_rows(verdicts):
    fitted = ranking.fit(verdicts)
    draws = ranking.bootstrap(verdicts, fitted, draws=3, seed=2)
    weight = dict(zip(draws.units, draws.weights[1], strict=True))
    repeated = verdicts.loc[verdicts.index.repeat(verdicts["scenario_id"].map(weight))]
    assert draws.abilities[1] == pytest.approx(ranking.fit(repeated, fitted.configs).abilities, abs=1e-7)


def test_cluster_weights_draw_whole_terms_and_keep_the_size(verdicts):
    units, unit_of_row, weights = ranking.cluster_weights(verdicts, ["term_id", "scenario_id"], 50, 0)
    assert (units[unit_of_row] == verdicts["scenario_id"]).all()
    per_term = pd.DataFrame(weights.T, index=units).groupby(lambda s: int(s[1:]) // 3).sum()
    assert (per_term % 3 == 0).all().all()  # a term drawn k times brings 3 k scenarios
    assert (weights.sum(1) == len(units)).all()


def test_an_anchor_is_placed_on_the_scale_without_moving_it():
    truth = [*centred(np.linspace(-1, 1, 6)), 0.5]
    everything = simulate(truth, 4000, seed=3)
    is_anchor = (everything["config_first"] == "c06") | (everything["config_second"] == "c06")
    fitted = ranking.fit(everything[~is_anchor])
    draws = ranking.bootstrap(everything[~is_anchor], fitted, draws=200, seed=0)
    row, drawn = ranking.anchor_row(everything[is_anchor], "c06", fitted, draws)
    assert row["low"] < 0.5 < row["high"]
    assert row["score"] == pytest.approx(0.5, abs=2.5 * np.nanstd(drawn))
    assert row["is_anchor"] and "rank" not in row


def test_an_anchor_that_always_wins_has_no_upper_bound(verdicts):
    fitted = ranking.fit(verdicts)
    draws = ranking.bootstrap(verdicts, fitted, draws=100, seed=0)
    perfect = verdicts.head(12).assign(config_first="reference", verdict="A")
    row, _ = ranking.anchor_row(perfect, "reference", fitted, draws)
    assert np.isnan(row["high"]) and row["low"] > 0


def test_table_gives_ranks_with_intervals_that_hold_them(verdicts):
    fitted = ranking.fit(verdicts)
    table = ranking.ranking_table(verdicts, fitted, ranking.bootstrap(verdicts, fitted, draws=300, seed=0))
    assert table["rank"].tolist() == list(range(1, 9))
    assert (table["rank_low"] <= table["rank"]).all() and (table["rank"] <= table["rank_high"]).all()
    assert table["p_best"].sum() == pytest.approx(1)
    assert table["score"].sum() == pytest.approx(0, abs=1e-9)
    assert table["n_judgements"].sum() == 2 * len(verdicts)


def test_pair_counts_do_not_depend_on_the_seats():
    seen = pd.DataFrame(
        [("a", "b", "A"), ("b", "a", "A"), ("b", "a", "B"), ("a", "b", "tie")],
        columns=["config_first", "config_second", "verdict"],
    )
    (row,) = ranking.pair_counts(seen, ["a", "b"]).to_dict("records")
    assert row == {"config_a": "a", "config_b": "b", "wins_a": 2, "ties": 1, "wins_b": 1}
