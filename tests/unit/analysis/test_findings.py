"""What may be said when data are few, missing or not valid."""

from __future__ import annotations

import dataclasses
import json
import re

import fake_study
import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import findings, recommendation
from telco_nb.analysis.claims import primary_finding
from telco_nb.analysis.effects import effect_tables
from telco_nb.analysis.parting import parting_findings
from telco_nb.analysis.power import power_findings
from telco_nb.analysis.results import (
    StudyResults,
    results_table,
)
from telco_nb.analysis.statements import counted, some_of
from telco_nb.judge.protocol import headline_blocks


def finding(study: StudyResults, id: str) -> findings.Finding:
    return next(f for f in findings.all_findings(study) if f.id == id)


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


@pytest.mark.parametrize(("untuned", "chosen"), [(9.0, False), (-9.0, True)])
def test_nothing_is_recommended_if_the_untuned_model_surely_answers_better(untuned, chosen):
    planted = fake_study.truth(fake_study.design())["quality"]
    judge = make_judge(pd.concat([planted, pd.Series({"untuned": untuned})]))
    placed = dataclasses.replace(judge, ranking=judge.ranking.assign(is_anchor=judge.ranking.index == "untuned"))
    found = {f.id: f for f in findings.all_findings(make_study(16, [placed]))}
    deploy = found["deploy"]
    assert ("front_runner" in found) == chosen and deploy.value is None
    assert chosen or "the untuned model answers better" in deploy.blocked_by[0]


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


def test_n_counts_units_and_never_draws():
    """Draws can be made as many as one likes: with twice as many, no finding has another n."""
    planted = fake_study.truth(fake_study.design())["quality"]
    counts = []
    for times in (1, 2):
        judge = make_judge(pd.concat([planted, pd.Series({"untuned": -4.0})]))
        ranking = judge.ranking.assign(is_anchor=judge.ranking.index == "untuned", n_terms=24)
        judge = dataclasses.replace(judge, ranking=ranking, draws=pd.concat([judge.draws] * times, ignore_index=True))
        study = make_study(16, [judge, dataclasses.replace(judge, name="other")])
        drawn = pd.concat([study.loss_draws] * times, ignore_index=True)
        study = dataclasses.replace(study, loss_draws=drawn)
        told = [*findings.all_findings(study), *power_findings(study, 48), *parting_findings(study, {})]
        counts.append({f.id: f.n for f in [*told, primary_finding(study)]})
    assert counts[0] == counts[1] and {"gain.checklist", "regret.checklist", "confidence"} <= set(counts[0])
    assert {counts[0][id] for id in ("gain.checklist", "regret.checklist", "confidence")} == {24}


@pytest.mark.parametrize(("n", "said"), [
    (0, "none of 16 configurations is"), (1, "1 of 16 configurations is"), (2, "2 of 16 configurations are"),
])  # fmt: skip
def test_the_verb_follows_the_count(n, said):
    assert some_of(n, 16, "configuration", "is", "are") == said
    assert [counted(k, "run") for k in (0, 1, 1200)] == ["0 runs", "1 run", "1,200 runs"]


def test_no_statement_counts_one_thing_in_the_plural():
    wrong = re.compile(
        r"\b1 (?:configurations|runs|prompts|seeds|terms|pairs|answers|effects|explanations|comparisons)\b"
    )
    for n in (1, 2, 3, 5):
        study = make_study(n)
        told = [*findings.all_findings(study), *power_findings(study, 1), *parting_findings(study, {})]
        assert not [f.statement for f in told if wrong.search(f.statement)]


def test_the_answer_to_the_primary_claim_says_that_its_bounds_hold_for_all_at_once():
    assert "bounds hold for all configurations at once" in primary_finding(make_study()).statement


def test_effects_on_scores_say_that_their_error_holds_the_noise_of_judging():
    told = {f.id: f.statement for f in findings.all_findings(make_study())}
    for id, said in told.items():
        if id.startswith("effect."):
            assert ("noise of judging included" in said) == id.startswith("effect.checklistscore")
