"""Variants by rule: more conversations of a scenario, put together from the sentences of its own problem.

A variant is what a card allows without a writer: the customer's `says`, a clause of the context and typing noise; the
protective step, the question and the steps in the card's wordings. An answer never holds a sentence of another problem.
Every choice is a hash of scenario, number and slot: the same cards give the same bytes on any machine.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from telco_nb import DATA_DIR
from telco_nb.corpus.cards import Card, Problem
from telco_nb.corpus.scenarios import Context, Scenario, conversation_row, stable_hash
from telco_nb.corpus.text_measures import capitalised, count_words
from telco_nb.study.input_files import read_yaml

GENERATOR_ID = "variants-1"
MANNERS = (
    "plain", "terse", "polite", "lower_case", "misspelling", "no_stops", "angry", "rambling", "worried", "non_native",
    "kind", "two_problems",
)  # fmt: skip
TURN_PAIRS = (1, 2, 1, 2, 3, 1, 2, 1, 2, 4)  # 40 % one exchange, 40 % two, 20 % three or four
ANSWER_TARGET = (28, 70)  # words up to which an answer takes further sentences
RESERVED_SAYS = 2  # of a problem's phrasings, for its held-out scenario alone
ATTEMPTS = 10
NAMES_IDENTIFICATION = re.compile(
    r"\bidentity\b|\bidentif(?:y|ied|ication)\b|\bverified\b|who you are|\bit is you\b|it[’']s you\b|signed in\b|"
    r"sign-in|secure (?:form|check)|\b(?:the|your|portal) check\b|approved? the (?:request|confirmation)|"
    r"authorised person",
    re.I,
)  # a step that needs identification makes it its condition


@cache
def phrases() -> dict[str, list[str]]:
    """The small phrases around the cards' sentences, by bank."""
    return read_yaml(DATA_DIR / "variants.yaml")


@dataclass
class Draw:
    """Choices for one variant. The variants of a problem go through the options of a slot in turn.

    `key` names the problem and `number` counts its variants over all contexts, so that they repeat each other less.
    """

    key: str
    number: int
    attempt: int = 0
    used: set[str] = field(default_factory=set)

    def index(self, n: int, slot: str) -> int:
        """Return a number in 0..n-1 from key, number, attempt and slot."""
        start = stable_hash(self.key, slot)
        strides = [stride for stride in range(1, max(2, n)) if math.gcd(stride, n) == 1]
        turn = self.number if not self.attempt else stable_hash(self.number, self.attempt, slot)
        return (start + turn * strides[(start >> 32) % len(strides)]) % n

    def choose(self, options: Sequence[str], slot: str) -> str:
        """Choose an option that this conversation has not used, if there is one."""
        start = self.index(len(options), slot)
        ordered = [*options[start:], *options[:start]]
        chosen = next((option for option in ordered if option not in self.used), ordered[0])
        self.used.add(chosen)
        return chosen


def conversation_plan(scenario: Scenario, number: int) -> tuple[str, int]:
    """Return (manner of the customer, exchanges) of a scenario's conversation, for both generators."""
    start = stable_hash("plan", scenario.scenario_id)
    return MANNERS[(start + 5 * number) % len(MANNERS)], TURN_PAIRS[((start >> 20) + 3 * number) % len(TURN_PAIRS)]


# ---------------------------------------------------------------- the customer


def _says(problem: Problem, scenario: Scenario, held_out: Sequence[str]) -> list[str]:
    """The phrasings that a scenario may use: each held-out scenario of the problem has some for itself."""
    if not held_out:
        return problem.says
    start = stable_hash("says", scenario.term_id, problem.id) % len(problem.says)
    turned = [*problem.says[start:], *problem.says[:start]]
    own = {name: turned[i * RESERVED_SAYS :][:RESERVED_SAYS] for i, name in enumerate(held_out)}
    rest = turned[RESERVED_SAYS * len(held_out) :]
    return own.get(scenario.scenario_id, rest) or problem.says


def _first_message(says: list[str], context: Context, manner: str, draw: Draw) -> str:
    said = draw.choose(says, "says")
    clause = draw.choose(context.clauses, "clause") if context.clauses and draw.index(4, "with clause") else ""
    opener = "" if manner == "terse" else draw.choose(phrases()["openers"], "opener")
    closer = "" if manner == "terse" else draw.choose(phrases()["closers"], "closer")
    middle = [clause, _ended(said)] if draw.index(2, "order") else [_ended(said), clause]
    text = " ".join(part for part in [opener, *middle, closer] if part)
    return typed(text, manner, f"{draw.key}.{draw.number}.{draw.attempt}")


def _ended(text: str) -> str:
    return text if text.rstrip().endswith((".", "?", "!", "…")) else f"{text.rstrip()}."


def typed(text: str, manner: str, key: str) -> str:
    """Write a text as a customer of this manner types it; only spelling, case and stops change."""
    if manner == "lower_case":
        return text.lower()
    if manner == "no_stops":
        return re.sub(r"[.,;:](?=\s|$)", "", text).replace("’", "").replace("'", "").lower()
    if manner == "angry":
        return re.sub(r"\.(?=\s|$)", lambda match: "!" if stable_hash(key, match.start()) % 2 else "!!", text)
    if manner in ("misspelling", "non_native", "rambling"):
        rate = 5 if manner == "misspelling" else 9
        words = text.split(" ")
        return " ".join(_misspelt(word, f"{key}.{i}", rate) for i, word in enumerate(words))
    return text


def _misspelt(word: str, key: str, rate: int) -> str:
    """Leave out, double or exchange a letter in one of `rate` words; figures and short words stay."""
    place = stable_hash(key)
    if place % rate or len(word) < 4 or not word.isalpha():
        return word
    i = 1 + (place >> 8) % (len(word) - 2)
    return (
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
    )[(place >> 16) % 3]


# ---------------------------------------------------------------- the agent


@dataclass
class Agent:
    """What the agent has said so far: which steps are left, and whether the customer was asked to identify."""

    problem: Problem
    draw: Draw
    next_step: int = 0
    identified: bool = False

    def first_answer(self) -> str:
        """The protective step, the question, and the first steps up to a drawn length."""
        protective = [self._protective()] if self.problem.first else []
        question = []
        if self.problem.ask and self.draw.index(3, "asks"):
            question = [self.draw.choose(self.problem.ask.say, "ask")]
        steps = self._filled(protective + question, "answer0")
        last = self.draw.index(3, "question first")
        return " ".join(protective + (steps + question if last else question + steps))

    def next_answer(self, turn: int) -> str:
        """The next steps, or what is left to say of this problem."""
        return " ".join(self._filled([], f"answer{turn}"))

    def steps_left(self) -> bool:
        return self.next_step < len(self.problem.steps)

    def say(self, bank: str, turn: int) -> str:
        """A sentence on how the customer sees that it worked, or when the agent hands over; a fact beside it."""
        slots = {"done": self.problem.done.rstrip("."), "escalate": self.problem.escalate_when.rstrip(".")}
        sentence = self.draw.choose(phrases()[bank], f"{bank}{turn}").format(**slots)
        facts = [fact for fact in self.problem.facts if fact not in self.draw.used]
        return " ".join([sentence, *([_ended(self.draw.choose(facts, f"fact{turn}"))] if facts else [])])

    def _protective(self) -> str:
        first = self.problem.first
        assert first is not None
        if first.when is None:
            return _ended(self.draw.choose(first.say, "first"))
        slots = {"When": capitalised(first.when), "do": first.do.rstrip(".")}
        return self.draw.choose(phrases()["precaution"], "precaution").format(**slots)

    def _filled(self, said: list[str], slot: str) -> list[str]:
        """The next steps in their order, up to a drawn length of the answer; a step that asks something ends it."""
        low, high = ANSWER_TARGET
        target = low + self.draw.index(high - low, slot)
        parts: list[str] = []
        asked = False
        while self.steps_left() and not asked and (count_words(" ".join(said + parts)) < target or not said + parts):
            parts += self._step()
            asked = parts[-1].endswith("?")
        facts = [fact for fact in self.problem.facts if fact not in self.draw.used]
        if facts and not asked and count_words(" ".join(said + parts)) < target:
            parts.append(_ended(self.draw.choose(facts, f"{slot}fact")))
        return parts

    def _step(self) -> list[str]:
        """The next step; before the first one that needs identification stands the request, if its words lack it."""
        step = self.problem.steps[self.next_step]
        said = _ended(self.draw.choose(step.say, f"step{self.next_step}"))
        self.next_step += 1
        if not step.needs_identity or self.identified:
            return [said]
        self.identified = True
        if NAMES_IDENTIFICATION.search(said):
            return [said]
        return [self.draw.choose(phrases()["identity"], "identity"), said]


def _later_turn(agent: Agent, turn: int) -> tuple[str, str] | None:
    """A customer message that reacts to the agent, and its answer; None if the card has no more to say."""
    draw = agent.draw
    if agent.steps_left():
        bank = ("asks_next", "not_yet")[draw.index(2, f"reacts{turn}")]
        return draw.choose(phrases()[bank], f"{bank}{turn}"), agent.next_answer(turn)
    for question, bank in (("asks_done", "done"), ("asks_hand_over", "hand_over")):
        if bank not in draw.used and not (bank == "hand_over" and agent.problem.escalate_when.startswith("at")):
            draw.used.add(bank)
            return draw.choose(phrases()[question], f"{question}{turn}"), agent.say(bank, turn)
    return None


# ---------------------------------------------------------------- conversations


def write_variant(
    card: Card, scenario: Scenario, context: Context, number: int, attempt: int = 0, held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Write one variant, with the keys of conversations.parquet.

    Args:
        card: the card of the scenario's term.
        scenario: the scenario.
        context: the scenario's context.
        number: the number within the scenario; it sets manner and exchanges.
        attempt: above 0 for another draft of the same number.
        held_out: the ids of the problem's held-out scenarios.
    """
    problem = card.by_problem[scenario.problem_id]
    manner, n_turns = conversation_plan(scenario, number)
    place = list(problem.contexts).index(scenario.context)
    draw = Draw(f"{card.id}.{problem.id}", number * len(problem.contexts) + place, attempt)
    agent = Agent(problem, draw)
    turns = [(_first_message(_says(problem, scenario, held_out), context, manner, draw), agent.first_answer())]
    while len(turns) < n_turns and (later := _later_turn(agent, len(turns))):
        turns.append((typed(later[0], manner, f"{scenario.scenario_id}.{number}.{len(turns)}"), later[1]))
    messages = [
        {"role": role, "content": text}
        for exchange in turns
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    return conversation_row(scenario, number, "variant", messages, manner)


def write_variants(
    cards: list[Card], scenarios: list[Scenario], contexts: list[Context], numbers: range
) -> Iterator[dict[str, Any]]:
    """Yield the variants of all scenarios in grid order; one is drafted again while it repeats one of its problem.

    Args:
        cards: the cards.
        scenarios: the scenario grid.
        contexts: the contexts.
        numbers: the numbers within each scenario that are written; the others are gold.
    """
    by_id, by_context = {card.id: card for card in cards}, {context.id: context for context in contexts}
    held_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for held in (scenario for scenario in scenarios if scenario.split in ("val", "test")):
        held_out[held.term_id, held.problem_id].append(held.scenario_id)
    said: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scenario in scenarios:
        name = scenario.term_id, scenario.problem_id
        earlier, own = said[name], held_out[name]
        for number in numbers:
            for attempt in range(ATTEMPTS):
                row = write_variant(
                    by_id[scenario.term_id], scenario, by_context[scenario.context], number, attempt, own
                )
                first = {message["content"] for message in row["messages"][:2]}
                if not earlier & first:
                    break
            earlier |= first
            yield row


def generator_facts() -> dict[str, Any]:
    """Describe this generator for the data card."""
    return {"id": GENERATOR_ID, "model": None, "calls_planned": 0, "usd": 0.0}
