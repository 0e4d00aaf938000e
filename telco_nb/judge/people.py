"""Judges outside this machine: people, or a panel of language models, whose votes on blind pairs are imported.

`python -m telco_nb votes export` writes the pairs, `votes import` puts the votes into a store of verdicts, and 05_judge
ranks them like those of any other judge. A vote counts for the two texts that were shown: if an answer has changed
since, it is refused.

The plan of such a judge holds what it was shown: every pair up to the last one that has a vote. A pair without a vote
there, or with `skip`, counts as not judged. Planted controls count only if they were shown; without them the gate is
not passed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pandas as pd

from telco_nb.judge import asking, design
from telco_nb.judge.blind_pairs import KEY_COLUMNS, SEATS, Material
from telco_nb.judge.cases import Case, JudgeError, OfflineJudge, Question, Verdict
from telco_nb.judge.store import VerdictStore, text_sha256
from telco_nb.judge.votes_file import Line, Vote, VotesError, refuse
from telco_nb.study.params import ParameterError
from telco_nb.study.record import parse_line

CONTROL_COLUMNS = [*design.PLAN_COLUMNS, "control", "planted"]
PARTS = ("controls", "pairs")


class OutsideJudge(OfflineJudge):
    """A judge whose votes were imported. It cannot be asked again, so missing votes stay missing."""

    is_proxy = False
    forms = ("pair",)
    instrument: ClassVar[dict[str, str]]  # how the verdicts were made; part of every stored line
    needs_reasons: ClassVar[bool] = False  # what `instrument` says must be true of every vote

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model, endpoint)
        if model is not None:
            raise ParameterError(f"judge {name!r}: the votes of a {self.kind} are imported; remove judge_model.")
        self.parameters = dict(self.instrument)

    def judge(self, case: Case) -> Verdict:
        raise JudgeError("provider_error", "there is no vote of this judge on these answers; import a file with one")


class HumanJudge(OutsideJudge):
    """A person."""

    kind = "human"
    instrument: ClassVar = {"instrument": "blind pairs"}
    description = "a person: votes on blind pairs"

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model, endpoint)
        if not name.startswith("human-"):
            raise ParameterError(f"judge {name!r}: a person is named human-<rater>.")


class LanguageModelPanelJudge(OutsideJudge):
    """A panel of language models that nobody asked through this project."""

    kind = "language_model_panel"
    needs_reasons = True
    instrument: ClassVar = {
        "instrument": "blind pairs",
        "made_by": "language models outside this project read the pairs one by one and gave a reason with each vote",
        "model": "not known to this record",
    }
    description = (
        "a panel of language models outside this project: blind pairs were exported, read and voted on one by one with "
        "a reason, and the votes imported; which models they were is not known to this record"
    )


def shown_pairs(store: VerdictStore, part: str) -> pd.DataFrame:
    """The plan of a part (pairs or controls): the questions that the judge was shown.

    Raises VotesError if no votes were imported.
    """
    if not store.plans:
        raise VotesError(f"{store.path}: no votes yet. Import them: python -m telco_nb votes import STUDY FILE")
    plan = store.planned(part).drop(columns="judgement_id")
    return plan.reindex(columns=_columns(part)) if plan.empty else plan


def _columns(part: str) -> list[str]:
    return CONTROL_COLUMNS if part == "controls" else design.PLAN_COLUMNS


# ---------------------------------------------------------------- importing


class Import(NamedTuple):
    """Checked votes of one judge: the lines to add to its store, new votes among them, and pairs judged before."""

    judge: OutsideJudge
    store: VerdictStore
    lines: list[dict[str, Any]]
    n_new: int
    n_known: int

    def stored(self) -> bytes:
        """The whole store with the new lines. Of a last line without a line feed only a whole one stays."""
        data = self.store.path.read_bytes() if self.store.path.is_file() else b""
        end = data.rfind(b"\n") + 1
        kept = data[:end] if parse_line(data[end:]) is None else data + b"\n"
        new = [json.dumps(line, allow_nan=False).encode("ascii") + b"\n" for line in self.lines]
        return kept + b"".join(new)


def check_votes(
    judge: OutsideJudge,
    votes: Sequence[Line],
    keys: Sequence[Sequence[Mapping[str, Any]]],
    material: Material,
    store: VerdictStore,
) -> Import:
    """Check all votes of a judge against the study; nothing is written.

    Args:
        judge: the judge.
        votes: its votes, at most one a pair (`votes_file.one_vote_each`).
        keys: those of all exports of the study (`blind_pairs.read_keys`).
        material: the study's prompts, answers and controls.
        store: the judge's store.

    Returns:
        What is to be added to the store.

    Raises:
        VotesError: a vote is on no exported pair, on answers that have changed, differs from an earlier import, or
            lacks the reason that this kind of judge must give.
    """
    _refuse_without_reason(judge, votes)
    by_id = {line.vote.pair_id: line for line in votes}
    rows = [row for key in keys for row in _shown(key, by_id)]
    _refuse_unfit(votes, rows, material)
    rows = [row for row in rows if _is_current(row, material)]
    plans, questions = _plans(judge, rows, material, store)
    lines, n_known, faults = [], 0, []
    taken = dict(store.ok)
    for row, question in zip(rows, questions, strict=True):
        line = by_id.get(row["pair_id"])
        fresh = _attempt(judge, question, line.vote if line else None, row["pair_id"], store)
        if fresh is None:
            continue
        earlier = taken.setdefault(question.id, fresh)
        if earlier is fresh:
            lines.append(fresh)
        elif line and earlier.get("pair_id") != row["pair_id"]:
            n_known += 1
        elif line and any(earlier[name] != fresh[name] for name in ("verdict", "margin")):
            faults.append(f"{line.where}: vote: {line.vote.vote!r} differs from the vote imported earlier")
    refuse(faults)
    # Marked as brought: also a plan without a new vote, of skips or of pairs judged before, changes what 05 ranks.
    planned = [line for part in PARTS for line in store.plan_lines(part, plans[part], source="votes")]
    return Import(judge, store, [*planned, *lines], sum(line["source"] == "votes" for line in lines), n_known)


def _shown(key: Sequence[Mapping[str, Any]], voted: Mapping[str, Line]) -> list[Mapping[str, Any]]:
    """The rows of a key that the judge was shown: those up to the last one with a vote."""
    last = max((row["position"] for row in key if row["pair_id"] in voted), default=0)
    return [row for row in key if row["position"] <= last]


def _refuse_without_reason(judge: OutsideJudge, votes: Sequence[Line]) -> None:
    """A person may vote without a reason; the record of a panel says that each of its votes has one."""
    if judge.needs_reasons:
        bare = [line.where for line in votes if line.vote.vote != "skip" and not (line.vote.reason or "").strip()]
        refuse([f"{where}: reason: a vote of a {judge.kind} needs one. Add it." for where in bare])


def _refuse_unfit(votes: Sequence[Line], rows: Sequence[Mapping[str, Any]], material: Material) -> None:
    known = {row["pair_id"]: row for row in rows if row["pair_id"]}
    faults = []
    for where, vote in votes:
        row = known.get(vote.pair_id)
        if row is None:
            faults.append(f"{where}: pair_id: {vote.pair_id!r:.40} is no pair that this study has exported")
        elif not _is_current(row, material):
            faults.append(f"{where}: pair_id: an answer of {vote.pair_id!r} has changed since the export; export again")
    refuse(faults)


def _is_current(row: Mapping[str, Any], material: Material) -> bool:
    hashes = [row["sha256_first"], row["sha256_second"]]
    there = all((row[seat], row["prompt_id"]) in material.answers for seat in SEATS)
    return there and [text_sha256(text) for text in material.texts(row)] == hashes


def _plans(
    judge: OutsideJudge, rows: Sequence[Mapping[str, Any]], material: Material, store: VerdictStore
) -> tuple[dict[str, pd.DataFrame], list[Question]]:
    """The plan of each part, earlier imports included, and the question of every row."""
    cases, plan = _with_ids(judge, pd.DataFrame(rows, columns=KEY_COLUMNS)[CONTROL_COLUMNS], material)
    plans = {}
    for part in PARTS:
        own = plan[(plan["purpose"] == "control") == (part == "controls")]
        both = pd.concat([_earlier(judge, part, material, store), own[[*_columns(part), "judgement_id"]]])
        plans[part] = both.drop_duplicates([*_columns(part)], ignore_index=True)
    records = [
        {
            name: value
            for name, value in row.items()
            if row["purpose"] == "control" or name not in ("control", "planted")
        }
        for row in plan.to_dict("records")
    ]
    pairs = zip(records, cases, strict=True)
    return plans, [Question(row["judgement_id"], row, case) for row, case in pairs]


def _with_ids(judge: OutsideJudge, plan: pd.DataFrame, material: Material) -> tuple[list[Case], pd.DataFrame]:
    cases = asking.build_cases(plan, material.prompts, material.answers, material.cards)
    return cases, asking.with_judgement_ids(judge, plan, cases)


def _earlier(judge: OutsideJudge, part: str, material: Material, store: VerdictStore) -> pd.DataFrame:
    """The stored plan of a part without the questions whose answers have changed since."""
    plan = store.planned(part)
    seats = [zip(plan[seat], plan["prompt_id"], strict=True) for seat in SEATS] if len(plan) else []
    there = [all(answer in material.answers for answer in pair) for pair in zip(*seats, strict=True)]
    plan = plan[there] if len(plan) else plan
    if plan.empty:
        return pd.DataFrame(columns=[*_columns(part), "judgement_id"])
    _, now = _with_ids(judge, plan.drop(columns="judgement_id"), material)
    return plan[now["judgement_id"] == plan["judgement_id"]]


def _attempt(
    judge: OutsideJudge, question: Question, vote: Vote | None, pair_id: str | None, store: VerdictStore
) -> dict[str, Any] | None:
    """The line of a vote, or of a verdict by rule; None without a decision."""
    if pair_id is None:
        by_rule = asking.rule_verdict(question.case)
        return store.attempt_line(judge, question, by_rule, source="rule", latency_s=0.0) if by_rule else None
    verdict = vote.verdict() if vote else None
    if vote is None or verdict is None:
        return None
    seconds = vote.seconds and round(vote.seconds, 6)
    told = {"source": "votes", "latency_s": seconds, "pair_id": pair_id, "rater": vote.rater}
    return store.attempt_line(judge, question, verdict, **told, **({"time": vote.time} if vote.time else {}))
