"""Reads a file of votes, as a person, a spreadsheet or a program wrote it.

A line of a JSONL file is one object, a row of a CSV file the same fields in columns; see `Vote`. The other fields of an
exported pair may stay in the file. Every fault is named with file, line and field, and then nothing of the file counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from telco_nb.corpus import tables
from telco_nb.hosted.keys import printable
from telco_nb.judge.cases import Verdict
from telco_nb.study.input_files import InputFileError, numbered_lines, parse_json

SHOWN = ("conversation", "card", "answer_a", "answer_b")  # fields of an exported pair that a votes file may keep
MOST_FAULTS = 20  # that one message names


class VotesError(InputFileError):
    """Votes cannot be imported; the message names every bad line and field."""


class Vote(BaseModel):
    """One vote: which answer of a pair is better. `skip` means that the pair was shown and not decided.

    `margin` is 1 for somewhat and 2 for clearly better; without one it is 1. `seconds` is the time that the decision
    took, `time` the date or moment of the vote, `rater` who voted.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    pair_id: str
    vote: Literal["a", "b", "tie", "skip"]
    margin: int | None = Field(default=None, ge=0, le=2)
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    reason: str | None = Field(default=None, max_length=2000)
    rater: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    time: str | None = None

    @field_validator("vote", "rater", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("time")
    @classmethod
    def _possible(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not re.match(r"\d{4}-\d\d-\d\d", value):
            raise ValueError("a date such as 2026-03-31 or 2026-03-31T10:15:00+00:00 is expected")
        moment = datetime.fromisoformat(value)
        if moment.replace(tzinfo=moment.tzinfo or UTC) > datetime.now(UTC) + timedelta(days=1):
            raise ValueError("this date lies in the future")
        return value

    @model_validator(mode="after")
    def _margin_fits(self) -> Vote:
        if self.margin is not None and (self.margin > 0) != (self.vote in ("a", "b")):
            raise ValueError(f"margin {self.margin} does not fit the vote {self.vote!r}: 1 or 2 with a or b, else 0")
        return self

    @property
    def decision(self) -> tuple[str, int | None]:
        return self.vote, (self.margin or 1) if self.vote in ("a", "b") else None

    def verdict(self) -> Verdict | None:
        """The verdict, None without a decision."""
        reason = printable(self.reason or "")
        if self.vote == "skip":
            return None
        return Verdict("tie", 0, reason) if self.vote == "tie" else Verdict(self.vote.upper(), self.margin or 1, reason)


class Line(NamedTuple):
    """A vote and where it stands: file and line."""

    where: str
    vote: Vote


def refuse(faults: Sequence[str]) -> None:
    """Raise VotesError if there are faults."""
    if faults:
        more = f"\n... and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise VotesError("\n".join(faults[:MOST_FAULTS]) + more + "\nNothing was imported.")


def read_votes(path: Path) -> list[Line]:
    """Read a votes file: a table if its name ends in .csv or .tsv, else one JSON object a line.

    Read are UTF-8 with or without a byte order mark and UTF-16 with one, any line ends, empty lines, and in a table
    commas, semicolons or tabs, also as a first line `sep=;` declares them.

    Raises:
        VotesError: the file is no such file, or a line of it is bad; all faults are named.
        OSError: the file cannot be read.
    """
    lines, faults = [], []
    try:
        for number, raw in _rows(path) if path.suffix.lower() in (".csv", ".tsv") else _objects(path):
            try:
                if isinstance(raw, ValueError):
                    raise raw
                lines.append(Line(f"{path}:{number}", Vote.model_validate(raw)))
            except ValidationError as error:
                faults += [f"{path}:{number}: {_fault(detail)}" for detail in error.errors()]
            except ValueError as error:
                faults.append(f"{path}:{number}: the line: {error}")
    except InputFileError as error:  # the file as a whole
        faults = str(error).split("\n")
    refuse(faults)
    if not lines:
        raise VotesError(f"{path}: this file holds no vote. Nothing was imported.")
    return lines


def _fault(detail: Any) -> str:
    """Field and fault of a validation error; a fault that no field has alone is the margin's."""
    field = ".".join(map(str, detail["loc"])) or "margin"
    return f"{field}: {detail['msg'].removeprefix('Value error, ')}, not {detail['input']!r:.60}"


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table: (row number as the spreadsheet shows it, fields that are filled)."""
    for number, cells in tables.read_csv(path):
        raw: dict[str, Any] = {name: cell for name, cell in cells.items() if cell and name not in SHOWN}
        if re.fullmatch(r"\d", raw.get("margin", "")):
            raw["margin"] = int(raw["margin"])
        if re.fullmatch(r"-?\d+([.,]\d+)?", raw.get("seconds", "")):
            raw["seconds"] = float(raw["seconds"].replace(",", "."))
        yield number, raw


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """The filled lines of a JSONL file: (line number, object, or what is wrong with the line)."""
    for number, line in numbered_lines(path):
        yield number, _object(line)


def _object(line: str) -> dict[str, Any] | ValueError:
    try:
        raw = parse_json(line)
    except ValueError as error:
        return ValueError(f"no JSON object can be read here ({error})")
    if not isinstance(raw, dict):
        return ValueError(f"a JSON object is expected, not {line.strip()!r:.60}")
    return {name: value for name, value in raw.items() if name not in SHOWN}


def one_vote_each(lines: Sequence[Line]) -> list[Line]:
    """One line per pair: a decision replaces a `skip`, and the same vote twice counts once.

    Args:
        lines: the votes for one judge.

    Raises:
        VotesError: two different votes on one pair; file and line of both are named.
    """
    kept: dict[str, Line] = {}
    faults = []
    for line in lines:
        earlier = kept.setdefault(line.vote.pair_id, line)
        if earlier.vote.vote == "skip":
            kept[line.vote.pair_id] = line
        elif line.vote.vote != "skip" and line.vote.decision != earlier.vote.decision:
            faults.append(
                f"{line.where}: vote: {line.vote.vote!r} on pair {line.vote.pair_id!r:.40}, but {earlier.vote.vote!r} "
                f"stands in {earlier.where}. Remove one of them."
            )
    refuse(faults)
    return list(kept.values())
