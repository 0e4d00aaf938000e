"""The scenario grid: the full factorial of terms and axes, a description of each cell in words, and the split."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, ValidationError

from telco_nb.corpus.cards import Card, StrictModel, Text, read_yaml
from telco_nb.corpus.text_measures import first_sentence

SPLITS = ("train", "val", "test")
AXES = ("intent", "situation", "customer")
HELD_OUT_SHARE = 0.1  # of the cells, for validation and again for test: 3 + 3 of a term's 30
FEWEST_CELLS = 10  # per term; with fewer, one held-out cell per term and split would exceed HELD_OUT_SHARE


class Level(StrictModel):
    """One level of an axis. `detail` (intents only) quotes the card, so that every cell of the grid makes sense."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    label: Text
    wording: Text
    detail: str = ""


class AxisLevels(StrictModel):
    intent: Annotated[list[Level], Field(min_length=1)]
    situation: Annotated[list[Level], Field(min_length=1)]
    customer: Annotated[list[Level], Field(min_length=1)]


class Axes(StrictModel):
    """Levels of the grid, the moods and openings over which seed numbers cycle, and the table of turn pairs."""

    axes: AxisLevels
    moods: Annotated[list[str], Field(min_length=1)]
    openings: Annotated[list[str], Field(min_length=1)]
    turn_table: Annotated[list[Annotated[int, Field(ge=1, le=3)]], Field(min_length=1)]

    def levels(self, axis: str) -> list[Level]:
        return getattr(self.axes, axis)

    def ids(self, axis: str) -> list[str]:
        return [level.id for level in self.levels(axis)]

    @property
    def cells_per_term(self) -> int:
        return len(self.axes.intent) * len(self.axes.situation) * len(self.axes.customer)


@dataclass(frozen=True)
class Scenario:
    """One cell of the grid. `position` counts the cells of its term from 0."""

    scenario_id: str
    term_id: str
    category: str
    intent: str
    situation: str
    customer: str
    reading: str
    position: int
    split: str = "train"


def load_axes(path: Path | str) -> Axes:
    """Load axes from YAML. Raises ValueError naming the file and the faulty key, or a level id used twice."""
    path = Path(path)
    try:
        axes = Axes.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    names = [level for axis in AXES for level in axes.ids(axis)] + axes.moods + axes.openings
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise ValueError(f"{path.name}: level ids must be unique over all axes; repeated: {', '.join(doubled)}")
    return axes


def stable_hash(*parts: Any) -> int:
    """Return a 64-bit hash of the text of `parts`, equal on every machine: the only random source of the data.

    Python's hash() differs between processes, and random.choice may differ between versions.
    """
    text = "|".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _reading(card: Card, intent: Level, situation: Level, customer: Level, position: int) -> str:
    """Describe a cell in words; `position` rotates through the card's sentences, so that an intent's cells differ."""

    def rotate(items: list[Any]) -> Any:
        return items[position % len(items)]

    wrong, comparison = rotate(card.wrong_beliefs), rotate(card.comparisons)
    slots = {
        "term": card.term,
        "belief": wrong.belief,
        "correction": wrong.correction,
        "fault": rotate(card.fault_reports),
        "diagnosis": card.diagnosis[0],
        "dispute": rotate(card.billing_disputes),
        "billing_answer": first_sentence(card.billing_answer),
        "change": rotate(card.change_requests),
        "change_answer": first_sentence(card.change_answer),
        "options": comparison.options,
        "advice": first_sentence(comparison.advice),
    }
    text = f"{customer.wording} {intent.wording}. {situation.wording} {intent.detail}"
    try:
        return text.format(**slots).strip()
    except (KeyError, IndexError, ValueError) as error:
        where = f"levels {intent.id}, {situation.id}, {customer.id}"
        raise ValueError(f"axes: {where}: cannot fill {error} in {text!r:.80}; known: {', '.join(slots)}") from None


def build_scenarios(cards: list[Card], axes: Axes, seed: int) -> list[Scenario]:
    """Build all scenarios with their split.

    Args:
        cards: the cards.
        axes: the axes of the grid.
        seed: the seed of the split.

    Returns:
        The scenarios in glossary order.

    Raises:
        AssertionError: the factorial is not exact.
        ValueError: the grid is too small to be split.
    """
    cells = list(product(*(axes.levels(axis) for axis in AXES)))
    scenarios = [
        Scenario(
            scenario_id=".".join((card.id, *(level.id for level in cell))),
            term_id=card.id,
            category=card.category,
            intent=cell[0].id,
            situation=cell[1].id,
            customer=cell[2].id,
            reading=_reading(card, *cell, position),
            position=position,
        )
        for card in cards
        for position, cell in enumerate(cells)
    ]
    _assert_factorial(scenarios, cards, axes)
    splits = split_scenarios(scenarios, seed)
    _assert_splittable(scenarios, splits, axes)
    return [replace(s, split=splits[s.scenario_id]) for s in scenarios]


def _assert_factorial(scenarios: list[Scenario], cards: list[Card], axes: Axes) -> None:
    """Check that every term occurs with every combination of levels once, from the counts per level."""
    assert len(scenarios) == len(cards) * axes.cells_per_term, "the grid is not the full factorial"
    assert len({s.scenario_id for s in scenarios}) == len(scenarios), "a scenario id is used twice"
    assert set(Counter(s.term_id for s in scenarios).values()) == {axes.cells_per_term}
    for axis in AXES:
        counts = Counter(getattr(s, axis) for s in scenarios)
        expected = len(scenarios) // len(axes.ids(axis))
        assert counts == dict.fromkeys(axes.ids(axis), expected), f"unequal counts on axis {axis}: {counts}"


def _assert_splittable(scenarios: list[Scenario], splits: dict[str, str], axes: Axes) -> None:
    """Refuse a grid in which a split would lack a level, before anything is generated."""
    if axes.cells_per_term < FEWEST_CELLS:
        raise ValueError(
            f"the axes give {axes.cells_per_term} cells a term; at least {FEWEST_CELLS} are needed to hold one out for "
            "validation and one for test and to keep 80 % for training. Add a level to an axis."
        )
    for axis in AXES:
        for name in ("val", "test"):
            held = [getattr(s, axis) for s in scenarios if splits[s.scenario_id] == name]
            absent = sorted(set(axes.ids(axis)) - set(held))
            if absent:
                raise ValueError(
                    f"{len(held)} {name} scenarios do not meet every {axis} (absent: {', '.join(absent)}). "
                    "Add cards, or use fewer levels."
                )


def split_scenarios(scenarios: list[Scenario], seed: int) -> dict[str, str]:
    """Split by scenario id: a tenth of the cells to validation, a tenth to test, the rest to train.

    The numbers of held-out cells of two terms differ by at most one. Terms are visited in a seeded order. Each
    held-out cell is the one whose levels this split holds least often, first within the term (so that a term's three
    cells differ in intent and situation), then over all terms.

    Returns:
        {scenario id: "train", "val" or "test"}.
    """
    by_term: dict[str, list[Scenario]] = defaultdict(list)
    for scenario in scenarios:
        by_term[scenario.term_id].append(scenario)
    result = {scenario.scenario_id: "train" for scenario in scenarios}
    in_split: dict[str, Counter] = {"val": Counter(), "test": Counter()}
    order = sorted(by_term, key=lambda term: stable_hash(seed, "split", term))
    each, extra = divmod(round(HELD_OUT_SHARE * len(scenarios)), len(order))  # the first `extra` terms give one more
    for place, term_id in enumerate(order):
        free = list(by_term[term_id])
        for name in ("val", "test"):
            in_term: Counter = Counter()
            for _ in range(min(max(1, each + (place < extra)), len(free) // 2)):
                chosen = min(free, key=lambda s: _crowding(s, in_term, in_split[name], seed))
                free.remove(chosen)
                result[chosen.scenario_id] = name
                in_term.update(_levels(chosen))
                in_split[name].update(_levels(chosen))
    return result


def _levels(s: Scenario) -> list[Any]:
    return [s.intent, s.situation, s.customer, (s.intent, s.situation), (s.intent, s.situation, s.customer)]


def _crowding(s: Scenario, in_term: Counter, in_split: Counter, seed: int) -> tuple:
    """Rank a candidate by how often its levels are already held out."""
    intent, situation, customer, pair, cell = _levels(s)
    return (
        in_term[situation] + in_term[intent],
        *(in_split[key] for key in (pair, intent, situation, customer, cell)),
        stable_hash(seed, "split", s.scenario_id),
    )


def conversation_row(
    scenario: Scenario, number: int, mood: str, opening: str, messages: list[dict[str, str]]
) -> dict[str, Any]:
    """Return a conversation with the keys of conversations.parquet; `number` is its seed number in the scenario."""
    return {
        "conversation_id": f"{scenario.scenario_id}.{number:02d}",
        **{key: getattr(scenario, key) for key in ("scenario_id", "term_id", *AXES)},
        "mood": mood,
        "opening": opening,
        "n_turns": len(messages) // 2,
        "messages": messages,
        "split": scenario.split,
    }


def scenarios_table(scenarios: list[Scenario]) -> pd.DataFrame:
    """Return one row per scenario, as written to scenarios.parquet."""
    columns = ["scenario_id", "term_id", "category", *AXES, "reading", "split"]
    return pd.DataFrame([vars(s) for s in scenarios], columns=columns)


def level_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Count the scenarios of every level and split in a table of scenarios: columns axis, level, train, val, test."""
    counts = {axis: pd.crosstab(frame[axis], frame["split"]) for axis in ("category", *AXES)}
    table = pd.concat(counts, names=["axis", "level"]).reindex(columns=list(SPLITS), fill_value=0)
    return table.rename_axis(columns=None).reset_index()
