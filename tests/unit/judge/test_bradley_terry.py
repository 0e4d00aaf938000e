"""The ranking: equal to other implementations, symmetric, honest about what the verdicts cannot say."""

import choix
import evalica
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from statsmodels.tools.numdiff import approx_hess

from telco_nb.judge import bradley_terry, ranking


def simulate(
    abilities,
    n,
    *,
    position=0.0,
    tie=-0.7,
    length=0.0,
    missing=0.0,
    terms=52,
    per_term=3,
    spread=0.0,
    term_spread=0.0,
    seed=0,
):
    """Verdicts drawn from the model; the spreads are SDs of effects of scenarios and terms on each configuration."""
    rng = np.random.default_rng(seed)
    k = len(abilities)
    first = rng.integers(k, size=n)
    second = (first + rng.integers(1, k, size=n)) % k
    scenario = rng.integers(terms * per_term, size=n)
    words = rng.integers(20, 90, size=(n, 2))
    local = rng.normal(0, spread, (terms * per_term, k))
    if term_spread:
        local += np.repeat(rng.normal(0, term_spread, (terms, k)), per_term, axis=0)
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


def standard_errors(seen, fitted):
    """(SEs of the abilities minus the first one, SEs of position, length and tie) from the Hessian of the fit."""
    terms, n = [fitted.position, fitted.length, fitted.tie], len(fitted.configs)
    fits = [term is not None for term in terms]
    cells = bradley_terry._cells(seen, fitted.configs, fits[1], ties=fits[2])
    counts = cells.counts(np.ones((1, len(seen))), np.arange(len(seen)))
    free = np.array([True] * n + fits)
    parameters = np.append(fitted.abilities, [term or 0.0 for term in terms])[None]
    covariance = np.linalg.inv(bradley_terry._derivatives(parameters, counts, cells, 0, free)[1][0])
    variance = np.diag(covariance)
    gaps = variance[:n] + variance[0] - 2 * covariance[0, :n]
    return dict(zip(fitted.configs, np.sqrt(gaps), strict=True)), np.sqrt(variance[-3:])


@pytest.fixture(scope="module")
def verdicts():
    return simulate(centred(np.linspace(-1, 1, 8)), 1500, position=0.3)


def test_plain_bradley_terry_equals_choix(verdicts):
    decided = verdicts[verdicts["verdict"] != "tie"]
    fitted = bradley_terry.fit_bradley_terry(decided, ties=False, position=False, ridge=0)
    place = {config: i for i, config in enumerate(fitted.configs)}
    won = [
        (place[r.config_first], place[r.config_second])[:: 1 if r.verdict == "A" else -1] for r in decided.itertuples()
    ]
    theirs = choix.ilsr_pairwise(len(place), won, max_iter=1000, tol=1e-12)
    assert np.abs(centred(theirs) - fitted.abilities).max() < 1e-6


def test_ties_as_half_wins_equal_evalica(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts, ties=False, position=False, ridge=0)
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


# Citations between four statistics journals, 1987-88 (Stigler 1994): rows are cited, columns cite. The example of
# Turner and Firth (2012), "Bradley-Terry Models in R", section 2.1.
JOURNALS = ("Biometrika", "Comm Statist", "JASA", "JRSS-B")
CITATIONS = np.array([[714, 730, 498, 221], [33, 425, 68, 17], [320, 813, 1072, 142], [284, 276, 325, 188]])


def citation_verdicts():
    rows = []
    for i in range(4):
        for j in range(i):
            sides = (JOURNALS[i], JOURNALS[j])
            rows += [(*sides, "A")] * CITATIONS[i, j] + [(*sides, "B")] * CITATIONS[j, i]
    return pd.DataFrame(rows, columns=["config_first", "config_second", "verdict"])


def test_the_journal_citations_give_the_published_coefficients_and_standard_errors():
    seen = citation_verdicts()
    fitted = bradley_terry.fit_bradley_terry(seen, JOURNALS, ties=False, position=False, ridge=0)
    gaps, (errors, _) = fitted.abilities - fitted.abilities[0], standard_errors(seen, fitted)
    found = {name: (gaps[i], errors[name]) for i, name in enumerate(JOURNALS)}
    assert found["Comm Statist"] == pytest.approx((-2.94907, 0.10255), abs=1e-5)
    assert found["JASA"] == pytest.approx((-0.47957, 0.06059), abs=1e-5)
    assert found["JRSS-B"] == pytest.approx((0.26895, 0.07083), abs=1e-5)


@pytest.mark.parametrize("position", [False, True])
def test_standard_errors_equal_those_of_a_logistic_regression(position):
    seen = citation_verdicts().sample(frac=1, random_state=0)
    fitted = bradley_terry.fit_bradley_terry(seen, JOURNALS, ties=False, position=position, ridge=0)
    seats = [
        pd.get_dummies(seen[f"config_{seat}"]).reindex(columns=JOURNALS[1:], fill_value=0.0).astype(float)
        for seat in ("first", "second")
    ]
    design = (seats[0] - seats[1]).assign(**({"position": 1.0} if position else {}))
    theirs = sm.Logit((seen["verdict"] == "A").astype(float), design).fit(disp=0)
    gaps, (errors, terms) = fitted.abilities - fitted.abilities[0], standard_errors(seen, fitted)
    for i, name in enumerate(JOURNALS[1:], 1):
        assert (gaps[i], errors[name]) == pytest.approx((theirs.params[name], theirs.bse[name]), rel=1e-5)
    if position:
        assert fitted.position == pytest.approx(theirs.params["position"], rel=1e-5)
        assert terms[0] == pytest.approx(theirs.bse["position"], rel=1e-5)


def test_the_hessian_of_the_newton_steps_is_the_curvature_of_the_likelihood():
    """With ties, position and length: numeric second derivatives over contrasts to the first configuration."""
    seen = simulate([0.5, 0.0, -0.5], 400, position=0.3, length=0.4, seed=1)
    fitted = bradley_terry.fit_bradley_terry(seen, ridge=0, length=True)
    place = {config: i for i, config in enumerate(fitted.configs)}
    i, j = (seen[f"config_{seat}"].map(place).to_numpy() for seat in ("first", "second"))
    ratio = np.log((seen["words_first"] + 1) / (seen["words_second"] + 1)).to_numpy()
    outcome = seen["verdict"].map({"A": 0, "tie": 1, "B": 2}).to_numpy()

    def loss(x):
        abilities = np.array([0.0, *x[:2]])
        eta = abilities[i] - abilities[j] + x[2] + x[3] * ratio
        logits = np.stack([eta / 2, np.full(len(eta), x[4]), -eta / 2], axis=1)
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(eta)), outcome]).sum()

    gaps = fitted.abilities[1:] - fitted.abilities[0]
    curvature = approx_hess(np.array([*gaps, fitted.position, fitted.length, fitted.tie]), loss)
    errors = np.sqrt(np.diag(np.linalg.inv(curvature)))
    ours, terms = standard_errors(seen, fitted)
    assert [*list(ours.values())[1:], *terms] == pytest.approx(list(errors), rel=1e-3)


def test_the_fit_is_a_maximum_of_what_it_says_it_maximises(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts, ridge=0)
    chances = {(a, b): fitted.probabilities(a, b) for a in fitted.configs for b in fitted.configs if a != b}
    by_hand = sum(np.log(chances[r.config_first, r.config_second][r.verdict]) for r in verdicts.itertuples())
    assert by_hand == pytest.approx(fitted.log_likelihood, abs=1e-8)
    for step in (-1e-3, 1e-3):
        moved = bradley_terry.Fit(
            fitted.configs, fitted.abilities + step * np.eye(8)[2], fitted.position, fitted.tie, None, 0.0
        )
        other = sum(
            np.log(moved.probabilities(r.config_first, r.config_second)[r.verdict]) for r in verdicts.itertuples()
        )
        assert other < by_hand


def test_renaming_configurations_renames_the_scores_and_changes_nothing_else(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts)
    names = dict(zip(fitted.configs, reversed(fitted.configs), strict=True))
    renamed = verdicts.assign(
        config_first=verdicts["config_first"].map(names), config_second=verdicts["config_second"].map(names)
    )
    assert bradley_terry.fit_bradley_terry(renamed).abilities == pytest.approx(fitted.abilities[::-1], abs=1e-9)


def test_exchanging_all_seats_flips_the_position_term_only(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts)
    swapped = verdicts.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    swapped["verdict"] = swapped["verdict"].map({"A": "B", "B": "A", "tie": "tie"})
    other = bradley_terry.fit_bradley_terry(swapped)
    assert other.abilities == pytest.approx(fitted.abilities, abs=1e-9)
    assert (other.position, other.tie) == pytest.approx((-fitted.position, fitted.tie), abs=1e-9)


def test_exchanging_all_labels_changes_no_score_interval_rank_or_test(verdicts):
    """A and B mean nothing: with the seats of every verdict exchanged, the tables are the same, length term and all."""
    swapped = verdicts.rename(
        columns={
            "config_first": "config_second",
            "config_second": "config_first",
            "words_first": "words_second",
            "words_second": "words_first",
        }
    ).assign(verdict=verdicts["verdict"].map({"A": "B", "B": "A", "tie": "tie"}))
    tables = []
    for seen in (verdicts, swapped):
        fitted = bradley_terry.fit_bradley_terry(seen, length=True)
        draws = bradley_terry.bootstrap_fit(seen, fitted, draws=60, seed=4)
        tables.append((fitted.length, ranking.ranking_table(seen, fitted, draws), ranking.pair_tests(fitted, draws)))
    assert tables[0][0] == pytest.approx(tables[1][0], abs=1e-9)
    for one, two in zip(tables[0][1:], tables[1][1:], strict=True):
        pd.testing.assert_frame_equal(one, two, atol=1e-8, rtol=1e-7)
    counts = [ranking.pair_counts(seen, sorted(set(verdicts["config_first"]))) for seen in (verdicts, swapped)]
    pd.testing.assert_frame_equal(*counts)


def test_planted_truth_is_recovered_within_two_standard_errors():
    truth = centred(np.linspace(-1.2, 1.2, 16) ** 3)
    seen = simulate(truth, 3120, position=0.3, length=0.2, missing=0.03, seed=5)
    fitted = bradley_terry.fit_bradley_terry(seen, length=True)
    draws = bradley_terry.bootstrap_fit(seen, fitted, draws=200, seed=1)
    error = (fitted.abilities - truth) / draws.abilities.std(0)
    assert np.sqrt((error**2).mean()) < 1.5 and np.abs(error).max() < 3
    errors = bradley_terry.fit_bradley_terry(seen, length=True, ridge=0)
    position_se, length_se, tie_se = standard_errors(seen, errors)[1]
    assert draws.position.std() == pytest.approx(position_se, rel=0.3)  # verdicts are independent here
    assert abs(errors.position - 0.3) < 2 * position_se and abs(errors.length - 0.2) < 2 * length_se
    assert abs(errors.tie + 0.7) < 2 * tie_se
    assert abs(fitted.position - 0.3) < 2 * draws.position.std()
    assert abs(fitted.length - 0.2) < 2 * draws.length.std()
    assert abs(fitted.tie + 0.7) < 2 * draws.tie.std()


def test_intervals_by_terms_cover_the_truth_where_single_verdicts_and_two_stages_do_not():
    """A smaller version of bench/judging_coverage.py: three scenarios a term, effects of both."""
    abilities = centred(np.linspace(-1, 1, 6))
    options = {"per_term": 3, "spread": 0.5, "term_spread": 0.6}
    # Effects flatten the averages: the truth is what endless terms would give.
    truth = bradley_terry.fit_bradley_terry(simulate(abilities, 150_000, terms=20_000, **options, seed=999)).abilities
    ways = {"terms": ["term_id"], "both": ["term_id", "scenario_id"], "row": []}
    hits = {name: [] for name in ways}
    for study in range(200):
        seen = simulate(abilities, 1500, terms=52, **options, seed=study)
        fitted = bradley_terry.fit_bradley_terry(seen)
        for name, by in ways.items():
            draws = bradley_terry.bootstrap_fit(seen, fitted, draws=150, seed=study, by=by)
            tails = bradley_terry.interval_levels(52) if name == "terms" else (0.025, 0.975)
            low, high = np.quantile(draws.abilities, tails, axis=0)
            hits[name].append((low <= truth) & (truth <= high))
    share = {name: float(np.mean(found)) for name, found in hits.items()}
    assert 0.92 <= share["terms"] <= 0.97, share
    assert share["row"] < 0.92 and share["both"] > share["terms"], share


def test_the_tails_are_those_of_the_expanded_percentile_interval():
    low, high = bradley_terry.interval_levels(40)
    # By hand: z = sqrt(40 / 39) * t(.025, 39) = -2.0485, and its normal tail.
    assert (low, high) == pytest.approx((0.02026, 1 - 0.02026), abs=2e-5)
    assert bradley_terry.interval_levels(10_000)[0] == pytest.approx(0.025, abs=1e-4)


def test_groups_that_never_meet_are_refused():
    seen = pd.DataFrame(
        [("a", "b", "A"), ("b", "a", "A"), ("c", "d", "tie")], columns=["config_first", "config_second", "verdict"]
    )
    with pytest.raises(bradley_terry.RankingError, match=r"a, b \| c, d"):
        bradley_terry.fit_bradley_terry(seen)


def test_an_undefeated_configuration_gets_a_finite_score_by_the_ridge_and_is_refused_without():
    seen = pd.DataFrame(
        [("a", "b", "A"), ("b", "a", "B"), ("b", "c", "A"), ("c", "b", "A")],
        columns=["config_first", "config_second", "verdict"],
    )
    assert bradley_terry.fit_bradley_terry(seen).abilities[0] > 1
    with pytest.raises(bradley_terry.RankingError, match="both directions"):
        bradley_terry.fit_bradley_terry(seen, ties=False, position=False, ridge=0)


def test_bootstrap_fits_equal_fits_on_resampled_rows(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts)
    draws = bradley_terry.bootstrap_fit(verdicts, fitted, draws=3, seed=2, by=["term_id", "scenario_id"])
    weight = dict(zip(draws.units, draws.weights[1], strict=True))
    repeated = verdicts.loc[verdicts.index.repeat(verdicts["scenario_id"].map(weight))]
    assert draws.abilities[1] == pytest.approx(
        bradley_terry.fit_bradley_terry(repeated, fitted.configs).abilities, abs=1e-7
    )


def test_cluster_weights_draw_whole_terms_and_keep_the_size(verdicts):
    units, unit_of_row, weights = bradley_terry.cluster_weights(verdicts, ["term_id", "scenario_id"], 50, 0)
    assert (units[unit_of_row] == verdicts["scenario_id"]).all()
    per_term = pd.DataFrame(weights.T, index=units).groupby(lambda s: int(s[1:]) // 3).sum()
    assert (per_term % 3 == 0).all().all()  # a term drawn k times brings 3 k scenarios
    assert (weights.sum(1) == len(units)).all()


def test_an_anchor_is_placed_on_the_scale_without_moving_it():
    truth = [*centred(np.linspace(-1, 1, 6)), 0.5]
    everything = simulate(truth, 4000, seed=3)
    is_anchor = (everything["config_first"] == "c06") | (everything["config_second"] == "c06")
    fitted = bradley_terry.fit_bradley_terry(everything[~is_anchor])
    draws = bradley_terry.bootstrap_fit(everything[~is_anchor], fitted, draws=200, seed=0)
    row, drawn = ranking.anchor_row(everything[is_anchor], "c06", fitted, draws)
    assert row["low"] < 0.5 < row["high"]
    assert row["score"] == pytest.approx(0.5, abs=2.5 * np.nanstd(drawn))
    assert row["is_anchor"] and "rank" not in row


def test_pairs_of_an_anchor_on_terms_that_are_not_drawn_or_beside_others_do_not_place_it():
    """The bootstrap has no weight for such a term, and the fit no score for such a configuration."""
    seen = simulate([*centred(np.linspace(-1, 1, 6)), 0.5], 2000, seed=3).replace("c06", "echo")
    is_anchor = (seen["config_first"] == "echo") | (seen["config_second"] == "echo")
    seen["purpose"] = np.where(is_anchor, "anchor", "ranking")
    fitted = bradley_terry.fit_bradley_terry(seen[~is_anchor])
    draws = bradley_terry.bootstrap_fit(seen[~is_anchor], fitted, draws=50, seed=0)
    table = ranking.ranking_table(seen[~is_anchor], fitted, draws)
    wanted, scores = ranking.with_anchors(table, seen, seen, fitted, draws)
    elsewhere = seen[is_anchor].assign(verdict="A", **{draws.units.name: "elsewhere"})
    unranked = seen[is_anchor].replace(fitted.configs, "c99").assign(verdict="A")
    for more in (elsewhere, unranked):
        judged = pd.concat([seen, more])
        found, drawn = ranking.with_anchors(table, judged, judged, fitted, draws)
        pd.testing.assert_frame_equal(found, wanted)
        pd.testing.assert_frame_equal(drawn, scores)
    row = ranking.with_anchors(table, unranked, unranked, fitted, draws)[0].set_index("config").loc["echo"]
    assert np.isnan(row["score"]) and row["n_judgements"] == 0


def test_an_anchor_that_always_wins_has_no_upper_bound(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts)
    draws = bradley_terry.bootstrap_fit(verdicts, fitted, draws=100, seed=0)
    perfect = verdicts.head(12).assign(config_first="reference", verdict="A")
    row, _ = ranking.anchor_row(perfect, "reference", fitted, draws)
    assert np.isnan(row["high"]) and row["low"] > 0


def test_table_gives_ranks_with_intervals_that_hold_them(verdicts):
    fitted = bradley_terry.fit_bradley_terry(verdicts)
    table = ranking.ranking_table(verdicts, fitted, bradley_terry.bootstrap_fit(verdicts, fitted, draws=300, seed=0))
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


def test_win_rates_of_a_pair_add_up_to_one_and_those_that_never_met_are_missing():
    pairs = pd.DataFrame([("a", "b", 2, 1, 1)], columns=["config_a", "config_b", "wins_a", "ties", "wins_b"])
    rates = ranking.win_rates(pairs, ["b", "a", "c"])
    assert (rates.loc["a", "b"], rates.loc["b", "a"]) == (0.625, 0.375)
    assert rates.loc["a", "c":].isna().all() and rates.loc["c"].isna().all()


def test_pair_tests_tell_apart_what_differs_and_hold_their_level_over_all_pairs():
    seen = simulate([1.5, 1.5, -1.0, -1.0], 2500, seed=2)
    fitted = bradley_terry.fit_bradley_terry(seen)
    tests = ranking.pair_tests(fitted, bradley_terry.bootstrap_fit(seen, fitted, draws=300, seed=0))
    across = (tests["config_a"].isin(["c00", "c01"])) & tests["config_b"].isin(["c02", "c03"])
    assert tests.loc[across, "told_apart"].all() and not tests.loc[~across, "told_apart"].any()
    assert (tests["difference"] >= 0).all() and (tests["p_holm"] >= tests["p"]).all()
    false_alarms = 0
    for study in range(40):  # nobody differs: any pair told apart is an error
        seen = simulate(np.zeros(5), 500, seed=study)
        fitted = bradley_terry.fit_bradley_terry(seen)
        alarms = ranking.pair_tests(fitted, bradley_terry.bootstrap_fit(seen, fitted, draws=100, seed=study))
        false_alarms += alarms["told_apart"].any()
    assert false_alarms <= 6  # 2 expected; 7 or more has probability .003


def test_adjusted_p_values_are_those_of_holm():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.9])  # R: p.adjust(p, "holm")
    assert ranking.holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert ranking.holm(np.array([0.6, 0.6])).tolist() == [1, 1]
    assert len(ranking.holm(np.array([]))) == 0 and np.isnan(ranking.holm(np.array([np.nan, np.nan]))).all()


def test_verdicts_that_cannot_be_ranked_give_missing_numbers_everywhere_and_never_zero():
    none = simulate(np.zeros(3), 20).iloc[:0]
    assert bradley_terry.unrankable_reason(none, ["c00", "c01"]) == "there are no verdicts"
    fitted = bradley_terry.missing_fit(["c00", "c01"], length=True)
    draws = bradley_terry.bootstrap_fit(none, fitted, draws=10, seed=0)
    table = ranking.ranking_table(none, fitted, draws)
    numbers = table[["score", "low", "high", "rank", "rank_low", "rank_high", "p_best"]]
    assert numbers.isna().all().all() and (table["n_judgements"] == 0).all()
    assert not ranking.pair_tests(fitted, draws)["told_apart"].any()
    row, drawn = ranking.anchor_row(none, "untuned", fitted, draws)
    assert np.isnan(row["score"]) and np.isnan(drawn).all()
    assert ranking.mean_with_interval(pd.Series([1.0]), pd.Series(["t"]), draws)["value"] is None
    assert np.isnan(list(fitted.probabilities("c00", "c01").values())).all()
