"""The points that the answer explorer shows are those that the checklist has counted."""

import judge_study
import pytest

from telco_nb.judge.checklist import BACKGROUND, ChecklistJudge, checked_answers, checks_table
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


def test_the_coverage_of_the_checklist_is_the_best_credits_and_what_background_adds_to_them(table):
    """To the last digit: the two tables come from one pass, so neither can see another answer or problem."""
    judge = ChecklistJudge("checklist")
    checks = checks_table(judge, PROMPTS, ANSWERS, judge_study.CARDS).set_index(["config", "prompt_id"])
    by_answer = table.groupby(["config", "prompt_id"], sort=False)["credit"]
    assert set(by_answer.groups) == set(checks.index) == set(ANSWERS)
    for config, prompt, _, checked in checked_answers(judge, PROMPTS, ANSWERS, judge_study.CARDS):
        credits = by_answer.get_group((config, prompt["prompt_id"]))
        assert tuple(credits) == checked.asked
        made = credits.nlargest(checked.needed).sum() / checked.needed
        expected = min(1.0, made + BACKGROUND * checked.background * (made < 1))
        assert checks.loc[(config, prompt["prompt_id"]), "coverage"] == pytest.approx(expected, abs=1e-12)


def test_an_empty_answer_makes_none_and_a_gold_answer_makes_some(table):
    best = table.groupby(["config", "prompt_id"])["credit"].max()
    assert (best["empty"] == 0).all() and (best["gold"] > 0.5).all()


def test_a_prompt_whose_problem_is_not_known_has_no_points():
    unknown = PROMPTS.assign(problem_id="")
    assert points_table(ChecklistJudge("checklist"), unknown, ANSWERS, judge_study.CARDS).empty
