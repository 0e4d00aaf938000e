"""The points that the answer explorer shows are those that the checklist has counted."""

import judge_study
import pytest

from telco_nb.judge.checklist import ChecklistJudge, checks_table
from telco_nb.judge.points import points_table

PROMPTS = judge_study.make_prompts(6)
GOLD = {("gold", row.prompt_id): row.reference for row in PROMPTS.itertuples()}
ANSWERS = GOLD | {("empty", prompt_id): "" for prompt_id in PROMPTS["prompt_id"]}


@pytest.fixture(scope="module")
def table():
    return points_table(ChecklistJudge("checklist"), PROMPTS, ANSWERS, judge_study.CARDS)


def test_every_answer_is_held_against_the_same_points(table):
    by_config = [
        rows.drop_duplicates().reset_index(drop=True) for _, rows in table.groupby("config")[["prompt_id", "point"]]
    ]
    assert by_config[0].equals(by_config[1]) and set(table["prompt_id"]) == set(PROMPTS["prompt_id"])


def test_the_best_credits_make_up_the_coverage_of_the_checklist(table):
    checks = checks_table(ChecklistJudge("checklist"), PROMPTS, ANSWERS, judge_study.CARDS)
    for row in checks.itertuples():
        mine = table[(table["config"] == row.config) & (table["prompt_id"] == row.prompt_id)]
        best = mine["credit"].nlargest(min(3, len(mine))).mean()
        assert best <= row.coverage + 1e-9 and row.coverage - best <= 0.2


def test_an_empty_answer_makes_none_and_a_gold_answer_makes_some(table):
    best = table.groupby(["config", "prompt_id"])["credit"].max()
    assert (best["empty"] == 0).all() and (best["gold"] > 0.5).all()


def test_a_prompt_whose_problem_is_not_known_has_no_points():
    unknown = PROMPTS.assign(problem_id="")
    assert points_table(ChecklistJudge("checklist"), unknown, ANSWERS, judge_study.CARDS).empty
