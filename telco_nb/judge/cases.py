"""What a judge is given and what it returns: a case goes in, a verdict comes out.

A case is what a judge may know: the customer's conversation, the fact card, and one or two answers by seat. Its form
says what is asked: `pair` (which of two is better) or `rubric` (rate one answer).

Answers are model output: untrusted text. It is only ever compared, quoted inside neutralised delimiters, or hashed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from telco_nb.corpus.cards import Card

Form = Literal["pair", "rubric"]
SEATS = ("A", "B")
# The rubric, 1 (bad) to 5 (good) each: a view of its own, outside the ranking.
CRITERIA = {
    "factual": "agrees with the fact card; no wrong fact, figure or belief",
    "resolves": "deals with what the customer asked and says what happens next",
    "on_policy": "keeps to the operator's steps and scope, in their order",
    "tone": "polite, calm, without blame",
    "concise": "no more words than the matter needs, and complete",
}
FLAGS = (
    "wrong_fact", "unknown_figure", "wrong_belief", "off_topic", "no_next_step", "unclean_end", "instruction",
    "empty", "looping", "bad",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a judge may know. Configurations have no name here; `answers` are by seat: A, B."""

    form: Form
    card: Card
    intent: str
    messages: tuple[tuple[str, str], ...]  # (role, content), ends with a user turn
    reference: str  # only the judge `reference` looks at it
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        fitting = {"pair": 2, "rubric": 1}[self.form]
        if len(self.answers) != fitting:
            raise ValueError(f"a {self.form} holds {fitting} answers, not {len(self.answers)}")

    @property
    def seats(self) -> tuple[str, ...]:
        return SEATS[: len(self.answers)]


@dataclass(frozen=True)
class Verdict:
    """A judge's decision. `receipt` holds what a provider returned (ids, tokens, cost), by field of the store.

    `verdict` is A, B or tie for a pair, None for a rubric; `margin` goes with a pair, `scores` (criterion: 1 to 5, None
    where the judge cannot tell) with a rubric.
    Raises ValueError for what is no verdict of any form.
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
            raise ValueError(f"margin {self.margin!r} does not go with verdict {self.verdict!r}")

    @property
    def form(self) -> Form:
        """The form that this verdict answers."""
        if self.scores is not None:
            rated = set(self.scores) == set(CRITERIA) and all(s in (None, 1, 2, 3, 4, 5) for s in self.scores.values())
            if not rated or self.verdict is not None:
                raise ValueError(f"{dict(self.scores)} is no rating: {', '.join(CRITERIA)}, each 1 to 5")
            return "rubric"
        if self.verdict in ("A", "B", "tie"):
            return "pair"
        raise ValueError(f"{self.verdict!r} is no verdict")


def verdict_fault(verdict: Verdict, case: Case) -> str | None:
    """Why a verdict does not answer its case, or None: it is of another form."""
    return None if verdict.form == case.form else f"a {verdict.form} verdict answers no {case.form}"


class JudgeError(RuntimeError):
    """No verdict could be read; `status` is one of providers.STATUSES other than `ok`. Never a tie or a loss."""

    def __init__(self, status: str, message: str):
        self.status = status
        super().__init__(message)


class Judge(Protocol):
    """Who judges. `parameters` holds all that can change a verdict; it is part of every judgement's id."""

    name: str
    kind: str
    model: str | None
    is_proxy: bool  # offline rule or measure, not a language model: said wherever the judge is named
    is_free: bool  # asking costs nothing: it goes on after a failed gate
    description: str
    forms: tuple[Form, ...]  # what it can be asked
    parameters: dict[str, Any]


class LocalJudge(Judge, Protocol):
    """A judge that is asked one case after the other; a hosted one is asked many at a time (jury.HostedJudge.put)."""

    store_every: int  # verdicts to lose at most when killed

    def prepare(self, cases: Sequence[Case]) -> None:
        """Called once with all cases to come, so that work can be done in batches."""

    def judge(self, case: Case) -> Verdict:
        """Raises JudgeError if no verdict could be read."""


def refuse_remote(name: str, kind: str, endpoint: str | None) -> None:
    if endpoint is not None:
        raise ValueError(f"judge {name!r}: kind {kind!r} works offline; remove judge_endpoint.")


def printable(text: str) -> str:
    """Text without control characters, marks of direction, lone surrogates: safe in a page, a table, a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def degenerate_answer(text: str) -> Literal["empty", "looping"] | None:
    """Whether an answer is empty, or repeats itself without end; such an answer loses by rule, no judge is asked.

    Looping: the text ends in the same run of up to 40 words three times or more, or over half of its 4-word runs
    are repeats.
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


@dataclass(frozen=True)
class Question:
    """A row of a plan that has no verdict yet: its id, the row, what the judge sees, the number of this attempt."""

    id: str
    row: Mapping[str, Any]
    case: Case
    attempt: int


def verdict_by_score(
    scores: Sequence[float], tie_band: float, clear_margin: float, analysis: str, flags: Sequence[str] = ()
) -> Verdict:
    """The verdict on two answers by a score: differences below `tie_band` are ties."""
    # Rounded, so that the order of a sum cannot decide a case at the edge of the band.
    first, second = (round(score, 9) for score in scores)
    gap = round(first - second, 9)
    if abs(gap) < tie_band:
        return Verdict("tie", 0, analysis, tuple(flags))
    return Verdict("A" if gap > 0 else "B", 2 if abs(gap) >= clear_margin else 1, analysis, tuple(flags))
