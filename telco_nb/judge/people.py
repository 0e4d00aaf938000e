"""People as judges: imports the votes of a blind panel into a store of verdicts.

`python -m telco_nb votes outputs/laptop votes/ann.jsonl` checks a rater's file against the study and appends the votes
to `judge-human-ann/store/verdicts.jsonl`. One line of a votes file is one JSON object, see `Vote`. If one is wrong,
nothing of the file is imported. `python -m telco_nb rerank outputs/laptop/judge-human-ann` then ranks the votes; a file
`params/judges/human-ann.yaml` with `judge_kind: human` makes the person a judge of the study.

The plan of a person holds the questions that the panel showed, so a skipped question counts as not judged. Planted
controls count only if the panel showed them; without them the gate is not passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from telco_nb.corpus.cards import Card
from telco_nb.judge import asking, design, gate
from telco_nb.judge.cases import Answers, Case, JudgeError, OfflineJudge, Question, Verdict, printable
from telco_nb.judge.store import VerdictStore, text_sha256

CONTROL_COLUMNS = [*design.PLAN_COLUMNS, "control", "planted"]


class Vote(BaseModel):
    """One line of a votes file, in the order in which the person voted.

    The hashes are those of the two texts shown (`store.text_sha256`), so a vote cannot count for other answers.
    `both_bad` counts as a tie with a flag, `undo` removes the last vote on the same question, and `skip` means that the
    question was shown and not answered. `repeat` is 1 if the same question is shown again. `control` names a planted
    control, whose planted side is `control:<name>`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    rater: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
    prompt_id: str
    config_first: str
    config_second: str
    sha256_first: str = Field(pattern=r"^[0-9a-f]{64}$")
    sha256_second: str = Field(pattern=r"^[0-9a-f]{64}$")
    choice: Literal["first", "second", "tie", "both_bad", "skip", "undo"]
    repeat: int = Field(default=0, ge=0, le=1)
    control: str | None = None
    seconds: float | None = Field(default=None, ge=0)
    note: str | None = Field(default=None, max_length=2000)

    @property
    def question(self) -> tuple[str, str, str, int]:
        return (self.prompt_id, self.config_first, self.config_second, self.repeat)

    def verdict(self) -> Verdict | None:
        """The verdict, None without a decision. The panel asks for no margin, so the margin is the smallest, 1."""
        note = printable(self.note or "")
        if self.choice in ("first", "second"):
            return Verdict("A" if self.choice == "first" else "B", 1, note)
        flags = ("A:bad", "B:bad") if self.choice == "both_bad" else ()
        return Verdict("tie", 0, note, flags) if self.choice in ("tie", "both_bad") else None


class VotesError(ValueError):
    """A votes file cannot be imported; the message names every bad row and field."""


class HumanJudge(OfflineJudge):
    """A person whose votes were imported. The person cannot be asked again, so missing votes stay missing."""

    kind = "human"
    is_proxy = False
    forms = ("pair",)
    description = "a person: the votes of a blind panel"

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model, endpoint)
        if not name.startswith("human-") or model is not None:
            raise ValueError(f"judge {name!r}: a person is named human-<rater> and has no judge_model.")
        self.parameters = {"instrument": "blind panel"}

    def judge(self, case: Case) -> Verdict:
        raise JudgeError("provider_error", "there is no vote of this person on these answers; import a file with one")


def shown_pairs(store: VerdictStore, part: str) -> pd.DataFrame:
    """A person's plan of a part (pairs or controls): the questions that the panel showed.

    Raises VotesError if no votes were imported.
    """
    if not store.plans:
        raise VotesError(f"{store.path}: no votes yet. Import them: python -m telco_nb votes <study> <votes file>")
    plan = store.planned(part).drop(columns="judgement_id")
    return plan.reindex(columns=CONTROL_COLUMNS if part == "controls" else design.PLAN_COLUMNS) if plan.empty else plan


# ---------------------------------------------------------------- reading


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file. Raises VotesError with the number, the field and the fault of each bad row."""
    votes, faults = [], []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")  # not splitlines(), because a note may hold U+2028
    for number, line in enumerate(lines, 1):
        try:
            votes.append(Vote.model_validate_json(line))
        except ValidationError as error:
            for detail in error.errors():
                field = ".".join(map(str, detail["loc"])) or "the line"
                faults.append(f"{path}:{number}: {field}: {detail['msg']}")
    raters = {vote.rater for vote in votes}
    if len(raters) > 1:
        faults.append(f"{path}: rater: one file holds one person's votes, not those of {', '.join(sorted(raters))}")
    _refuse(faults)
    return votes


def latest_votes(votes: Sequence[Vote], path: Path) -> list[Vote]:
    """The votes that remain after all `undo`, one per question. Raises VotesError for a second vote on a question."""
    latest: dict[tuple, Vote] = {}
    faults = []
    for number, vote in enumerate(votes, 1):
        earlier = latest.get(vote.question)
        if vote.choice == "undo":
            if latest.pop(vote.question, None) is None:
                faults.append(f"{path}:{number}: choice: nothing to undo on {vote.prompt_id}")
        elif earlier is None or earlier.choice == "skip":
            latest[vote.question] = vote
        else:
            faults.append(f"{path}:{number}: repeat: voted twice on one question; undo the first, or mark repeat 1")
    _refuse(faults)
    return list(latest.values())


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise VotesError("\n".join(faults[:20]) + more + "\nNothing was imported.")


# ---------------------------------------------------------------- importing


def add_votes(
    votes: Sequence[Vote],
    prompts: pd.DataFrame,
    answers: Answers,
    cards: Mapping[str, Card],
    configs: Sequence[str],
    store: VerdictStore,
    path: Path,
) -> int:
    """Checks all votes, then adds them to the store of the judge human-<rater>.

    Args:
        votes: the votes of one rater (`latest_votes`).
        prompts: the test prompts, one row each.
        answers: text by (configuration, prompt_id), the planted controls included.
        cards: card by term_id.
        configs: the configurations of the study.
        store: the store of the judge.
        path: the votes file, for messages.

    Returns:
        The number of new votes.

    Raises:
        VotesError: a vote does not fit the study or an earlier vote; nothing is imported.
    """
    judge = HumanJudge(f"human-{votes[0].rater}")
    plan = _plan_votes(votes, prompts, answers, configs, path)
    cases = asking.build_cases(plan, prompts, answers, cards)
    plan = asking.with_judgement_ids(judge, plan, cases)
    is_control = plan["purpose"] == "control"
    parts = {"controls": plan[is_control], "pairs": plan[~is_control].drop(columns=["control", "planted"])}
    lines = _lines(judge, plan, cases, votes, store, path)
    for part, rows in parts.items():
        store.plan(part, rows)
    store.append(lines)
    return len(lines)


def _plan_votes(
    votes: Sequence[Vote], prompts: pd.DataFrame, answers: Answers, configs: Sequence[str], path: Path
) -> pd.DataFrame:
    """The votes as a plan. Raises VotesError for votes that do not fit the study."""
    keys = {row["prompt_id"]: row for row in prompts[design.PROMPT_COLUMNS].to_dict("records")}
    rows, faults, shown = [], [], set()
    for number, vote in enumerate(votes, 1):
        sides = (vote.config_first, vote.config_second)
        where = f"{path}: vote {number} ({vote.prompt_id}, {' and '.join(sides)})"
        faults += [f"{where}: {fault}" for fault in _vote_faults(vote, keys, answers, configs)]
        row = design.pair_row(keys.get(vote.prompt_id, {}), "control", *sides) | {"repeat": vote.repeat}
        if vote.control:
            rows.append(row | {"control": vote.control, "planted": f"control:{vote.control}"})
            continue
        again, swapped = (vote.prompt_id, *sides) in shown, (vote.prompt_id, *reversed(sides)) in shown
        purpose = "anchor" if set(sides) & set(design.ANCHORS) else "swap" if swapped else "ranking"
        if vote.repeat and not again:
            faults.append(f"{where}: repeat: 1, but the question was not shown before")
        rows.append(row | {"purpose": "retest" if vote.repeat else purpose, "order": "ba" if swapped else "ab"})
        shown.add((vote.prompt_id, *sides))
    _refuse(faults)
    return pd.DataFrame(rows, columns=CONTROL_COLUMNS)


def _vote_faults(vote: Vote, keys: Mapping[str, Any], answers: Answers, configs: Sequence[str]) -> list[str]:
    """The reasons why a vote does not fit the study; empty if it fits."""
    planted = f"control:{vote.control}"
    known = {*configs, *design.ANCHORS} | ({planted} if vote.control in gate.GATE else set())
    faults = []
    if vote.prompt_id not in keys:
        faults.append(f"prompt_id: {vote.prompt_id!r} is not a test prompt of this study")
    for seat in ("first", "second"):
        config, digest = getattr(vote, f"config_{seat}"), getattr(vote, f"sha256_{seat}")
        text = answers.get((config, vote.prompt_id))
        if config not in known:
            faults.append(f"config_{seat}: {config!r} is not in this study")
        elif text is None or text_sha256(text) != digest:
            problem = "has no answer to it" if text is None else "has another answer to it now"
            faults.append(f"sha256_{seat}: {config} {problem}")
    if vote.config_first == vote.config_second:
        faults.append("config_second: a configuration cannot meet itself")
    if vote.control is not None and planted not in (vote.config_first, vote.config_second):
        faults.append(f"control: no side is {planted}")
    return faults


def _lines(
    judge: HumanJudge, plan: pd.DataFrame, cases: list[Case], votes: Sequence[Vote], store: VerdictStore, path: Path
) -> list[dict[str, Any]]:
    """The lines of the votes that are not in the store. Raises VotesError for a vote that differs from a stored one."""
    lines, faults = [], []
    for row, case, vote in zip(plan.to_dict("records"), cases, votes, strict=True):
        verdict, stored = vote.verdict(), store.ok.get(row["judgement_id"])
        if stored and verdict and stored["verdict"] != verdict.verdict:
            faults.append(f"{path}: {vote.prompt_id}: choice: differs from the vote imported earlier")
        if stored or verdict is None:
            continue
        row = row if vote.control else {k: v for k, v in row.items() if k not in ("control", "planted")}
        question = Question(row["judgement_id"], row, case)
        seconds = vote.seconds and round(vote.seconds, 6)
        lines.append(store.attempt_line(judge, question, verdict, source="human", latency_s=seconds, time=vote.time))
    _refuse(faults)
    return lines
