"""The store of verdicts: one line per attempt, never changed, and everything else a function of it.

A line is JSON in ASCII, so that no text of a model, whatever it holds, can break a line or its encoding. Two kinds:

- an attempt, see `FIELDS`: one question to one judge, how it ended, and what was said. Only `ok` enters a ranking; what
  could not be read is kept with its status, is asked again, and is never a tie or a loss.
- a plan: all questions of one part (controls, rubric, pairs). A later plan replaces the earlier one of its
  part, so that coverage counts what was never asked, and verdicts on answers that no longer exist stay out.
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

from telco_nb.hosted import api
from telco_nb.hosted.attempts import AttemptStore
from telco_nb.judge.cases import CRITERIA, Verdict, printable

PARTS = ("controls", "rubric", "pairs")
FIT_PURPOSES = ("ranking", "swap")  # retests and anchors stay outside the ranking fit
MIN_COVERAGE = 0.98
MISSINGNESS_P = 0.01
# What only a provider can say; None for an offline judge.
RECEIPT = (*api.RECEIPT, "price_table", "usd", "usd_at_most", "batch_id")
# The fields of an attempt, whatever its form and its end; the plan's columns (who met whom, where, why) come on top.
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

    def _enter(self, read: dict[str, Any]) -> None:
        if "plan" in read:
            self.plans[read["plan"]] = read
            return
        if read["status"] == "ok":  # a line that says ok without a verdict would else count as a tie
            Verdict(read["verdict"], read["margin"], scores=read.get("scores"))
        super()._enter(read)

    def plan(self, part: str, plan: pd.DataFrame) -> None:
        """Note what is going to be asked in a part, unless the latest plan of the part says the same."""
        questions = {name: [_listed(v) for v in plan[name]] for name in plan.columns}
        digest = hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest()
        if self.plans.get(part, {}).get("sha256") != digest:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.append([{"plan": part, "sha256": digest, "n": len(plan), "time": now, "questions": questions}])

    def planned(self, part: str) -> pd.DataFrame:
        """The latest plan of a part, empty if there is none."""
        return pd.DataFrame(self.plans.get(part, {}).get("questions", {"judgement_id": [], "purpose": []}))


def _listed(value: Any) -> Any:
    """A value of a table as JSON has it."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return value.item() if hasattr(value, "item") else value


_TABLE = {
    "attempt": "Int64", "source": "str", "verdict": "str", "margin": "Int64", "flags": "str", "analysis": "str",
    "raw": "str", "model_asked": "str", "model_returned": "str", "request_id": "str", "finish_reason": "str",
    "tokens_in": "Int64", "tokens_out": "Int64", "tokens_cached": "Int64", "tokens_reasoning": "Int64",
    "price_table": "str", "usd": "Float64", "prompt_sha256": "str", "latency_s": "Float64", "time": "str",
}  # fmt: skip


def judged_rows(plan: pd.DataFrame, store: VerdictStore) -> pd.DataFrame:
    """The good verdicts of a plan: its rows and what was stored. Flags are joined by "; ".

    Questions that got no readable verdict are left out, not counted as anything. A pair also gets `winner` (a
    configuration or "tie"), `words_first` and `words_second`.
    """
    answered = plan[plan["judgement_id"].isin(store.ok)].reset_index(drop=True)
    lines = [store.ok[identity] for identity in answered["judgement_id"]]
    table = pd.DataFrame([_row(line) for line in lines], columns=list(_TABLE))
    joined = pd.concat([answered, table.astype(_TABLE)], axis=1)
    return _pairs(joined, lines) if "config_first" in joined else joined


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A stored line as a row of a table: texts of a model without what a table or a page cannot hold."""
    row = {name: line.get(name) for name in _TABLE} | {"flags": "; ".join(line["flags"])}
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def rated_rows(plan: pd.DataFrame, store: VerdictStore) -> pd.DataFrame:
    """The ratings of a rubric plan, as `verdicts`, with `config` and a column per criterion, 1 to 5.

    Missing where the judge could not tell.
    """
    rated = judged_rows(plan, store)
    scores = [store.ok[identity]["scores"] for identity in rated["judgement_id"]]
    columns = {name: pd.array([found[name] for found in scores], dtype="Int64") for name in CRITERIA}
    config = [configs[0] for configs in rated["configs"]]
    return rated.assign(config=pd.Series(config, dtype="str"), **columns).drop(columns=["configs", "verdict", "margin"])


def _pairs(joined: pd.DataFrame, lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    first, second = joined["config_first"], joined["config_second"]
    winner = first.where(joined["verdict"] == "A", second.where(joined["verdict"] == "B", "tie"))
    words = pd.DataFrame([line["answer_words"] for line in lines], columns=["words_first", "words_second"])
    return joined.assign(winner=winner, **words.astype("Int64"))


# ---------------------------------------------------------------- coverage


def coverage_table(plan: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """Per configuration of the fit: questions planned, judged, their share, and verdicts given by rule."""

    def count(rows: pd.DataFrame) -> pd.Series:
        rows = rows[rows["purpose"].isin(FIT_PURPOSES)]
        return pd.concat([rows["config_first"], rows["config_second"]]).value_counts()

    planned = count(plan).sort_index()
    table = pd.DataFrame({"planned": planned})
    table["judged"] = count(judged).reindex(planned.index, fill_value=0)
    table["coverage"] = table["judged"] / table["planned"]
    table["by_rule"] = count(judged[judged["source"] == "rule"]).reindex(planned.index, fill_value=0)
    return table.rename_axis("config").reset_index()


def coverage_block(table: pd.DataFrame) -> str | None:
    """Why missing verdicts forbid a headline, or None: too many missing, or missing more for some configurations."""
    short = table[table["coverage"] < MIN_COVERAGE]
    if len(short):
        named = ", ".join(f"{r.config} {r.coverage:.1%}" for r in short.itertuples())
        return f"coverage below {MIN_COVERAGE:.0%}: {named}"
    p = missingness_p(table)
    if p is not None and p < MISSINGNESS_P:
        return f"missing verdicts depend on the configuration (chi-square p = {p:.4f})"
    return None


def missingness_p(table: pd.DataFrame) -> float | None:
    """p of a chi-square test that verdicts are missing alike for all configurations; None if none (or all) are."""
    missing = table["planned"] - table["judged"]
    if missing.sum() == 0 or table["judged"].sum() == 0:
        return None
    return float(stats.chi2_contingency([table["judged"], missing]).pvalue)
