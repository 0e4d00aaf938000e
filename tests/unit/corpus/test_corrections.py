"""What earlier cards said wrongly is put right in those that are shipped; `corrections.yaml` lists it."""

import re
from pathlib import Path

import pytest
import shipped

from telco_nb.corpus.cards import Fact
from telco_nb.study.input_files import read_yaml

ENTRIES = read_yaml(Path(__file__).parent / "corrections.yaml")
IDS = [entry["id"] for entry in ENTRIES]
PARTS = ("names", "definition", "facts", "beliefs", "figures", "source")


def dated(part):
    """Where and until when a fact or figure holds, as " (UK, until 2027-01-31)"; empty if everywhere and for good."""
    limits = [
        part.applies_in if part.applies_in != "any" else "",
        f"until {part.valid_until}" if part.valid_until else "",
    ]
    return f" ({', '.join(filter(None, limits))})" if any(limits) else ""


def lines(card):
    """(part or problem, line) of what a card lets an agent say or do; what it forbids and beliefs are left out."""
    yield from (("names", name) for name in card.names)
    yield "definition", card.definition
    yield from (("facts", f"{dated(fact).strip()} {fact.text}".strip()) for fact in card.facts)
    yield from (("beliefs", wrong.correction) for wrong in card.wrong_beliefs)
    yield from (("figures", f"{figure.text}, {figure.meaning}{dated(figure)}") for figure in card.figures)
    yield "source", card.source or ""
    for problem in card.problems:
        if problem.first:
            yield problem.id, f"first, {problem.first.who}: {problem.first.do} ({problem.first.when or 'always'})"
        for step in problem.steps:
            yield problem.id, f"{step.who}{', identified' if step.needs_identity else ''}: {step.do}"
        for field, text in problem.agent_texts():
            if not field.endswith(".do"):
                yield problem.id, f"{field}: {text}" if field == "escalate_when" else text


def split(pattern, card):
    """The part or problem that a pattern names before its first colon, or "" for the whole card, and the rest."""
    head, colon, rest = pattern.partition(": ")
    return (head, rest) if colon and (head in PARTS or head in card.by_problem) else ("", pattern)


def found(pattern, card):
    """The lines of the card that a pattern finds."""
    place, regex = split(pattern, card)
    return [line for where, line in lines(card) if place in ("", where) and re.search(regex, line, re.I)]


def faults(entry, card):
    """What the card lacks, and what it says again, of one correction."""
    lacks = [f"lacks {pattern}" for pattern in entry["holds"] if not found(pattern, card)]
    return lacks + [f"says again {line}" for pattern in entry["never"] for line in found(pattern, card)]


def saying(card, text):
    """The card with one more sentence, as a name, as a fact and in every problem."""
    return card.model_copy(
        update={
            "aliases": [*card.aliases, text],
            "facts": [*card.facts, Fact(text=text)],
            "problems": [p.model_copy(update={"facts": [*p.facts, text]}) for p in card.problems],
        }
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_a_card_holds_what_was_put_right_and_says_the_wrong_no_more(entry):
    assert faults(entry, shipped.by_id()[entry["card"]]) == []


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_wrong_statement_that_came_back_and_every_fact_that_went_would_be_found(entry):
    card = shipped.by_id()[entry["card"]]
    again = saying(card, entry["was"])
    assert [pattern for pattern in entry["never"] if not found(pattern, again)] == []
    nothing = {part: [] for part in ("aliases", "facts", "wrong_beliefs", "figures", "problems")}
    bare = card.model_copy(update={"definition": "-", "source": None, **nothing})
    assert faults(entry, bare) == [f"lacks {pattern}" for pattern in entry["holds"]]


def test_every_correction_is_whole_and_stands_once():
    needed = {"id", "card", "was", "holds", "never"}
    assert all(needed <= entry.keys() <= needed | {"note"} and entry["holds"] for entry in ENTRIES)
    assert len(set(IDS)) == len({entry["was"] for entry in ENTRIES}) == len(ENTRIES)


def test_cards_use_one_word_and_one_unit_and_leave_a_box_without_power_for_one_time():
    texts = [(card.id, line) for card in shipped.cards() for _, line in lines(card)]
    assert [row for row in texts if re.search(r"\b(airplane|flight) mode\b|\b[kMG]bps\b", row[1])] == []
    pauses = {
        figure.text
        for card in shipped.cards()
        for figure in card.figures
        if re.search(r"(without|off) power", figure.meaning) and "second" in figure.text
    }
    assert pauses == {"30 seconds"}
