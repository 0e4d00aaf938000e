"""The offline judge `checklist`: rules that compare an answer with the fact card, for points, order and errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from telco_nb.corpus import cards, text_measures
from telco_nb.corpus.cards import Card
from telco_nb.judge.cases import CRITERIA, Case, OfflineJudge, Verdict, verdict_by_score
from telco_nb.study.imports import sources_sha256

TIE_BAND = 0.05  # score differences below this are a tie
CLEAR_MARGIN = 0.25  # from here on the better answer is clearly better
WEIGHTS = {"coverage": 0.55, "order": 0.10, "next_step": 0.15, "on_topic": 0.20}
PENALTIES = {"wrong_belief": 0.25, "unknown_figure": 0.15, "unclean_end": 0.15}
# The card fields that answer the first message of a conversation, by intent.
INTENT_FIELDS: dict[str, tuple[str, ...]] = {
    "understand": ("definition", "facts"),
    "fault": ("diagnosis", "resolution", "escalate_when"),
    "billing_dispute": ("billing_answer", "facts"),
    "change": ("change_answer", "facts"),
    "compare": ("comparisons", "facts"),
}
FULL_POINTS = 2  # the number of points of a full answer
_STOP_WORDS = """
a about after all also am an and any are as at be because been before but by can could did do does for from had has
have how i if in into is it its me more my no not of on once one only or other our out over so some such than that the
their them then there these they this those to too up us very was we were what when where which while who why will with
would you your
"""
_STOP = frozenset(_STOP_WORDS.split())
_NEXT_STEP = re.compile(
    r"\bnext step|\bplease\b|\b(?:tell|send|give|show|ask|write|reply|confirm|report|let)\b|"
    r"\b(?:i|we)(?:'ll|’ll| will| can| shall)? (?:open|check|send|place|note|add|mark|book|raise|start|arrange|pass|"
    r"hand|reopen|record|chase|escalate|restart|attach|log|call|keep|look|follow|contact|update|enter|find|flag)\b|"
    r"\bif (?:that|this|it|the)\b[^.]*(?:,| then )",
    re.I,
)
_DOUBT = re.compile(r"\b(?:myth|mistaken|mistake|wrong|not true|untrue|incorrect|belief|believe|people say)\b", re.I)
_LIST_MARK = re.compile(r"(?:^|(?<=[:;.])\s|\n)\s*\(?(?:step )?\d{1,2}[.):](?=\s)", re.I)


@dataclass(frozen=True)
class Checked:
    """The checks of one answer. `order` is None if fewer than two steps of the card are recognised."""

    coverage: float
    order: float | None
    next_step: bool
    on_topic: float
    wrong_beliefs: int
    unknown_figures: tuple[str, ...]
    clean_end: bool

    @property
    def score(self) -> float:
        """The weighted mean of the credits that apply, minus penalties: 1 is a complete answer."""
        credits = {k: getattr(self, k) for k in WEIGHTS if getattr(self, k) is not None}
        credit = sum(WEIGHTS[k] * v for k, v in credits.items()) / sum(WEIGHTS[k] for k in credits)
        penalty = PENALTIES["wrong_belief"] * self.wrong_beliefs
        penalty += PENALTIES["unknown_figure"] * min(2, len(self.unknown_figures))
        return credit - penalty - PENALTIES["unclean_end"] * (not self.clean_end)

    def flags(self) -> list[str]:
        faults = {
            "wrong_belief": self.wrong_beliefs > 0,
            "unknown_figure": bool(self.unknown_figures),
            "off_topic": self.on_topic < 0.5,
            "no_next_step": not self.next_step,
            "unclean_end": not self.clean_end,
        }
        return [name for name, present in faults.items() if present]

    def rubric(self) -> dict[str, int | None]:
        """Ratings 1 to 5; None for tone and concision, which no check covers.

        factual: 5 minus 2 for each wrong belief and 1 for each unknown figure. resolves: 1 + 4 x (0.8 coverage + 0.2
        next step). on_policy: 1 + 4 x the mean of topic and, if known, order of steps.
        """
        policy = [value for value in (self.on_topic, self.order) if value is not None]
        ratings = {
            "factual": 5 - 2 * self.wrong_beliefs - len(self.unknown_figures),
            "resolves": 1 + 4 * (0.8 * self.coverage + 0.2 * self.next_step),
            "on_policy": 1 + 4 * sum(policy) / len(policy),
        }
        return {name: max(1, round(ratings[name])) if name in ratings else None for name in CRITERIA}

    def summary(self) -> str:
        order = "" if self.order is None else f", order {self.order:.2f}"
        faults = ", ".join(self.flags()) or "no fault found"
        return f"score {self.score:.2f}: coverage {self.coverage:.2f}{order}, topic {self.on_topic:.2f}; {faults}"


class ChecklistJudge(OfflineJudge):
    """An offline proxy: deterministic rules that compare each answer with the fact card."""

    kind = "checklist"
    forms = ("pair", "rubric")
    description = "an offline proxy: rules that hold each answer against the fact card; no language model judges"

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model, endpoint)
        self.parameters = {
            "tie_band": TIE_BAND,
            "clear_margin": CLEAR_MARGIN,
            "rules_sha256": sources_sha256("from telco_nb.judge import checklist"),
        }
        self._checked: dict[tuple[str, str, tuple, str], Checked] = {}

    def _check(self, case: Case, answer: str) -> Checked:
        key = (case.card.id, case.intent, case.messages, answer)
        if key not in self._checked:
            self._checked[key] = check_answer(answer, case)
        return self._checked[key]

    def judge(self, case: Case) -> Verdict:
        checked = {seat: self._check(case, answer) for seat, answer in zip(case.seats, case.answers, strict=True)}
        flags = tuple(f"{seat}:{flag}" for seat, checks in checked.items() for flag in checks.flags())
        analysis = " ".join(f"{seat} {checks.summary()}." for seat, checks in checked.items())
        if case.form == "rubric":
            return Verdict(analysis=analysis, flags=flags, scores=checked["A"].rubric())
        scores = [checks.score for checks in checked.values()]
        return verdict_by_score(scores, TIE_BAND, CLEAR_MARGIN, analysis, flags)


def check_answer(answer: str, case: Case) -> Checked:
    """Compares one answer with the card of its case."""
    card = case.card
    customer = " ".join(content for _, content in case.messages)
    parts = answer_sentences(_LIST_MARK.sub("\n", answer))
    bags = [content_words(part) for part in parts]
    unknown = [_unknown_figures(part, customer, card) for part in parts]
    # A sentence with an unknown figure makes no point, even if its words match the card.
    sound = [bag if not figures else frozenset() for bag, figures in zip(bags, unknown, strict=True)]
    windows = sound + [a | b for a, b in pairwise(sound)]
    points, needed = expected_points(case)
    credits = sorted((_credit(point, windows) for point in points), reverse=True)[:needed]
    return Checked(
        coverage=sum(credits) / min(needed, len(points)),
        order=_order([*card.diagnosis, *card.resolution], sound),
        next_step=bool(_NEXT_STEP.search(" ".join(parts[-2:]))),
        on_topic=_on_topic(answer, bags, card),
        wrong_beliefs=_wrong_beliefs(parts, bags, card),
        unknown_figures=tuple(figure for figures in unknown for figure in figures),
        clean_end=bool(re.search(r"[.!?][\"”’')]*\s*$", answer)),
    )


def expected_points(case: Case) -> tuple[list[str], int]:
    """The points of the card that an answer can make, and the number of points of a full answer.

    A wrong belief quoted in the last message selects its correction; a quoted figure selects the facts that contain it.
    Otherwise the intent selects the points for the first message of a conversation, and later messages select all.
    """
    card, last = case.card, case.messages[-1][1]
    question = content_words(last)
    corrections = [w.correction for w in card.wrong_beliefs if _recall(content_words(w.belief), question) >= 0.85]
    if corrections:
        return corrections, len(corrections)
    quoted = [figure.text for figure in card.figures if re.search(rf"[“\"]{re.escape(figure.text)}[”\"]", last)]
    if explained := [fact for fact in card.facts if any(figure in fact for figure in quoted)]:
        return explained, 1
    fields = INTENT_FIELDS.get(case.intent, "") if len(case.messages) == 1 else ""  # "" begins the name of every field
    chosen = [text for name, text in card.agent_texts() if name.startswith(fields)]
    return [part for text in chosen for part in answer_sentences(text)], FULL_POINTS


def answer_sentences(text: str) -> list[str]:
    """The sentences and lines of an answer, also of a badly written one; for card texts use text_measures.sentences."""
    return [part for part in re.split(r"(?<=[.!?])[\"”’')]*\s+|\n+", text.strip()) if part]


@lru_cache(maxsize=65536)
def content_words(text: str) -> frozenset[str]:
    """The stems of the words that are not stop words."""
    return frozenset(_stem(word) for word in text_measures.words(text) if word not in _STOP)


def _stem(word: str) -> str:
    word = re.sub(r"['’]s$", "", word)
    for ending in ("ing", "ies", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def _recall(point: frozenset[str], bag: frozenset[str]) -> float:
    return len(point & bag) / len(point) if point else 0.0


def _credit(point: str, windows: list[frozenset[str]]) -> float:
    """The share of a point that one sentence or two neighbours make, 0 to 1. Under 0.35 of its words is chance."""
    words = content_words(point)
    best = max((_recall(words, window) for window in windows), default=0.0)
    return float(np.clip((best - 0.35) / 0.5, 0.0, 1.0))


def _order(steps: Sequence[str], bags: list[frozenset[str]]) -> float | None:
    """The share of recognised step pairs that are in the card's order; None with fewer than two steps."""
    places = []
    for step in steps:
        recalls = [_recall(content_words(step), bag) for bag in bags]
        if recalls and max(recalls) >= 0.6:
            places.append(int(np.argmax(recalls)))
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :] if a != b]
    return sum(a < b for a, b in pairs) / len(pairs) if pairs else None


def names_pattern(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names as a whole word, with plural and possessive endings."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?:s|es|'s|’s)?(?!\w)", re.I)


def _on_topic(answer: str, bags: list[frozenset[str]], card: Card) -> float:
    """1 if the answer names the term, else the share of its words that are on the card, at most 0.5."""
    if names_pattern(card.names).search(answer):
        return 1.0
    words = frozenset().union(*bags)
    known = frozenset().union(*(content_words(text) for _, text in card.agent_texts()))
    return min(0.5, _recall(words, known))


def _wrong_beliefs(parts: list[str], bags: list[frozenset[str]], card: Card) -> int:
    """The number of wrong beliefs that a sentence states as true, without the correction anywhere in the answer."""
    everything = frozenset().union(*bags)
    truths = [content_words(text) for _, text in card.agent_texts()]
    count = 0
    for wrong in card.wrong_beliefs:
        belief, correction = content_words(wrong.belief), content_words(wrong.correction)
        stated = [
            (part, bag)
            for part, bag in zip(parts, bags, strict=True)
            if _recall(belief, bag) >= 0.8 and not _DOUBT.search(part) and not part.endswith("?")
        ]
        nearer = [bag for _, bag in stated if all(_overlap(bag, belief) > _overlap(bag, truth) for truth in truths)]
        count += bool(nearer) and _recall(correction - belief, everything) < 0.5
    return count


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def _unknown_figures(answer: str, customer: str, card: Card) -> list[str]:
    """The figures of a text that are neither on the card nor in the conversation."""
    unknown = cards.unknown_figures(answer, card)
    named = {number for number, _ in cards.figures_in(customer)} if unknown else set()
    return [figure for figure in unknown if figure.split()[0] not in named]
