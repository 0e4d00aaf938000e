"""A glossary as two tables, `cards.csv` and `problems.csv`, for those who work in a spreadsheet.

One row a card, one row a problem; `card` in problems.csv is the id of its card. The columns are named as the fields of
`cards.Card` and `cards.Problem`, with these ways to write more than one thing into a cell:

    lists              one | two | three                   aliases, facts, says, ask_say, first_say, never
    figures            5 working days => usual time for a new card | 3 wrong PINs => tries until the chip refuses
    wrong_beliefs      a false sentence => the sentence that corrects it | another one => its correction
    steps              who: what to do => a wording // another one | who: what to do [identity] => a wording
    ask, ask_say       empty where nothing is asked; so are the four columns first_... without a protective step
    context_<id>       one column for each context

`[identity]` marks a step that needs an identified customer. The columns applies_in, valid_until and facts of
problems.csv may be left out. A single fact or figure has no applies_in and no valid_until here, and no text may hold a
`|`, and none in its place `=>` or `//`: such a glossary stays in YAML. A line break in a cell counts as a space.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from telco_nb.study.input_files import InputFileError, NoTextError, read_text

NAMES = ("cards.csv", "problems.csv")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
CONTEXT = "context_"
SAVE_AS = "In the spreadsheet choose Save as and the type “CSV UTF-8”."


class Fault(NamedTuple):
    """What is wrong and where: file (in tables with its row), card, problem ("": the card itself), field or column."""

    file: str
    card: str
    problem: str
    field: str
    message: str

    def __str__(self) -> str:
        names = [f"{kind} {name!r}, " for kind, name in (("card", self.card), ("problem", self.problem)) if name]
        return f"{self.file}: {''.join(names)}{self.field}: {self.message}"


class RawCard(NamedTuple):
    """A card as it was read, what to call its file in an error, and how to find the place of a fault in tables."""

    file: str
    values: Any
    locate: Callable[[Fault], Fault] = lambda fault: fault


# ---------------------------------------------------------------- the file, as a spreadsheet wrote it


class _Table(NamedTuple):
    """The named columns and the filled rows of a file. `broken`: the rows cannot be told apart from one another."""

    name: str
    header: int
    columns: list[str]
    rows: dict[int, dict[str, str]]
    cut_off: dict[int, list[str]]  # columns that a row ends before
    faults: list[Fault]
    broken: bool


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a table that a spreadsheet or a person wrote.

    Read are UTF-8 with or without a byte order mark and UTF-16 with one; commas, semicolons or tabs, also as a first
    line `sep=;` declares them; any line ends; line breaks in quoted cells; empty rows and columns. Cells missing at the
    end of a row are empty: Excel leaves them out where 16 rows have none.

    Yields:
        (row number as the spreadsheet shows it, cells by column name, in lower case and with _ for spaces).

    Raises:
        InputFileError: the file is no such table; all faults are named with row and column.
    """
    table = _read_table(path)
    if table.faults:
        raise InputFileError("\n".join(f"{path.parent}/{fault}" for fault in table.faults))
    yield from table.rows.items()


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except NoTextError as error:
        raise InputFileError(f"{error} {SAVE_AS}") from None


def _records(text: str, separator: str) -> tuple[list[list[str]], str]:
    """Split a text into rows of cells, up to the first row that cannot be split; with what is wrong there, or ""."""
    rows: list[list[str]] = []
    try:
        for cells in csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True):
            rows.append([cell.strip() for cell in cells])
    except csv.Error as error:
        return rows, str(error)
    return rows, ""


def _split(text: str) -> tuple[str, str]:
    """Return (the text without a line such as `sep=;`, the separator: declared there, or that of most column names)."""
    first, _, rest = text.partition("\n")
    declared = re.fullmatch(r'"?sep=([,;\t])"?[,;\t]*', first, re.I)
    if declared:
        return rest, declared[1]

    def misfit(separator: str) -> tuple[int, int]:
        rows, _ = _records(text, separator)
        width = len(next(filter(any, rows), []))
        return -width, sum(len(cells) > width for cells in rows)

    return text, min(SEPARATORS, key=misfit)


def _read_table(path: Path) -> _Table:
    text, separator = _split(_text(path))
    records, error = _records(text, separator)
    numbered = [(number, cells) for number, cells in enumerate(records, 1) if any(cells)]
    (header, names), *filled = numbered or [(1, [])]
    columns = [re.sub(r"[\s_-]+", "_", name.lower()) for name in names]
    faults = list(_header_faults(f"{path.name}, row {header}", columns))
    if error:
        where = f"{path.name}, row {len(records) + 1}"
        faults.append(Fault(where, "", "", "(row)", f"the quotation marks do not match from here on ({error})"))
    table = _Table(path.name, header, list(filter(None, columns)), {}, {}, faults, bool(faults))
    for number, cells in filled:
        faults += _cell_faults(f"{path.name}, row {number}", columns, cells, SEPARATORS[separator])
        padded = [*cells, *[""] * len(columns)]
        table.rows[number] = {name: cell for name, cell in zip(columns, padded, strict=False) if name}
        if missing := [name for name in columns[len(cells) :] if name]:
            table.cut_off[number] = missing
    return table


def _header_faults(where: str, columns: Sequence[str]) -> Iterator[Fault]:
    if not columns:
        yield Fault(where, "", "", "(row)", "the table is empty; its first row holds the names of the columns")
    for name, count in Counter(filter(None, columns)).items():
        if count > 1:
            yield Fault(where, "", "", name, f"this column is given {count} times")


def _cell_faults(where: str, columns: Sequence[str], cells: Sequence[str], separators: str) -> Iterator[Fault]:
    """Yield what a spreadsheet or a missing quotation mark did to the cells of a row."""
    for i, cell in enumerate(cells):
        name = columns[i] if i < len(columns) else ""
        if cell and not name:
            message = f"{cell!r:.60} is cell {i + 1} of this row, and row 1 has no column name there"
            hint = f"Is a quotation mark missing around a cell that holds {separators}?"
            yield Fault(where, "", "", "(row)", f"{message}. {hint}")
            return
        if spoilt := _spoilt(cell):
            yield Fault(where, "", "", name, spoilt)


def _spoilt(cell: str) -> str:
    """Say what is wrong with a cell that a program has changed, or ""."""
    if re.fullmatch(r"#[A-ZÄÖÜ/0]+[?!]|#N/?[AV]|###+", cell):
        return f"the spreadsheet shows {cell} in place of what was typed. Format the column as text and type it again."
    if mangled := re.search(r"â€|Ã[\u00a0-\u00bf]|\ufffd", cell):
        return f"{mangled[0]!r} is a letter that was read in a wrong encoding. Correct it, then save as UTF-8."
    return ""


# ---------------------------------------------------------------- cells and what they mean

REQUIRED, OMITTED = object(), object()


class _Cell(NamedTuple):
    """How a filled cell is read, and what an empty one is: a value, refused, or a field left out."""

    read: Callable[[str], Any]
    empty: Any = REQUIRED

    def value(self, cell: str) -> Any:
        """The value of a cell. Raises ValueError if it has none."""
        if not cell and self.empty is REQUIRED:
            raise ValueError("this cell is empty")
        return self.read(re.sub(r"\s*[\r\n]\s*", " ", cell)) if cell else self.empty


def _items(cell: str) -> list[str]:
    items = [item.strip() for item in cell.split("|")]
    if "" in items:
        raise ValueError(f"item {items.index('') + 1}: a | with nothing before or after it")
    return items


def _mappings(*names: str, empty: Any = REQUIRED) -> _Cell:
    """A list whose items are mappings with these keys; => divides their values."""

    def read(cell: str) -> list[dict[str, str]]:
        pairs = [[part.strip() for part in item.split("=>", len(names) - 1)] for item in _items(cell)]
        for number, parts in enumerate(pairs, 1):
            if len(parts) != len(names) or not all(parts) or ("=>" in parts[-1] and len(parts) > 1):
                raise ValueError(f"item {number}: “{' => '.join(names)}” is expected, not {' => '.join(parts)!r:.60}")
        return [dict(zip(names, parts, strict=True)) for parts in pairs]

    return _Cell(read, empty)


_STEP = re.compile(r"(?P<who>\w+)\s*:\s*(?P<do>.+?)\s*(?P<identity>\[identity\])?\s*=>(?P<say>.*)", re.I)


def _steps(cell: str) -> list[dict[str, Any]]:
    steps = []
    for number, item in enumerate(_items(cell), 1):
        match = _STEP.fullmatch(item)
        if not match or "=>" in match["say"]:
            raise ValueError(f"item {number}: “who: do => wording // wording” is expected, not {item!r:.60}")
        say = [text.strip() for text in re.split(r"(?<!:)//", match["say"])]  # the // of an address is no separator
        if not all(say):
            raise ValueError(f"item {number}: a => or // with no wording before or after it")
        identity = {"needs_identity": True} if match["identity"] else {}
        steps.append({"who": match["who"].lower(), "do": match["do"], "say": say} | identity)
    return steps


def _weight(cell: str) -> float:
    if not re.fullmatch(r"\d+([.,]\d+)?", cell):
        raise ValueError(f"{cell!r} is no number such as 0.24. Has the spreadsheet made a date or a percentage of it?")
    return float(cell.replace(",", "."))


_TEXT, _TEXT_OR_NONE, _TEXT_IF_ANY = (_Cell(str, empty) for empty in (REQUIRED, None, OMITTED))
_WORD, _WORD_OR_NONE = (_Cell(str.lower, empty) for empty in (REQUIRED, None))
_LIST, _LIST_IF_ANY = (_Cell(_items, empty) for empty in ([], OMITTED))
CARD_COLUMNS = {
    "id": _TEXT, "term": _TEXT, "aliases": _LIST, "category": _TEXT, "definition": _TEXT, "facts": _mappings("text"),
    "wrong_beliefs": _mappings("belief", "correction", empty=[]), "figures": _mappings("text", "meaning", empty=[]),
    "source": _TEXT_OR_NONE,
}  # fmt: skip
PROBLEM_COLUMNS = {
    "card": _TEXT, "id": _TEXT, "weight": _Cell(_weight), "kind": _WORD, "cause": _TEXT,
    "says": _Cell(_items), "tells": _TEXT, "ask": _TEXT_OR_NONE, "ask_say": _LIST,
    "first_who": _WORD_OR_NONE, "first_do": _TEXT_OR_NONE, "first_when": _TEXT_OR_NONE, "first_say": _LIST,
    "steps": _Cell(_steps), "never": _LIST, "done": _TEXT, "escalate_when": _TEXT,
    "applies_in": _TEXT_IF_ANY, "valid_until": _TEXT_IF_ANY, "facts": _LIST_IF_ANY,
}  # fmt: skip
# Fields of a problem that have several columns, and are null where all of them are empty.
PARTS = {
    "ask": {"what": "ask", "say": "ask_say"},
    "first": {"who": "first_who", "do": "first_do", "when": "first_when", "say": "first_say"},
}


# ---------------------------------------------------------------- reading


def find_tables(folder: Path) -> tuple[Path, Path] | None:
    """Return the paths of cards.csv and problems.csv in a folder, in upper or lower case; None if neither is there.

    Raises:
        InputFileError: one of them is there without the other, or twice.
    """
    found = [[path for path in sorted(folder.iterdir()) if path.name.lower() == name] for name in NAMES]
    if not any(found):
        return None
    for name, paths in zip(NAMES, found, strict=True):
        if len(paths) != 1:
            given = ", ".join(path.name for path in paths) or f"no {name}"
            raise InputFileError(f"{folder}: {given}. A glossary in tables is one {' and one '.join(NAMES)}.")
    return found[0][0], found[1][0]


def read_tables(cards: Path, problems: Path) -> tuple[list[RawCard], list[Fault]]:
    """Read the cards of two tables.

    Returns:
        The cards for `parse_cards`, without those whose rows cannot be read; the faults, with table, row and column.
    """
    tables = card_table, problem_table = _read_table(cards), _read_table(problems)
    faults = [fault for table in tables for fault in table.faults]
    missing = [*_column_faults(card_table, CARD_COLUMNS), *_column_faults(problem_table, PROBLEM_COLUMNS)]
    if missing or card_table.broken or problem_table.broken:
        return [], faults + missing
    faults += [*_row_faults(card_table, CARD_COLUMNS), *_row_faults(problem_table, PROBLEM_COLUMNS)]
    unreadable = {fault.file for fault in faults if fault.field == "(row)"}
    by_card = _read_problems(problem_table, card_table, unreadable, faults)
    raw = []
    for number, cells in card_table.rows.items():
        where, own = f"{cards.name}, row {number}", by_card[cells["id"]]
        if where not in unreadable:
            values = _read_cells(CARD_COLUMNS, cells, (where, cells["id"], ""), faults)
            if None not in own.values():
                raw.append(RawCard(where, values | {"problems": list(own.values())}, _locator(problems.name, own)))
    return raw, faults


def _read_problems(
    problems: _Table, cards: _Table, unreadable: Container[str], faults: list[Fault]
) -> dict[str, dict[str, Any]]:
    """Return card -> table and row -> problem, None where the row is unreadable."""
    by_card: dict[str, dict[str, Any]] = defaultdict(dict)
    known = {cells["id"] for cells in cards.rows.values()}
    for number, cells in problems.rows.items():
        where, card = f"{problems.name}, row {number}", cells["card"]
        if where in unreadable:
            by_card[card][where] = None
            continue
        by_card[card][where] = _read_problem(where, cells, faults)
        if card and card not in known:
            faults.append(Fault(where, card, cells["id"], "card", f"{cards.name} has no card with this id"))
    return by_card


def _column_faults(table: _Table, columns: Mapping[str, _Cell]) -> Iterator[Fault]:
    where = f"{table.name}, row {table.header}"
    contexts = [name for name in table.columns if name.startswith(CONTEXT) and columns is PROBLEM_COLUMNS]
    for name, codec in columns.items():
        if table.columns and name not in table.columns and codec.empty is not OMITTED:
            yield Fault(where, "", "", name, "this column is missing")
    if table.columns and columns is PROBLEM_COLUMNS and not contexts:
        yield Fault(where, "", "", f"{CONTEXT}…", "no such column; there must be one for each context")
    for name in dict.fromkeys(table.columns):
        if name not in columns and name not in contexts:
            yield Fault(where, "", "", name, "there is no column of this name")


def _row_faults(table: _Table, columns: Mapping[str, _Cell]) -> Iterator[Fault]:
    """Yield the rows that end before a cell that must be filled."""
    for number, missing in table.cut_off.items():
        if any(columns.get(name, _TEXT).empty is REQUIRED for name in missing):
            message = f"this row ends before {missing[0]!r}. Is a separator or a quotation mark missing?"
            yield Fault(f"{table.name}, row {number}", "", "", "(row)", message)


def _read_cells(
    columns: Mapping[str, _Cell], cells: Mapping[str, str], place: tuple[str, str, str], faults: list[Fault]
) -> dict[str, Any]:
    """Read the cells of a row, by column; a cell that cannot be read is added to `faults` and kept as text.

    Args:
        columns: the columns; others are contexts.
        cells: the cells by column.
        place: file and row, card, problem.
        faults: where faults are added.
    """
    values = {}
    for column, cell in cells.items():
        try:
            value = columns.get(column, _TEXT).value(cell)
        except ValueError as error:
            faults.append(Fault(*place, column, str(error)))
            value = cell
        if value is not OMITTED:
            values[column] = value
    return values


def _read_problem(where: str, cells: Mapping[str, str], faults: list[Fault]) -> dict[str, Any]:
    place = where, cells["card"], cells["id"]
    values = _read_cells(PROBLEM_COLUMNS, cells, place, faults)
    del values["card"]
    contexts = {name.removeprefix(CONTEXT): values.pop(name) for name in cells if name not in PROBLEM_COLUMNS}
    parts: dict[str, Any] = {}
    for field, columns in PARTS.items():
        part = {key: values.pop(column) for key, column in columns.items()}
        filled = [column for key, column in columns.items() if part[key]]
        for key, column in columns.items():
            if filled and not part[key] and key != "when":
                faults.append(Fault(*place, column, f"this cell is empty, but {filled[0]} is filled"))
        parts[field] = part if filled else None
    return values | parts | {"contexts": contexts}


def _locator(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Callable[[Fault], Fault]:
    """Return a function that says in which row and column of which table a fault of a card lies.

    Args:
        name: the name of the table of problems.
        rows: the card's problems, by table and row.
    """
    by_problem = {problem["id"] or f"number {i}": where for i, (where, problem) in enumerate(rows.items(), 1)}

    def locate(fault: Fault) -> Fault:
        if fault.field == "problems" and not rows:
            return fault._replace(field="id", message=f"{name} has no row with this card")
        if fault.field == "problems":
            numbers = ", ".join(where.rpartition(" ")[2] for where in rows)
            return fault._replace(file=f"{name}, rows {numbers}", field="weight")
        column, item = _column(fault.field)
        message = f"item {item}: {fault.message}" if item else fault.message
        return fault._replace(file=by_problem.get(fault.problem, fault.file), field=column, message=message)

    return locate


def _column(field: str) -> tuple[str, int | None]:
    """Return the column of a field such as `steps[0].say[1]`, and the number of the item in its cell."""
    column, *rest = re.findall(r"\w+", field)
    if rest and column in PARTS:
        column = PARTS[column][rest.pop(0)]
    elif rest and column == "contexts":
        column = CONTEXT + rest.pop(0)
    return column, next((int(part) + 1 for part in rest if part.isdigit()), None)
