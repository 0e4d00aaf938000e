"""Does an answer make a point of the card? Words in order, weighed by how telling they are, and not negated."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from telco_nb.corpus.cards import Card
from telco_nb.corpus.text_measures import content_stems, stem, words

CHANCE, FULL = 0.30, 0.62  # of a phrasing's weight: up to CHANCE an overlap is chance, from FULL on the point is made
SAME_POINT = 0.5  # a gold answer, or a sentence of it, that has this credit for a point of the card makes this point
OPPOSITE = 0.1  # of the matching words: with more of them negated in one text alone, it says the opposite
REACH = 3  # words in front of a matched word in which a negation counts
NEGATIONS = frozenset("not no never nothing nobody none without cannot neither nor don't doesn't won't isn't".split())  # noqa: SIM905
_END = re.compile(r"(?<=[.!?])[\"”’')]*\s+|\n+")
_LIST_MARK = re.compile(r"(?:^|(?<=[:;.])\s|\n)[^\S\n]*\(?(?:step )?\d{1,2}[.):](?=\s)", re.I)


def answer_sentences(text: str) -> list[str]:
    """The sentences and lines of an answer, also of a badly written one; for card texts use text_measures.sentences."""
    return [part for part in _END.split(_LIST_MARK.sub("\n", text).strip()) if part]


@dataclass(frozen=True)
class Phrase:
    """A text as its content stems in order, each with whether a negation stands close in front of it."""

    stems: tuple[str, ...]
    negated: tuple[bool, ...]


def phrase(text: str) -> Phrase:
    """The stems of a text's content words, in order. A negation reaches over the next `REACH` words, to a comma."""
    stems, negated, reach = [], [], 0
    for part in re.split(r"[,;:()]| but | and | or ", text.lower().replace("’", "'")):
        reach = 0
        for word in words(part):
            if word in NEGATIONS or word.endswith("n't"):
                reach = REACH + 1
            elif content_stems(word):
                stems.append(stem(word))
                negated.append(reach > 0)
            reach = max(0, reach - 1)
    return Phrase(tuple(stems), tuple(negated))


@dataclass(frozen=True)
class Match:
    """How well a text makes a point: `credit` 0 to 1, and whether it says the opposite."""

    credit: float
    contradicts: bool
    place: int  # the sentence in which it is made


NO_MATCH = Match(0.0, False, 0)


class Answer:
    """An answer cut into sentences; single sentences and pairs of neighbours are searched."""

    def __init__(self, text: str, sound: Sequence[bool] | None = None):
        """`sound` says which sentences may make a point; None for all of them."""
        self.sentences = answer_sentences(text)
        self.phrases = [
            phrase(sentence) if sound is None or sound[i] else Phrase((), ())
            for i, sentence in enumerate(self.sentences)
        ]

    @cached_property
    def windows(self) -> list[tuple[int, Phrase]]:
        single = list(enumerate(self.phrases))
        pairs = [
            (i, Phrase(a.stems + b.stems, a.negated + b.negated)) for i, (a, b) in enumerate(pairwise(self.phrases))
        ]
        return single + pairs


class Weights:
    """How telling a stem is on a card: a word of every problem ("line") says little, one of a single problem much."""

    def __init__(self, card: Card):
        self.n = len(card.problems)
        self.frequency = Counter(stem for problem in card.problems for stem in problem.stems)

    def of(self, stem_: str) -> float:
        return math.log(1 + (self.n + 1) / (self.frequency[stem_] + 0.5))


def in_order(point: Phrase, window: Phrase, weights: Weights) -> tuple[float, list[tuple[int, int]]]:
    """The heaviest common subsequence of two phrases: (its weight, the pairs of positions)."""
    n, m = len(point.stems), len(window.stems)
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        weight = weights.of(point.stems[i])
        for j in range(m - 1, -1, -1):
            take = best[i + 1][j + 1] + weight if point.stems[i] == window.stems[j] else 0.0
            best[i][j] = max(take, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < n and j < m and best[i][j] > 0:
        if point.stems[i] == window.stems[j] and best[i][j] == best[i + 1][j + 1] + weights.of(point.stems[i]):
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return best[0][0], pairs


def match(texts: Sequence[str], answer: Answer, weights: Weights) -> Match:
    """How well an answer makes a point that may be worded in several ways.

    A window makes a wording by the share of the wording's weight that it holds in the same order. If words that match
    are negated in one of the two and not in the other, the window says the opposite; it counts as a contradiction if no
    other window makes the point.
    """
    best, opposite = NO_MATCH, NO_MATCH
    for text in texts:
        point = phrase(text)
        total, bag = sum(map(weights.of, point.stems)), set(point.stems)
        for place, window in answer.windows:
            if not total or len(bag & set(window.stems)) < min(2, len(bag)):
                continue
            weight, pairs = in_order(point, window, weights)
            credit = min(1.0, max(0.0, (weight / total - CHANCE) / (FULL - CHANCE)))
            differ = sum(point.negated[i] != window.negated[j] for i, j in pairs)
            if differ > OPPOSITE * len(pairs):
                opposite = max(opposite, Match(credit, True, place), key=lambda found: found.credit)
            else:
                best = max(best, Match(credit, False, place), key=lambda found: found.credit)
    return opposite if opposite.credit > 2 * best.credit else best
