"""The points of each problem, and which of them an answer makes: what the answer explorer shows beside a score."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from telco_nb.corpus.cards import Card
from telco_nb.judge.cases import Answers, Case
from telco_nb.judge.checklist import ChecklistJudge, asked_points, weights_of


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
    known = {}
    for prompt in prompts.to_dict("records"):
        card = cards_by_id[prompt["term_id"]]
        if problem := card.by_problem.get(prompt["problem_id"]):
            points = asked_points(problem, prompt["reference"], weights_of(card))
            messages = tuple((m["role"], m["content"]) for m in prompt["messages"])
            known[prompt["prompt_id"]] = card, prompt, messages, [wordings[0] for wordings in points]
    rows = []
    for (config, prompt_id), text in answers.items():
        if prompt_id not in known:
            continue
        card, prompt, messages, points = known[prompt_id]
        case = Case("rubric", card, prompt["problem_id"], messages, prompt["reference"], (text or "",))
        credits = judge.check(case, text or "").asked
        rows += [(config, prompt_id, point, credit) for point, credit in zip(points, credits, strict=True)]
    return pd.DataFrame(rows, columns=["config", "prompt_id", "point", "credit"])
