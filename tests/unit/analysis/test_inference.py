"""Inference that respects the design: its error rates in simulated studies, and against published and other sums."""

from __future__ import annotations

import itertools

import fake_study
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from telco_nb.analysis import inference, statistics
from telco_nb.analysis.effects import FACTORS, ORDER_SHARE, main_effects, order_shares
from telco_nb.study.plan import run_order

DESIGN = fake_study.design()
LEVELS = DESIGN[list(FACTORS)]
CODES = [pd.factorize(LEVELS[factor])[0] for factor in FACTORS]


def driven(rng: np.random.Generator, sizes: tuple[float, ...], noise: float, interaction: float = 0.0) -> np.ndarray:
    """A score that the factors drive: effects of the given sizes in random directions, an interaction, and noise."""
    score = noise * rng.normal(size=16)
    for size, code in zip(sizes, CODES, strict=True):
        score = score + size * (rng.normal(size=4) if code.max() > 1 else rng.choice([-1, 1]) * np.array([-1, 1]))[code]
    return score + interaction * rng.choice([-1, 1]) * (2 * CODES[1] - 1) * (2 * CODES[2] - 1)


def relabelled_p(relabelled: np.ndarray, loss: np.ndarray, score: np.ndarray) -> float:
    return inference.relabelling_p(
        inference.relabelled_values(statistics.tau_rows, relabelled, (loss, score), (True, False))
    )


# ---------------------------------------------------------------- the design as the unit


def test_the_16_run_array_has_32_relabellings_and_each_keeps_who_shares_a_level():
    found = inference.relabellings(LEVELS)
    assert found.shape == (32, 16) and (found[0] == np.arange(16)).all()
    assert len({tuple(row) for row in found}) == 32
    for row in found:
        for code in CODES:
            moved = code[row]
            assert len(set(zip(code, moved, strict=True))) == code.max() + 1  # one level becomes one level
    composed = {tuple(a[b]) for a, b in itertools.product(found, found)}
    assert composed == {tuple(row) for row in found}  # a group, so the test is exact


def test_relabellings_of_other_sets():
    full = pd.DataFrame(list(itertools.product("ab", "xyz")), columns=["f", "g"])
    assert len(inference.relabellings(full)) == 2 * 6
    assert len(inference.relabellings(LEVELS.iloc[:15])) == 2  # those that leave the missing run where it is
    assert len(inference.relabellings(pd.concat([full, full.iloc[:1]]))) == 1  # repeated levels
    large = pd.DataFrame(list(itertools.product(range(4), repeat=3)), columns=list("abc"))
    sampled = inference.relabellings(large, seed=1)
    assert (np.sort(sampled, axis=1) == np.arange(64)).all() and len(sampled) > 4000
    assert (sampled == inference.relabellings(large, seed=1)).all()


@pytest.mark.parametrize("sizes", [(0.7, 0.7, 1.0, 1.0), (0.5, 0.5, 3.0, 1.0), (0.5, 0.5, 1.0, 1.0), (0, 0, 0, 0)])
def test_false_positives_stay_below_5_percent_where_factors_drive_both_sides(sizes):
    """The second case is the study's own: the number of epochs moves loss and answers most."""
    rng, relabelled, n = np.random.default_rng(11), inference.relabellings(LEVELS), 400
    critical, hits, plain = statistics.critical_tau(16), 0, 0
    interaction = 2.0 if sizes == (0.5, 0.5, 1.0, 1.0) else 0.0
    for _ in range(n):
        loss, score = (driven(rng, sizes, 0.3, interaction) for _ in "ab")
        p = relabelled_p(relabelled, loss, score)
        hits += p < 0.05
        plain += abs(statistics.tau_rows(loss, score)[0]) >= critical
    assert hits / n <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n)
    assert sum(sizes) == 0 or plain / n > 0.25  # what shuffled configurations would claim


def test_whichever_side_is_relabelled_p_is_the_same_because_relabellings_form_a_group():
    rng, relabelled = np.random.default_rng(6), inference.relabellings(LEVELS)
    for _ in range(20):
        loss, score = (driven(rng, (0.5, 0.5, 2.0, 1.0), 0.3) for _ in "ab")
        assert relabelled_p(relabelled, loss, score) == relabelled_p(relabelled, score, loss)


def test_adjusted_p_claim_any_of_five_unrelated_statistics_in_at_most_5_percent_and_still_reach_one_in_32():
    """The five share the relabellings and the score. Plain p claim one of them more often."""
    rng, relabelled, n, sizes = np.random.default_rng(7), inference.relabellings(LEVELS), 400, (0.7, 0.7, 1.0, 1.0)
    any_plain, any_adjusted = 0, 0
    for _ in range(n):
        score, losses = driven(rng, sizes, 0.3), [driven(rng, sizes, 0.3) for _ in range(5)]
        values = np.array([
            inference.relabelled_values(statistics.tau_rows, relabelled, (loss, score), (True, False))
            for loss in losses
        ])  # fmt: skip
        adjusted, plain = inference.step_down_p(values), [inference.relabelling_p(row) for row in values]
        assert (adjusted >= np.array(plain) - 1e-12).all()
        any_adjusted += adjusted.min() < 0.05
        any_plain += min(plain) < 0.05
    assert any_adjusted / n <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n) < any_plain / n
    clear = np.vstack([np.where(np.arange(32) == 0, 0.9, 0.1), rng.uniform(-0.2, 0.2, (4, 32))])
    assert inference.step_down_p(clear)[0] == 1 / 32


def test_the_step_down_is_that_of_westfall_and_young_by_hand():
    """Three statistics of one size over four relabellings: the second is compared without the first."""
    values = np.array([[3.0, 1.0, -1.0, 1.0], [2.0, 2.0, 0.0, 2.0], [0.0, 2.0, 2.0, 2.0]])
    values *= np.sqrt(3 / (values**2).mean(axis=1, keepdims=True))
    assert inference.step_down_p(values) == pytest.approx([0.25, 1.0, 1.0])
    assert inference.step_down_p(values[::-1]) == pytest.approx([1.0, 1.0, 0.25])
    assert inference.step_down_p(np.zeros((2, 4))) == pytest.approx([1.0, 1.0])


def test_a_true_relation_can_be_found_and_p_goes_down_to_one_in_32():
    rng, relabelled, found = np.random.default_rng(2), inference.relabellings(LEVELS), 0
    for _ in range(100):
        loss = driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3)
        score = -loss + 0.3 * loss.std() * rng.normal(size=16)
        p = relabelled_p(relabelled, loss, score)
        assert p >= 1 / 32
        found += p < 0.05
    assert found >= 55


def test_tau_within_a_factor_uses_only_pairs_alike_in_it():
    rng = np.random.default_rng(0)
    epochs = (LEVELS["epochs"] > 1).astype(float)
    loss = pd.Series(rng.normal(size=16), DESIGN.index) - 9 * epochs
    score = pd.Series(rng.normal(size=16), DESIGN.index) + 9 * epochs
    within = inference.taus_within(LEVELS, loss, score)
    by_level = inference.taus_by_level(LEVELS["epochs"], loss, score)
    assert statistics.kendall_tau(loss, score) < -0.4 < within["epochs"]
    assert within["epochs"] == pytest.approx(np.mean(list(by_level.values())))  # no ties, levels of equal size
    for level, tau in by_level.items():
        kept = LEVELS["epochs"] == level
        assert tau == pytest.approx(stats.kendalltau(loss[kept], score[kept]).statistic)


def test_tau_of_rows_equals_scipy_with_ties_and_is_missing_for_a_constant():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, (300, 9)), rng.normal(size=(300, 9))
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert statistics.tau_rows(a, b) == pytest.approx(expected)
    assert statistics.tau_rows(a, b[0]) == pytest.approx([stats.kendalltau(x, b[0]).statistic for x in a])
    assert np.isnan(statistics.tau_rows(np.ones(5), np.arange(5.0))).all()


def test_partial_tau_is_the_rank_correlation_left_at_equal_third_values():
    rng = np.random.default_rng(4)
    given = rng.normal(size=(1, 400))
    a, b = given + 0.5 * rng.normal(size=(1, 400)), given + 0.5 * rng.normal(size=(1, 400))
    t = [stats.kendalltau(*pair).statistic for pair in ((a[0], b[0]), (a[0], given[0]), (b[0], given[0]))]
    expected = (t[0] - t[1] * t[2]) / np.sqrt((1 - t[1] ** 2) * (1 - t[2] ** 2))
    assert inference.partial_tau_rows(a, b, given)[0] == pytest.approx(expected)
    assert abs(expected) < 0.35 < t[0]


# ---------------------------------------------------------------- errors of effects


# Montgomery, Design and Analysis of Experiments, the pilot plant filtration rate, 2^4 runs in standard order. There:
# PSE 2.625, margin of error 6.748; A, C, D, AC and AD are active.
FILTRATION = [45, 71, 48, 65, 68, 60, 80, 65, 43, 100, 45, 104, 75, 86, 70, 96]


def test_lenths_error_is_that_of_the_textbook_example():
    runs = pd.DataFrame([run[::-1] for run in itertools.product((0, 1), repeat=4)], columns=list("ABCD"))
    y = pd.Series(FILTRATION, dtype=float)
    contrasts = inference.saturated_contrasts(runs)
    effects = np.sort(np.abs(contrasts.T @ y) / 2)[::-1]  # 16 runs: an effect is half its orthonormal contrast
    assert effects[:5] == pytest.approx([21.625, 18.125, 16.625, 14.625, 9.875])
    error = inference.lenth_error(runs, y)
    assert error.sd / 2 == pytest.approx(2.625)
    assert error.df == 5
    assert stats.t.ppf(0.975, error.df) * error.sd / 2 == pytest.approx(6.748, abs=5e-3)


@pytest.mark.parametrize("levels", [LEVELS, LEVELS.iloc[:11], fake_study.design(24)[list(FACTORS)]])
def test_contrasts_are_orthonormal_and_use_up_any_design(levels):
    contrasts = inference.saturated_contrasts(levels)
    assert contrasts.shape == (len(levels), len(levels) - 1)
    assert contrasts.T @ contrasts == pytest.approx(np.eye(len(levels) - 1), abs=1e-9)
    assert contrasts.sum(axis=0) == pytest.approx(np.zeros(len(levels) - 1), abs=1e-9)


def test_lenth_needs_eight_configurations_and_something_that_varies():
    y = pd.Series(np.random.default_rng(0).normal(size=16), DESIGN.index)
    assert inference.lenth_error(LEVELS.iloc[:7], y.iloc[:7]) is None
    assert inference.lenth_error(LEVELS, y * 0 + 3) is None


def repeated_runs(rng: np.random.Generator, means: pd.Series, noise: float) -> pd.Series:
    runs = means[["c06", "c06", "c11", "c11"]]
    return runs + noise * rng.normal(size=4)


def test_pure_error_and_lack_of_fit_equal_the_sums_of_squares():
    rng = np.random.default_rng(5)
    y = pd.Series(driven(rng, (1, 1, 1, 1), 0.2, 1.0), DESIGN.index)
    repeats = repeated_runs(rng, y, 0.2)
    table = main_effects(DESIGN, y, repeats=repeats)
    runs = pd.concat([y, repeats])
    within = sum(((runs[[c]] - runs[[c]].mean()) ** 2).sum() for c in ("c06", "c11"))
    x = sm.add_constant(pd.get_dummies(LEVELS.astype(str), drop_first=True, dtype=float)).loc[runs.index]
    residual = float(sm.OLS(runs, x).fit().ssr)
    f = ((residual - within) / 9) / (within / 4)
    assert table["lack_of_fit_f"].iloc[0] == pytest.approx(f)
    assert table["lack_of_fit_p"].iloc[0] == pytest.approx(stats.f.sf(f, 9, 4))
    row = table.set_index("factor").loc["epochs"]
    half = stats.t.ppf(0.975, 4) * np.sqrt(within / 4) * np.sqrt(4 / 16)
    assert (row["low"], row["high"]) == pytest.approx((row["effect"] - half, row["effect"] + half))
    assert "4 degrees of freedom" in row["error"]


def test_without_repeats_the_error_is_lenths_and_says_so():
    y = pd.Series(driven(np.random.default_rng(6), (0, 0, 2, 0), 1.0), DESIGN.index)
    table = main_effects(DESIGN, y)
    assert table["error"].str.startswith("Lenth's pseudo standard error, 15 contrasts").all()
    assert table["lack_of_fit_p"].isna().all()
    same = main_effects(DESIGN, y, repeats=y[["c06", "c11"]])  # repeats that do not differ measure no error
    assert same["error"].equals(table["error"])


@pytest.mark.parametrize(("repeats", "coverage"), [(True, (0.92, 0.98)), (False, (0.94, 0.995))])
def test_intervals_of_effects_cover_the_truth_and_holm_holds_the_family(repeats, coverage, monkeypatch):
    """Lenth's intervals are known to cover a little more than they say."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # statsmodels collects before every adjustment of p-values
    rng, hits, families, n = np.random.default_rng(7), 0, 0, 250
    for _ in range(n):
        y = pd.Series(2.0 * CODES[2] + rng.normal(size=16), DESIGN.index)
        more = repeated_runs(rng, pd.Series(2.0 * CODES[2], DESIGN.index), 1.0) if repeats else None
        table = main_effects(DESIGN, y, repeats=more)
        truth = np.where(table["factor"] == "epochs", 2.0, 0.0)
        hits += ((table["low"] <= truth) & (truth <= table["high"])).sum()
        families += (table.loc[table["factor"] != "epochs", "p_holm"] < 0.05).any()
    assert coverage[0] <= hits / (6 * n) <= coverage[1]
    assert families / n <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n)


def test_the_drawn_order_of_runs_follows_no_factor_whatever_the_seed():
    for seed in range(50):
        order = run_order(list(DESIGN.index), seed)
        assert sorted(order) == sorted(DESIGN.index)
        shares = order_shares(DESIGN.loc[order])
        assert shares["target_modules"] < 0.2 and max(shares.values()) < ORDER_SHARE


def test_the_order_of_runs_is_that_of_their_starts():
    order = run_order(list(DESIGN.index), 1)
    started = pd.Series([f"2026-11-26T{hour:02}:00:00+00:00" for hour in range(16)], order)
    assert order_shares(DESIGN.assign(train_started_at=started)) == order_shares(DESIGN.loc[order])


def test_runs_in_the_order_of_names_follow_the_target_modules():
    shares = order_shares(DESIGN)
    assert shares["target_modules"] == pytest.approx(320 / 340)
    assert max(shares[factor] for factor in FACTORS[1:]) < 0.05
    in_turn = order_shares(DESIGN.loc[[f"c{4 * block + k:02d}" for k in range(1, 5) for block in range(4)]])
    assert in_turn["target_modules"] < 0.1
