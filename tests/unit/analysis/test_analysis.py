"""The statistics against independent computations, and what may be said when data are few, missing or not valid."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import fake_study
import krippendorff
import matplotlib
import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from fake_study import make_judge, make_study
from sklearn.metrics import cohen_kappa_score

from telco_nb.analysis import charts, findings, recommendation, statistics
from telco_nb.analysis.effects import FACTORS, design_facts, effect_tables, main_effects, noise_floor
from telco_nb.analysis.results import (
    StudyResults,
    gate_table,
    noise_ceiling,
    own_answers,
    result_columns,
    results_table,
    self_preference,
    val_loss_draws,
    val_loss_interval,
)
from telco_nb.analysis.rows import one_factor_pairs
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.protocol import headline_blocks
from telco_nb.judge.ranking import tied_top

matplotlib.use("Agg")


def finding(study: StudyResults, id: str) -> findings.Finding:
    return next(f for f in findings.all_findings(study) if f.id == id)


# ---------------------------------------------------------------- rank correlation


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


def test_noise_ceiling_falls_with_the_judges_noise():
    score = fake_study.truth(fake_study.design())["quality"]
    quiet, loud = (noise_ceiling(make_judge(score, noise)) for noise in (0.01, 0.5))
    assert quiet > 0.9 > loud


# ---------------------------------------------------------------- validation loss


def losses(per_scenario: np.ndarray, conversations: int = 2, tokens: int = 50) -> pd.DataFrame:
    n = len(per_scenario) * conversations
    scenario = np.arange(n) % len(per_scenario)
    return pd.DataFrame(
        {
            "scenario_id": [f"s{i:03d}" for i in scenario],
            "n_tokens": tokens,
            "loss_sum_after": tokens * per_scenario[scenario],
        }
    )


def test_validation_loss_is_token_weighted():
    frame = pd.DataFrame({"scenario_id": ["a", "b"], "n_tokens": [10, 90], "loss_sum_after": [10.0, 45.0]})
    draws = val_loss_draws({"c": frame}, 50, 0)
    assert val_loss_interval(frame, draws["c"]).value == pytest.approx(0.55)


@pytest.mark.parametrize("scenarios", [12, 60])
def test_loss_interval_covers_the_true_mean_of_scenarios(scenarios):
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        frame = losses(rng.normal(1.0, 0.2, scenarios))
        interval = val_loss_interval(frame, val_loss_draws({"c": frame}, 400, 1)["c"])
        hits += interval.low <= 1.0 <= interval.high
    assert 0.92 <= hits / 300 <= 0.98


def test_configurations_share_their_draws_so_differences_are_paired():
    base = np.random.default_rng(0).normal(1, 0.2, 40)
    draws = val_loss_draws({"a": losses(base), "b": losses(base + 0.01)}, 100, 0)
    assert np.allclose(draws["b"] - draws["a"], 0.01)


# ---------------------------------------------------------------- results.csv


def test_results_columns_are_the_agreed_ones_and_missing_stays_empty():
    training = {
        "c01": {"target_modules": "qv", "rank": 8, "epochs": 1, "val_loss": 0.5, "energy_kind": "none"},
        "c02": {},
    }
    judge = make_judge(
        pd.Series({"c01": 0.3, "c03": -0.3}),
        gate_passed=False,
        headline_blocks=("failed its validity gate (no result)",),
    )
    table = results_table(training, {"c01": {"answer_energy_wh": 0.0}}, {"c01": Interval(0.5, 0.4, 0.6)}, [judge])
    expected = (
        "config target_modules rank lora_alpha epochs learning_rate seed train_tokens val_loss val_loss_low "
        "val_loss_high test_loss test_perplexity noisy_loss noisy_perplexity unseen_loss "
        "unseen_perplexity train_energy_wh train_energy_low_wh train_energy_high_wh energy_kind energy_source "
        "answer_energy_wh train_seconds tokens_per_second checklist_score checklist_low checklist_high "
        "checklist_rank checklist_rank_low checklist_rank_high checklist_gate"
    )
    assert list(table.columns) == expected.split()
    first, second = table.to_csv(index=False).splitlines()[1:]
    assert first.startswith("c01,qv,8,,1,,,,0.5,0.4,0.6,,,,,,,,,,none,,0.0,,,0.3,")
    assert second == "c02" + "," * 31 + "failed"


def test_a_configuration_that_the_judge_left_out_has_no_score():
    judge = make_judge(pd.Series({"c01": 0.3, "c03": -0.3}))
    table = results_table({"c02": {"val_loss": 0.5}}, {}, {}, [judge]).set_index("config")
    assert pd.isna(table.loc["c02", "checklist_score"])
    assert table.loc["c02", "checklist_gate"] == "passed"


# ---------------------------------------------------------------- main effects


def test_main_effects_equal_statsmodels():
    configs = fake_study.design()
    response = fake_study.truth(configs)["loss"]
    ours = main_effects(configs, response).set_index("contrast")
    levels = "C(target_modules, Treatment('qv')) + C(rank) + C(epochs) + C(learning_rate)"
    fit = smf.ols(f"y ~ {levels}", configs.assign(y=response)).fit()
    for contrast, term in (
        ("qv -> all", "C(target_modules, Treatment('qv'))[T.all]"),
        ("1 -> 4", "C(epochs)[T.4]"),
        ("0.0002 -> 0.001", "C(learning_rate)[T.0.001]"),
    ):
        assert ours.loc[contrast, "effect"] == pytest.approx(fit.params[term])


def test_main_effects_of_a_balanced_design_are_differences_of_level_means():
    configs = fake_study.design()
    response = fake_study.truth(configs)["loss"]
    ours = main_effects(configs, response).set_index("contrast")["effect"]
    for factor, low, high in (("epochs", 1, 4), ("rank", 8, 64), ("target_modules", "qv", "mlp")):
        means = response.groupby(configs[factor]).mean()
        assert ours[f"{low} -> {high}"] == pytest.approx(means[high] - means[low])


def test_energy_effects_are_ratios():
    configs = fake_study.design()
    energy = pd.Series(np.where(configs["epochs"] == 4, 40.0, 10.0), configs.index)
    noisy = energy * np.exp(np.random.default_rng(0).normal(0, 1e-4, 16))
    effects = main_effects(configs, noisy, log=True).set_index("contrast")
    assert effects.loc["1 -> 4", "effect"] == pytest.approx(4, rel=1e-3)
    assert effects.loc["8 -> 64", "effect"] == pytest.approx(1, rel=1e-3)
    exact = main_effects(configs, energy, log=True)
    assert not exact["estimable"].any() and "nothing that could be noise" in exact["reason"].iloc[0]


def test_the_default_design_is_orthogonal_and_clear_of_two_factor_interactions():
    facts = design_facts(fake_study.design())
    assert facts[["varied", "separable", "clear"]].all().all()


def test_a_design_says_what_it_cannot_tell_apart():
    grid = itertools.product(("qv", "mlp", "all"), ((8, 1), (64, 4)), (1e-4, 1e-3))
    rows = [(target, rank, epochs, rate) for target, (rank, epochs), rate in grid]
    together = pd.DataFrame(rows, columns=list(FACTORS))
    facts = design_facts(together).set_index("factor")
    assert not facts.loc["rank", "separable"]
    assert facts.loc["target_modules", "separable"]
    effects = main_effects(together, pd.Series(np.arange(12.0))).set_index("factor")
    assert math.isnan(effects.loc["epochs", "effect"])
    assert "cannot be separated" in effects.loc["epochs", "reason"]
    configs = fake_study.design()
    half = configs[configs["learning_rate"] > 4e-4]  # rank is then target x epochs
    assert not design_facts(half).set_index("factor").loc["rank", "clear"]


@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_configurations_give_reasons_instead_of_effects(n):
    effects = effect_tables(make_study(n))
    assert not effects["estimable"].any()
    assert effects[["effect", "low", "high"]].isna().all().all()
    assert (effects["reason"] != "").all()


# ---------------------------------------------------------------- noise, fronts, ties, agreement


def test_noise_floor_is_the_pooled_spread_between_seeds():
    results = pd.DataFrame({"val_loss": [0.50, 0.60, 0.70]}, index=["c1", "c2", "c3"])
    repeats = pd.DataFrame({"config": ["c1", "c1", "c2"], "seed": [1, 2, 1], "val_loss": [0.51, 0.52, 0.63]})
    noise = noise_floor(results, repeats, "val_loss")
    pooled = math.sqrt((2 * 0.01**2 + 0.03**2 / 2) / 3)
    assert noise.between_seeds.value == pytest.approx(pooled)
    assert (noise.df, noise.n_runs) == (3, 5)
    assert noise.between_seeds.low < pooled < noise.between_seeds.high
    assert noise.resolution > 2.7 * pooled  # t with 3 degrees of freedom, not 1.96
    assert noise_floor(results, repeats.iloc[:0], "val_loss") is None


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


# ---------------------------------------------------------------- agreement on ratings, and on one's own answers

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


def judgements(winners: list[str], purpose: str = "anchor") -> pd.DataFrame:
    """One comparison of `mine` with `theirs` per prompt, and who won it."""
    n = len(winners)
    ids = {"prompt_id": [f"p{i}" for i in range(n)], "scenario_id": [f"s{i}" for i in range(n)], "purpose": purpose}
    return pd.DataFrame(ids | {"config_first": "mine", "config_second": "theirs", "winner": winners})


def test_self_preference_is_the_surplus_over_the_other_judges():
    vain = judgements(["mine"] * 30 + ["theirs"] * 10)
    other = judgements(["mine"] * 10 + ["tie"] * 20 + ["theirs"] * 10)
    swapped = other.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    for others in ([other], [swapped], [other, other]):
        gap, n = self_preference(vain, others, {"mine"}, 200, 0)
        assert gap.value == pytest.approx(30 / 40 - 20 / 40) and n == 40
        assert 0 < gap.low < gap.value < gap.high
    assert self_preference(vain, [], {"mine"}, 50, 0)[1] == 0
    assert self_preference(vain, [other], {"mine", "theirs"}, 50, 0)[1] == 0  # own against own says nothing


def test_whose_answers_are_a_judges_own():
    configs = ["c01", "c02"]
    assert own_answers("checklist", None, "tiny", None, configs) == set()
    assert own_answers("embedding", "mini", "tiny", None, configs) == {"reference"}
    assert own_answers("openai-compatible", "tiny", "tiny", None, configs) == {"c01", "c02", "untuned"}
    assert own_answers("anthropic", "big", "tiny", "big", configs) == {"reference"}


def test_ratings_of_two_judges_give_an_alpha_per_criterion_and_of_one_a_reason():
    panel = [make_judge(pd.Series({"c01": 1.0, "c02": 0.0}), name=name) for name in ("one", "two")]
    rng = np.random.default_rng(2)
    ids = [{"prompt_id": f"p{i}", "scenario_id": f"s{i}", "config": "c01"} for i in range(40)]
    base = pd.DataFrame(ids).assign(factual=rng.integers(1, 6, 40), tone=3)
    both = pd.concat([base.assign(rater="one", tone=np.nan), base.assign(rater="two")])
    found = {f.id: f for f in findings.rubric_findings(panel, both, 100, 0)}
    assert found["alpha.factual"].value == pytest.approx(1)
    assert found["alpha.tone"].verdict == "not estimable" and found["alpha.tone"].value is None
    (alone,) = findings.rubric_findings(panel, base.assign(rater="one"), 100, 0)
    assert "fewer than two judges" in alone.blocked_by[0]


def test_the_gate_is_shown_control_by_control_for_every_judge():
    def control(name, value, passed):
        return {"control": name, "value": value, "rule": ">=", "threshold": 0.95, "n": 40, "passed": passed}

    score = pd.Series({"c01": 1.0, "c02": 0.0})
    good = make_judge(score, controls=(control("truncated", 0.975, True), control("wrong_number", 1.0, True)))
    bad = make_judge(
        score, name="embedding", controls=(control("wrong_number", 0.75, False), control("late", None, False))
    )
    table = gate_table([good, bad]).set_index("control")
    assert table.loc["wrong_number", "embedding (offline proxy)"] == "0.750 (n = 40) FAILED"
    assert table.loc["truncated", "checklist (offline proxy)"] == "0.975 (n = 40) passed"
    assert table.loc["late", "embedding (offline proxy)"] == "no question FAILED"
    assert pd.isna(table.loc["late", "checklist (offline proxy)"])


def test_a_judge_that_has_ranked_nothing_is_blocked_and_leaves_the_others_as_they_are():
    planted = fake_study.truth(fake_study.design())["quality"]
    blocks = ("failed its validity gate (no result)", "no ranking: nothing was judged")
    silent = make_judge(planted * np.nan, name="silent", gate_passed=False, coverage=0.0, headline_blocks=blocks)
    study = make_study(16, [make_judge(planted), silent])
    assert recommendation.recommend(study).config == recommendation.recommend(make_study()).config
    found = {f.id: f for f in findings.all_findings(study)}
    assert found["tau.silent"].value is None and "gain.silent" not in found
    assert any("no ranking" in block for block in silent.blocks)
    table = results_table({"c01": {}}, {}, {}, [silent])
    assert table[["silent_score", "silent_rank"]].isna().all().all()


# ---------------------------------------------------------------- what may be said


def test_a_judge_that_failed_its_gate_neither_chooses_nor_carries_a_headline():
    planted = fake_study.truth(fake_study.design())["quality"]
    blocks = ("failed its validity gate (injection)",)
    bad = make_judge(-planted, name="bad", gate_passed=False, headline_blocks=blocks)
    study = make_study(16, [make_judge(planted), bad])
    assert recommendation.recommend(study).config == recommendation.recommend(make_study()).config
    blocked = finding(study, "tau.bad")
    assert blocked.verdict == "blocked"
    assert "injection" in blocked.blocked_by[0]
    assert blocked.value is not None  # shown, with its failure


@pytest.mark.parametrize(
    ("judged", "passed", "reason"),
    [
        ((97, 100, 100), True, "coverage below 98%: c01 97.0%"),
        ((980, 1000, 1000), True, "depend on the configuration"),
        ((100, 100, 100), False, "failed its validity gate (no result)"),
    ],
)
def test_low_coverage_or_uneven_gaps_or_no_gate_block_the_recommendation(judged, passed, reason):
    table = pd.DataFrame({"config": ["c01", "c02", "c03"], "planned": max(judged), "judged": judged})
    table["coverage"] = table["judged"] / table["planned"]
    blocks = headline_blocks({"passed": passed, "controls": []}, table, None)
    planted = fake_study.truth(fake_study.design())["quality"]
    deploy = finding(make_study(16, [make_judge(planted, headline_blocks=tuple(blocks))]), "deploy")
    assert (deploy.value, deploy.verdict) == (None, "blocked")
    assert len(blocks) == 1 and reason in deploy.blocked_by[0]


@pytest.mark.parametrize(("untuned", "deployed"), [(9.0, False), (-9.0, True)])
def test_nothing_is_recommended_if_the_untuned_model_surely_answers_better(untuned, deployed):
    planted = fake_study.truth(fake_study.design())["quality"]
    judge = make_judge(pd.concat([planted, pd.Series({"untuned": untuned})]))
    placed = dataclasses.replace(judge, ranking=judge.ranking.assign(is_anchor=judge.ranking.index == "untuned"))
    deploy = finding(make_study(16, [placed]), "deploy")
    assert (deploy.value is not None) == deployed
    assert deployed or "the untuned model answers better" in deploy.blocked_by[0]


def test_the_configuration_that_loss_misplaces_most_is_named_with_both_ranks():
    configs = fake_study.design()
    score = -fake_study.truth(configs)["loss"]
    best = score.idxmax()
    score[best] = score.min() - 1  # the lowest loss, and the worst answers
    told = finding(make_study(16, [make_judge(score, noise=0.001)]), "misplaced.checklist")
    assert told.value == 16
    assert f"Loss misplaces {best} most: 1 of 16 by loss, 16 of 16" in told.statement


def test_energies_of_different_kinds_stand_on_no_ranking():
    study = make_study(4, energy_kind=["measured", "measured", "estimated", "measured"])
    ratio = finding(study, "energy_ratio")
    assert (ratio.value, ratio.verdict) == (None, "blocked")
    assert not [f for f in findings.all_findings(study) if f.id.startswith("pareto")]
    assert "training energy" not in " ".join(effect_tables(study)["response"])


def test_windows_too_short_to_trust_block_energy_and_do_not_choose():
    score = pd.Series({"c01": 0.0, "c02": 0.05, "c03": 0.1, "c04": -3.0})
    study = make_study(4, [make_judge(score)], train_energy_wh=[1.0, 1.1, 4.0, 0.1])
    short = StudyResults(study.results, study.loss_draws, study.judges, study.repeats, ("c02",))
    assert recommendation.recommend(short).config == "c03"
    ratio = finding(short, "energy_ratio")
    assert ratio.verdict == "blocked" and "too short" in ratio.blocked_by[0]
    assert finding(short, "pareto.checklist").verdict == "blocked"


def test_an_estimate_is_called_one_wherever_energy_is_stated():
    said = [f.statement for f in findings.all_findings(make_study()) if " Wh" in f.statement]
    assert said
    assert all("estimated" in text for text in said)


def test_offline_judges_are_called_proxies_wherever_they_are_named():
    study = make_study(16)
    for found in findings.all_findings(study):
        if "checklist" in found.statement and not found.id.startswith("effect"):
            assert "proxy" in found.statement
    assert make_judge(pd.Series({"a": 1.0}), name="claude", kind="anthropic").label == "claude"


def test_chance_is_stated_beside_the_rank_of_the_lowest_loss():
    configs = [f"c{i:02d}" for i in range(1, 17)]
    loss = pd.Series(np.linspace(0.5, 0.68, 16), configs)
    score = pd.Series(np.linspace(1, -1, 16), configs)
    score["c01"], score["c16"] = score.iloc[5] + 0.01, 2.0  # as in the paper: 6th or 7th, and first
    study = make_study(16, [make_judge(score, 0.01)], val_loss=loss.to_numpy())
    best, worst = finding(study, "best_loss_rank.checklist"), finding(study, "worst_loss_rank.checklist")
    assert (best.value, worst.value) == (6, 1)
    assert "probability 0.69" in best.statement  # 11 of 16
    assert "probability 0.06" in worst.statement  # 1 of 16


def test_nothing_is_claimed_from_three_configurations():
    study = make_study(3)
    tau = finding(study, "tau.checklist")
    assert (tau.verdict, tau.value) == ("not estimable", None)
    assert finding(study, "top3.checklist").verdict == "not estimable"
    assert finding(study, "noise_floor").blocked_by


def test_the_untuned_model_is_compared_where_the_judge_has_placed_it():
    planted = fake_study.truth(fake_study.design())["quality"]
    judge = make_judge(pd.concat([planted, pd.Series({"untuned": -4.0})]))
    judge.ranking.loc["untuned", "is_anchor"] = True
    gain = finding(make_study(16, [judge]), "gain.checklist")
    assert gain.low > 0
    assert "untuned" not in judge.scores


def test_findings_are_strict_json_with_the_agreed_keys():
    text = findings.to_json(findings.all_findings(make_study(3)))
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in findings.json"))
    assert set(rows[0]) == {"id", "statement", "value", "low", "high", "n", "verdict", "blocked_by"}
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_paper_stands_beside_ours_with_its_published_facts():
    table = findings.paper_table(make_study(), "tiny").set_index("quantity")["paper"]
    assert table["lowest validation loss"] == "0.5024"
    assert table["highest validation loss"] == "0.6807"
    assert table["training energy per configuration"] == "284-1371 Wh (factor 4.8)"


# ---------------------------------------------------------------- figures and the notebook itself


def test_spread_keeps_order_and_distance():
    values = [0.0, 0.01, 0.02, 5.0]
    placed = charts.spread(values, 1.0)
    assert (np.diff(placed) >= 1.0 - 1e-9).all()
    assert placed[3] == pytest.approx(5.0)
    assert placed[:3].mean() == pytest.approx(0.01)


def test_a_component_without_a_meter_gets_no_bar_of_zero():
    wide = charts.energy_by_component(fake_study.energy_table("train", 1.0).assign(config="c01"), ["c01", "c02"])
    assert wide.loc["c01", "cpu_wh"] == pytest.approx(1.0)
    assert math.isnan(wide.loc["c01", "gpu_wh"])
    assert wide.loc["c02"].isna().all()
    assert charts.kinds_text(wide) == "estimated"


@pytest.mark.parametrize(
    ("n", "judges", "repeats"),
    [(2, ("checklist",), 0), (5, ("checklist", "embedding", "third"), 1), (24, ("embedding",), 2)],
)
def test_06_runs_for_any_number_of_configurations_and_judges(tmp_path, monkeypatch, n, judges, repeats):
    root = fake_study.build_study(tmp_path, n, judges, repeats)
    folder = fake_study.run_analysis(root, n, judges, repeats, monkeypatch)
    results = pd.read_csv(root / "results.csv")
    assert list(results.columns) == result_columns(judges)
    assert len(results) == n
    assert json.loads((root / "findings.json").read_text())
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    pairs = pd.read_parquet(folder / "tables" / "row_pairs.parquet")
    assert len(pairs) == len(judges) * len(one_factor_pairs(fake_study.design(n)))
    assert {"loss_vs_quality", "rank_slopes", "judge_agreement", "energy_quality", "energy", "loss_curves"} <= figures


def test_06_runs_with_a_judge_that_was_stopped_before_it_ranked_anything(tmp_path, monkeypatch):
    root = fake_study.build_study(tmp_path, 5, ("checklist",), 1)
    builder, planted = fake_study.Builder(tmp_path), fake_study.truth(fake_study.design(5))["quality"]
    fake_study.add_judge(builder, np.random.default_rng(1), "silent", planted * np.nan, passed=False)
    fake_study.run_analysis(root, 5, ("checklist", "silent"), 1, monkeypatch)
    results = pd.read_csv(root / "results.csv")
    assert results["silent_score"].isna().all() and (results["silent_gate"] == "failed").all()
    assert results["checklist_score"].notna().all()
    told = {row["id"]: row for row in json.loads((root / "findings.json").read_text())}
    assert told["tau.silent"]["value"] is None and told["tau.checklist"]["value"] is not None
    gate = pd.read_csv(root / "study" / "06_analysis" / "tables" / "gate.csv")
    assert gate["silent"].str.contains("FAILED").all()
