"""The points of each problem, and which of them an answer makes: what the answer explorer shows beside a score."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from telco_nb.corpus.cards import Card
from telco_nb.judge.cases import Answers
from telco_nb.judge.checklist import ChecklistJudge, asked_points, checked_answers, weights_of


def points_table(
    judge: ChecklistJudge, prompts: pd.DataFrame, answers: Answers, cards_by_id: Mapping[str, Card]
) -> pd.DataFrame:
    """Hold every answer against every point that its problem asks for.

    Args:
        judge: keeps what it has checked; see `checklist.checks_table`.
        prompts: the judged prompts, one row each. One whose problem its card does not name has no points of its own.
        answers: text by (configuration, prompt_id), anchors included.
        cards_by_id: card by term_id.

    Returns:
        One row per answer and point: config, prompt_id, point (its first wording) and credit (0 missed to 1 made).
    """
    points, rows = {}, []
    for config, prompt, case, checked in checked_answers(judge, prompts, answers, cards_by_id):
        problem, prompt_id = case.card.by_problem.get(case.problem_id), prompt["prompt_id"]
        if problem is None:
            continue
        if prompt_id not in points:
            points[prompt_id] = [told[0] for told in asked_points(problem, case.reference, weights_of(case.card))]
        pairs = zip(points[prompt_id], checked.asked, strict=True)
        rows += [(config, prompt_id, point, credit) for point, credit in pairs]
    return pd.DataFrame(rows, columns=["config", "prompt_id", "point", "credit"])
