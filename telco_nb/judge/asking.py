"""The judging protocol: who meets whom, what is asked, and the line that is stored of every answer.

A plan is a DataFrame, one row per question to a judge. All have purpose, prompt_id, scenario_id, term_id, order (ab |
ba: the planned seats, or exchanged) and repeat (0, or 1 for a retest); and by form

- pairs (purpose ranking | swap | retest | anchor | control): config_first, config_second;
- rubric (purpose rubric): configs, which holds the one configuration.

`enrol` gives every row its judgement id and notes the plan in the store, `questions` holds what the store does not
answer yet, `ask` puts them to the judge, `verdicts.verdicts` reads the result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from telco_nb import __version__
from telco_nb.corpus.cards import Card
from telco_nb.judge.cases import (
    CRITERIA,
    Case,
    Form,
    Judge,
    JudgeError,
    Question,
    Verdict,
    degenerate_answer,
    verdict_fault,
)
from telco_nb.judge.design import form_of, seated
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.prompts import prompt_sha256, render_prompt
from telco_nb.judge.store import RECEIPT, VerdictStore

PROTOCOLS: dict[Form, str] = {"pair": "pairwise-2", "rubric": "rubric-1"}


def build_cases(
    plan: pd.DataFrame, prompts: pd.DataFrame, answers: Mapping[tuple[str, str], str], cards: Mapping[str, Card]
) -> list[Case]:
    """What the judge sees for every row of a plan. `answers` maps (config, prompt_id) to text.

    Raises KeyError naming the configuration and the prompt if an answer is missing.
    """
    shared = {}
    for prompt in prompts.to_dict("records"):
        messages = tuple((m["role"], m["content"]) for m in prompt["messages"])
        shared[prompt["prompt_id"]] = (cards[prompt["term_id"]], prompt["intent"], messages, prompt["reference"])
    made = []
    for row in plan.to_dict("records"):
        texts = []
        for config in seated(row):
            if (config, row["prompt_id"]) not in answers:
                raise KeyError(f"{config} has no answer to prompt {row['prompt_id']}: run 04_energy for it again")
            texts.append(answers[config, row["prompt_id"]] or "")
        made.append(Case(form_of(row), *shared[row["prompt_id"]], tuple(texts)))
    return made


def judgement_id(judge: Judge, case: Case, order: str, repeat: int) -> str:
    """sha256 over protocol, judge, parameters, full content, order and repeat: equal means the same question."""
    asked = [
        PROTOCOLS[case.form], judge.name, judge.kind, judge.model, judge.parameters, render_prompt(case).text,
        case.reference, order, repeat,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def with_judgement_ids(judge: Judge, plan: pd.DataFrame, asked: Sequence[Case]) -> pd.DataFrame:
    """The plan with `judgement_id`."""
    rows = zip(plan["order"], plan["repeat"], asked, strict=True)
    return plan.assign(judgement_id=[judgement_id(judge, case, order, repeat) for order, repeat, case in rows])


def register_plan(
    judge: Judge, plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore, part: str
) -> pd.DataFrame:
    """The plan with `judgement_id`, noted in the store as what is to be asked in this part (verdicts.PARTS)."""
    plan = with_judgement_ids(judge, plan, asked)
    store.plan(part, plan)
    return plan


def all_questions(plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore) -> list[Question]:
    """The questions of a plan with `judgement_id`, each once, whether the store answers them or not."""
    found: dict[str, Question] = {}
    for row, case in zip(plan.to_dict("records"), asked, strict=True):
        identity = row["judgement_id"]
        found[identity] = Question(identity, row, case, store.attempts[identity] + 1)
    return list(found.values())


def open_questions(plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore) -> list[Question]:
    """What the store does not answer yet, each question once. Stored verdicts are never asked for again."""
    return [question for question in all_questions(plan, asked, store) if question.id not in store.ok]


def ask(
    judge: Judge, waiting: Sequence[Question], store: VerdictStore, progress: Callable[[int, int], None] | None = None
) -> None:
    """Put the questions to the judge, hosted or local, and store every attempt. Failed ones wait for a next run.

    A hosted judge is asked several at a time, within its limits and the budget. Raises CallsStopped where that ends.
    """
    if isinstance(judge, LanguageModelJudge):
        judge.put(store_by_rule(judge, waiting, store), store, normalised_line, progress)
        return
    judge.prepare([question.case for question in waiting if rule_verdict(question.case) is None])
    done: list[dict[str, Any]] = []
    try:
        for i, question in enumerate(waiting, 1):
            done.append(_attempt(judge, question))
            if len(done) >= judge.store_every:
                store.append(done)
                done = []
            if progress:
                progress(i, len(waiting))
    finally:
        store.append(done)


def store_by_rule(judge: Judge, waiting: Sequence[Question], store: VerdictStore) -> list[Question]:
    """Store the verdicts that need no judge; returns the other questions."""
    store.append([_attempt(judge, question) for question in waiting if rule_verdict(question.case)])
    return [question for question in waiting if question.id not in store.ok]


def rule_verdict(case: Case) -> Verdict | None:
    """The verdict where no judge is needed: an empty or looping answer loses, two of them tie; else None.

    In a rubric such an answer gets the lowest rating, and none for tone and concision: there is nothing to rate.
    """
    found = [degenerate_answer(answer) for answer in case.answers]
    lost = [seat for seat, what in zip(case.seats, found, strict=True) if what]
    sound = [seat for seat in case.seats if seat not in lost]
    if not lost:
        return None
    flags = tuple(f"{seat}:{what}" for seat, what in zip(case.seats, found, strict=True) if what)
    said = f"Empty or looping: {', '.join(lost)}."
    if case.form == "rubric":
        lowest = {name: None if name in ("tone", "concise") else 1 for name in CRITERIA}
        return Verdict(analysis=said, flags=flags, scores=lowest)
    return Verdict(sound[0], 2, said, flags) if sound else Verdict("tie", 0, said, flags)


def normalise(case: Case, verdict: Verdict) -> Verdict:
    """The verdict, which must answer its case. Raises JudgeError (parse_error) for a verdict of another form."""
    if wrong := verdict_fault(verdict, case):
        raise JudgeError("parse_error", wrong)
    return verdict


def _attempt(judge: Judge, question: Question) -> dict[str, Any]:
    """One line of the store."""
    started, verdict, status, error = time.perf_counter(), rule_verdict(question.case), "ok", None
    source = "rule" if verdict else "judge"
    try:
        verdict = verdict or normalise(question.case, judge.judge(question.case))
    except JudgeError as failure:
        status, error = failure.status, str(failure)
    seconds = time.perf_counter() - started
    return attempt_line(judge, question, status, verdict, error=error, source=source, latency_s=seconds)


def normalised_line(
    judge: Judge, question: Question, status: str, verdict: Verdict | None, **more: Any
) -> dict[str, Any]:
    """As `attempt_line`, of a verdict as the judge gave it."""
    return attempt_line(judge, question, status, normalise(question.case, verdict) if verdict else None, **more)


def attempt_line(
    judge: Judge,
    question: Question,
    status: str,
    verdict: Verdict | None,
    *,
    error: str | None = None,
    source: str = "judge",
    latency_s: float | None = None,
    attempt: int | None = None,
    when: str | None = None,
) -> dict[str, Any]:
    """The line of the store (verdicts.FIELDS and the plan's columns) for one attempt, however it ended."""
    case, receipt = question.case, dict(verdict.receipt) if verdict else {}
    return {
        "judgement_id": question.id,
        "protocol": PROTOCOLS[case.form],
        "form": case.form,
        "judge": judge.name,
        "judge_kind": judge.kind,
        **{name: value for name, value in question.row.items() if name != "judgement_id"},
        "attempt": attempt or question.attempt,
        "status": status,
        "error": error,
        "source": source,
        "verdict": verdict.verdict if verdict else None,
        "margin": verdict.margin if verdict else None,
        "scores": dict(verdict.scores) if verdict and verdict.scores else None,
        "flags": list(verdict.flags) if verdict else None,
        "analysis": verdict.analysis if verdict else None,
        "raw": verdict.raw if verdict else None,
        "model_asked": judge.model,
        **{name: receipt.get(name) for name in RECEIPT},
        "parameters": judge.parameters,
        "prompt_sha256": prompt_sha256(case.form),
        "answer_words": [len(answer.split()) for answer in case.answers],
        "answer_sha256": [text_sha256(answer) for answer in case.answers],
        "latency_s": None if latency_s is None else round(latency_s, 6),
        "time": when or datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": __version__,
    }


def text_sha256(text: str) -> str:
    """Hash of a text, whatever it holds (half a surrogate pair has no UTF-8)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
