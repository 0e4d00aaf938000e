"""The scenario grid: an exact full factorial of terms and axes, a written reading per cell, and the split."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from telco_nb.corpus.cards import Card, Text, read_yaml
from telco_nb.corpus.text_measures import first_sentence

SPLITS = ("train", "val", "test")
AXES = ("intent", "situation", "customer")
HELD_OUT_SHARE = 0.1  # of the cells, once for validation and once for test: 3 + 3 of a term's 30
FEWEST_CELLS = 10  # a term; with fewer, one held-out cell a term and split would be more than that share


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Level(_Strict):
    """One level of an axis. `detail` (intents only) quotes the card, so that odd cells still read sensibly."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    label: Text
    wording: Text
    detail: str = ""


class AxisLevels(_Strict):
    intent: Annotated[list[Level], Field(min_length=1)]
    situation: Annotated[list[Level], Field(min_length=1)]
    customer: Annotated[list[Level], Field(min_length=1)]


class Axes(_Strict):
    """Levels of the grid, the moods and openings that seeds run through, and the table of turn pairs."""

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
    """Axes from YAML. Raises ValueError naming the file and the key that is wrong, or a level id used twice."""
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
    """A 64-bit number from the text of `parts`: the only source of chance in the data, the same everywhere.

    Python's own hash() differs between processes, and random.choice between versions.
    """
    text = "|".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def reading(card: Card, intent: Level, situation: Level, customer: Level, position: int) -> str:
    """What this cell means, in words: who asks, what for, in which situation, and what the case turns on.

    `position` rotates through the card's sentences, so that the six cells of an intent are not one text.
    """
    wrong = card.wrong_beliefs[position % len(card.wrong_beliefs)]
    comparison = card.comparisons[position % len(card.comparisons)]
    slots = {
        "term": card.term,
        "belief": wrong.belief,
        "correction": wrong.correction,
        "fault": card.fault_reports[position % len(card.fault_reports)],
        "diagnosis": card.diagnosis[0],
        "dispute": card.billing_disputes[position % len(card.billing_disputes)],
        "billing_answer": first_sentence(card.billing_answer),
        "change": card.change_requests[position % len(card.change_requests)],
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
    """All scenarios with their split, in glossary order.

    Raises AssertionError if the factorial is not exact, and ValueError if the grid is too small to be split.
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
            reading=reading(card, *cell, position),
            position=position,
        )
        for card in cards
        for position, cell in enumerate(cells)
    ]
    assert_factorial(scenarios, cards, axes)
    splits = split_scenarios(scenarios, seed)
    _assert_splittable(scenarios, splits, axes)
    return [Scenario(**{**s.__dict__, "split": splits[s.scenario_id]}) for s in scenarios]


def assert_factorial(scenarios: list[Scenario], cards: list[Card], axes: Axes) -> None:
    """Every term meets every combination of levels once: the counts per level follow exactly."""
    assert len(scenarios) == len(cards) * axes.cells_per_term, "the grid is not the full factorial"
    assert len({s.scenario_id for s in scenarios}) == len(scenarios), "a scenario id is used twice"
    assert set(Counter(s.term_id for s in scenarios).values()) == {axes.cells_per_term}
    for axis in AXES:
        counts = Counter(getattr(s, axis) for s in scenarios)
        expected = len(scenarios) // len(axes.ids(axis))
        assert counts == dict.fromkeys(axes.ids(axis), expected), f"unequal counts on axis {axis}: {counts}"


def _assert_splittable(scenarios: list[Scenario], splits: dict[str, str], axes: Axes) -> None:
    """Refuse a grid that cannot give every split every level, with the reason; nothing has been generated yet."""
    if axes.cells_per_term < FEWEST_CELLS:
        raise ValueError(
            f"the axes give {axes.cells_per_term} cells a term; at least {FEWEST_CELLS} are needed to hold one out for "
            "validation and one for test and keep 80 % for training. Add a level to an axis."
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

    Every term gives as many cells as another, or one more. Terms are visited in a seeded order; each held-out cell is
    the one whose levels this split has seen least, first within the term (so a term's three cells differ in intent
    and situation), then over all terms.
    """
    by_term: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        by_term.setdefault(scenario.term_id, []).append(scenario)
    result = {scenario.scenario_id: "train" for scenario in scenarios}
    seen: dict[str, Counter] = {"val": Counter(), "test": Counter()}
    order = sorted(by_term, key=lambda term: stable_hash(seed, "split", term))
    each, extra = divmod(round(HELD_OUT_SHARE * len(scenarios)), len(order))  # the first `extra` terms give one more
    for place, term_id in enumerate(order):
        free = list(by_term[term_id])
        for name in ("val", "test"):
            here: Counter = Counter()
            for _ in range(min(max(1, each + (place < extra)), len(free) // 2)):
                chosen = min(free, key=lambda s: _crowding(s, here, seen[name], seed))
                free.remove(chosen)
                result[chosen.scenario_id] = name
                levels = _levels(chosen)
                here.update(levels)
                seen[name].update(levels)
    return result


def _levels(s: Scenario) -> list[Any]:
    return [s.intent, s.situation, s.customer, (s.intent, s.situation), (s.intent, s.situation, s.customer)]


def _crowding(s: Scenario, here: Counter, seen: Counter, seed: int) -> tuple:
    intent, situation, customer, pair, cell = _levels(s)
    return (
        here[situation] + here[intent], seen[pair], seen[intent], seen[situation], seen[customer], seen[cell],
        stable_hash(seed, "split", s.scenario_id),
    )  # fmt: skip


def scenarios_table(scenarios: list[Scenario]) -> pd.DataFrame:
    """One row per scenario, as written to scenarios.parquet."""
    columns = ["scenario_id", "term_id", "category", *AXES, "reading", "split"]
    return pd.DataFrame([s.__dict__ for s in scenarios], columns=columns)


def level_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows per level of every axis and split: columns axis, level, train, val, test."""
    rows = []
    for axis in ("category", *AXES):
        counts = frame.groupby([axis, "split"]).size().unstack(fill_value=0)
        for level, row in counts.iterrows():
            rows.append({"axis": axis, "level": level} | {name: int(row.get(name, 0)) for name in SPLITS})
    return pd.DataFrame(rows, columns=["axis", "level", *SPLITS])
