"""Written conversations: the gold ones of each scenario, the noisy test exchanges, and prompts of one's own.

All of them are files that people may edit, so every fault is named with its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pandas as pd
from pydantic import Field, ValidationError

from telco_nb.corpus.cards import Card, StrictModel, Text
from telco_nb.corpus.filters import mentions_term
from telco_nb.corpus.scenarios import Scenario, conversation_row
from telco_nb.corpus.tables import read_csv
from telco_nb.study.input_files import InputFileError, read_json_lines

Line = TypeVar("Line", bound=StrictModel)


class _Message(StrictModel):
    role: Literal["user", "assistant"]
    content: Text


class _Written(StrictModel):
    """A line of a file of written conversations. `ends` and `manner` are for readers."""

    id: Text
    messages: Annotated[list[_Message], Field(min_length=2)]
    ends: str = ""
    manner: str = "-"


class WrittenFileError(InputFileError):
    """Raised for a file of conversations or prompts that cannot be used; the message names file, line and fault."""


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of a JSONL file. Raises WrittenFileError for a line that is not JSON in UTF-8."""
    try:
        yield from read_json_lines(path)
    except InputFileError as error:
        raise WrittenFileError(str(error)) from None


def _validated(form: type[Line], value: Any, path: Path, number: int) -> Line:
    """The line in its form. Raises WrittenFileError naming file, line and field."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path.name}, line {number}: {'.'.join(map(str, first['loc']))}"
        raise WrittenFileError(f"{where}: {first['msg']}") from None


def _read_written(path: Path, by_id: Mapping[str, Scenario], seen: set[str]) -> Iterator[tuple[Scenario, _Written]]:
    for number, value in read_lines(path):
        where, written = f"{path.name}, line {number}", _validated(_Written, value, path, number)
        if written.id not in by_id:
            raise WrittenFileError(f"{where}: no scenario has the id {written.id!r} (term.problem.context)")
        if written.id in seen:
            raise WrittenFileError(f"{where}: {written.id!r} is given twice")
        roles = [message.role for message in written.messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise WrittenFileError(f"{where}: {written.id!r}: the roles must go user, assistant in turn")
        seen.add(written.id)
        yield by_id[written.id], written


def _term_files(folder: Path, parameter: str) -> list[Path]:
    """The `<term>.jsonl` files of a folder by name. Raises WrittenFileError if there is no such folder."""
    if not folder.is_dir():
        raise WrittenFileError(f"{folder}: no such folder. Set {parameter} to null if you have none.")
    return sorted(folder.glob("*.jsonl"))


def load_gold(folder: Path | None, scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Load the gold conversations: number 0 of their scenarios, in grid order.

    Args:
        folder: `<term>.jsonl` files; None if there are none. A scenario may lack one.
        scenarios: the scenario grid.

    Raises:
        WrittenFileError: a line cannot be used, or the folder is missing.
    """
    if folder is None:
        return []
    by_id = {scenario.scenario_id: scenario for scenario in scenarios}
    found: dict[str, dict[str, Any]] = {}
    for path in _term_files(folder, "gold_path"):
        for scenario, written in _read_written(path, by_id, set(found)):
            messages = [message.model_dump() for message in written.messages]
            found[scenario.scenario_id] = conversation_row(scenario, 0, "gold", messages, written.manner)
    return [found[name] for name in by_id if name in found]


def load_noisy(path: Path | None, scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Load the test scenarios as hurried or confused customers ask about them; conversations as `load_gold` gives.

    Lines of scenarios that are not in the test split are left out: the test set follows the split.
    """
    if path is None:
        return []
    by_id = {scenario.scenario_id: scenario for scenario in scenarios}
    rows = []
    for scenario, written in _read_written(path, by_id, set()):
        if scenario.split == "test":
            row = conversation_row(scenario, 0, "gold", [m.model_dump() for m in written.messages], written.manner)
            rows.append(row | {"conversation_id": f"{scenario.scenario_id}.noisy"})
    return rows


# ---------------------------------------------------------------- prompts of one's own

COLUMNS = ("prompt", "reference", "term", "problem")


def load_prompts(path: Path | None, cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Load prompts of one's own from a CSV or JSONL file.

    Columns: `prompt`; optional `reference` (a good answer), `term` and `problem` (ids of a card and of its problem).
    Without a term the card whose name the prompt mentions is taken, if it is one.

    Returns:
        Rows as `dataset.test_prompts` gives them, with test_set "own"; term_id and problem_id are "" where unknown.

    Raises:
        WrittenFileError: the file cannot be read, or a row names no known term or problem.
    """
    if path is None:
        return []
    by_id = {card.id: card for card in cards}
    rows = []
    for number, values in _prompt_rows(path):
        where = f"{path.name}, row {number}"
        if fault := _prompt_fault(values):
            raise WrittenFileError(f"{where}: {fault}. Columns: {', '.join(COLUMNS)}; only prompt is needed.")
        text, reference, term, problem = ((values.get(name) or "").strip() for name in COLUMNS)
        term = term or _mentioned(text, cards)
        if term and term not in by_id:
            raise WrittenFileError(f"{where}: no card has the id {term!r}")
        if problem and (not term or problem not in by_id[term].by_problem):
            raise WrittenFileError(f"{where}: card {term!r} has no problem {problem!r}")
        rows.append(_own_prompt(number, term, problem, text, reference))
    return rows


def _prompt_fault(values: Mapping[str, Any]) -> str | None:
    if unknown := sorted(set(values) - set(COLUMNS)):
        return f"unknown column {', '.join(unknown)}"
    for name, value in values.items():
        if not isinstance(value, str | None):
            return f"{name} is not a text"
    return None if (values.get("prompt") or "").strip() else "prompt is empty"


def _own_prompt(number: int, term: str, problem: str, text: str, reference: str) -> dict[str, Any]:
    return {
        "prompt_id": f"own.{number:04d}", "test_set": "own", "scenario_id": f"own.{number:04d}", "term_id": term,
        "problem_id": problem, "kind": "own", "context": "own", "messages": [{"role": "user", "content": text}],
        "reference": reference,
    }  # fmt: skip


def _mentioned(text: str, cards: Sequence[Card]) -> str:
    """The id of the one card that the text names, or ""."""
    named = [card.id for card in cards if mentions_term(text, card)]
    return named[0] if len(named) == 1 else ""


def _prompt_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        try:
            yield from read_csv(path)
        except InputFileError as error:
            raise WrittenFileError(str(error)) from None
        return
    for number, value in read_lines(path):
        if not isinstance(value, dict):
            raise WrittenFileError(f'{path.name}, line {number}: an object is expected, such as {{"prompt": "…"}}')
        yield number, value


# ---------------------------------------------------------------- the second reading

POINTS = ("answers", "right", "safe", "in_order", "natural", "own", "ends_well")


class _Review(StrictModel):
    """A line of the second reading: seven scores from 1 to 5."""

    id: Text
    answers: Annotated[int, Field(ge=1, le=5)]
    right: Annotated[int, Field(ge=1, le=5)]
    safe: Annotated[int, Field(ge=1, le=5)]
    in_order: Annotated[int, Field(ge=1, le=5)]
    natural: Annotated[int, Field(ge=1, le=5)]
    own: Annotated[int, Field(ge=1, le=5)]
    ends_well: Annotated[int, Field(ge=1, le=5)]
    rewritten: bool
    remark: str


def load_reviews(folder: Path | None, scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Load the scores of the second reading of the gold conversations, one row per scenario that has them.

    Args:
        folder: `<term>.jsonl` files; None if there are none.
        scenarios: the scenario grid; scores of other scenarios are left out.

    Raises:
        WrittenFileError: a line cannot be used, a scenario is scored twice, or the folder is missing.
    """
    known = {scenario.scenario_id for scenario in scenarios}
    rows: dict[str, dict[str, Any]] = {}
    for path in _term_files(folder, "reviews_path") if folder else []:
        for number, value in read_lines(path):
            review = _validated(_Review, value, path, number)
            if review.id in rows:
                raise WrittenFileError(f"{path.name}, line {number}: {review.id!r} is given twice")
            if review.id in known:
                rows[review.id] = {"scenario_id": review.id, **review.model_dump(exclude={"id"})}
    return list(rows.values())


def review_table(reviews: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per point of the second reading: point, mean, lowest, and the share of fives."""
    frame = pd.DataFrame(reviews, columns=["scenario_id", *POINTS])[list(POINTS)]
    table = pd.DataFrame({"mean": frame.mean(), "lowest": frame.min(), "fives_share": (frame == 5).mean()})
    return table.rename_axis("point").reset_index()
