"""Judges: a case goes in, a verdict comes out.

A case is what a judge may know: the customer's conversation, the fact card, and one or two answers by seat. Its
form says what is asked: `pair` (which of two is better) or `rubric` (rate one answer).
Every judge has the same small interface, so another kind is one more line in `kinds`.

Answers are model output: untrusted text. It is only ever compared, quoted inside neutralised delimiters, or hashed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from telco_nb import ROOT
from telco_nb.corpus.cards import Card
from telco_nb.hosted.api import KEY_VARIABLES

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
MOST_CHARACTERS = (
    20_000  # of one answer in a prompt; far beyond any answer of the study, so that none can cost a fortune
)


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


def misfit(verdict: Verdict, case: Case) -> str | None:
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


@cache
def kinds() -> dict[str, type]:
    """The class of every kind of judge that works offline. Imported here because their modules import this one."""
    from telco_nb.judge import proxies, votes

    return {"checklist": proxies.ChecklistJudge, "reference": proxies.ReferenceJudge, "human": votes.HumanJudge}


def open_judge(values: Mapping[str, Any], root: Path) -> Judge:
    """The judge that parameters describe; `root` is the study's folder, where the budget is kept.

    Raises ValueError for an unknown kind or a setting it cannot use.
    """
    kind = values["judge_kind"]
    if kind in KEY_VARIABLES:
        from telco_nb.judge.jury import HostedJudge

        return HostedJudge.from_parameters(values, root)
    if kind not in kinds():
        known = ", ".join([*kinds(), *KEY_VARIABLES])
        raise ValueError(f"judge {values['judge']!r}: unknown judge_kind {kind!r}. Known: {known}.")
    return kinds()[kind](values["judge"], values["judge_model"], values["judge_endpoint"])


def label(judge: Judge) -> str:
    """The judge's name as it is shown."""
    return f"{judge.name} (offline proxy)" if judge.is_proxy else judge.name


def refuse_remote(name: str, kind: str, endpoint: str | None) -> None:
    if endpoint is not None:
        raise ValueError(f"judge {name!r}: kind {kind!r} works offline; remove judge_endpoint.")


# ---------------------------------------------------------------- what a language model must reply


class Reply(BaseModel):
    """What every reply has. The analysis comes first, so that the decision follows from it."""

    model_config = ConfigDict(extra="forbid")
    analysis: str = Field(description="at most 80 words on what decides")


class PairReply(Reply):
    """The reply to a pair."""

    verdict: Literal["A", "B", "tie"]
    margin: Literal[0, 1, 2] = Field(description="0 for a tie, 1 somewhat better, 2 clearly better")
    flags: list[str]

    @model_validator(mode="after")
    def _margin_fits(self) -> PairReply:
        if (self.verdict == "tie") != (self.margin == 0):
            raise ValueError(f"margin {self.margin} does not go with verdict {self.verdict!r}: 0 is for a tie only")
        return self

    @field_validator("flags")
    @classmethod
    def _known(cls, flags: list[str]) -> list[str]:
        return known_flags(flags)

    def to_verdict(self) -> Verdict:
        return Verdict(self.verdict, self.margin, self.analysis, tuple(self.flags))


class RubricReply(Reply):
    """The reply to a rubric."""

    factual: Literal[1, 2, 3, 4, 5]
    resolves: Literal[1, 2, 3, 4, 5]
    on_policy: Literal[1, 2, 3, 4, 5]
    tone: Literal[1, 2, 3, 4, 5]
    concise: Literal[1, 2, 3, 4, 5]

    def to_verdict(self) -> Verdict:
        return Verdict(analysis=self.analysis, scores={name: getattr(self, name) for name in CRITERIA})


REPLIES: dict[Form, type[PairReply | RubricReply]] = {"pair": PairReply, "rubric": RubricReply}


def known_flags(flags: Sequence[str]) -> list[str]:
    """Flags as `seat:flag`; what is none of ours becomes `other`, so that no free text enters a table."""
    known = [re.fullmatch(rf"[AB]:(?:{'|'.join(FLAGS)})", flag) for flag in flags]
    return list(dict.fromkeys(flag if match else "other" for flag, match in zip(flags, known, strict=True)))


# ---------------------------------------------------------------- the prompt

TEMPLATES: dict[Form, str] = {"pair": "judge_prompt.md", "rubric": "judge_rubric_prompt.md"}
_DATA = "<!-- the data follow -->\n"


class Prompt(NamedTuple):
    """`system` is the same for all cases of a form, `shared` (conversation, card) for all on one test prompt and card.

    What comes first and is the same can be served from a provider's cache; only `own` differs from case to case. With
    the shipped cards and 156 test prompts, system and shared part of a pair are 1,188 to 1,731 tokens of SmolLM2
    (median 1,437; system 428, card 698 to 1,072), of a rating 1,055 to 1,598 (median 1,304).
    """

    system: str
    shared: str
    own: str

    @property
    def data(self) -> str:
        return self.shared + self.own

    @property
    def text(self) -> str:
        return f"{self.system}\n{self.data}"


@cache
def prompt_template(form: Form) -> str:
    return (ROOT / "telco_nb" / "data" / TEMPLATES[form]).read_text(encoding="utf-8")


def prompt_sha256(form: Form) -> str:
    return hashlib.sha256(prompt_template(form).encode()).hexdigest()


def render(case: Case) -> Prompt:
    """The full prompt of a case. Untrusted parts cannot close their tags: their angle brackets are replaced."""
    conversation = "\n\n".join(f"{role}: {content}" for role, content in case.messages)
    answers = [
        f"<answer_{seat.lower()}>\n{neutralise(answer)}\n</answer_{seat.lower()}>"
        for seat, answer in zip(case.seats, case.answers, strict=True)
    ]
    parts = {"conversation": neutralise(conversation), "card": card_text(case.card), "answers": "\n\n".join(answers)}
    system, data = prompt_template(case.form).split(_DATA)
    shared, mark, own = data.partition("{{answers}}")

    def filled(template: str) -> str:  # in one pass, so that a placeholder quoted in an answer stays text
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)

    return Prompt(system.strip() + "\n", filled(shared).lstrip(), filled(mark + own).rstrip() + "\n")


def neutralise(text: str) -> str:
    """Untrusted text that can neither open nor close a tag of the prompt, nor hide control characters."""
    cut = text[:MOST_CHARACTERS] + f"\n[cut: {len(text)} characters]" * (len(text) > MOST_CHARACTERS)
    return printable(cut.replace("<", "‹").replace(">", "›"))


def printable(text: str) -> str:
    """Text without control characters, marks of direction, lone surrogates: safe in a page, a table, a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


@lru_cache(maxsize=512)
def _card_text(dumped: str) -> str:
    card = Card.model_validate_json(dumped)
    lines = [f"Term: {card.term}", f"Also called: {', '.join(card.aliases) or '-'}", f"Definition: {card.definition}"]
    lists = {
        "Facts": card.facts,
        "Checks, in order": card.diagnosis,
        "Fixes, in order": card.resolution,
        "Wrong beliefs": [f"{w.belief} CORRECT IS: {w.correction}" for w in card.wrong_beliefs],
        "Figures": [f"{f.text}: {f.meaning}" for f in card.figures],
        "Advice": [f"{c.options}: {c.advice}" for c in card.comparisons],
    }
    for title, items in lists.items():
        lines += [f"{title}:", *(f"- {item}" for item in items)]
    lines += [f"On a bill: {card.billing_answer}", f"Changes: {card.change_answer}"]
    return "\n".join([*lines, f"Escalate when {card.escalate_when}"])


def card_text(card: Card) -> str:
    """The card as a judge reads it."""
    return _card_text(card.model_dump_json())


# ---------------------------------------------------------------- answers that lose by rule


def degenerate(text: str) -> Literal["empty", "looping"] | None:
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
