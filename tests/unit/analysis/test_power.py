"""What a study can tell: the computed power is the share of simulated studies that find the difference."""

import dataclasses
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study
from scipy import stats

from telco_nb.analysis import power, seeds
from telco_nb.analysis.power import Errors
from telco_nb.analysis.results import JudgeResults

ERRORS = Errors(prompts=0.04, terms=24, training=0.06, df_training=8, configs=16)


def rejected(
    errors: Errors, difference: float, times: float = 1.0, margin: float | None = None, n: int = 6000
) -> float:
    """The share of simulated studies whose t test finds a difference (or, with a margin, shows equivalence).

    Each has values of terms, one run of both configurations with its luck, and an estimate of the luck from repeats.
    """
    rng, terms = np.random.default_rng(2), round(errors.terms * times)
    per_term = rng.normal(0, np.sqrt(errors.prompts * errors.terms), (n, terms))
    seen = difference + per_term.mean(1) + rng.normal(0, np.sqrt(errors.training), n)
    prompts = per_term.var(1, ddof=1) / terms
    training = errors.training * rng.chisquare(errors.df_training, n) / errors.df_training
    df = (prompts + training) ** 2 / (prompts**2 / (terms - 1) + training**2 / errors.df_training)
    error = np.sqrt(prompts + training)
    if margin is None:
        return float((np.abs(seen) > error * stats.t.isf(0.025, df)).mean())
    return float((np.abs(seen) + error * stats.t.isf(0.05, df) < margin).mean())


@pytest.mark.parametrize("errors", [ERRORS, ERRORS._replace(training=0.0001), ERRORS._replace(prompts=0.005)])
def test_the_least_difference_is_found_in_80_percent_of_simulated_studies_and_nothing_in_5(errors):
    least = power.least_difference(*errors.of())
    assert rejected(errors, least) == pytest.approx(0.8, abs=0.03)
    assert rejected(errors, 0.0) == pytest.approx(0.05, abs=0.015)


def test_the_number_of_prompts_gives_the_power_it_promises():
    for difference, margin in ((1.0, None), (0.0, 1.0)):
        errors = ERRORS._replace(prompts=0.4)
        times = power.prompts_needed(errors, (1, 1), difference, margin)
        assert 1 < times < 20
        assert rejected(errors, difference, times, margin) == pytest.approx(0.8, abs=0.04)


def test_no_number_of_prompts_outweighs_the_luck_of_training_but_seeds_do():
    assert power.prompts_needed(ERRORS, (1, 1), 0.4) == np.inf
    assert power.prompts_needed(ERRORS, (5, 5), 0.4) < np.inf
    more, fewer = (power.least_difference(*ERRORS.of(1.0, runs)) for runs in ((3, 3), (1, 1)))
    assert more < fewer


def test_the_errors_are_those_of_single_runs_and_the_luck_between_them():
    rng = np.random.default_rng(4)
    runs = [f"c{i:02d}{end}" for i in range(1, 17) for end in ("", "-seed1")]
    score = pd.Series(rng.normal(0, 0.5, 32), runs)
    judge = make_judge(score, 0.1)
    judge = dataclasses.replace(judge, ranking=judge.ranking.assign(n_terms=24))
    errors = power.errors_of(seeds.merge_runs(judge))
    assert errors is not None and errors.terms == 24 and errors.df_training == 16 and errors.configs == 16
    assert errors.prompts == pytest.approx(2 * 0.1**2 * 24 / 23, rel=0.15)
    between = ((score.to_numpy()[::2] - score.to_numpy()[1::2]) ** 2 / 2).mean()
    assert errors.training == pytest.approx(2 * (between - 0.1**2), rel=0.05)


def test_the_findings_say_what_is_missing_and_never_a_number_for_it():
    study = make_study()
    found = {finding.id: finding for finding in power.power_findings(study, 48)}
    assert set(found) == {"power.checklist", "power_top.checklist", "equivalence.checklist"}
    assert "the luck of training is not known" in found["power.checklist"].statement
    assert found["power.checklist"].value > 0
    assert list(power.power_table(study, study.judges[0], 48)["seeds"]) == [1]
    score = study.judges[0].scores
    level = make_study(16, [make_judge(score * 0, 0.05)])
    equal = {finding.id: finding for finding in power.power_findings(level, 48)}
    assert equal["equivalence.checklist"].verdict == "not distinguishable"
    assert "The luck of training is not known" in equal["equivalence.checklist"].statement
    assert "No number of prompts" in equal["power_top.checklist"].statement
    none = make_study(16, [make_judge(score * np.nan, 0.05)])
    assert [finding.verdict for finding in power.power_findings(none, 48)] == ["not estimable"]


def repeated(score: float, luck: float) -> JudgeResults:
    """16 configurations, each with two seeds, that score alike but for planted luck."""
    runs = [f"c{i:02d}{end}" for i in range(1, 17) for end in ("", "-seed1")]
    judge = make_judge(pd.Series(score, runs) + np.tile([luck, -luck], 16), 0.05)
    return seeds.merge_runs(dataclasses.replace(judge, ranking=judge.ranking.assign(n_terms=24)))


def test_two_are_equivalent_only_where_the_luck_of_training_is_known_and_small():
    small, large = (power.power_findings(make_study(16, [repeated(0.0, luck)]), 48)[1] for luck in (0.02, 0.4))
    assert small.id == large.id == "equivalence.checklist"
    assert small.verdict == "supported" and large.verdict == "not distinguishable"
    assert small.low is None or np.isnan(small.low)  # bounds of 90 % stand in the text alone
    assert "picked after the fact" in small.statement and "90 %" in small.statement


def test_equivalence_rests_on_the_errors_of_the_two_that_are_compared():
    judge = repeated(0.0, 0.02)
    rng, (first, second) = np.random.default_rng(1), power.top_two(judge)
    unsure = judge.draws.assign(**{first: judge.draws[first] + rng.normal(0, 1, len(judge.draws))})
    found = power.power_findings(make_study(16, [dataclasses.replace(judge, draws=unsure)]), 48)[1]
    assert found.verdict == "not distinguishable" and first in found.statement and second in found.statement


def test_two_that_differ_by_more_than_the_margin_are_not_equivalent():
    score = pd.Series(np.linspace(1.5, -1.5, 16), make_study().results.index)
    found = {f.id: f for f in power.power_findings(make_study(16, [make_judge(10 * score, 0.05)]), 48)}
    assert found["equivalence.checklist"].verdict == "not distinguishable"
    assert "not shown to be equivalent within 0.4" in found["equivalence.checklist"].statement


def test_a_difference_that_only_a_certain_winner_has_is_said_in_words_and_not_in_log_odds():
    score = make_study().judges[0].scores
    finding = next(f for f in power.power_findings(make_study(16, [make_judge(score, 5.0)]), 8) if f.id.count(".") == 1
                   and f.id.startswith("power."))  # fmt: skip
    assert finding.value > power.FORGONE and "log-odds" not in finding.statement
    assert "With 8 prompts only a configuration that wins practically always would be noticed" in finding.statement


def test_the_least_difference_is_said_as_what_a_difference_must_be_and_n_counts_terms():
    study = make_study(16, [repeated(0.0, 0.1)])
    found = {finding.id: finding for finding in power.power_findings(study, 48)}
    said = found["power.checklist"].statement
    assert "a difference between two configurations must be at least" in said and "with 80% power" in said
    assert {finding.n for finding in found.values()} == {24}
    uncounted = {finding.n for finding in power.power_findings(make_study(), 48)}  # as many terms as stand for no count
    assert uncounted == {None}


def test_the_spread_is_the_median_variance_of_the_difference_of_every_two():
    judge = make_judge(pd.Series({"c01": 0.0, "c02": 1.0, "c03": 2.0, "c04": 2.5}), 0.3)
    draws = judge.draws.assign(c04=judge.draws["c03"] + 0.1)
    judge = dataclasses.replace(judge, draws=draws, ranking=judge.ranking.assign(n_terms=10))
    pairs = [(draws[a] - draws[b]).var() for a, b in combinations(draws, 2)]
    errors = power.errors_of(judge)
    assert errors.prompts == pytest.approx(np.median(pairs) * 10 / 9, rel=1e-9)
