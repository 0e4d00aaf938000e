"""The luck of training: runs of a configuration become one score, whose intervals hold what another seed changes."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study
from scipy import stats

from telco_nb.analysis import findings, inference, seeds
from telco_nb.analysis.recommendation import compare, mean_expected_scores, recommend, seed_text
from telco_nb.analysis.results import JudgeResults, StudyResults

CONFIGS = [f"c{i:02d}" for i in range(1, 9)]
RUNS = [*CONFIGS, *(f"{config}-seed1" for config in CONFIGS[:6])]
LAPTOP = [*CONFIGS, *(f"{config}-seed1" for config in CONFIGS[:4])]  # 4 degrees of freedom


def judged(
    rng: np.random.Generator, truth: pd.Series, luck: float, noise: float = 0.15, runs: list[str] = RUNS
) -> JudgeResults:
    """Runs as 05 ranks them: the truth of the configuration, luck of the run, noise that the draws know of."""
    score = pd.Series([truth[seeds.config_of(run)] for run in runs], runs)
    score += rng.normal(0, luck, len(runs)) + rng.normal(0, noise, len(runs))
    score -= score.mean()
    draws = pd.DataFrame(score.to_numpy() + rng.normal(0, noise, (400, len(runs))), columns=runs)
    ranks = draws.rank(axis=1, ascending=False)
    table = pd.DataFrame({"score": score, "low": draws.quantile(0.025), "high": draws.quantile(0.975), "p_best": 0.1})
    table["rank"], table["rank_low"], table["rank_high"] = 1.0, ranks.quantile(0.025), ranks.quantile(0.975)
    table = table.assign(is_anchor=False, n_terms=48, n_judgements=390)
    return JudgeResults("checklist", "checklist", True, 1.0, (), table.rename_axis("config"), draws)


def studied(judge: JudgeResults) -> StudyResults:
    return make_study(8, [judge])


def covered(table: pd.DataFrame, truth: pd.Series) -> tuple[float, float]:
    """The shares of intervals of score and of rank that hold the truth."""
    table, centred = table.loc[CONFIGS], truth - truth.mean()
    place = truth.rank(ascending=False)
    in_score = (table["low"] <= centred) & (centred <= table["high"])
    return float(in_score.mean()), float(((table["rank_low"] <= place) & (place <= table["rank_high"])).mean())


@pytest.mark.parametrize(("runs", "df"), [(RUNS, 6), (LAPTOP, 4)])
def test_intervals_with_the_luck_of_training_cover_score_and_rank_and_without_it_they_do_not(runs, df):
    """200 studies of 8 configurations. Ranks are whole numbers, so they cover more. A width is that of t."""
    rng, held, alone, widths = np.random.default_rng(5), [], [], []
    for study in range(200):
        truth = pd.Series(rng.normal(0, 0.6, 8), CONFIGS)
        judge = judged(rng, truth, 0.3, runs=runs)
        merged = seeds.merge_runs(judge, study).ranking
        held.append(covered(merged, truth))
        widths.append(merged.loc["c08", "high"] - merged.loc["c08", "low"])
        once = judge.ranking.loc[CONFIGS]
        once[["low", "high"]] -= once["score"].mean()
        alone.append(covered(once, truth)[0])
    score, place = np.mean(held, axis=0)
    assert 0.92 <= score <= 0.97 and 0.92 <= place <= 0.99, (score, place)
    assert np.mean(alone) < 0.75
    known = 2 * stats.norm.ppf(0.975) * np.sqrt((0.3**2 + 0.15**2) * 7 / 8)  # of one run, if the variances were known
    by_t = stats.t.ppf(0.975, df) / stats.norm.ppf(0.975)
    assert np.sqrt(np.mean(np.square(widths))) / known < 1.15 * by_t


@pytest.mark.parametrize("runs", [["c01-seed1"], ["c01-seed1", "c02-seed1"], LAPTOP[8:]])
def test_the_width_of_luck_is_that_of_t_and_its_variance_finite_down_to_one_degree_of_freedom(runs):
    runs = [*CONFIGS, *runs]
    judge = judged(np.random.default_rng(3), pd.Series(0.0, CONFIGS), 0.4, 0.01, runs)
    merged = [seeds.merge_runs(judge, seed) for seed in range(5)]
    luck = merged[0].luck
    wide = stats.t.ppf(0.975, luck.df) / stats.norm.ppf(0.975)
    for found in merged:  # whatever is drawn: a heavy tail would make it a matter of chance
        estimated = found.error_draws["c07"].std() / np.sqrt(7 / 8)
        assert estimated == pytest.approx(luck.sd.value, rel=0.12)
        assert found.draws["c07"].std() / found.error_draws["c07"].std() == pytest.approx(wide, rel=0.15)


def test_the_finding_says_when_too_few_repeats_tell_the_luck():
    truth, rng = pd.Series(0.0, CONFIGS), np.random.default_rng(3)
    few, enough = (
        seeds.luck_findings(studied(seeds.merge_runs(judged(rng, truth, 0.4, runs=runs))))[0].statement
        for runs in ([*CONFIGS, "c01-seed1"], LAPTOP)
    )
    assert "with 1 the intervals are wide, and still hold the truth less often than they say" in few
    assert "(noise of judging taken out; 1 configuration with 2 runs)" in few and "noise of judging included" in few
    assert "less often" not in enough


def test_expected_scores_are_shrunk_by_the_luck_that_was_estimated_not_by_the_width_of_t():
    truth = pd.Series(np.linspace(-0.5, 0.5, 8), CONFIGS)
    merged = seeds.merge_runs(judged(np.random.default_rng(3), truth, 0.4, 0.05, [*CONFIGS, "c01-seed1"]))
    as_wide = dataclasses.replace(merged, error_draws=None)
    expected, wide = (mean_expected_scores(studied(judge), [judge]) for judge in (merged, as_wide))
    assert expected.std() > 1.1 * wide.std()


def test_nobody_is_called_better_by_luck_alone():
    """100 studies of equal configurations, as much luck as 2 of 8 repeated twice tell."""
    rng, found = np.random.default_rng(8), []
    for study in range(100):
        merged = seeds.merge_runs(judged(rng, pd.Series(0.0, CONFIGS), 0.3, runs=LAPTOP), study)
        (table,) = compare(studied(merged), [merged]).values()
        found.append((table["better_than"].map(len).sum() > 0, table["can_be_best"].mean()))
    wrong, kept = np.mean(found, axis=0)
    assert wrong <= 0.1 and kept >= 0.92


def test_luck_is_drawn_by_name_and_apart_for_losses_and_each_judge():
    streams = [seeds.drawn_luck(1, stream, CONFIGS, 2000) for stream in ("loss", "judge a", "judge b")]
    together = pd.concat(streams, axis=1, keys=range(3)).corr().to_numpy()
    assert np.abs(together - np.eye(24)).max() < 0.1
    assert seeds.drawn_luck(1, "judge a", CONFIGS[::-1][:3], 2000).equals(streams[1][CONFIGS[::-1][:3]])
    assert not seeds.drawn_luck(2, "judge a", CONFIGS, 2000).equals(streams[1])


def test_the_order_of_a_ranking_does_not_hand_the_luck_of_one_configuration_to_another():
    rng, level = np.random.default_rng(2), pd.Series(0.0, CONFIGS)
    first = judged(rng, level, 0.5, noise=0.01)
    other = judged(rng, level, 0.5, noise=0.01, runs=RUNS[::-1])
    other = dataclasses.replace(other, name="embedding", kind="embedding")
    a, b = (seeds.merge_runs(judge, 1).draws[CONFIGS] for judge in (first, other))
    between = np.corrcoef(a.to_numpy().T, b.to_numpy().T)[:8, 8:]
    assert np.abs(between).max() < 0.25


def test_an_open_bound_widens_the_rank_and_one_term_gives_none():
    judge = judged(np.random.default_rng(2), pd.Series(np.linspace(1, -1, 8), CONFIGS), 0.02, noise=0.02)
    judge.ranking.loc["c01", ["low", "high"]] = [-2.0, np.nan]  # it won everything: its exact bound lies far down
    judge.ranking.loc["c01-seed1", ["low", "high"]] = [-2.0, np.nan]
    judge.ranking.loc["c05", "n_terms"] = 1
    table = seeds.merge_runs(judge).ranking
    assert table.loc["c01", "rank_high"] == 8 and table.loc["c02", "rank_high"] < 4
    assert table.loc["c05", ["low", "high", "rank_low", "rank_high", "p_best"]].isna().all()


def test_the_score_of_a_configuration_is_the_mean_of_its_runs_and_one_without_repeats_is_as_unsure():
    truth = pd.Series(np.linspace(-1, 1, 8), CONFIGS)
    judge = judged(np.random.default_rng(1), truth, 0.3, noise=0.02)
    merged = seeds.merge_runs(judge)
    runs = judge.ranking["score"]
    means = runs.groupby(runs.index.map(seeds.config_of)).mean()
    assert list(merged.scores.index) == CONFIGS and np.allclose(merged.scores, means - means.mean())
    assert np.allclose(merged.draws[CONFIGS].mean(axis=1), 0)
    width = (merged.ranking["high"] - merged.ranking["low"])[CONFIGS]
    assert width[CONFIGS[6:]].min() > width[CONFIGS[:6]].max() > 5 * 4 * 0.02
    assert merged.first_scores.equals(runs[CONFIGS]) and merged.ranking.loc["c01", "n_judgements"] == 780


def test_luck_is_the_pure_error_of_runs_less_the_noise_and_runs_that_do_not_differ_tell_none():
    judge = judged(np.random.default_rng(3), pd.Series(0.0, CONFIGS), 0.4)
    runs = judge.ranking["score"]
    error = inference.pure_error(runs.set_axis(runs.index.map(seeds.config_of)))
    luck = seeds.training_luck(runs, judge.draws)
    assert (luck.total, luck.df) == (pytest.approx(error.sd**2), error.df) == (luck.total, 6)
    assert 0 < luck.noise < luck.total and seeds.training_luck(runs).noise == 0
    assert seeds.training_luck(runs * 0) is None and seeds.training_luck(runs[CONFIGS]) is None


def test_the_spread_between_seeds_has_one_name_for_losses_and_scores():
    judge = seeds.merge_runs(judged(np.random.default_rng(3), pd.Series(0.0, CONFIGS), 0.4))
    study = studied(judge)
    repeats = pd.DataFrame({"config": CONFIGS[:6], "seed": 1, "val_loss": 0.5, "train_energy_wh": 1.0})
    said = [seeds.noise_finding(dataclasses.replace(study, repeats=repeats)), *seeds.luck_findings(study)]
    assert all(finding.statement.startswith("The standard deviation between seeds of the ") for finding in said)
    assert [finding.n for finding in said] == [12, 12]


def test_luck_is_found_and_the_noise_of_verdicts_is_not_taken_for_it():
    rng = np.random.default_rng(3)
    level = pd.Series(0.0, CONFIGS)
    found = {luck: [seeds.merge_runs(judged(rng, level, luck)).luck.sd for _ in range(60)] for luck in (0.0, 0.4)}
    assert abs(np.mean([luck.value for luck in found[0.4]]) - 0.4) < 0.06
    assert np.median([luck.value for luck in found[0.0]]) < 0.08
    held = np.mean([luck.low <= 0.4 <= luck.high for luck in found[0.4]])
    assert held >= 0.88


def test_without_repeats_nothing_changes():
    judge = make_judge(pd.Series({"c01": 0.5, "c02": -0.5}))
    assert seeds.merge_runs(judge) is judge
    study = make_study(4)
    assert seeds.with_loss_luck(study) is study and seeds.luck_findings(study) == []


def test_a_judge_without_a_ranking_keeps_one_row_for_each_configuration():
    judge = judged(np.random.default_rng(1), pd.Series(0.0, CONFIGS), 0.1)
    numbers = ["score", "low", "high", "rank", "rank_low", "rank_high", "p_best"]
    missing = dataclasses.replace(judge, ranking=judge.ranking.assign(**dict.fromkeys(numbers, np.nan)))
    merged = seeds.merge_runs(missing)
    assert list(merged.ranking.index) == CONFIGS and merged.scores.empty and merged.luck is None


def test_anchors_stay_on_the_scale_and_an_open_bound_stays_open():
    judge = judged(np.random.default_rng(2), pd.Series(np.linspace(-1, 1, 8), CONFIGS), 0.1)
    judge.ranking.loc["c08", "high"] = np.nan
    judge.ranking.loc["untuned"] = judge.ranking.loc["c01"].replace({0.1: np.nan})
    judge.ranking["is_anchor"] = judge.ranking.index == "untuned"
    judge.draws["untuned"] = judge.draws["c01"]
    merged = seeds.merge_runs(judge)
    runs = judge.ranking["score"]
    lead = runs[["c08"]].mean() - runs["untuned"]
    assert np.isclose(merged.ranking.loc["c08", "score"] - merged.ranking.loc["untuned", "score"], lead)
    assert np.isnan(merged.ranking.loc["c08", "high"]) and np.isfinite(merged.ranking.loc["c08", "low"])
    assert "untuned" in merged.draws and "untuned" not in merged.scores.index


def test_luck_reaches_tau_the_comparison_with_the_best_and_the_recommendation():
    rng = np.random.default_rng(9)
    truth = pd.Series(np.linspace(-0.6, 0.6, 8), CONFIGS)
    judge = judged(rng, truth, 0.5, noise=0.02)
    alone = dataclasses.replace(judge, ranking=judge.ranking.loc[CONFIGS], draws=judge.draws[CONFIGS])
    with_luck, without = studied(seeds.merge_runs(judge)), studied(alone)
    widths = []
    for study in (with_luck, without):
        found = {f.id: f for f in findings.all_findings(study)}["tau.checklist"]
        widths.append(found.high - found.low)
    assert widths[0] > 1.3 * widths[1]
    rivals = [compare(s, s.judges)["checklist (offline proxy)"]["can_be_best"].sum() for s in (with_luck, without)]
    assert rivals[0] > rivals[1] == 1
    assert not recommend(with_luck).is_supported and recommend(without).is_supported
    assert "Intervals include the variation between training seeds" in seed_text(with_luck)
    said = seeds.luck_findings(with_luck)[0]
    assert said.id == "luck.checklist" and "6 configurations with 12 runs" in said.statement
    assert "kappa, alpha, self-preference and what votes correct do not" in said.statement


def test_the_luck_of_a_loss_moves_all_losses_of_a_configuration_together():
    study = make_study(8)
    repeats = pd.DataFrame({"config": CONFIGS[:6], "seed": 1, "train_energy_wh": 1.0})
    repeats["val_loss"] = study.losses[CONFIGS[:6]].to_numpy() + np.array([0.1, -0.1] * 3)
    study = dataclasses.replace(study, repeats=repeats, set_draws={"test_loss": study.loss_draws + 1})
    moved = seeds.with_loss_luck(study, 1)
    assert moved.losses.equals(study.losses)
    assert moved.loss_draws.std().min() > 5 * study.loss_draws.std().max()
    assert np.allclose(moved.set_draws["test_loss"] - moved.loss_draws, 1)


def test_repeats_get_their_scores_so_that_effects_have_the_error_between_runs():
    judge = seeds.merge_runs(judged(np.random.default_rng(2), pd.Series(np.linspace(-1, 1, 8), CONFIGS), 0.1))
    table = seeds.with_scores(pd.DataFrame({"config": CONFIGS[:6], "seed": 1, "val_loss": 0.5}), [judge])
    assert judge.runs is not None
    assert table["checklist_score"].tolist() == [judge.runs[f"{config}-seed1"] for config in CONFIGS[:6]]
