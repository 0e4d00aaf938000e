"""People as judges: the votes of a blind panel enter the same store as any judge's verdicts.

`python -m telco_nb votes outputs/laptop votes/ann.jsonl` checks a rater's file against the study and appends its votes to
`judge-human-ann/store/verdicts.jsonl`. One line of a votes file is one JSON object, see `Vote`. Either all of a file is
good, or nothing of it is imported. `python -m telco_nb rerank outputs/laptop/judge-human-ann` then ranks them; a file
`params/judges/human-ann.yaml` with `judge_kind: human` makes the person a judge of the study.

A person's plan is what was shown: a question that was skipped counts as not judged. Planted controls count only if the
panel showed them; without them the gate is not passed, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from telco_nb.corpus.cards import Card
from telco_nb.judge import asking, design, gate
from telco_nb.judge.cases import Case, JudgeError, Question, Verdict, printable, refuse_remote
from telco_nb.judge.store import VerdictStore


class Vote(BaseModel):
    """One line of a votes file, in the order in which the person voted.

    The hashes are those of the two texts shown (judging.text_sha256), so that a vote cannot count for other answers.
    `both_bad` ranks as a tie with a flag; `undo` takes back the last vote on the same question; `skip` was shown and
    not answered. `repeat` is 1 where the same question is shown again. A planted control names itself in `control`; its
    planted side is `control:<name>`.
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
        """None where the person did not decide. A person is not asked for a margin; 1 is the smallest there is."""
        said = printable(self.note or "")
        if self.choice in ("first", "second"):
            return Verdict("A" if self.choice == "first" else "B", 1, said)
        flags = ("A:bad", "B:bad") if self.choice == "both_bad" else ()
        return Verdict("tie", 0, said, flags) if self.choice in ("tie", "both_bad") else None


class VotesError(ValueError):
    """A votes file cannot be imported; the message names every bad row and field."""


class HumanJudge:
    """A person whose votes were imported. Asking again is not possible: what is missing stays missing."""

    kind = "human"
    is_proxy = False
    is_free = True
    forms = ("pair",)
    store_every = 500
    description = "a person: the votes of a blind panel"

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        refuse_remote(name, self.kind, endpoint)
        if not name.startswith("human-") or model is not None:
            raise ValueError(f"judge {name!r}: a person is named human-<rater> and has no judge_model.")
        self.name, self.model = name, None
        self.parameters: dict[str, Any] = {"instrument": "blind panel"}

    def prepare(self, cases: Sequence[Case]) -> None:
        pass

    def judge(self, case: Case) -> Verdict:
        raise JudgeError("provider_error", "this person has not voted on these answers; import a file that has it")


def shown_pairs(store: VerdictStore, part: str) -> pd.DataFrame:
    """A person's plan: what the panel showed, by part (pairs, controls). Raises VotesError if nothing was imported."""
    if not store.plans:
        raise VotesError(f"{store.path}: no votes yet. Import them: python -m telco_nb votes <study> <votes file>")
    found = store.planned(part).drop(columns="judgement_id")
    columns = [*design.PLAN_COLUMNS, *(["control", "planted"] if part == "controls" else [])]
    return found.reindex(columns=columns) if found.empty else found


# ---------------------------------------------------------------- reading


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file. Raises VotesError naming each bad row by number, with the field and what is wrong."""
    votes, wrong = [], []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")  # not splitlines(): a note may hold U+2028
    for number, line in enumerate(lines, 1):
        try:
            votes.append(Vote.model_validate_json(line))
        except ValidationError as error:
            for found in error.errors():
                field = ".".join(map(str, found["loc"])) or "the line"
                wrong.append(f"{path}:{number}: {field}: {found['msg']}")
    raters = {vote.rater for vote in votes}
    if len(raters) > 1:
        wrong.append(f"{path}: rater: one file holds one person's votes, not those of {', '.join(sorted(raters))}")
    _refuse(wrong)
    return votes


def latest_votes(votes: Sequence[Vote], path: Path) -> list[Vote]:
    """The votes that stand after all undoing, one per question. Raises VotesError for a second vote on a question."""
    kept: dict[tuple, Vote] = {}
    wrong = []
    for number, vote in enumerate(votes, 1):
        earlier = kept.get(vote.question)
        if vote.choice == "undo":
            if kept.pop(vote.question, None) is None:
                wrong.append(f"{path}:{number}: choice: nothing to undo on {vote.prompt_id}")
        elif earlier is None or earlier.choice == "skip":
            kept[vote.question] = vote
        else:
            wrong.append(f"{path}:{number}: repeat: voted twice on one question; undo the first, or mark repeat 1")
    _refuse(wrong)
    return list(kept.values())


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        more = f"\n... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise VotesError("\n".join(wrong[:20]) + more + "\nNothing was imported.")


# ---------------------------------------------------------------- importing


def plan_votes(votes: Sequence[Vote], prompts: pd.DataFrame, configs: Sequence[str], path: Path) -> pd.DataFrame:
    """The votes as a plan (judging): why each question was shown, seats as shown, `control` and `planted` for controls.

    Raises VotesError for unknown prompts, configurations or controls, and for a repeat of nothing.
    """
    keys = {row["prompt_id"]: row for row in prompts[design.SHARED_COLUMNS[1:]].to_dict("records")}
    rows, wrong, shown = [], [], set()
    for number, vote in enumerate(votes, 1):
        sides = (vote.config_first, vote.config_second)
        where = f"{path}: vote {number} ({vote.prompt_id}, {' and '.join(sides)})"
        wrong += [f"{where}: {problem}" for problem in _unknown(vote, keys, configs)]
        planted = f"control:{vote.control}"
        row = design.pair_row(keys.get(vote.prompt_id, {}), "control", *sides) | {"repeat": vote.repeat}
        if vote.control:
            rows.append(row | {"control": vote.control, "planted": planted})
            continue
        again, swapped = (vote.prompt_id, *sides) in shown, (vote.prompt_id, *reversed(sides)) in shown
        purpose = "anchor" if set(sides) & set(design.ANCHORS) else "swap" if swapped else "ranking"
        if vote.repeat and not again:
            wrong.append(f"{where}: repeat: 1, but the question was not shown before")
        rows.append(row | {"purpose": "retest" if vote.repeat else purpose, "order": "ba" if swapped else "ab"})
        shown.add((vote.prompt_id, *sides))
    _refuse(wrong)
    return pd.DataFrame(rows, columns=[*design.PLAN_COLUMNS, "control", "planted"])


def _unknown(vote: Vote, keys: Mapping[str, Any], configs: Sequence[str]) -> list[str]:
    known = {*configs, *design.ANCHORS} | ({f"control:{vote.control}"} if vote.control in gate.GATE else set())
    sides = {"config_first": vote.config_first, "config_second": vote.config_second}
    found = [f"{name}: {side!r} is not in this study" for name, side in sides.items() if side not in known]
    if vote.prompt_id not in keys:
        found.append(f"prompt_id: {vote.prompt_id!r} is not a test prompt of this study")
    if vote.config_first == vote.config_second:
        found.append("config_second: a configuration cannot meet itself")
    if vote.control is not None and f"control:{vote.control}" not in sides.values():
        found.append(f"control: no side is control:{vote.control}")
    return found


def add_votes(
    votes: Sequence[Vote],
    prompts: pd.DataFrame,
    answers: Mapping[tuple[str, str], str],
    cards: Mapping[str, Card],
    configs: Sequence[str],
    store: VerdictStore,
    path: Path,
) -> int:
    """Put the votes into the store of the judge human-<rater>; returns how many are new. All are checked first."""
    judge = HumanJudge(f"human-{votes[0].rater}")
    shown = plan_votes(votes, prompts, configs, path)
    asked = _cases(shown, votes, prompts, answers, cards, path)
    enrolled = asking.with_judgement_ids(judge, shown, asked)
    lines = _lines(judge, enrolled, asked, votes, store, path)
    is_control = enrolled["purpose"] == "control"
    store.plan("controls", enrolled[is_control])
    store.plan("pairs", enrolled[~is_control].drop(columns=["control", "planted"]))
    store.append(lines)
    return len(lines)


def _cases(
    shown: pd.DataFrame,
    votes: Sequence[Vote],
    prompts: pd.DataFrame,
    answers: Mapping[tuple[str, str], str],
    cards: Mapping[str, Card],
    path: Path,
) -> list[Case]:
    """The cases that were shown, each text equal to the study's by hash."""
    wrong = []
    for number, vote in enumerate(votes, 1):
        for side, digest in (("first", vote.sha256_first), ("second", vote.sha256_second)):
            config = getattr(vote, f"config_{side}")
            text = answers.get((config, vote.prompt_id))
            if text is None or asking.text_sha256(text) != digest:
                have = "has no answer to it" if text is None else "has another answer to it now"
                wrong.append(f"{path}: vote {number} ({vote.prompt_id}): sha256_{side}: {config} {have}")
    _refuse(wrong)
    return asking.build_cases(shown, prompts, answers, cards)


def _lines(
    judge: HumanJudge,
    enrolled: pd.DataFrame,
    asked: Sequence[Case],
    votes: Sequence[Vote],
    store: VerdictStore,
    path: Path,
) -> list[dict[str, Any]]:
    """Lines for the votes that the store does not have. A stored vote is never changed: a different one is refused."""
    lines, wrong = [], []
    for row, case, vote in zip(enrolled.to_dict("records"), asked, votes, strict=True):
        verdict, stored = vote.verdict(), store.ok.get(row["judgement_id"])
        if stored and verdict and stored["verdict"] != verdict.verdict:
            wrong.append(f"{path}: {vote.prompt_id}: choice: differs from the vote imported earlier")
        if stored or verdict is None:
            continue
        row = row if vote.control else {k: v for k, v in row.items() if k not in ("control", "planted")}
        question = Question(row["judgement_id"], row, case, store.attempts[row["judgement_id"]] + 1)
        line = asking.attempt_line(
            judge, question, "ok", verdict, source="human", latency_s=vote.seconds, when=vote.time
        )
        lines.append(line)
    _refuse(wrong)
    return lines
