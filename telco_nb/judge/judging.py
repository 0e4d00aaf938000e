"""The judging protocol: who meets whom, what is asked, and the line that is stored of every answer.

A plan is a DataFrame, one row per question to a judge. All have purpose, prompt_id, scenario_id, term_id, order (ab |
ba: the planned seats, or exchanged) and repeat (0, or 1 for a retest); and by form

- pairs (purpose ranking | swap | retest | anchor | control): config_first, config_second;
- rubric (purpose rubric): configs, which holds the one configuration.

`enrol` gives every row its judgement id and notes the plan in the store, `questions` holds what the store does not
answer yet, `ask` puts them to the judge, `verdicts.verdicts` reads the result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from telco_nb import __version__
from telco_nb.corpus.cards import Card
from telco_nb.judge import judges
from telco_nb.judge.judges import Case, Form, Judge, JudgeError, Verdict
from telco_nb.judge.jury import HostedJudge
from telco_nb.judge.verdicts import FIT_PURPOSES, RECEIPT, VerdictStore

PROTOCOLS: dict[Form, str] = {"pair": "pairwise-2", "rubric": "rubric-1"}
ANCHORS = ("untuned", "reference")
ANCHOR_OPPONENTS = 4  # configurations that each anchor meets on an anchor prompt
SHARED_COLUMNS = ["purpose", "prompt_id", "scenario_id", "term_id"]
PLAN_COLUMNS = [*SHARED_COLUMNS, "config_first", "config_second", "order", "repeat"]
RATING_COLUMNS = [*SHARED_COLUMNS, "configs", "order", "repeat"]


# ---------------------------------------------------------------- the plan


def matchings(n: int) -> list[list[tuple[int, int]]]:
    """All rounds of a round robin of `n` by the circle method: every pair once; with odd n one has a bye each round."""
    seats = list(range(n)) + ([-1] if n % 2 else [])
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if -1 not in p])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def plan_comparisons(
    prompts: pd.DataFrame,
    configs: Sequence[str],
    *,
    matchings_per_prompt: int,
    swap_share: float,
    retest_share: float,
    anchor_share: float,
    seed: int,
) -> pd.DataFrame:
    """The sparse round robin as a plan; a pure function of prompts (prompt_id, scenario_id, term_id), configs, numbers.

    The k-th prompt (in a seeded order, so that the design does not line up with the terms) gets `matchings_per_prompt`
    consecutive matchings. Seats are balanced per pair, then per configuration. Shares are of the ranking rows (swap,
    retest) and of the prompts (anchor). Raises ValueError for fewer than two or repeated configs or prompts.
    """
    _check_design(prompts, configs)
    rng = np.random.default_rng(seed)
    keys = prompts.sort_values("prompt_id")[["prompt_id", "scenario_id", "term_id"]].to_dict("records")
    keys = [keys[i] for i in rng.permutation(len(keys))]
    base = _ranking_rows(keys, list(configs), matchings_per_prompt, rng)
    swapped = [r | {"purpose": "swap", "order": "ba", **_exchanged(r)} for r in _sample(base, swap_share, rng)]
    again = [r | {"purpose": "retest", "repeat": 1} for r in _sample(base, retest_share, rng)]
    anchored = _anchor_rows(_sample(keys, anchor_share, rng), list(configs), rng)
    return pd.DataFrame([*base, *swapped, *again, *anchored], columns=PLAN_COLUMNS)


def _check_design(prompts: pd.DataFrame, configs: Sequence[str]) -> None:
    doubled = [c for c, count in Counter(configs).items() if count > 1]
    if len(configs) < 2 or doubled or set(configs) & set(ANCHORS):
        raise ValueError(f"at least two different configurations are needed, none named as an anchor; got {configs}")
    if prompts["prompt_id"].duplicated().any() or prompts.empty:
        raise ValueError("prompts must not be empty, and every prompt_id must be there once")


def pair_row(key: Mapping[str, str], purpose: str, first: str, second: str) -> dict[str, Any]:
    seats = {"config_first": first, "config_second": second}
    return {**key, "purpose": purpose, **seats, "order": "ab", "repeat": 0}


def _exchanged(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"config_first": row["config_second"], "config_second": row["config_first"]}


def _ranking_rows(keys: list[dict], configs: list[str], per_prompt: int, rng: np.random.Generator) -> list[dict]:
    rounds = matchings(len(configs))
    per_prompt = min(per_prompt, len(rounds))  # never the same pair twice on one prompt
    lead = np.zeros((len(configs), len(configs)), int)  # lead[i, j]: times i sat before j, minus times after
    rows = []
    for k, key in enumerate(keys):
        for m in range(per_prompt * k, per_prompt * (k + 1)):
            for i, j in rounds[m % len(rounds)]:
                a, b = (i, j) if rng.random() < 0.5 else (j, i)
                # Whoever sat second more often, against this opponent and then over all, sits first; else chance.
                if (lead[a, b], lead[a].sum()) > (lead[b, a], lead[b].sum()):
                    a, b = b, a
                lead[a, b] += 1
                lead[b, a] -= 1
                rows.append(pair_row(key, "ranking", configs[a], configs[b]))
    return rows


def _sample(items: list, share: float, rng: np.random.Generator) -> list:
    """A seeded sample of round(share * n) items, at least one if the share is not 0, in their order."""
    n = max(1, round(share * len(items))) if share > 0 else 0
    return [items[i] for i in sorted(rng.permutation(len(items))[:n])]


def _anchor_rows(keys: list[dict], configs: list[str], rng: np.random.Generator) -> list[dict]:
    order = rng.permutation(len(configs))
    rows, met = [], 0
    for a, anchor in enumerate(ANCHORS):
        for k, key in enumerate(keys):
            for slot in range(min(ANCHOR_OPPONENTS, len(configs))):
                config = configs[order[met % len(configs)]]
                pair = (anchor, config) if (k + slot + a) % 2 else (config, anchor)
                rows.append(pair_row(key, "anchor", *pair))
                met += 1
    return rows


def plan_ratings(prompts: pd.DataFrame, configs: Sequence[str], *, share: float, seed: int) -> pd.DataFrame:
    """The rubric as a plan: every configuration's answer on a seeded share of the prompts, one question each.

    A smaller share is a part of a larger one, so that judges who rate different shares have answers in common.
    """
    _check_design(prompts, configs)
    keys = _shuffled(prompts, np.random.default_rng(seed))
    keys = keys[: max(1, round(share * len(keys))) if share > 0 else 0]
    fixed = {"purpose": "rubric", "order": "ab", "repeat": 0}
    rows = [{**key, **fixed, "configs": [config]} for key in keys for config in configs]
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _shuffled(prompts: pd.DataFrame, rng: np.random.Generator) -> list[dict]:
    """The prompts' ids in a seeded order, so that a design does not line up with the terms."""
    keys = prompts.sort_values("prompt_id")[SHARED_COLUMNS[1:]].to_dict("records")
    return [keys[i] for i in rng.permutation(len(keys))]


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Question:
    """A row of a plan that has no verdict yet: its id, the row, what the judge sees, the number of this attempt."""

    id: str
    row: Mapping[str, Any]
    case: Case
    attempt: int


def cases(
    plan: pd.DataFrame,
    prompts: pd.DataFrame,
    answers: Mapping[tuple[str, str], str],
    cards: Mapping[str, Card],
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


def seated(row: Mapping[str, Any]) -> list[str]:
    """The configurations of a plan's row by seat."""
    return list(row["configs"]) if "configs" in row else [row["config_first"], row["config_second"]]


def form_of(row: Mapping[str, Any]) -> Form:
    return "rubric" if row["purpose"] == "rubric" else "pair"


def judgement_id(judge: Judge, case: Case, order: str, repeat: int) -> str:
    """sha256 over protocol, judge, parameters, full content, order and repeat: equal means the same question."""
    asked = [
        PROTOCOLS[case.form], judge.name, judge.kind, judge.model, judge.parameters, judges.render(case).text,
        case.reference, order, repeat,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def identify(judge: Judge, plan: pd.DataFrame, asked: Sequence[Case]) -> pd.DataFrame:
    """The plan with `judgement_id`."""
    rows = zip(plan["order"], plan["repeat"], asked, strict=True)
    return plan.assign(judgement_id=[judgement_id(judge, case, order, repeat) for order, repeat, case in rows])


def enrol(judge: Judge, plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore, part: str) -> pd.DataFrame:
    """The plan with `judgement_id`, noted in the store as what is to be asked in this part (verdicts.PARTS)."""
    plan = identify(judge, plan, asked)
    store.plan(part, plan)
    return plan


def every_question(plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore) -> list[Question]:
    """The questions of a plan with `judgement_id`, each once, whether the store answers them or not."""
    found: dict[str, Question] = {}
    for row, case in zip(plan.to_dict("records"), asked, strict=True):
        identity = row["judgement_id"]
        found[identity] = Question(identity, row, case, store.attempts[identity] + 1)
    return list(found.values())


def questions(plan: pd.DataFrame, asked: Sequence[Case], store: VerdictStore) -> list[Question]:
    """What the store does not answer yet, each question once. Stored verdicts are never asked for again."""
    return [question for question in every_question(plan, asked, store) if question.id not in store.ok]


def ask(
    judge: Judge,
    waiting: Sequence[Question],
    store: VerdictStore,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Put the questions to the judge, hosted or local, and store every attempt. Failed ones wait for a next run.

    A hosted judge is asked several at a time, within its limits and the budget. Raises CallsStopped where that ends.
    """
    if isinstance(judge, HostedJudge):
        judge.put(store_by_rule(judge, waiting, store), store, settled_line, progress)
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
    found = [judges.degenerate(answer) for answer in case.answers]
    lost = [seat for seat, what in zip(case.seats, found, strict=True) if what]
    sound = [seat for seat in case.seats if seat not in lost]
    if not lost:
        return None
    flags = tuple(f"{seat}:{what}" for seat, what in zip(case.seats, found, strict=True) if what)
    said = f"Empty or looping: {', '.join(lost)}."
    if case.form == "rubric":
        lowest = {name: None if name in ("tone", "concise") else 1 for name in judges.CRITERIA}
        return Verdict(analysis=said, flags=flags, scores=lowest)
    return Verdict(sound[0], 2, said, flags) if sound else Verdict("tie", 0, said, flags)


def settle(case: Case, verdict: Verdict) -> Verdict:
    """The verdict, which must answer its case. Raises JudgeError (parse_error) for a verdict of another form."""
    if wrong := judges.misfit(verdict, case):
        raise JudgeError("parse_error", wrong)
    return verdict


def _attempt(judge: Judge, question: Question) -> dict[str, Any]:
    """One line of the store."""
    started, verdict, status, error = time.perf_counter(), rule_verdict(question.case), "ok", None
    source = "rule" if verdict else "judge"
    try:
        verdict = verdict or settle(question.case, judge.judge(question.case))
    except JudgeError as failure:
        status, error = failure.status, str(failure)
    seconds = time.perf_counter() - started
    return attempt_line(judge, question, status, verdict, error=error, source=source, latency_s=seconds)


def settled_line(judge: Judge, question: Question, status: str, verdict: Verdict | None, **more: Any) -> dict[str, Any]:
    """As `attempt_line`, of a verdict as the judge gave it."""
    return attempt_line(judge, question, status, settle(question.case, verdict) if verdict else None, **more)


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
        "prompt_sha256": judges.prompt_sha256(case.form),
        "answer_words": [len(answer.split()) for answer in case.answers],
        "answer_sha256": [text_sha256(answer) for answer in case.answers],
        "latency_s": None if latency_s is None else round(latency_s, 6),
        "time": when or datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": __version__,
    }


def text_sha256(text: str) -> str:
    """Hash of a text, whatever it holds (half a surrogate pair has no UTF-8)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------- habits of a judge


def habits(judged: pd.DataFrame) -> pd.DataFrame:
    """Per verdict of the plan, the observations that the bias panel averages; NaN where one does not apply.

    first_seat: first seat won (a tie is a half); tie; longer_wins: the longer answer won, among decided verdicts of
    unlike length; swap_consistent and retest_consistent: same winner as when first asked.
    """
    fit_rows = judged["purpose"].isin(FIT_PURPOSES)
    tie = judged["verdict"] == "tie"
    first_won = (judged["verdict"] == "A").astype(float)
    longer_first = np.sign((judged["words_first"] - judged["words_second"]).astype(float))
    table = judged[["judgement_id", "purpose", "term_id", "scenario_id"]].copy()
    table["first_seat"] = (first_won + tie / 2).where(fit_rows)
    table["tie"] = tie.astype(float).where(fit_rows)
    decided = fit_rows & ~tie & (longer_first != 0)
    table["longer_wins"] = (first_won == (longer_first > 0)).astype(float).where(decided)
    pair = [tuple(sorted(p)) for p in zip(judged["config_first"], judged["config_second"], strict=True)]
    key = list(zip(judged["prompt_id"], pair, strict=True))
    base = {k: w for k, w, p in zip(key, judged["winner"], judged["purpose"], strict=True) if p == "ranking"}
    original = pd.Series([base.get(k) for k in key], index=judged.index, dtype=object)
    same = (original == judged["winner"]).astype(float).where(original.notna())
    table["swap_consistent"] = same.where(judged["purpose"] == "swap")
    table["retest_consistent"] = same.where(judged["purpose"] == "retest")
    return table
