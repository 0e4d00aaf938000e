"""Puts the questions of a plan to a judge and stores every attempt.

A plan is a DataFrame with one row per question. All plans have the columns purpose, prompt_id, scenario_id, term_id,
order (`ab` for the planned seats, `ba` for exchanged seats) and repeat (0, or 1 for a retest). The form adds:

- pair (purpose ranking, swap, retest, anchor or control): config_first, config_second;
- rubric (purpose rubric): configs, a list of one configuration.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from telco_nb.corpus.cards import Card
from telco_nb.judge.cases import (
    CRITERIA,
    Answers,
    Case,
    Judge,
    JudgeError,
    OfflineJudge,
    Question,
    Verdict,
    degenerate_answer,
    verdict_fault,
)
from telco_nb.judge.design import form_of, seated
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.prompts import render_prompt
from telco_nb.judge.store import PROTOCOL_VERSIONS, VerdictStore


def build_cases(plan: pd.DataFrame, prompts: pd.DataFrame, answers: Answers, cards: Mapping[str, Card]) -> list[Case]:
    """The case of every row of a plan.

    Args:
        plan: one row per question.
        prompts: the test prompts, one row each.
        answers: text by (configuration, prompt_id).
        cards: card by term_id.

    Raises:
        KeyError: an answer is missing; the message names the configuration and the prompt.
    """
    shared = {}
    for prompt in prompts.to_dict("records"):
        messages = tuple((m["role"], m["content"]) for m in prompt["messages"])
        shared[prompt["prompt_id"]] = (cards[prompt["term_id"]], prompt["problem_id"], messages, prompt["reference"])
    cases = []
    for row in plan.to_dict("records"):
        texts = []
        for config in seated(row):
            if (config, row["prompt_id"]) not in answers:
                raise KeyError(f"{config} has no answer to prompt {row['prompt_id']}: run 04_energy for it again")
            texts.append(answers[config, row["prompt_id"]] or "")
        cases.append(Case(form_of(row), *shared[row["prompt_id"]], tuple(texts)))
    return cases


def judgement_id(judge: Judge, case: Case, order: str, repeat: int) -> str:
    """The hash of all that makes a question: equal questions have equal ids."""
    content = [
        PROTOCOL_VERSIONS[case.form], judge.name, judge.kind, judge.model, judge.parameters, render_prompt(case).text,
        case.reference, order, repeat,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def with_judgement_ids(judge: Judge, plan: pd.DataFrame, cases: Sequence[Case]) -> pd.DataFrame:
    """The plan with the column `judgement_id`."""
    rows = zip(plan["order"], plan["repeat"], cases, strict=True)
    return plan.assign(judgement_id=[judgement_id(judge, case, order, repeat) for order, repeat, case in rows])


def build_questions(plan: pd.DataFrame, cases: Sequence[Case]) -> list[Question]:
    """The questions of a plan with `judgement_id`, each once, answered or not."""
    rows = zip(plan.to_dict("records"), cases, strict=True)
    return list({row["judgement_id"]: Question(row["judgement_id"], row, case) for row, case in rows}.values())


def ask(
    judge: OfflineJudge | LanguageModelJudge,
    questions: Sequence[Question],
    store: VerdictStore,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Asks the questions that have no verdict yet and stores every attempt; a later run asks failed ones again.

    Args:
        judge: the judge; a hosted judge is asked many questions at a time.
        questions: the questions; those with a verdict in the store are left out.
        store: the judge's store.
        progress: called with (number done, number of all).

    Raises:
        CallsStopped: a hosted judge cannot be asked any further.
    """
    waiting = answer_by_rule(judge, questions, store)
    if isinstance(judge, LanguageModelJudge):
        judge.ask_all(waiting, store, progress)
        return
    judge.prepare([question.case for question in waiting])
    lines: list[dict[str, Any]] = []
    try:
        for i, question in enumerate(waiting, 1):
            lines.append(_attempt(judge, question, store))
            if len(lines) >= judge.store_every:
                store.append(lines)
                lines = []
            if progress:
                progress(i, len(waiting))
    finally:
        store.append(lines)


def answer_by_rule(judge: Judge, questions: Sequence[Question], store: VerdictStore) -> list[Question]:
    """Stores the verdicts that need no judge, and returns the questions that still have no verdict."""
    waiting = [question for question in questions if question.id not in store.ok]
    verdicts = {question.id: rule_verdict(question.case) for question in waiting}
    by_rule = [question for question in waiting if verdicts[question.id]]
    store.append([store.attempt_line(judge, q, verdicts[q.id], source="rule", latency_s=0.0) for q in by_rule])
    return [question for question in waiting if not verdicts[question.id]]


def rule_verdict(case: Case) -> Verdict | None:
    """The verdict that needs no judge: an empty or looping answer loses, and two of them tie. None for other cases.

    A rubric gives such an answer the lowest rating, but none for tone and concision, because there is no text to rate.
    """
    faults = {
        seat: fault for seat, text in zip(case.seats, case.answers, strict=True) if (fault := degenerate_answer(text))
    }
    if not faults:
        return None
    flags = tuple(f"{seat}:{fault}" for seat, fault in faults.items())
    analysis = f"Empty or looping: {', '.join(faults)}."
    if case.form == "rubric":
        lowest = {name: None if name in ("tone", "concise") else 1 for name in CRITERIA}
        return Verdict(analysis=analysis, flags=flags, scores=lowest)
    winner = next((seat for seat in case.seats if seat not in faults), None)
    return Verdict(winner, 2, analysis, flags) if winner else Verdict("tie", 0, analysis, flags)


def require_form(case: Case, verdict: Verdict) -> Verdict:
    """The verdict, if it has the form of its case. Raises JudgeError (parse_error) otherwise."""
    if fault := verdict_fault(verdict, case):
        raise JudgeError("parse_error", fault)
    return verdict


def _attempt(judge: OfflineJudge, question: Question, store: VerdictStore) -> dict[str, Any]:
    """Asks one question and returns the line of the attempt."""
    started, verdict, status, error = time.perf_counter(), None, "ok", None
    try:
        verdict = require_form(question.case, judge.judge(question.case))
    except JudgeError as failure:
        status, error = failure.status, str(failure)
    seconds = round(time.perf_counter() - started, 6)
    return store.attempt_line(judge, question, verdict, status=status, error=error, latency_s=seconds)
