"""The prompts for a language model as a judge, the schemas of its replies, and the neutralising of untrusted text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from telco_nb import ROOT
from telco_nb.corpus.cards import Card, Problem
from telco_nb.hosted.keys import printable
from telco_nb.judge.cases import CRITERIA, FLAGS, Case, Form, Verdict

MAX_ANSWER_CHARACTERS = 20_000  # of one answer in a prompt; no answer of the study is near it; it limits the cost
TEMPLATES: dict[Form, str] = {"pair": "judge_prompt.md", "rubric": "judge_rubric_prompt.md"}
_DATA = "<!-- the data follow -->\n"


class Reply(BaseModel):
    """The common part of all replies. The analysis comes first, so that the decision follows from it."""

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
            raise ValueError(f"margin {self.margin} does not fit verdict {self.verdict!r}: 0 is for a tie only")
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
    """The flags as `seat:flag`. An unknown flag becomes `other`, so that no free text enters a table."""
    known = [re.fullmatch(rf"[AB]:(?:{'|'.join(FLAGS)})", flag) for flag in flags]
    return list(dict.fromkeys(flag if match else "other" for flag, match in zip(flags, known, strict=True)))


class Prompt(NamedTuple):
    """A prompt in three parts. A provider can serve the first two from its cache, because many cases share them.

    `system` is the same for all cases of a form, `shared` (conversation and card) for all cases of one test prompt, and
    `own` differs from case to case.
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


def render_prompt(case: Case) -> Prompt:
    """The full prompt of a case. Untrusted texts cannot close their tags, because their angle brackets are replaced."""
    conversation = "\n\n".join(f"{role}: {content}" for role, content in case.messages)
    answers = [
        f"<answer_{seat.lower()}>\n{neutralise(answer)}\n</answer_{seat.lower()}>"
        for seat, answer in zip(case.seats, case.answers, strict=True)
    ]
    card = card_text(case.card, case.problem_id)
    parts = {"conversation": neutralise(conversation), "card": card, "answers": "\n\n".join(answers)}
    system, data = prompt_template(case.form).split(_DATA)
    shared, mark, own = data.partition("{{answers}}")

    def filled(template: str) -> str:  # in one pass, because a placeholder inside an answer must stay text
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)

    return Prompt(system.strip() + "\n", filled(shared).lstrip(), filled(mark + own).rstrip() + "\n")


def neutralise(text: str) -> str:
    """Shortens untrusted text and replaces its angle brackets and control characters, so it cannot form a tag."""
    cut = text[:MAX_ANSWER_CHARACTERS] + f"\n[cut: {len(text)} characters]" * (len(text) > MAX_ANSWER_CHARACTERS)
    return printable(cut.replace("<", "‹").replace(">", "›"))


def card_text(card: Card, problem_id: str = "") -> str:
    """The card in the words of the prompt, with the customer's problem, or all of them where it is not known."""
    lines = [f"Term: {card.term}", f"Also called: {', '.join(card.aliases) or '-'}", f"Definition: {card.definition}"]
    lists = {
        "Facts": [fact.text for fact in card.facts],
        "Wrong beliefs": [f"{w.belief} CORRECT IS: {w.correction}" for w in card.wrong_beliefs],
        "Figures": [f"{figure.text}: {figure.meaning}" for figure in card.figures],
    }
    for title, items in lists.items():
        lines += [f"{title}:", *(f"- {item}" for item in items)]
    own = card.by_problem.get(problem_id)
    for problem in [own] if own else card.problems:
        lines += _problem_lines(problem)
    return "\n".join(lines)


def _problem_lines(problem: Problem) -> list[str]:
    first, ask = problem.first, problem.ask
    lines = [f"The customer's problem: {problem.cause}"]
    if first:
        lines.append(f"Before all else{f', {first.when}' if first.when else ''}: {first.do} ({first.who})")
    if ask:
        lines.append(f"The agent must know: {ask.what}")
    lines.append("Steps, in order:")
    for i, step in enumerate(problem.steps, 1):
        identity = ", only after the identity check" if step.needs_identity else ""
        lines.append(f"{i}. {step.do} ({step.who}{identity})")
    lines += [f"Never: {'; '.join(problem.never) or '-'}", f"It has worked when {problem.done}"]
    return [*lines, f"Hand over when: {problem.escalate_when}", *(f"- {fact}" for fact in problem.facts)]
