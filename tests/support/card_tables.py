"""Writes cards as the two tables that `load_cards` reads, for tests that go there and back. Not a test."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb.corpus import tables
from telco_nb.corpus.cards import Card

MAPPINGS = {"facts": ("text",), "wrong_beliefs": ("belief", "correction"), "figures": ("text", "meaning")}


def write_tables(cards: Sequence[Card], folder: Path) -> None:
    """Write cards as cards.csv and problems.csv.

    Raises:
        ValueError: a table cannot hold a value, named with card, problem and column; then nothing is written.
    """
    card_rows, problem_rows = [], []
    for card in cards:
        values = card.model_dump(exclude_defaults=True)
        card_rows.append(_cells(tables.CARD_COLUMNS, values, values["id"]))
        for problem in values["problems"]:
            contexts = {tables.CONTEXT + name: text for name, text in problem["contexts"].items()}
            flat = problem | contexts | {"card": values["id"]}
            for field, columns in tables.PARTS.items():
                flat |= {column: (problem[field] or {}).get(key) for key, column in columns.items()}
            columns = tables.PROBLEM_COLUMNS | dict.fromkeys(contexts, tables._TEXT)
            problem_rows.append(_cells(columns, flat, f"{values['id']}, problem {problem['id']}"))
    for name, rows in zip(tables.NAMES, (card_rows, problem_rows), strict=True):
        with (folder / name).open("w", encoding="utf-8-sig", newline="") as stream:  # Excel needs the byte order mark
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _cells(columns: Mapping[str, tables._Cell], values: Mapping[str, Any], place: str) -> dict[str, str]:
    cells = {}
    for column, codec in columns.items():
        value = values.get(column)
        cells[column] = cell = "" if value in (None, []) else _cell(column, value)
        try:
            same = not cell or (codec.value(cell) == value and not tables._spoilt(cell))
        except ValueError:
            same = False
        if not same:
            raise ValueError(f"card {place}, {column}: a table cannot hold this: {value!r}")
    return cells


def _cell(column: str, value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return " | ".join(item if isinstance(item, str) else _item(column, item) for item in value)


def _item(column: str, item: Mapping[str, Any]) -> str:
    if column != "steps":
        return " => ".join(item[name] for name in MAPPINGS[column])
    mark = " [identity]" if item.get("needs_identity") else ""
    return f"{item['who']}: {item['do']}{mark} => {' // '.join(item['say'])}"
