"""The store of verdicts: a file with one line per attempt. Lines never change, and all tables are functions of them.

A line is JSON in ASCII, so no text of a model can break a line or its encoding. There are two kinds of lines:

- an attempt, see `FIELDS`: one question to one judge, its status, and the verdict. Only attempts with status `ok` enter
  a ranking. An unreadable reply is stored with its status and asked again; it is never a tie or a loss.
- a plan: all questions of one part (controls, rubric or pairs). A later plan replaces the earlier plan of its part.
  So coverage counts questions that were never asked, and verdicts on answers that no longer exist are left out. The
  source of one that an import of votes has made is `votes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from telco_nb import __version__
from telco_nb.hosted import api
from telco_nb.hosted.attempts import AttemptStore
from telco_nb.hosted.keys import printable
from telco_nb.judge import design
from telco_nb.judge.cases import CRITERIA, Form, Judge, Question, Verdict
from telco_nb.judge.prompts import prompt_sha256
from telco_nb.study.input_files import LARGEST_INTEGER

PROTOCOL_VERSIONS: dict[Form, str] = {"pair": "pairwise-2", "rubric": "rubric-1"}
FIT_PURPOSES = ("ranking", "swap")  # retests and anchors stay outside the ranking fit
MIN_COVERAGE = 0.98
MISSINGNESS_P = 0.01
# Only a provider can fill these fields; they are None for an offline judge.
RECEIPT = (*api.RECEIPT, "price_table", "usd", "usd_at_most", "batch_id")
# The fields of every attempt, for all forms and statuses. The columns of the plan's row are stored beside them.
FIELDS = (
    "judgement_id", "protocol", "form", "judge", "judge_kind", "attempt", "status", "error", "source", "verdict",
    "margin", "scores", "flags", "analysis", "raw", "model_asked", *RECEIPT, "parameters", "prompt_sha256",
    "answer_words", "answer_sha256", "latency_s", "time", "code_version",
)  # fmt: skip


class VerdictStore(AttemptStore):
    """The attempts of one judge, by judgement id, and `plans`: the latest plan of each part."""

    def __init__(self, path: Path):
        self.plans: dict[str, dict[str, Any]] = {}
        super().__init__(path, key="judgement_id")

    def _enter(self, attempt: dict[str, Any]) -> None:
        if "plan" in attempt:
            _check_plan(attempt)
            self.plans[attempt["plan"]] = attempt
            return
        if attempt["status"] == "ok":  # without this check an `ok` line without a verdict would count as a tie
            if not isinstance(attempt.get("scores"), dict | None):
                raise TypeError("scores are an object")
            verdict = Verdict(attempt["verdict"], attempt["margin"], scores=attempt.get("scores"))
            _check_types(attempt, verdict.form)
        super()._enter(attempt)

    def plan(self, part: str, plan: pd.DataFrame) -> None:
        """Stores the plan of a part, unless the latest plan of the part has the same questions."""
        self.append(self.plan_lines(part, plan))

    def plan_lines(self, part: str, plan: pd.DataFrame, **fields: Any) -> list[dict[str, Any]]:
        """The line of a plan, with more fields; none if the latest plan of the part has the same questions."""
        questions = {name: [_json_value(v) for v in plan[name]] for name in plan.columns}
        digest = hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest()
        if self.plans.get(part, {}).get("sha256") == digest:
            return []
        return [{"plan": part, "sha256": digest, "n": len(plan), "time": _now(), "questions": questions} | fields]

    def planned(self, part: str) -> pd.DataFrame:
        """The latest plan of a part, empty if there is none."""
        return pd.DataFrame(self.plans.get(part, {}).get("questions", {"judgement_id": [], "purpose": []}))

    def attempt_line(self, judge: Judge, question: Question, verdict: Verdict | None, **fields: Any) -> dict[str, Any]:
        """The line of the next attempt at a question, with all `FIELDS` and the columns of the plan.

        Args:
            judge: the judge.
            question: the question.
            verdict: the verdict, None for a failed attempt.
            **fields: values that replace the defaults: status `ok`, error None, source `judge` (the others are `rule`,
                where no judge was needed, and `votes`, where it was imported), latency_s None, time now, and the
                receipt of a provider; or more fields.
        """
        case, receipt = question.case, verdict.receipt if verdict else {}
        return {
            "judgement_id": question.id,
            "protocol": PROTOCOL_VERSIONS[case.form],
            "form": case.form,
            "judge": judge.name,
            "judge_kind": judge.kind,
            **{name: value for name, value in question.row.items() if name != "judgement_id"},
            "attempt": self.attempts[question.id] + 1,
            "status": "ok",
            "error": None,
            "source": "judge",
            **{f: getattr(verdict, f, None) for f in ("verdict", "margin", "scores", "flags", "analysis", "raw")},
            "model_asked": judge.model,
            **{name: receipt.get(name) for name in RECEIPT},
            "parameters": judge.parameters,
            "prompt_sha256": prompt_sha256(case.form),
            "answer_words": [len(answer.split()) for answer in case.answers],
            "answer_sha256": [text_sha256(answer) for answer in case.answers],
            "latency_s": None,
            "time": _now(),
            "code_version": __version__,
        } | fields


_TYPES = {"Int64": int, "Float64": int | float, "str": str}
_PLANNED = {
    "pairs": design.PLAN_COLUMNS,
    "controls": [*design.PLAN_COLUMNS, "control"],
    "rubric": design.RATING_COLUMNS,
}


def _check_types(attempt: Mapping[str, Any], form: Form) -> None:
    """Raise TypeError or KeyError for a verdict of which no row of a table can be made."""
    named = [(attempt[name], "str") for name in ("judge", "judge_kind")]
    listed = [(text, "str") for text in attempt["flags"]] + [(number, "Int64") for number in attempt["answer_words"]]
    fields = [(attempt.get(name), dtype) for name, dtype in _TABLE.items() if name != "flags"]
    for value, dtype in [*named, *listed, *((value, dtype) for value, dtype in fields if value is not None)]:
        if not isinstance(value, _TYPES[dtype]) or isinstance(value, bool):
            raise TypeError(f"{value!r:.60} is not of type {dtype}")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise TypeError("an integer is too large for a table")
    if len(attempt["answer_words"]) != (2 if form == "pair" else 1):
        raise TypeError("answer_words has a number for each answer")


def _check_plan(line: Mapping[str, Any]) -> None:
    """Raise TypeError or KeyError for a plan of which no table can be made."""
    part, questions = line["plan"], line["questions"]
    lengths = {len(questions[name]) for name in ("judgement_id", *_PLANNED.get(part, ["purpose"]))}
    values = [(name, value) for name, column in questions.items() for value in column]
    whole = all(isinstance(column, list) for column in questions.values())
    if not whole or lengths != {len(column) for column in questions.values()} or len(lengths) != 1:
        raise TypeError("the columns of a plan are lists of one length")
    for name, value in values:
        kind = int if name == "repeat" else list if name == "configs" else str
        empty = value is None and name in ("control", "planted")
        if not empty and (not isinstance(value, kind) or (kind is list and not all(isinstance(v, str) for v in value))):
            raise TypeError(f"{name} of a plan is {value!r:.60}")


def text_sha256(text: str) -> str:
    """The hash of any text, also of one with lone surrogates, which UTF-8 cannot encode."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json_value(value: Any) -> Any:
    """Converts a value of a table to a type that JSON has."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return value.item() if hasattr(value, "item") else value


# ---------------------------------------------------------------- tables


_TABLE = {
    "attempt": "Int64", "source": "str", "verdict": "str", "margin": "Int64", "flags": "str", "analysis": "str",
    "raw": "str", "model_asked": "str", "model_returned": "str", "request_id": "str", "finish_reason": "str",
    "tokens_in": "Int64", "tokens_out": "Int64", "tokens_cached": "Int64", "tokens_reasoning": "Int64",
    "price_table": "str", "usd": "Float64", "prompt_sha256": "str", "latency_s": "Float64", "time": "str",
}  # fmt: skip


def judged_rows(plan: pd.DataFrame, store: VerdictStore) -> pd.DataFrame:
    """The readable verdicts on the questions of a plan.

    Args:
        plan: one row per question, with `judgement_id`.
        store: the judge's store.

    Returns:
        The plan's rows that have a verdict, with the stored fields; flags are joined by "; ". A pair also gets `winner`
        (a configuration or "tie"), `words_first` and `words_second`. Questions without a readable verdict are left out.
    """
    answered = plan[plan["judgement_id"].isin(store.ok)].reset_index(drop=True)
    lines = [store.ok[identity] for identity in answered["judgement_id"]]
    table = pd.DataFrame([_row(line) for line in lines], columns=list(_TABLE))
    joined = pd.concat([answered, table.astype(_TABLE)], axis=1)
    return _with_winner(joined, lines) if "config_first" in joined else joined


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A stored line as a row of a table; texts are made printable, because tables and pages show them."""
    row = {name: line.get(name) for name in _TABLE} | {"flags": "; ".join(line["flags"])}
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def _with_winner(joined: pd.DataFrame, lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    first, second = joined["config_first"], joined["config_second"]
    winner = first.where(joined["verdict"] == "A", second.where(joined["verdict"] == "B", "tie"))
    words = pd.DataFrame([line["answer_words"] for line in lines], columns=["words_first", "words_second"])
    return joined.assign(winner=winner, **words.astype("Int64"))


def rated_rows(plan: pd.DataFrame, store: VerdictStore) -> pd.DataFrame:
    """The ratings of a rubric plan.

    Args:
        plan: one row per rating, with `judgement_id` and `configs`.
        store: the judge's store.

    Returns:
        The rows of `judged_rows` with `config` and a column per criterion, 1 to 5; missing where the judge cannot tell.
    """
    rated = judged_rows(plan, store)
    scores = [store.ok[identity]["scores"] for identity in rated["judgement_id"]]
    columns = {name: pd.array([score[name] for score in scores], dtype="Int64") for name in CRITERIA}
    config = [configs[0] for configs in rated["configs"]]
    return rated.assign(config=pd.Series(config, dtype="str"), **columns).drop(columns=["configs", "verdict", "margin"])


# ---------------------------------------------------------------- coverage


def coverage_table(plan: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """The share of the planned questions that have a verdict, per configuration.

    Args:
        plan: the planned pairs; only those of the ranking fit (`FIT_PURPOSES`) count.
        judged: the verdicts on them (`judged_rows`).

    Returns:
        Columns config, planned, judged, coverage (judged / planned) and by_rule (verdicts that needed no judge).
    """

    def count(rows: pd.DataFrame) -> pd.Series:
        rows = rows[rows["purpose"].isin(FIT_PURPOSES)]
        return pd.concat([rows["config_first"], rows["config_second"]]).value_counts()

    table = pd.DataFrame({"planned": count(plan).sort_index()})
    table["judged"] = count(judged).reindex(table.index, fill_value=0)
    table["coverage"] = table["judged"] / table["planned"]
    table["by_rule"] = count(judged[judged["source"] == "rule"]).reindex(table.index, fill_value=0)
    return table.rename_axis("config").reset_index()


def coverage_block(table: pd.DataFrame) -> str | None:
    """The reason why missing verdicts block a headline (too many, or unequally many per configuration), or None."""
    short = table[~(table["coverage"] >= MIN_COVERAGE)]  # an unknown coverage is short as well
    if len(short):
        shares = [f"{config} {share:.1%}" for config, share in zip(short["config"], short["coverage"], strict=True)]
        return f"coverage below {MIN_COVERAGE:.0%}: {', '.join(shares)}"
    p = missingness_p(table)
    if p is not None and p < MISSINGNESS_P:
        return f"missing verdicts depend on the configuration (chi-square p = {p:.4f})"
    return None


def missingness_p(table: pd.DataFrame) -> float | None:
    """The p-value of a chi-square test for equal shares of missing verdicts in all configurations.

    Returns None if no verdict is missing, or if all are. `table` is that of `coverage_table`.
    """
    missing = table["planned"] - table["judged"]
    if missing.sum() == 0 or table["judged"].sum() == 0:
        return None
    return float(stats.chi2_contingency([table["judged"], missing]).pvalue)
