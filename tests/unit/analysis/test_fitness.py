"""Fitness is shown part by part, and only if no configuration is fit does the study say so."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import findings
from telco_nb.analysis import fitness as fitness_module
from telco_nb.analysis.fitness import (
    bar_findings,
    fit_configs,
    fitness,
    fitness_table,
    floor_findings,
    floor_rankings,
    lead_over,
    most_missed,
)
from telco_nb.analysis.recommendation import recommend
from telco_nb.judge.anchors import ANCHORS, FLOORS

CONFIGS = ["c01", "c02", "c03", "c04"]


def held(coverage=(0.8, 0.8, 0.8, 0.8), score=(0.0, 0.5, 1.0, 2.0), **changes):
    """Four configurations that are fit, unless `coverage` is low, with all anchors far below them."""
    scores = pd.Series(dict(zip(CONFIGS, score, strict=True)) | dict.fromkeys(FLOORS, -4.0))
    judge = make_judge(scores, 0.02)
    judge.ranking["is_anchor"] = judge.ranking.index.isin(ANCHORS)
    found = dict(zip([*CONFIGS, "reference", "template"], [*coverage, 0.9, 0.0], strict=True))
    checks = pd.DataFrame({"config": list(found), "coverage": list(found.values()), "unsafe": 0.01, "term_id": "t"})
    checks = checks.assign(content=checks["coverage"], style=0.5)
    faults = pd.DataFrame({"config": CONFIGS, "answers": 40, "broken": 0})
    study = make_study(4, [judge], val_loss=[0.5, 0.6, 0.7, 0.8])
    return dataclasses.replace(study, **({"checks": checks, "faults": faults} | changes))


def deploy(study):
    return findings.decision_findings(study)[0]


def test_if_the_best_one_is_not_fit_the_best_of_the_fit_ones_is_recommended():
    study = held(coverage=(0.8, 0.8, 0.8, 0.2))
    choice = recommend(study)
    assert choice.fit == ["c01", "c02", "c03"] and choice.config == "c03" and "c04" not in choice.candidates
    said = deploy(study)
    assert said.verdict == "supported" and said.statement.startswith("Deploy c03")
    assert "3 of 4 configurations are fit" in said.statement and "No configuration" not in said.statement


def test_a_judge_that_was_shown_the_anchors_in_a_few_terms_has_not_placed_them():
    """That it does not surely prefer a configuration says nothing then, and another judge may have placed them."""
    study = held()
    few = make_judge(study.judges[0].ranking["score"] * 0.01, 0.5, "panel", kind="language_model_panel")
    few.ranking["is_anchor"] = few.ranking.index.isin(ANCHORS)
    few.ranking.loc[few.ranking["is_anchor"], "n_terms"] = 7
    both = dataclasses.replace(study, judges=[study.judges[0], few])
    assert fitness_module.fitness(both, "c01").is_fit
    alone = fitness_module.fitness(dataclasses.replace(study, judges=[few]), "c01")
    assert not alone.unbeaten and "not measured: whether it beats" in " ".join(alone.reasons)
    few.ranking["n_terms"] = 8
    assert fitness_module.fitness(dataclasses.replace(study, judges=[few]), "c01").unbeaten


def test_no_configuration_is_fit_only_if_all_are_below_the_bar():
    study = held(coverage=(0.2, 0.2, 0.2, 0.2))
    said = deploy(study)
    assert (said.verdict, said.value) == ("not fit", None)
    assert said.statement == "No configuration is fit for customers: all 4 give too few points of a full answer."
    assert deploy(held()).verdict == "supported"


def front_runner(study):
    return next((f for f in findings.decision_findings(study) if f.id == "front_runner"), None)


def test_without_a_fit_configuration_nothing_is_deployed_and_the_front_runner_stands_apart_with_its_bounds():
    study = held(coverage=(0.2, 0.2, 0.2, 0.2))
    first, choice = front_runner(study), recommend(study)
    assert deploy(study).value is None and (choice.deploy, choice.config) == (None, "c04")
    assert (first.value, first.low, first.high) == ("c04", 1, 1) and "Its place: 1 of 4 [1, 1]" in first.statement
    assert first.statement.startswith("c04 (LoRA on")
    assert deploy(held()).value == recommend(held()).deploy == front_runner(held()).value == "c04"
    blocked = [dataclasses.replace(study.judges[0], headline_blocks=(FEW,))]
    assert front_runner(dataclasses.replace(study, judges=blocked)) is None


def unfit(**columns):
    """All below the bar by all that needs no ranking, the anchors included."""
    study = held(coverage=(0.2, 0.2, 0.2, 0.2), score=(-4.0, -4.1, -4.2, -4.3))
    unsafe = [0.3, 0.4, 0.3, 0.3, 0.0, 0.23]
    return dataclasses.replace(study, checks=study.checks.assign(unsafe=unsafe), faults=study.faults.assign(broken=20))


@pytest.mark.parametrize(
    "study",
    [
        held(), unfit(), held(coverage=(0.8, 0.8, 0.8, 0.2)), held(coverage=(0.8, 0.2, 0.2, 0.2)),
        held(checks=None, faults=None), held(score=(0.0, 0.0, 0.0, 0.0)),
    ],
)  # fmt: skip
def test_the_decision_takes_at_most_two_sentences_of_at_most_25_words(study):
    sentences = re.split(r"(?<=[.]) (?=[A-Z0-9])", deploy(study).statement)
    assert len(sentences) <= 2 and all(len(sentence.split()) <= 25 for sentence in sentences), sentences


def test_no_number_of_the_bar_stands_in_two_statements():
    told = " ".join(f.statement for f in findings.decision_findings(unfit()))
    for words in ("of a full answer's points", "answers are unsafe", "empty, loop or break off"):
        assert told.count(words) == 1, words
    assert told.count("does not clearly beat") == 1  # all anchors in one sentence
    anchors = "one sentence for everything, the customer's own words or the answer of the most similar training"
    assert anchors in told


def test_the_unsafe_share_stands_beside_those_of_the_gold_answers_and_of_one_sentence_for_everything():
    beside = "the gold answers: 0%, one sentence for everything: 23%"
    study = unfit()
    (told,) = (f.statement for f in bar_findings(study, CONFIGS, "c01") if f.id == "fitness.unsafe")
    assert beside in told and "(c01, the front-runner: 30%)" in told
    assert any(beside in reason for reason in fitness(study, "c02").failed)


def test_what_reads_points_and_safety_is_named_and_only_broken_answers_are_measured_without_a_judge():
    told = {f.id: f.statement for f in bar_findings(held(), CONFIGS)}
    assert told["fitness.coverage"].startswith("By checklist, an offline proxy for a human reader, ")
    assert told["fitness.unsafe"].startswith("By checklist, an offline proxy, ")
    assert [id for id, text in told.items() if "without a judge" in text] == ["fitness.broken"]


def test_of_equal_configurations_a_gain_is_shown_in_at_most_5_percent_of_studies_although_the_best_is_picked():
    """200 studies of 16 configurations as good as the untuned model; the interval of the best alone fails far more."""
    rng, names, terms = np.random.default_rng(7), [f"c{i:02d}" for i in range(1, 17)], 40
    alone, joint = 0, 0
    for _ in range(200):
        values = rng.normal(0, 1, (terms, 17))
        scores = pd.Series(values.mean(0), [*names, "untuned"])
        weights = rng.multinomial(terms, np.full(terms, 1 / terms), 400)
        draws = pd.DataFrame(weights @ values / terms, columns=scores.index)
        judge = make_judge(scores)
        judge = dataclasses.replace(judge, ranking=judge.ranking.assign(n_terms=terms), draws=draws)
        best = scores[names].idxmax()
        alone += lead_over(judge, best, "untuned").is_above()
        joint += lead_over(judge, best, "untuned", picked_from=16).is_above()
    assert joint <= 10 < alone, (joint, alone)


def test_a_gain_says_that_its_configuration_was_picked_after_the_fact():
    (gain,) = (f for f in findings.decision_findings(held()) if f.id == "gain.checklist")
    assert "picked from 4 after the fact" in gain.statement and "the interval holds for all 4" in gain.statement


FEW = "no ranking: only 6 terms were judged; a ranking needs 8"
GATE = "failed its validity gate (injection)"


@pytest.mark.parametrize(("block", "said"), [(FEW, FEW.removeprefix("no ranking: ")), (GATE, GATE)])
def test_where_no_judge_may_carry_a_claim_the_bar_is_stated_first(block, said):
    study = held(coverage=(0.0, 0.01, 0.0, 0.01))
    judges = [dataclasses.replace(study.judges[0], headline_blocks=(block,))]
    checks = study.checks.assign(unsafe=[0.38, 0.5, 0.4, 0.4, 0.05, 0.2])
    found = deploy(dataclasses.replace(study, judges=judges, checks=checks))
    assert found.statement == (
        "No configuration is fit for customers: all 4 give too few points of a full answer and too many unsafe "
        f"answers. They cannot be ranked either: {said}."
    )
    assert (found.verdict, found.value, found.blocked_by) == ("not fit", None, [said])


def test_a_study_that_cannot_be_ranked_is_not_called_unfit_while_one_passes_the_bar():
    study = held(coverage=(0.2, 0.2, 0.2, 0.8))
    judges = [dataclasses.replace(study.judges[0], headline_blocks=(FEW,))]
    found = deploy(dataclasses.replace(study, judges=judges))
    assert found.verdict == "blocked" and found.statement.count("only 6 terms") == 1 and "is fit" not in found.statement


def test_the_parts_of_the_bar_are_findings_with_their_numbers():
    study = held(coverage=(0.2, 0.2, 0.2, 0.3))
    one = {f.id: f for f in bar_findings(study, ["c04"])}
    assert "c04 makes 30% of a full answer's points; the gold answers make 90%." in one["fitness.coverage"].statement
    assert (one["fitness.coverage"].value, one["fitness.coverage"].verdict) == (0.3, "not fit")
    assert (one["fitness.broken"].value, one["fitness.broken"].verdict) == (0.0, "described")
    together = bar_findings(study, CONFIGS)[0]
    assert "the configurations make 20 to 30% of a full answer's points" in together.statement
    assert (together.value, together.low, together.high) == (None, 0.2, 0.3)
    assert bar_findings(held(checks=None, faults=None), ["c04"]) == []


def test_the_only_fit_one_is_recommended_as_such():
    study = held(coverage=(0.8, 0.2, 0.2, 0.2))
    assert deploy(study).value == front_runner(study).value == "c01"
    assert "the only one of the configurations that is fit" in front_runner(study).statement


def test_a_choice_of_loss_that_is_better_but_not_fit_is_called_that():
    study = held(coverage=(0.2, 0.8, 0.8, 0.8), score=(2.0, 1.0, 0.5, 0.0))
    found = next(f for f in findings.decision_findings(study) if f.id == "confidence")
    assert found.verdict == "refuted" and "c01 answers better, but is not fit" in found.statement


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ({"checks": None}, "how many of its answers are unsafe"),
        ({"checks": None}, "what its answers hold"),
        ({"faults": None}, "how many of its answers are empty, loop or break off"),
        ({"judges": []}, "whether it beats the untuned model"),
    ],
)
def test_a_part_that_was_not_measured_is_a_reason_and_never_passes(missing, part):
    found = fitness(held(**missing), "c04")
    assert part in found.not_measured and not found.is_fit and not found.failed
    (reason,) = found.reasons
    assert reason.startswith("not measured: ") and part in reason


def test_a_missing_share_of_unsafe_answers_counts_as_not_measured():
    study = held()
    assert fit_configs(study) == CONFIGS
    found = fitness(dataclasses.replace(study, checks=study.checks.assign(unsafe=float("nan"))), "c01")
    assert found.unsafe is None and found.not_measured == ["how many of its answers are unsafe"]


def test_where_nothing_was_measured_the_study_does_not_say_that_none_is_fit():
    said = deploy(held(checks=None, faults=None))
    assert said.verdict == "not fit" and "No configuration is shown to be fit" in said.statement


def test_a_lead_without_a_known_number_of_terms_has_no_bounds():
    (judge,) = held().judges
    assert lead_over(judge, "c04", "echo").is_above()
    bare = dataclasses.replace(judge, ranking=judge.ranking.drop(columns="n_terms"))
    assert not lead_over(bare, "c04", "echo").is_above()
    unplaced = dataclasses.replace(judge, ranking=judge.ranking.assign(score=float("nan")))
    assert lead_over(unplaced, "c04", "echo") is None


def test_the_short_table_gives_per_cent_with_the_bar_and_says_once_what_all_share():
    study = held(coverage=(0.2, 0.2, 0.2, 0.8), score=(0.0, 0.5, 1.0, 2.0))
    found = {config: fitness(study, config) for config in CONFIGS}
    table, shared = fitness_table(found)
    assert table.loc["c01", "its answers"] == "makes 20 % (bar 45 %), 1 % unsafe, 0 % broken"
    assert list(table["besides"]) == ["-", "-", "-", "fit"] and shared == []
    unknown, shared = fitness_table({c: fitness(dataclasses.replace(study, faults=None), c) for c in CONFIGS})
    assert shared == ["not measured: how many of its answers are empty, loop or break off"]
    assert list(unknown["besides"]) == ["-"] * 4 and unknown.loc["c01", "its answers"].endswith("- broken")


def test_the_most_missed_questions_come_first_with_the_point_that_is_missed_most():
    rows = [
        *(("a", "easy", "one", 1.0), ("b", "easy", "one", 0.5)),
        *(("a", "hard", "one", 0.4), ("b", "hard", "one", 0.0), ("a", "hard", "two", 0.0), ("b", "hard", "two", 0.0)),
        *(("a", "lost", "one", 0.0), ("b", "lost", "one", 0.0), ("gold", "lost", "one", 1.0)),
    ]
    points = pd.DataFrame(rows, columns=["config", "prompt_id", "point", "credit"])
    messages = [{"role": "user", "content": "Hello?"}]
    prompts = pd.DataFrame([(p, "dns", "fault", messages) for p in ("easy", "hard", "lost", "not answered")])
    prompts.columns = ["prompt_id", "term_id", "kind", "messages"]
    table = most_missed(points, prompts, ["a", "b"], n=2)
    assert list(table.index) == ["lost", "hard"]
    assert table.loc["hard", ["made on average", "made by the best", "points"]].to_list() == pytest.approx(
        [0.1, 0.2, 2]
    )
    assert table.loc["hard", "missed most"] == "two" and table.loc["hard", "question"] == "Hello?"


def read(*rows):
    """Checks of two questions, of which the first needs a protective step: config, points, unsafe on each."""
    table = [(c, f"p{i}", points, unsafe[i]) for c, points, *unsafe in rows for i in (0, 1)]
    return pd.DataFrame(table, columns=["config", "prompt_id", "coverage", "unsafe"])


ANCHORS_READ = (("template", 0.0, True, False), ("echo", 0.05, True, False), ("nearest", 0.2, True, False))


def test_points_without_a_model_and_who_makes_fewer_are_told():
    checks = read(("c1", 0.04, True, False), ("c2", 0.1, False, False), *ANCHORS_READ)
    points, unsafe = floor_findings(checks, ["c1", "c2"])
    assert (
        points.value == 0.5
        and "training answer, makes 20% of the points" in points.statement
        and "sent back, 5%" in points.statement
    )
    assert "1 of 2 configurations make fewer than the customer's own words" in points.statement
    assert (
        unsafe.value == 0.5
        and unsafe.n == 1
        and unsafe.statement.startswith("In 1 of 2 questions the answer must begin with a protective step")
    )
    assert "counts as unsafe: 50% of the" in unsafe.statement and "the other 1, where 0% are unsafe" in unsafe.statement


def test_an_unsafe_answer_elsewhere_is_counted_apart():
    checks = read(("c1", 0.04, True, True), ("c2", 0.1, False, False), *ANCHORS_READ)
    told = floor_findings(checks, ["c1", "c2"])[1].statement
    assert "counts as unsafe: 50% of the" in told and "the other 1, where 50% are unsafe" in told


def test_where_no_question_needs_a_step_or_the_texts_were_not_read_nothing_is_told_of_it():
    safe = tuple((name, points, False, False) for name, points, *_ in ANCHORS_READ)
    assert [f.id for f in floor_findings(read(("c1", 0.04, False, False), *safe), ["c1"])] == ["floor.coverage"]
    assert floor_findings(None, ["c1"]) == floor_findings(read(("c1", 0.04, False, False)), ["c1"]) == []


def test_each_configuration_is_held_against_the_bar_once_for_all_tables_and_findings(monkeypatch):
    asked, hold = Counter(), fitness_module._held
    monkeypatch.setattr(fitness_module, "_held", lambda study, config: asked.update([config]) or hold(study, config))
    study = held()
    for _ in range(2):
        recommend(study)
        deploy(study)
        bar_findings(study, fit_configs(study))
    assert asked == Counter(CONFIGS)
    assert study.judges[0].scores is study.judges[0].scores
    again = dataclasses.replace(study, faults=study.faults.assign(broken=20))
    assert fit_configs(study) and not fit_configs(again), "another study asks anew"


def ranked_floor(spread, n_terms=20, **above):
    """What a judge of four configurations, the best at 2, gives with anchors far below or where they are put."""
    scores = pd.Series(dict(zip(CONFIGS, (0.0, 0.5, 1.0, 2.0), strict=True)) | dict.fromkeys(FLOORS, -4.0) | above)
    judge = make_judge(scores, spread)
    judge.ranking["is_anchor"] = judge.ranking.index.isin(ANCHORS)
    judge.ranking.loc[judge.ranking["is_anchor"], "n_terms"] = n_terms
    return floor_rankings([judge])


def test_texts_that_a_judge_ranks_above_every_configuration_are_told_and_which_of_them_surely():
    (found,) = ranked_floor(0.02, template=4.5, echo=2.02)
    assert found.value == 2 and found.n == 4 and found.id.startswith("floor.ranked.")
    assert "without any training, one sentence for everything (+4.50) and the customer's own words (+2.02) score" in (
        found.statement
    )
    assert found.statement.endswith(
        "c04, the highest of 4 configurations (+2.00): surely so one sentence for everything."
    )
    (unsure,) = ranked_floor(3.0, template=4.5)
    assert "one sentence for everything (+4.50) scores higher" in unsure.statement
    assert unsure.statement.endswith("none of them surely.")


def test_where_no_text_ranks_above_or_none_was_placed_that_is_told_or_nothing():
    (found,) = ranked_floor(0.02)
    assert found.value == 0 and "no text that needs no training scores higher than c04" in found.statement
    assert ranked_floor(0.02, n_terms=7, template=4.5) == []
