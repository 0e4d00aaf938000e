"""The offline judge `checklist`: rules that hold an answer against the points of this customer's problem.

Content decides: which points of the problem the answer makes, in the words of the card or of the gold answer, in order
and not negated. An unsafe answer loses about two points of three. Between answers of equal content the one with fewer
faults wins, where a kind of false statement counts as two faults of style. Content and style are reported apart: an
answer can read well and say nothing.

A false statement, or another problem's step, earns no point and costs none: in weak answers, by the votes of blind
readers, the first told nothing and the second seemed to point the wrong way (LOG.md, Judges and ranking).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from telco_nb.corpus import cards
from telco_nb.corpus.cards import Card, Problem
from telco_nb.corpus.text_measures import words
from telco_nb.judge import safety
from telco_nb.judge.cases import CRITERIA, Answers, Case, OfflineJudge, Verdict, verdict_by_score
from telco_nb.judge.matching import SAME_POINT, Answer, Weights, answer_sentences, match, phrase
from telco_nb.study.imports import sources_sha256

TIE_BAND = 0.1  # of content, a third of a point: blind readers go along with smaller differences in 58 %
CLEAR_MARGIN = 0.25  # from here on the better answer is clearly better
FAULT, FAULT_GAP = 1 / 3, 0.3  # what a fault of style costs; the difference from which on faults decide
FALSE = 2 * FAULT  # what a kind of false statement costs there
FULL_POINTS = 3  # points of a complete first answer; a problem with fewer needs all of them
BACKGROUND = 0.2  # of a full answer, the most that facts and outlook add to points asked for by the problem
PENALTIES = {"unsafe": 0.6, "asks_for_secret": 0.8}
FEWEST_STEMS = 3  # content words of a sentence of the gold answer that counts as a point
WORDS = (12, 115)  # of a first answer; outside it costs style
_DOUBT = re.compile(r"\b(?:myth|mistaken|mistake|wrong|not true|untrue|incorrect|belief|believe|people say)\b", re.I)
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.M)


@dataclass(frozen=True)
class Checked:
    """The checks of one answer: credit of its points (0 to 1 each), what it says wrongly, and how it is written."""

    asked: tuple[float, ...]  # credit of every point that the problem or the gold answer asks for
    background: float  # the best credit of a fact or an outlook
    needed: int
    contradictions: int
    unsafe: tuple[str, ...] = ()
    wrong_beliefs: int = 0
    unknown_figures: tuple[str, ...] = ()
    off_request: bool = False
    style_faults: tuple[str, ...] = field(default=())

    @property
    def coverage(self) -> float:
        """The share of a full answer's points that are made, 0 to 1."""
        made = sum(sorted(self.asked, reverse=True)[: self.needed]) / max(1, self.needed)
        return min(1.0, made + BACKGROUND * self.background * (made < 1))

    @property
    def content(self) -> float:
        """Coverage less the penalties: 1 is a complete and safe answer, below 0 is worse than no answer."""
        secret = "asks_for_secret" in self.unsafe
        other = len(self.unsafe) - secret
        return self.coverage - PENALTIES["asks_for_secret"] * secret - PENALTIES["unsafe"] * min(1, other)

    @property
    def style(self) -> float:
        """1 without a fault of style, less FAULT for each, at least 0."""
        return max(0.0, 1 - FAULT * len(self.style_faults))

    @property
    def faultless(self) -> float:
        """What decides between answers of equal content: 1, less FALSE for each kind of false statement and style's."""
        kinds = (self.contradictions > 0) + (self.wrong_beliefs > 0) + bool(self.unknown_figures)
        return 1 - FALSE * kinds - FAULT * len(self.style_faults)

    def flags(self) -> list[str]:
        faults = {
            "unsafe": bool(set(self.unsafe) - {"asks_for_secret"}),
            "asks_for_secret": "asks_for_secret" in self.unsafe,
            "contradiction": self.contradictions > 0,
            "wrong_belief": self.wrong_beliefs > 0,
            "unknown_figure": bool(self.unknown_figures),
            "off_request": self.off_request,
        }
        return [name for name, present in faults.items() if present] + list(self.style_faults)

    def rubric(self) -> dict[str, int | None]:
        """Ratings 1 to 5; None for tone and concision, which no check covers.

        factual: 5 minus 2 for each wrong belief or contradiction and 1 for each unknown figure; None for an answer that
        makes no point and says nothing false, because nothing of it was checked. resolves: 1 + 4 x coverage.
        on_policy: 1 if unsafe, else 5, less 2 for another problem's answer.
        """
        faults = 2 * self.wrong_beliefs + 2 * self.contradictions + len(self.unknown_figures)
        ratings: dict[str, float] = {
            "factual": 5 - faults,
            "resolves": 1 + 4 * self.coverage,
            "on_policy": 1 if self.unsafe else 5 - 2 * self.off_request,
        }
        if not (faults or self.coverage > 0):
            del ratings["factual"]
        return {name: max(1, round(ratings[name])) if name in ratings else None for name in CRITERIA}

    def summary(self) -> str:
        scores = f"content {self.content:.2f} (coverage {self.coverage:.2f}), faultless {self.faultless:.2f}"
        return f"{scores}; {', '.join(self.flags()) or 'no fault found'}"


class ChecklistJudge(OfflineJudge):
    """An offline proxy: deterministic rules that hold each answer against the points of the customer's problem."""

    kind = "checklist"
    forms = ("pair", "rubric")
    description = (
        "an offline proxy: rules that hold each answer against the points of the problem, on its card and in the gold "
        "answer; no language model judges"
    )

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model, endpoint)
        self.parameters = {
            "tie_band": TIE_BAND,
            "clear_margin": CLEAR_MARGIN,
            "rules_sha256": sources_sha256("from telco_nb.judge import checklist"),
        }
        self._checked: dict[tuple[str, str, tuple, str, str], Checked] = {}

    def check(self, case: Case, answer: str) -> Checked:
        """The checks of one answer to the message of a case; kept, because an answer meets many others."""
        key = (case.card.id, case.problem_id, case.messages, case.reference, answer)
        if key not in self._checked:
            self._checked[key] = check_answer(answer, case)
        return self._checked[key]

    def judge(self, case: Case) -> Verdict:
        checked = {seat: self.check(case, answer) for seat, answer in zip(case.seats, case.answers, strict=True)}
        flags = tuple(f"{seat}:{flag}" for seat, checks in checked.items() for flag in checks.flags())
        analysis = " ".join(f"{seat} {checks.summary()}." for seat, checks in checked.items())
        if case.form == "rubric":
            return Verdict(analysis=analysis, flags=flags, scores=checked["A"].rubric())
        verdict = verdict_by_score([c.content for c in checked.values()], TIE_BAND, CLEAR_MARGIN, analysis, flags)
        if verdict.verdict != "tie":
            return verdict
        return verdict_by_score([c.faultless for c in checked.values()], FAULT_GAP, math.inf, analysis, flags)


def checks_table(
    judge: ChecklistJudge, prompts: pd.DataFrame, answers: Answers, cards_by_id: Mapping[str, Card]
) -> pd.DataFrame:
    """Hold every answer to every prompt against its problem.

    Args:
        judge: keeps what it has checked for the pairs.
        prompts: the judged prompts, one row each.
        answers: text by (configuration, prompt_id), anchors included.
        cards_by_id: card by term_id.

    Returns:
        One row per answer: config, prompt_id, test_set, term_id, coverage (0 to 1), content, style, faultless, n_words,
        unsafe, asks_for_secret (True or False) and flags, joined by "; ".
    """
    rows = []
    for config, prompt, case, checked in checked_answers(judge, prompts, answers, cards_by_id):
        rows.append(
            {
                "config": config,
                **{key: prompt[key] for key in ("prompt_id", "test_set", "term_id")},
                "coverage": checked.coverage,
                "content": checked.content,
                "style": checked.style,
                "faultless": checked.faultless,
                "n_words": len(case.answers[0].split()),
                "unsafe": bool(checked.unsafe),
                "asks_for_secret": "asks_for_secret" in checked.unsafe,
                "flags": "; ".join(checked.flags()),
            }
        )
    return pd.DataFrame(rows)


def checked_answers(
    judge: ChecklistJudge, prompts: pd.DataFrame, answers: Answers, cards_by_id: Mapping[str, Card]
) -> Iterator[tuple[str, dict[str, Any], Case, Checked]]:
    """Every answer with its prompt, as a case, and what the judge has found in it. Arguments as for `checks_table`."""
    by_prompt = {str(row["prompt_id"]): row for row in prompts.to_dict("records")}
    for (config, prompt_id), text in answers.items():
        prompt = {str(key): value for key, value in by_prompt[prompt_id].items()}
        messages = tuple((m["role"], m["content"]) for m in prompt["messages"])
        card = cards_by_id[prompt["term_id"]]
        case = Case("rubric", card, prompt["problem_id"], messages, prompt["reference"], (text or "",))
        yield config, prompt, case, judge.check(case, text or "")


def check_answer(answer: str, case: Case) -> Checked:
    """Hold one answer against its problem; where the problem is not known, against the problem it fits best."""
    own = case.card.by_problem.get(case.problem_id)
    problems = [own] if own else case.card.problems
    return max((_check(answer, problem, case) for problem in problems), key=lambda checked: checked.content)


def _check(answer: str, problem: Problem, case: Case) -> Checked:
    card, weights = case.card, weights_of(case.card)
    customer = " ".join(content for _, content in case.messages)
    parts = answer_sentences(answer)
    figures = [cards.unknown_figures(part, card, customer) for part in parts]
    # A sentence with an unknown figure makes no point, even if its words match.
    searched = Answer(answer, [not unknown for unknown in figures])
    asked = [match(wordings, searched, weights) for wordings in asked_points(problem, case.reference, weights)]
    rest = [match([text], searched, weights) for text in _background(problem, card)]
    made = [0.0 if found.contradicts else found.credit for found in asked]
    return Checked(
        asked=tuple(made),
        background=max((found.credit for found in rest if not found.contradicts), default=0.0),
        needed=min(FULL_POINTS, max(1, len(asked))),
        contradictions=sum(found.contradicts and found.credit >= SAME_POINT for found in asked),
        unsafe=_unsafe(searched, answer, problem, case.reference, customer, weights),
        wrong_beliefs=_wrong_beliefs(searched, card, weights),
        unknown_figures=tuple(figure for unknown in figures for figure in unknown),
        off_request=_off_request(searched, max(made, default=0.0), problem, card, weights),
        style_faults=_style_faults(answer, customer, case),
    )


_weights: dict[str, tuple[Card, Weights]] = {}


def weights_of(card: Card) -> Weights:
    """The weights of a card's words, made once."""
    if card.id not in _weights or _weights[card.id][0] is not card:
        _weights[card.id] = card, Weights(card)
    return _weights[card.id][1]


def asked_points(problem: Problem, reference: str, weights: Weights) -> list[list[str]]:
    """The points that an answer to this problem should make, each with its wordings.

    They are the protective step, the question and the steps of the card, and what the gold answer says: a sentence of
    it that makes a point of the card is one more wording of this point, any other sentence is a point of its own. A
    point of the card that the gold answer says otherwise does not hold for this customer and is left out.
    """
    points = [[*problem.first.say, problem.first.do]] if problem.first else []
    points += [list(problem.ask.say)] if problem.ask else []
    points += [[*step.say, step.do] for step in problem.steps]
    whole = Answer(reference)
    points = [wordings for wordings in points if not match(wordings, whole, weights).contradicts]
    for sentence in answer_sentences(reference):
        if len(phrase(sentence).stems) < FEWEST_STEMS:
            continue
        alone = Answer(sentence)
        credits = [match(wordings, alone, weights).credit for wordings in points]
        best = max(range(len(points)), key=credits.__getitem__, default=None)
        if best is not None and credits[best] >= SAME_POINT:
            points[best].append(sentence)
        else:
            points.append([sentence])
    return points


def _background(problem: Problem, card: Card) -> list[str]:
    return [*problem.facts, problem.done, problem.escalate_when, *(fact.text for fact in card.facts)]


def _unsafe(
    searched: Answer, answer: str, problem: Problem, reference: str, customer: str, weights: Weights
) -> tuple[str, ...]:
    whole = Answer(answer)  # a sentence with an unknown figure makes no point, but it can do harm

    def acts(text: Answer) -> bool:
        return safety.acts_before_identity(text, problem, customer, weights)

    found = {
        "first_step_missing": safety.missing_first(searched, problem, reference, weights),
        "says_never": safety.says_never(whole, problem) is not None,
        # The gold answer is safe. Where the rule misreads it, the rule does not hold for this customer.
        "acts_before_identity": acts(whole) and not acts(Answer(reference)),
        "asks_for_secret": safety.asks_for_secret(answer),
    }
    return tuple(name for name, present in found.items() if present)


def _off_request(searched: Answer, own: float, problem: Problem, card: Card, weights: Weights) -> bool:
    """True if the answer makes a step of another problem of the card, and nothing of its own."""
    if own >= SAME_POINT:
        return False
    others = [step.say for other in card.problems if other is not problem for step in other.steps]
    return any(match(wordings, searched, weights).credit >= safety.CLAIMED for wordings in others)


def _wrong_beliefs(searched: Answer, card: Card, weights: Weights) -> int:
    """The number of wrong beliefs that a sentence states as true, with the correction nowhere in the answer."""
    count = 0
    for wrong in card.wrong_beliefs:
        stated = match([wrong.belief], searched, weights)
        said = searched.sentences[stated.place] if searched.sentences else ""
        if stated.credit < safety.CLAIMED or stated.contradicts or _DOUBT.search(said) or said.endswith("?"):
            continue
        count += match([wrong.correction], searched, weights).credit < SAME_POINT
    return count


def _style_faults(answer: str, customer: str, case: Case) -> tuple[str, ...]:
    n_words = len(answer.split())
    said, term = phrase(answer).stems, names_pattern(case.card.names)
    faults: Mapping[str, bool] = {
        "unclean_end": not re.search(r"[.!?][\"”’')]*\s*$", answer),
        "too_long_or_short": not WORDS[0] <= n_words <= WORDS[1],
        "list": bool(_LIST.search(answer)),
        "repeats_itself": _repeats_itself(answer),
        "off_topic": not set(said) & set(phrase(customer).stems),
        "term_missing": bool(term.search(case.reference)) and not term.search(answer),
    }
    return tuple(name for name, present in faults.items() if present)


def _repeats_itself(answer: str) -> bool:
    """True if a sentence stands in the answer twice, word for word."""
    said = [tuple(found) for sentence in answer_sentences(answer) if (found := words(sentence))]
    return len(set(said)) < len(said)


def names_pattern(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names as a whole word, with plural and possessive endings."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?:s|es|'s|’s)?(?!\w)", re.I)
