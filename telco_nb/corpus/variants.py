"""The offline generator: a deterministic grammar over cards and scenarios that writes chat conversations.

Every choice is a keyed hash of (seed, scenario, seed number, attempt, slot): the same parameters give the same bytes
on any machine, one scenario does not depend on another, and a new slot does not disturb the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from telco_nb import DATA_DIR
from telco_nb.corpus.cards import Card, figures_in, read_yaml
from telco_nb.corpus.scenarios import AXES, Axes, Scenario, stable_hash
from telco_nb.corpus.text_measures import sentences

GRAMMAR_PATH = DATA_DIR / "grammar.yaml"
GENERATOR_ID = "offline-grammar-2"
USER_WORDS = (12, 45)  # aimed at; a turn outside is drawn again
ANSWER_WORDS = (35, 75)
ANSWER_TARGET = (42, 62)  # optional sentences are added up to a length drawn from here
ATTEMPTS = 12

_SLOT = re.compile(r"\{(\w+)\}")
_KINDS = {"fault": "fault", "billing_dispute": "billing_dispute", "change": "change", "compare": "compare"}
_LEANING = {"Otherwise", "It", "They", "That", "This", "These", "Those", "Both", "Then", "But", "And", "So", "For"}
_BY_KIND = ("issue", "probe", "frame_later")  # banks whose first keys are kinds of request, not levels
_UNDERSTAND = ("meaning", "meaning", "belief", "belief", "figure")


@cache
def load_grammar(path: Path = GRAMMAR_PATH) -> dict[str, Any]:
    """The phrase banks. Raises ValueError if a phrase holds a digit: figures may come from the card alone."""
    grammar = read_yaml(path)
    for bank, phrase in all_phrases(grammar):
        if re.search(r"\d", phrase):
            raise ValueError(f"{path.name}: {bank}: a digit in {phrase!r}")
    return grammar


def all_phrases(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(bank path, phrase) of everything in a grammar."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from all_phrases(value, f"{name}.{key}" if name else key)
    else:
        for phrase in node:
            yield name, phrase


def check_axes(axes: Axes, categories: set[str], grammar: dict[str, Any]) -> None:
    """Raises ValueError naming every bank without phrases for a level of the axes, before anything is written."""
    levels = {axis: set(axes.ids(axis)) for axis in AXES}
    levels |= {"mood": set(axes.moods), "opening": set(axes.openings), "category": categories}
    unknown = sorted(levels["intent"] - grammar["later_kinds"].keys())
    gaps = [f"later_kinds: no entry for intent {intent!r}" for intent in unknown]
    first = {kind for intent in levels["intent"] for kind in ([_KINDS[intent]] if intent in _KINDS else _UNDERSTAND)}
    later = {kind for intent in levels["intent"] for kind in grammar["later_kinds"].get(intent, ())}
    for bank, node in grammar.items():
        if bank in _BY_KIND:
            needed = first if bank == "issue" else later
            gaps += [f"{bank}: no entry for the kind of request {kind!r}" for kind in sorted(needed - node.keys())]
            node = {kind: node[kind] for kind in needed & node.keys()}
            gaps += [gap for kind, inner in sorted(node.items()) for gap in _gaps(inner, f"{bank}.{kind}", levels)]
        elif bank not in ("later_kinds", "jargon", "variants"):
            used = {o for o in levels["opening"] if any(f"{{{bank}}}" in t for t in grammar["first_turn"].get(o, ()))}
            gaps += _gaps(node, bank, levels | {"opening": used or levels["opening"]})
    if gaps:
        raise ValueError("the grammar lacks phrases for levels of the axes:\n" + "\n".join(f"  {gap}" for gap in gaps))


def _gaps(node: Any, path: str, levels: dict[str, set[str]]) -> list[str]:
    """What a bank lacks: the levels that its keys leave out, of the axis that most of its keys belong to."""
    if not isinstance(node, dict):
        return []
    axis = max(levels, key=lambda name: len(levels[name] & node.keys()))
    found = []
    if not levels[axis] & node.keys() and "any" not in node:
        found = [f"{path}: its entries ({', '.join(node)}) are no levels of the axes"]
    elif "any" not in node:
        found = [f"{path}: no entry for {axis} {level!r}" for level in sorted(levels[axis] - node.keys())]
    inner = [key for key in node if key == "any" or key in levels[axis]]
    return found + [gap for key in inner for gap in _gaps(node[key], f"{path}.{key}", levels)]


def resolve(grammar: dict[str, Any], bank: str, levels: frozenset[str], kind: str = "") -> list[str]:
    """The list of a bank that fits the kind of request, else the levels. Raises KeyError if not exactly one does."""
    node = grammar[bank]
    while isinstance(node, dict):
        fitting = [kind] if kind in node else [key for key in node if key in levels]
        if len(fitting) > 1 or not (fitting or "any" in node):
            raise KeyError(f"grammar bank {bank!r}: {len(fitting)} entries fit {sorted(levels)}")
        node = node[fitting[0] if fitting else "any"]
    return node


@dataclass
class Writer:
    """One conversation in the making: its levels, its card, and what it has already said."""

    card: Card
    grammar: dict[str, Any]
    key: tuple[Any, ...]
    levels: frozenset[str]
    slots: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    kinds: list[str] = field(default_factory=list)
    brief: bool = False  # choose among the shortest phrases
    turn_in: int | None = None  # the conversation's place among those of its scenario; None once it is drawn again

    def below(self, n: int, slot: str) -> int:
        """A number in 0..n-1 fixed by the conversation's key and the slot.

        The first draft goes through the options in turn, from a start and by a stride that differ by scenario and
        slot: conversations of a scenario then repeat each other less than independent draws would.
        """
        if self.turn_in is None:
            return stable_hash(*self.key, slot) % n
        seed, scenario_id, *_ = self.key
        drawn, strides = stable_hash(seed, scenario_id, slot), _strides(n)
        return (drawn + self.turn_in * strides[(drawn >> 32) % len(strides)]) % n

    def vary(self, text: str, slot: str) -> str:
        """The text with some of its expressions said in another way (bank `variants`)."""
        variants = self.grammar["variants"]

        def said(match: re.Match) -> str:
            found = match[0]
            lower = found not in variants
            options = [found, *variants[found[:1].lower() + found[1:] if lower else found]]
            chosen = options[stable_hash(*self.key, "vary", slot, match.start()) % len(options)]
            return chosen[:1].upper() + chosen[1:] if lower else chosen

        return _sayings(tuple(variants)).sub(said, text)

    def pick(self, options: list[str], slot: str) -> str:
        """One of the options, not yet used in this conversation where possible."""
        if self.brief:
            options = sorted(options, key=count_words)[:2]
        start = self.below(len(options), slot)
        ordered = options[start:] + options[:start]
        chosen = next((option for option in ordered if option not in self.used), ordered[0])
        self.used.add(chosen)
        return chosen

    def say(self, bank: str, turn: int, **slots: str) -> str:
        """A phrase of the bank with its braces filled, first from `slots` and the card, then from other banks."""
        template = self.pick(resolve(self.grammar, bank, self.levels, self.kinds[-1]), f"{bank}{turn}")
        known = {**self.slots, **slots}

        def fill(match: re.Match) -> str:
            name = match[1]
            return known[name] if name in known else self.say(name, turn, **slots)

        text = _SLOT.sub(fill, template)
        return capitalised(text) if template.startswith("{") else text


@cache
def _strides(n: int) -> list[int]:
    """The steps that visit all of 0..n-1: the numbers without a factor in common with n."""
    return [step for step in range(1, max(2, n)) if math.gcd(step, n) == 1]


@cache
def _sayings(keys: tuple[str, ...]) -> re.Pattern:
    """Matches any of the expressions as whole words, also at the beginning of a sentence; longest first.

    Not after "a" or "an", which would no longer fit, and not before "of" (because of).
    """
    both = {form for key in keys for form in (key, key[:1].upper() + key[1:])}
    return re.compile(
        rf"(?<!\b[Aa]\s)(?<!\b[Aa]n\s)\b(?:{'|'.join(sorted(both, key=lambda k: (-len(k), k)))})\b(?! of\b)"
    )


# --- small text tools --------------------------------------------------------------------------------


def capitalised(text: str) -> str:
    """First letter in upper case, unless the first word has its own spelling (eSIM)."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text if any(c.isupper() for c in first) else text[:1].upper() + text[1:]


def lowered(step: str, card: Card) -> str:
    """A card's sentence ready to follow a comma: first letter in lower case, unless it is a name (DNS, Wi-Fi)."""
    first = step.split(maxsplit=1)[0].rstrip(",.")
    name = any(c.isupper() or c.isdigit() for c in first[1:]) or len(first) == 1
    spelled = {word for name in card.names for word in name.split()}
    return step if name or first in spelled else step[:1].lower() + step[1:]


def tidy(text: str) -> str:
    """Single spaces, and no second full stop after a quotation that ends with one."""
    return re.sub(r"([.?!]”)\.", r"\1", " ".join(text.split()))


def count_words(text: str) -> int:
    return len(text.split())


def quantities(card: Card) -> list[tuple[str, str]]:
    """(figure, fact) for the card's figures that carry a unit and are spelled out in one of its facts."""
    return [
        (figure.text, fact)
        for figure in card.figures
        for fact in card.facts
        if figure.text in fact and any(unit for _, unit in figures_in(figure.text))
    ]


def article(card: Card) -> str:
    """The article of the term ("a ", "an ", "the ") as its definition begins with it; "" if it takes none."""
    first, _, rest = card.definition.partition(" ")
    return f"{first.lower()} " if first in ("A", "An", "The") and rest.startswith(card.term) else ""


def with_article(name: str, card: Card) -> str:
    """A name of the card with the article that the term takes: "a router", "an engineer visit", "latency"."""
    found = article(card)
    if found in ("", "the ") or name == card.term:
        return found + name
    spelled = name.split()[0].isupper()  # an abbreviation is read letter by letter: an SMS, a PIN
    return ("an " if name[0] in ("AEFHILMNORSX" if spelled else "aeiouAEIO") else "a ") + name


# --- the customer ------------------------------------------------------------------------------------


def _suited(writer: Writer, texts: list[str], slot: str) -> str:
    """One of the card's customer sentences; a novice does not get one that is full of jargon, if there is another."""
    marks = writer.grammar["jargon"]
    plain = [text for text in texts if not any(mark.lower() in text.lower() for mark in marks)]
    fitting = plain if "novice" in writer.levels and plain else texts
    return fitting[writer.below(len(fitting), slot)]


def _bind(writer: Writer, turn: int, kind: str) -> None:
    """Choose which of the card's sentences this turn is about, and put them into the slots."""
    card = writer.card
    writer.kinds.append(kind)
    name = [card.term, card.term, *card.aliases[:1]][writer.below(2 + len(card.aliases[:1]), f"name{turn}")]
    comparison = card.comparisons[writer.below(len(card.comparisons), "comparison")]
    writer.slots |= {
        "term": card.term,
        "a_term": with_article(card.term, card),
        "name": name,
        "a_name": with_article(name, card),
        "fault": writer.vary(_suited(writer, card.fault_reports, "fault"), "fault"),
        "dispute": writer.vary(_suited(writer, card.billing_disputes, "dispute"), "dispute"),
        "change": writer.vary(_suited(writer, card.change_requests, "change"), "change"),
        "options": comparison.options,
        "advice": comparison.advice,
    }
    if kind == "belief":
        writer.slots["belief"] = writer.pick([w.belief for w in card.wrong_beliefs], f"belief{turn}")
    if kind == "figure":
        found = [pair for pair in quantities(card) if pair[1] not in writer.used] or quantities(card)
        writer.slots["figure"], writer.slots["figure_fact"] = found[writer.below(len(found), f"figure{turn}")]


def _first_kind(writer: Writer, intent: str) -> str:
    if intent in _KINDS:
        return _KINDS[intent]
    kind = _UNDERSTAND[writer.below(len(_UNDERSTAND), "kind")]
    return "meaning" if kind == "figure" and not quantities(writer.card) else kind


def _later_kind(writer: Writer, intent: str, turn: int) -> str:
    """What the customer asks next: fits the intent, was not asked before, and the card can answer it."""
    allowed = [kind for kind in writer.grammar["later_kinds"][intent] if kind not in writer.kinds]
    if not quantities(writer.card):
        allowed = [kind for kind in allowed if kind != "figure"]
    return allowed[writer.below(len(allowed), f"kind{turn}")]


# --- the agent ---------------------------------------------------------------------------------------

Piece = tuple[str, str]  # ("check" | "fix" | "fact" | "plain" | "second" | "escalate", sentence)


def _content(writer: Writer, kind: str, turn: int, expert: bool) -> tuple[list[Piece], list[Piece]]:
    """(must say, may say) for a kind of request, drawn from the card and not said before."""
    card = writer.card
    facts = _unsaid(writer, [("fact", fact) for fact in card.facts], f"facts{turn}")
    definition = [("plain", s) for s in sentences(card.definition) if s not in writer.used]
    background = [*facts[:1], *definition[:1], *facts[1:2]] if expert else [*definition[:1], *facts[:2]]
    if kind == "meaning":
        more = [*facts[:1], *definition[1:]] if expert else definition[1:] + facts
        return (definition or facts)[:1], more
    if kind == "belief":
        wrong = next(w for w in card.wrong_beliefs if w.belief == writer.slots["belief"])
        return [("plain", wrong.correction)], background
    if kind == "figure":
        fact = ("plain", writer.slots["figure_fact"])
        return [fact], [piece for piece in background if piece[1] != fact[1]]
    if kind in ("fault", "still", "after"):
        return _steps(writer, kind, turn, expert)
    if kind == "escalation":
        steps = _unsaid(writer, [("fix", step) for step in card.resolution], f"fixes{turn}")
        return [("escalate", card.escalate_when)], steps[:1] + facts[:1]
    if kind == "practice":
        return facts[:1], facts[1:3]
    return _prepared(writer, kind, turn, facts, background)


def _prepared(
    writer: Writer, kind: str, turn: int, facts: list[Piece], background: list[Piece]
) -> tuple[list[Piece], list[Piece]]:
    """(must say, may say) from the card's prepared answers: the whole, or a part of it with a fact instead."""
    card = writer.card
    answer = {"billing_dispute": card.billing_answer, "change": card.change_answer, "compare": writer.slots["advice"]}
    first, *rest = sentences(answer[kind])
    said = [("plain", first), *(("second", text) for text in rest)]
    if kind == "compare" or not rest:  # advice is told whole
        return said, background
    parts = [said, said, [*said[:1], *facts[:1]], [("plain", rest[0]), *facts[:1]]]
    chosen = parts[writer.below(len(parts) - (kind == "change" or rest[0].split()[0] in _LEANING), f"parts{turn}")]
    return chosen, [piece for piece in [*said[1:], *background] if piece not in chosen and piece[1] != chosen[0][1]]


def _unsaid(writer: Writer, pieces: list[Piece], slot: str) -> list[Piece]:
    """Pieces not said yet, starting at a drawn place and going round (all of them again if all were said)."""
    fresh = [piece for piece in pieces if piece[1] not in writer.used] or pieces
    start = writer.below(len(fresh), slot)
    return fresh[start:] + fresh[:start]


def _steps(writer: Writer, kind: str, turn: int, expert: bool) -> tuple[list[Piece], list[Piece]]:
    """Steps in the card's order. What comes first depends on the situation: checks, or the fix, or the quickest."""
    card = writer.card
    checks = [("check", step) for step in card.diagnosis]
    fixes = [("fix", step) for step in card.resolution if step not in writer.used]
    fixes = fixes or [("fix", step) for step in card.resolution]
    escalate = [("escalate", card.escalate_when)]
    skip = writer.below(2, f"skip{turn}") if expert else 0  # who knows the jargon may start one check further on
    at = writer.below(max(1, len(fixes) - 1), f"fix{turn}")
    if kind == "after":
        return checks[skip : skip + 2], checks[skip + 2 : skip + 3]
    if kind == "still":
        return fixes[at : at + 2], escalate
    if "repeat_unresolved" in writer.levels:
        return fixes[at : at + 1] + escalate, []
    if "time_critical" in writer.levels:
        return [checks[skip], fixes[min(at, 1)]], escalate
    return checks[skip : skip + 2], [*checks[skip + 2 : skip + 3], *fixes[:1]]


def _render(writer: Writer, pieces: list[Piece], turn: int) -> list[str]:
    """Pieces as sentences: steps get connectors by their place and role, later facts a lead-in."""
    first = next((i for i, (role, _) in enumerate(pieces) if role in ("check", "fix")), -1)
    out = []
    for i, (role, said) in enumerate(pieces):
        writer.used.add(said)
        text = writer.vary(said, f"{turn}.{i}")
        if role in ("check", "fix"):
            later = "step_then" if role == "check" else "step_else"  # a check changes nothing, a fix may
            bank = later if i != first else "step_meanwhile" if i else "step_first"
            out.append(writer.say(bank, turn * 10 + i, step=lowered(text, writer.card)))
        elif role == "escalate":
            out.append(writer.say("escalate", turn, escalate_when=text.rstrip(".")))
        elif role == "second" and text.split()[0] not in _LEANING:
            out.append(writer.say("second", turn * 10 + i, text=text))
        elif role == "fact" and i:
            out.append(writer.say("fact_also", turn * 10 + i, fact=text))
        else:
            out.append(text)
    return out


def _next_step(writer: Writer, kind: str, turn: int) -> str:
    """The closing sentence. A question asked in passing about a fault has no steps to report on."""
    levels = writer.levels
    if "fault" in levels and kind in ("belief", "figure", "meaning", "practice"):
        writer.levels = levels - {"fault"} | {"understand"}
    action = writer.say("next_step", turn)
    writer.levels = levels
    return action


def _answer(writer: Writer, kind: str, turn: int, expert: bool) -> str:
    """Opening, content, next step: as many optional sentences as fit a drawn length, openings dropped last."""
    low, high = ANSWER_TARGET
    target = low + writer.below(high - low + 1, f"target{turn}")
    action = _next_step(writer, kind, turn)
    if turn == 0:
        openings = [writer.say("acknowledge", turn), writer.say("frame", turn)]
    else:
        openings = [writer.say("frame_later", turn)]
    pieces, optional = _content(writer, kind, turn, expert)
    fixed = count_words(action)
    room = target - fixed - count_words(openings[-1])
    for piece in optional:
        if sum(count_words(text) + 2 for _, text in [*pieces, piece]) <= room:
            pieces = [*pieces, piece]
    body = " ".join(_render(writer, pieces, turn))
    while len(openings) > 1 and fixed + count_words(" ".join([*openings, body])) > target:
        openings.pop(writer.below(2, f"opening{turn}"))
    if fixed + count_words(" ".join([*openings, body])) > ANSWER_WORDS[1]:
        openings = []
    return tidy(" ".join([*openings, body, action]))


# --- conversations -----------------------------------------------------------------------------------


def turn_pairs(scenario: Scenario, number: int, axes: Axes) -> int:
    """Turn pairs of a conversation: a fixed table, looked up by hash of scenario and seed number."""
    return axes.turn_table[stable_hash("turns", scenario.scenario_id, number) % len(axes.turn_table)]


def mood_and_opening(scenario: Scenario, number: int, axes: Axes) -> tuple[str, str]:
    """Seed numbers walk through moods and openings together, from a start that differs by scenario.

    With 5 moods and 4 openings any 20 numbers in a row give every pair once (5 and 4 share no factor).
    """
    start = stable_hash("start", scenario.scenario_id) % (len(axes.moods) * len(axes.openings))
    return axes.moods[(start + number) % len(axes.moods)], axes.openings[(start + number) % len(axes.openings)]


def _drafted(writer: Writer, draft: Callable[[], str], limits: tuple[int, int], slot: str) -> str:
    """A text within the word limits: drawn again while it is outside, in the end with short phrases only."""
    key, said, turn_in = writer.key, writer.used, writer.turn_in
    for retry in range(ATTEMPTS):
        writer.key, writer.used = (*key, slot, retry), set(said)
        writer.brief, writer.turn_in = retry >= ATTEMPTS // 2, None if retry else turn_in
        text = tidy(draft())
        if limits[0] <= count_words(text) <= limits[1]:
            break
    writer.key, writer.brief, writer.turn_in = key, False, turn_in
    return text


def _turn(writer: Writer, scenario: Scenario, turn: int) -> tuple[str, str]:
    kind = _later_kind(writer, scenario.intent, turn) if turn else _first_kind(writer, scenario.intent)
    _bind(writer, turn, kind)
    expert = scenario.customer == "expert"
    bank = "later_turn" if turn else "first_turn"
    question = _drafted(writer, lambda: writer.say(bank, turn), USER_WORDS, f"user{turn}")
    return question, _drafted(writer, lambda: _answer(writer, kind, turn, expert), ANSWER_WORDS, f"answer{turn}")


def write_conversation(
    card: Card,
    scenario: Scenario,
    number: int,
    axes: Axes,
    seed: int,
    attempt: int = 0,
    grammar: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One conversation; another `attempt` gives another text for the same scenario and seed number."""
    mood, opening = mood_and_opening(scenario, number, axes)
    levels = {scenario.intent, scenario.situation, scenario.customer, scenario.category, mood, opening}
    key = (seed, scenario.scenario_id, number, attempt)
    writer = Writer(card, grammar or load_grammar(), key, frozenset(levels))
    if not attempt and number < len(axes.moods) * len(axes.openings):  # numbers of one mood follow each other here
        writer.turn_in = number // len(axes.moods) + number % len(axes.moods) * len(axes.openings)
    pairs = turn_pairs(scenario, number, axes)
    turns = [_turn(writer, scenario, turn) for turn in range(pairs)]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return {
        "conversation_id": f"{scenario.scenario_id}.{number:02d}",
        "scenario_id": scenario.scenario_id,
        "term_id": scenario.term_id,
        "intent": scenario.intent,
        "situation": scenario.situation,
        "customer": scenario.customer,
        "mood": mood,
        "opening": opening,
        "n_turns": pairs,
        "messages": messages,
        "split": scenario.split,
    }


def _fresh(
    card: Card, scenario: Scenario, number: int, axes: Axes, seed: int, seen: set[str], grammar: dict[str, Any]
) -> dict[str, Any]:
    """A conversation whose first turn and first answer this scenario has not had; else the last one tried."""
    for attempt in range(ATTEMPTS):
        conversation = write_conversation(card, scenario, number, axes, seed, attempt, grammar)
        first = [message["content"] for message in conversation["messages"][:2]]
        if not seen.intersection(first):
            break
    seen.update(first)
    return conversation


def generate_conversations(
    cards: list[Card],
    scenarios: list[Scenario],
    axes: Axes,
    seeds_per_scenario: int,
    seed: int,
    grammar_path: Path = GRAMMAR_PATH,
) -> Iterator[dict[str, Any]]:
    """All conversations in grid order, `seeds_per_scenario` for each scenario: keys as in conversations.parquet.

    Raises ValueError if the grammar has no phrases for a level of the axes.
    """
    grammar = load_grammar(grammar_path)
    check_axes(axes, {card.category for card in cards}, grammar)
    by_id = {card.id: card for card in cards}
    for scenario in scenarios:
        seen: set[str] = set()
        for number in range(seeds_per_scenario):
            yield _fresh(by_id[scenario.term_id], scenario, number, axes, seed, seen, grammar)


def generator_facts() -> dict[str, Any]:
    """What the data set's card says of this generator."""
    return {"id": GENERATOR_ID, "model": None, "calls_planned": 0, "usd": 0.0}
