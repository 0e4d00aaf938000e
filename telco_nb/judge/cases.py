"""Cases and verdicts: the input and the output of every judge.

A case holds all that a judge may know: the customer's conversation, the fact card, and one or two answers by seat. Its
form is `pair` (which of two answers is better) or `rubric` (rate one answer).

Answers are the output of a model, so they are untrusted text. The code compares them, hashes them, or quotes them
inside neutralised delimiters; it does nothing else with them.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from telco_nb.corpus.cards import Card
from telco_nb.hosted.keys import printable as printable  # for 05, which shows texts by it
from telco_nb.study.params import ParameterError

Form = Literal["pair", "rubric"]
Answers = Mapping[tuple[str, str], str]  # text by (configuration, prompt_id)
SEATS = ("A", "B")
# The criteria of the rubric, 1 (bad) to 5 (good) each. Ratings do not enter the ranking.
CRITERIA = {
    "factual": "agrees with the fact card; no wrong fact, figure or belief",
    "resolves": "deals with what the customer asked and says what happens next",
    "on_policy": "keeps to the operator's steps and scope, in their order",
    "tone": "polite, calm, without blame",
    "concise": "no more words than the matter needs, and complete",
}
FLAGS = (
    "unsafe", "asks_for_secret", "contradiction", "wrong_fact", "unknown_figure", "wrong_belief", "off_request",
    "off_topic", "no_next_step", "unclean_end", "too_long_or_short", "list", "term_missing",
    "repeats_itself", "instruction", "empty", "looping", "bad",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """All that a judge may know. Configurations have no name here; `answers` are by seat: A, B."""

    form: Form
    card: Card
    problem_id: str  # of the card; "" where it is not known
    messages: tuple[tuple[str, str], ...]  # (role, content); the last one is from the customer
    reference: str  # the gold answer; only the offline judges read it
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        n_answers = {"pair": 2, "rubric": 1}[self.form]
        if len(self.answers) != n_answers:
            raise ValueError(f"a case of form {self.form} has {n_answers} answers, not {len(self.answers)}")

    @property
    def seats(self) -> tuple[str, ...]:
        return SEATS[: len(self.answers)]


@dataclass(frozen=True)
class Question:
    """One row of a plan, with its judgement id and the case that the judge sees."""

    id: str
    row: Mapping[str, Any]
    case: Case


@dataclass(frozen=True)
class Verdict:
    """A judge's decision. `receipt` holds what a provider returned (ids, tokens, cost), by field of the store.

    A pair has `verdict` (A, B or tie) and `margin`; a rubric has `scores` (criterion: 1 to 5, None where the judge
    cannot tell) and no verdict. Raises ValueError if the values fit neither form.
    """

    verdict: str | None = None
    margin: int | None = None
    analysis: str = ""
    flags: tuple[str, ...] = ()
    scores: Mapping[str, int | None] | None = None
    raw: str | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form == "pair" and self.margin not in ((0,) if self.verdict == "tie" else (1, 2)):
            raise ValueError(f"margin {self.margin!r} does not fit verdict {self.verdict!r}")

    @property
    def form(self) -> Form:
        """The form of the cases that this verdict can answer."""
        if self.scores is not None:
            rated = set(self.scores) == set(CRITERIA) and all(s in (None, 1, 2, 3, 4, 5) for s in self.scores.values())
            if not rated or self.verdict is not None:
                raise ValueError(f"{dict(self.scores)} is not a rating: {', '.join(CRITERIA)}, each 1 to 5")
            return "rubric"
        if self.verdict in ("A", "B", "tie"):
            return "pair"
        raise ValueError(f"{self.verdict!r} is not a verdict")


def verdict_fault(verdict: Verdict, case: Case) -> str | None:
    """The error message for a verdict whose form differs from that of its case, or None."""
    return None if verdict.form == case.form else f"a {verdict.form} verdict cannot answer a {case.form} case"


class JudgeError(RuntimeError):
    """No verdict could be read, which is never a tie or a loss. `status` is one of `hosted.api.STATUSES` but `ok`."""

    def __init__(self, status: str, message: str):
        self.status = status
        super().__init__(message)


class Judge:
    """The attributes of every judge. `parameters` holds all that can change a verdict; it is part of judgement ids."""

    name: str
    kind: str
    model: str | None
    is_proxy: bool  # an offline rule or measure, not a language model; tables say so
    is_free: bool  # asking costs nothing, so a failed gate does not end the asking
    description: str
    forms: tuple[Form, ...]  # the forms of the cases that it can answer
    parameters: dict[str, Any]


class OfflineJudge(Judge):
    """A judge on this machine. It answers one case after the other; a hosted judge answers many at a time."""

    is_proxy = is_free = True
    store_every = 500  # verdicts that a kill can lose at most

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        if endpoint is not None:
            raise ParameterError(f"judge {name!r}: kind {self.kind!r} works offline; remove judge_endpoint.")
        self.name, self.model = name, model

    def prepare(self, cases: Sequence[Case]) -> None:
        """Receives all coming cases once, so that a judge can do work in batches."""

    @abstractmethod
    def judge(self, case: Case) -> Verdict:
        """The verdict on a case. Raises JudgeError if there is none."""


def degenerate_answer(text: str) -> Literal["empty", "looping"] | None:
    """The fault of an answer that loses by rule, without asking a judge; None for every other answer.

    Empty: fewer than two words. Looping: the text ends in the same run of up to 40 words three times or more, or over
    half of its 4-word runs are repeats.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) < 2:
        return "empty"
    for period in range(1, min(40, len(words) // 3) + 1):
        run = 0
        while run < len(words) - period and words[-1 - run] == words[-1 - run - period]:
            run += 1
        if run >= max(2 * period, 6):
            return "looping"
    runs = list(zip(*(words[i:] for i in range(4)), strict=False))
    return "looping" if len(runs) >= 16 and len(set(runs)) < len(runs) / 2 else None


def verdict_by_score(
    scores: Sequence[float], tie_band: float, clear_margin: float, analysis: str, flags: Sequence[str] = ()
) -> Verdict:
    """The verdict on two answers by their scores: differences below `tie_band` are ties."""
    # Scores are rounded because the order of a sum must not decide a case at the edge of the band.
    first, second = (round(score, 9) for score in scores)
    gap = round(first - second, 9)
    if abs(gap) < tie_band:
        return Verdict("tie", 0, analysis, tuple(flags))
    return Verdict("A" if gap > 0 else "B", 2 if abs(gap) >= clear_margin else 1, analysis, tuple(flags))
