"""The offline generator: a deterministic grammar over cards and scenarios that writes chat conversations.

Every choice is a hash of (seed, scenario, seed number, attempt, slot): the same parameters give the same bytes on any
machine, one scenario does not depend on another, and a new slot does not change the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from telco_nb import DATA_DIR
from telco_nb.corpus.cards import Card, figures_in, read_yaml
from telco_nb.corpus.scenarios import AXES, Axes, Scenario, conversation_row, stable_hash
from telco_nb.corpus.text_measures import capitalised, count_words, sentences, tidy

GRAMMAR_PATH = DATA_DIR / "grammar.yaml"
GENERATOR_ID = "offline-grammar-2"
USER_WORDS = (12, 45)  # the target; a turn outside is drawn again
ANSWER_WORDS = (35, 75)
ANSWER_TARGET = (42, 62)  # optional sentences are added up to a length drawn from this range
ATTEMPTS = 12

_SLOT = re.compile(r"\{(\w+)\}")
_REQUESTS = ("fault", "billing_dispute", "change", "compare")  # intents that are a kind of request themselves
_QUESTIONS = ("meaning", "meaning", "belief", "belief", "figure")  # kinds of request of the other intents
_DEPENDENT = {"Otherwise", "It", "They", "That", "This", "These", "Those", "Both", "Then", "But", "And", "So", "For"}
_BY_KIND = ("issue", "probe", "frame_later")  # banks whose first keys are kinds of request, not levels

Grammar = dict[str, Any]  # bank -> phrases, or level or kind of request -> ... -> phrases
Piece = tuple[str, str]  # ("check" | "fix" | "fact" | "plain" | "second" | "escalate", sentence)
Content = tuple[list[Piece], list[Piece]]  # (required pieces, optional pieces)


@cache
def load_grammar(path: Path = GRAMMAR_PATH) -> Grammar:
    """Load the phrase banks. Raises ValueError if a phrase holds a digit: figures come from the card alone."""
    grammar = read_yaml(path)
    for bank, phrase in all_phrases(grammar):
        if re.search(r"\d", phrase):
            raise ValueError(f"{path.name}: {bank}: a digit in {phrase!r}")
    return grammar


def all_phrases(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (bank path, phrase) for every phrase of a grammar, or of the part `node` of one with the path `name`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from all_phrases(value, f"{name}.{key}" if name else key)
    else:
        for phrase in node:
            yield name, phrase


def check_axes(axes: Axes, categories: set[str], grammar: Grammar) -> None:
    """Raise ValueError naming every bank without phrases for a level of the axes or a category of the cards."""
    levels = {axis: set(axes.ids(axis)) for axis in AXES}
    levels |= {"mood": set(axes.moods), "opening": set(axes.openings), "category": categories}
    later_kinds = grammar["later_kinds"]
    gaps = [f"later_kinds: no entry for intent {intent!r}" for intent in sorted(levels["intent"] - later_kinds.keys())]
    first = {kind for i in levels["intent"] for kind in ([i] if i in _REQUESTS else _QUESTIONS)}
    later = {kind for intent in levels["intent"] for kind in later_kinds.get(intent, ())}
    for bank, node in grammar.items():
        if bank in _BY_KIND:
            needed = first if bank == "issue" else later
            gaps += [f"{bank}: no entry for the kind of request {kind!r}" for kind in sorted(needed - node.keys())]
            for kind in sorted(needed & node.keys()):
                gaps += _gaps(node[kind], f"{bank}.{kind}", levels)
        elif bank not in ("later_kinds", "jargon", "variants"):
            used = {o for o in levels["opening"] if any(f"{{{bank}}}" in t for t in grammar["first_turn"].get(o, ()))}
            gaps += _gaps(node, bank, levels | {"opening": used or levels["opening"]})
    if gaps:
        raise ValueError("the grammar lacks phrases for levels of the axes:\n" + "\n".join(f"  {gap}" for gap in gaps))


def _gaps(node: Any, path: str, levels: dict[str, set[str]]) -> list[str]:
    """List the missing levels of a bank; its axis is the one to which most of its keys belong."""
    if not isinstance(node, dict):
        return []
    axis = max(levels, key=lambda name: len(levels[name] & node.keys()))
    gaps = []
    if not levels[axis] & node.keys() and "any" not in node:
        gaps = [f"{path}: its entries ({', '.join(node)}) are no levels of the axes"]
    elif "any" not in node:
        gaps = [f"{path}: no entry for {axis} {level!r}" for level in sorted(levels[axis] - node.keys())]
    inner = [key for key in node if key == "any" or key in levels[axis]]
    return gaps + [gap for key in inner for gap in _gaps(node[key], f"{path}.{key}", levels)]


def resolve(grammar: Grammar, bank: str, levels: frozenset[str], kind: str = "") -> list[str]:
    """Return the phrases of a bank for the kind of request, else for the levels of the conversation.

    Raises KeyError if not exactly one entry fits.
    """
    node = grammar[bank]
    while isinstance(node, dict):
        fitting = [kind] if kind in node else [key for key in node if key in levels]
        if len(fitting) > 1 or not (fitting or "any" in node):
            raise KeyError(f"grammar bank {bank!r}: {len(fitting)} entries fit {sorted(levels)}")
        node = node[fitting[0] if fitting else "any"]
    return node


@dataclass
class Writer:
    """The state of one conversation while it is written: its levels, its card, and the phrases already used."""

    card: Card
    grammar: Grammar
    key: tuple[Any, ...]
    levels: frozenset[str]
    slots: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    kinds: list[str] = field(default_factory=list)
    brief: bool = False  # choose among the shortest phrases
    cycle: int | None = None  # the conversation's place among those of its scenario; None for a second draft

    def draw(self, n: int, slot: str) -> int:
        """Return a number in 0..n-1 that depends on the conversation's key and the slot only.

        The first drafts of a scenario go through the options in turn, from a start and by a stride that differ by
        scenario and slot. They repeat each other less than independent draws would.
        """
        if self.cycle is None:
            return stable_hash(*self.key, slot) % n
        seed, scenario_id, *_ = self.key
        start, strides = stable_hash(seed, scenario_id, slot), _strides(n)
        return (start + self.cycle * strides[(start >> 32) % len(strides)]) % n

    def choose(self, options: Sequence[Any], slot: str) -> Any:
        return options[self.draw(len(options), slot)]

    def choose_unused(self, options: list[str], slot: str) -> str:
        """Choose an option that this conversation has not used, if there is one."""
        if self.brief:
            options = sorted(options, key=count_words)[:2]
        start = self.draw(len(options), slot)
        ordered = options[start:] + options[:start]
        chosen = next((option for option in ordered if option not in self.used), ordered[0])
        self.used.add(chosen)
        return chosen

    def vary(self, text: str, slot: str) -> str:
        """Replace some expressions of the text by synonyms (bank `variants`)."""
        synonyms = self.grammar["variants"]

        def replacement(match: re.Match) -> str:
            original = match[0]
            at_start = original not in synonyms  # an expression with a capital at the start of a sentence
            options = [original, *synonyms[original[:1].lower() + original[1:] if at_start else original]]
            chosen = options[stable_hash(*self.key, "vary", slot, match.start()) % len(options)]
            return chosen[:1].upper() + chosen[1:] if at_start else chosen

        return _synonym_pattern(tuple(synonyms)).sub(replacement, text)

    def phrase(self, bank: str, turn: int, **slots: str) -> str:
        """Choose a phrase of the bank and fill its slots: from `slots`, from the card, or from other banks."""
        options = resolve(self.grammar, bank, self.levels, self.kinds[-1])
        template = self.choose_unused(options, f"{bank}{turn}")
        known = {**self.slots, **slots}

        def fill(match: re.Match) -> str:
            return known[match[1]] if match[1] in known else self.phrase(match[1], turn, **slots)

        text = _SLOT.sub(fill, template)
        return capitalised(text) if template.startswith("{") else text


@cache
def _strides(n: int) -> list[int]:
    """Return the strides that visit all of 0..n-1: the numbers without a factor in common with n."""
    return [stride for stride in range(1, max(2, n)) if math.gcd(stride, n) == 1]


@cache
def _synonym_pattern(keys: tuple[str, ...]) -> re.Pattern:
    """Match any of the expressions as whole words, with a small or capital first letter; longest first.

    Not after "a" or "an", which might no longer fit, and not before "of" (because of).
    """
    forms = {form for key in keys for form in (key, key[:1].upper() + key[1:])}
    longest_first = "|".join(sorted(forms, key=lambda form: (-len(form), form)))
    return re.compile(rf"(?<!\b[Aa]\s)(?<!\b[Aa]n\s)\b(?:{longest_first})\b(?! of\b)")


def lowered(step: str, card: Card) -> str:
    """Start a card's sentence with a small letter, to follow a comma, unless its first word is a name (DNS, Wi-Fi)."""
    first = step.split(maxsplit=1)[0].rstrip(",.")
    is_name = any(c.isupper() or c.isdigit() for c in first[1:]) or len(first) == 1
    in_names = {word for name in card.names for word in name.split()}
    return step if is_name or first in in_names else step[:1].lower() + step[1:]


def quantities(card: Card) -> list[tuple[str, str]]:
    """Return (figure, fact) for the card's figures that have a unit and occur in a fact."""
    return [
        (figure.text, fact)
        for figure in card.figures
        for fact in card.facts
        if figure.text in fact and any(unit for _, unit in figures_in(figure.text))
    ]


def with_article(name: str, card: Card) -> str:
    """Add to a name the article that the definition gives the term: "a router", "an engineer visit", "latency"."""
    first, _, rest = card.definition.partition(" ")
    article = f"{first.lower()} " if first in ("A", "An", "The") and rest.startswith(card.term) else ""
    if article in ("", "the ") or name == card.term:
        return article + name
    vowels = "AEFHILMNORSX" if name.split()[0].isupper() else "aeiouAEIO"  # abbreviations are spelled: an SMS, a PIN
    return ("an " if name[0] in vowels else "a ") + name


def _customer_sentence(writer: Writer, texts: list[str], slot: str) -> str:
    """Choose a customer sentence of the card; a novice gets one without jargon if there is one."""
    jargon = [mark.lower() for mark in writer.grammar["jargon"]]
    plain = [text for text in texts if not any(mark in text.lower() for mark in jargon)]
    return writer.vary(writer.choose(plain if "novice" in writer.levels and plain else texts, slot), slot)


def _bind(writer: Writer, turn: int, kind: str) -> None:
    """Choose the sentences of the card for this turn and put them into the slots."""
    card = writer.card
    writer.kinds.append(kind)
    name = writer.choose([card.term, card.term, *card.aliases[:1]], f"name{turn}")
    comparison = writer.choose(card.comparisons, "comparison")
    writer.slots |= {
        "term": card.term,
        "a_term": with_article(card.term, card),
        "name": name,
        "a_name": with_article(name, card),
        "fault": _customer_sentence(writer, card.fault_reports, "fault"),
        "dispute": _customer_sentence(writer, card.billing_disputes, "dispute"),
        "change": _customer_sentence(writer, card.change_requests, "change"),
        "options": comparison.options,
        "advice": comparison.advice,
    }
    if kind == "belief":
        writer.slots["belief"] = writer.choose_unused([w.belief for w in card.wrong_beliefs], f"belief{turn}")
    if kind == "figure":
        unused = [pair for pair in quantities(card) if pair[1] not in writer.used] or quantities(card)
        writer.slots["figure"], writer.slots["figure_fact"] = writer.choose(unused, f"figure{turn}")


def _request_kind(writer: Writer, intent: str, turn: int) -> str:
    """Choose the kind of request: it fits the intent, is new if not the first, and the card can answer it."""
    if turn == 0:
        kind = intent if intent in _REQUESTS else writer.choose(_QUESTIONS, "kind")
        return "meaning" if kind == "figure" and not quantities(writer.card) else kind
    later = [kind for kind in writer.grammar["later_kinds"][intent] if kind not in writer.kinds]
    return writer.choose([k for k in later if k != "figure" or quantities(writer.card)], f"kind{turn}")


def _content(writer: Writer, kind: str, turn: int) -> Content:
    """Return the pieces for a kind of request, from the card's sentences not used before."""
    card = writer.card
    facts = _unused(writer, [("fact", fact) for fact in card.facts], f"facts{turn}")
    definition = [("plain", s) for s in sentences(card.definition) if s not in writer.used]
    expert = "expert" in writer.levels
    background = [*facts[:1], *definition[:1], *facts[1:2]] if expert else [*definition[:1], *facts[:2]]
    if kind == "meaning":
        return (definition or facts)[:1], [*facts[:1], *definition[1:]] if expert else definition[1:] + facts
    if kind == "belief":
        wrong = next(w for w in card.wrong_beliefs if w.belief == writer.slots["belief"])
        return [("plain", wrong.correction)], background
    if kind == "figure":
        fact = writer.slots["figure_fact"]
        return [("plain", fact)], [piece for piece in background if piece[1] != fact]
    if kind in ("fault", "still", "after"):
        return _steps(writer, kind, turn)
    if kind == "escalation":
        steps = _unused(writer, [("fix", step) for step in card.resolution], f"fixes{turn}")
        return [("escalate", card.escalate_when)], steps[:1] + facts[:1]
    if kind == "practice":
        return facts[:1], facts[1:3]
    return _prepared(writer, kind, turn, facts, background)


def _prepared(writer: Writer, kind: str, turn: int, facts: list[Piece], background: list[Piece]) -> Content:
    """Return pieces from the card's prepared answers: the whole, or a part and a fact."""
    card = writer.card
    answer = {"billing_dispute": card.billing_answer, "change": card.change_answer, "compare": writer.slots["advice"]}
    first, *rest = sentences(answer[kind])
    whole = [("plain", first), *(("second", text) for text in rest)]
    if kind == "compare" or not rest:  # advice is given whole
        return whole, background
    parts = [whole, whole, [*whole[:1], *facts[:1]], [("plain", rest[0]), *facts[:1]]]
    needs_first = kind == "change" or rest[0].split()[0] in _DEPENDENT
    chosen = writer.choose(parts[:-1] if needs_first else parts, f"parts{turn}")
    return chosen, [piece for piece in [*whole[1:], *background] if piece not in chosen and piece[1] != chosen[0][1]]


def _unused(writer: Writer, pieces: list[Piece], slot: str) -> list[Piece]:
    """Return the unused pieces (all if none is left), rotated to a drawn start."""
    unused = [piece for piece in pieces if piece[1] not in writer.used] or pieces
    start = writer.draw(len(unused), slot)
    return unused[start:] + unused[:start]


def _steps(writer: Writer, kind: str, turn: int) -> Content:
    """Return steps in the card's order; the situation decides between checks and fixes."""
    card = writer.card
    checks = [("check", step) for step in card.diagnosis]
    fixes = [("fix", step) for step in card.resolution if step not in writer.used]
    fixes = fixes or [("fix", step) for step in card.resolution]
    escalate = [("escalate", card.escalate_when)]
    skip = writer.draw(2, f"skip{turn}") if "expert" in writer.levels else 0  # an expert may start one check later
    at = writer.draw(max(1, len(fixes) - 1), f"fix{turn}")
    if kind == "after":
        return checks[skip : skip + 2], checks[skip + 2 : skip + 3]
    if kind == "still":
        return fixes[at : at + 2], escalate
    if "repeat_unresolved" in writer.levels:
        return fixes[at : at + 1] + escalate, []
    if "time_critical" in writer.levels:
        return [checks[skip], fixes[min(at, 1)]], escalate
    return checks[skip : skip + 2], [*checks[skip + 2 : skip + 3], *fixes[:1]]


def _render(writer: Writer, pieces: list[Piece], turn: int) -> str:
    """Join pieces to a text: steps get connectors by place and role, later facts a lead-in."""
    first = next((i for i, (role, _) in enumerate(pieces) if role in ("check", "fix")), -1)
    rendered = []
    for i, (role, sentence) in enumerate(pieces):
        writer.used.add(sentence)
        text, place = writer.vary(sentence, f"{turn}.{i}"), turn * 10 + i
        if role in ("check", "fix"):
            later = "step_then" if role == "check" else "step_else"  # a check changes nothing, a fix may
            bank = later if i != first else "step_meanwhile" if i else "step_first"
            text = writer.phrase(bank, place, step=lowered(text, writer.card))
        elif role == "escalate":
            text = writer.phrase("escalate", turn, escalate_when=text.rstrip("."))
        elif role == "second" and text.split()[0] not in _DEPENDENT:
            text = writer.phrase("second", place, text=text)
        elif role == "fact" and i:
            text = writer.phrase("fact_also", place, fact=text)
        rendered.append(text)
    return " ".join(rendered)


def _next_step(writer: Writer, kind: str, turn: int) -> str:
    """Choose the closing sentence. After a question beside a fault there are no steps to report on."""
    levels = writer.levels
    if "fault" in levels and kind in ("belief", "figure", "meaning", "practice"):
        writer.levels = levels - {"fault"} | {"understand"}
    action = writer.phrase("next_step", turn)
    writer.levels = levels
    return action


def _answer(writer: Writer, kind: str, turn: int) -> str:
    """Write opening, content and next step: optional sentences up to a drawn length, then openings are dropped."""
    low, high = ANSWER_TARGET
    target = low + writer.draw(high - low + 1, f"target{turn}")
    action = _next_step(writer, kind, turn)
    openings = [writer.phrase(bank, turn) for bank in (("frame_later",) if turn else ("acknowledge", "frame"))]
    pieces, optional = _content(writer, kind, turn)
    room = target - count_words(f"{action} {openings[-1]}")
    for piece in optional:
        if sum(count_words(text) + 2 for _, text in [*pieces, piece]) <= room:
            pieces = [*pieces, piece]
    body = f"{_render(writer, pieces, turn)} {action}"
    while len(openings) > 1 and count_words(" ".join([*openings, body])) > target:
        openings.pop(writer.draw(2, f"opening{turn}"))
    if count_words(" ".join([*openings, body])) > ANSWER_WORDS[1]:
        openings = []
    return tidy(" ".join([*openings, body]))


def turn_pairs(scenario: Scenario, number: int, axes: Axes) -> int:
    """Return the number of turn pairs of a conversation (by its seed number): an entry of a fixed table."""
    return axes.turn_table[stable_hash("turns", scenario.scenario_id, number) % len(axes.turn_table)]


def mood_and_opening(scenario: Scenario, number: int, axes: Axes) -> tuple[str, str]:
    """Return (mood, opening): seed numbers cycle through both lists, from a start that differs by scenario.

    With 5 moods and 4 openings any 20 numbers in a row give every pair once (5 and 4 have no common factor).
    """
    start = stable_hash("start", scenario.scenario_id) % (len(axes.moods) * len(axes.openings))
    return axes.moods[(start + number) % len(axes.moods)], axes.openings[(start + number) % len(axes.openings)]


def _within_limits(writer: Writer, draft: Callable[[], str], limits: tuple[int, int], slot: str) -> str:
    """Draw a text again while its length is outside the word limits, in the end with short phrases only."""
    key, used, cycle, text = writer.key, writer.used, writer.cycle, ""
    for retry in range(ATTEMPTS):
        writer.key, writer.used = (*key, slot, retry), set(used)
        writer.brief, writer.cycle = retry >= ATTEMPTS // 2, None if retry else cycle
        text = tidy(draft())
        if limits[0] <= count_words(text) <= limits[1]:
            break
    writer.key, writer.brief, writer.cycle = key, False, cycle
    return text


def _turn(writer: Writer, intent: str, turn: int) -> list[dict[str, str]]:
    kind = _request_kind(writer, intent, turn)
    _bind(writer, turn, kind)
    bank = "later_turn" if turn else "first_turn"
    question = _within_limits(writer, lambda: writer.phrase(bank, turn), USER_WORDS, f"user{turn}")
    answer = _within_limits(writer, lambda: _answer(writer, kind, turn), ANSWER_WORDS, f"answer{turn}")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_conversation(
    card: Card, scenario: Scenario, number: int, axes: Axes, seed: int, attempt: int = 0, grammar: Grammar | None = None
) -> dict[str, Any]:
    """Write one conversation, with the keys of conversations.parquet.

    Args:
        card: the card of the scenario's term.
        scenario: the scenario.
        number: the seed number of the conversation in its scenario.
        axes: the axes of the grid.
        seed: the seed of the study.
        attempt: another attempt gives another text for the same scenario and seed number.
        grammar: the phrase banks; None for those of the package.
    """
    mood, opening = mood_and_opening(scenario, number, axes)
    levels = {scenario.intent, scenario.situation, scenario.customer, scenario.category, mood, opening}
    key = (seed, scenario.scenario_id, number, attempt)
    writer = Writer(card, grammar or load_grammar(), key, frozenset(levels))
    moods, openings = len(axes.moods), len(axes.openings)
    if not attempt and number < moods * openings:  # numbers of one mood follow each other in the cycle
        writer.cycle = number // moods + number % moods * openings
    turns = range(turn_pairs(scenario, number, axes))
    messages = [message for turn in turns for message in _turn(writer, scenario.intent, turn)]
    return conversation_row(scenario, number, mood, opening, messages)


def generate_conversations(
    cards: list[Card],
    scenarios: list[Scenario],
    axes: Axes,
    seeds_per_scenario: int,
    seed: int,
    grammar_path: Path = GRAMMAR_PATH,
) -> Iterator[dict[str, Any]]:
    """Yield all conversations in grid order, with the keys of conversations.parquet.

    A conversation is written again while its first turn or first answer repeats an earlier one of its scenario.

    Args:
        cards: the cards.
        scenarios: the scenario grid.
        axes: the axes of the grid.
        seeds_per_scenario: conversations per scenario.
        seed: the seed of the study.
        grammar_path: the file of the phrase banks.

    Raises:
        ValueError: the grammar has no phrases for a level of the axes.
    """
    grammar = load_grammar(grammar_path)
    check_axes(axes, {card.category for card in cards}, grammar)
    by_id = {card.id: card for card in cards}
    for scenario in scenarios:
        earlier: set[str] = set()
        for number in range(seeds_per_scenario):
            for attempt in range(ATTEMPTS):
                row = write_conversation(by_id[scenario.term_id], scenario, number, axes, seed, attempt, grammar)
                first = {message["content"] for message in row["messages"][:2]}
                if not earlier & first:
                    break
            earlier |= first
            yield row


def generator_facts() -> dict[str, Any]:
    """Describe this generator for the data card."""
    return {"id": GENERATOR_ID, "model": None, "calls_planned": 0, "usd": 0.0}
