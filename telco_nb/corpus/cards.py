"""Cards: one per telecom term, the ground truth of generation, filtering and judging; read from YAML, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from yaml.constructor import ConstructorError

from telco_nb.corpus.text_measures import flesch_reading_ease, ngrams, sentences, words

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=2)]
CardId = Annotated[str, StringConstraints(strict=True, pattern=r"^[a-z][a-z0-9_]*$")]
Fault = tuple[str, str, str]  # (card id, field, problem)
Located = tuple[int, str, str]  # (position of the card, field, problem)


class GlossaryError(ValueError):
    """Raised for a glossary file that cannot be used; `faults` lists every (card id, field, problem).

    The message names card and field. If `rows` gives the table row of each fault, it names row and column.
    """

    def __init__(self, path: Path | str, faults: list[Fault], rows: list[int] | None = None):
        self.path, self.faults = Path(path), faults
        if rows is None:
            lines = [f"  card {card!r}, field {field!r}: {problem}" for card, field, problem in faults]
        else:
            lines = [
                f"  row {row} ({card}), column {_column(field)}: {problem}"
                for row, (card, field, problem) in zip(rows, faults, strict=True)
            ]
        super().__init__("\n".join([f"{self.path.name}: {len(faults)} fault(s)", *lines]))


def _column(field: str) -> str:
    """Name a field as it appears in a table: "facts[2]" is item 3 in column facts."""
    name, _, rest = field.partition("[")
    return f"{name!r}, item {int(rest.partition(']')[0]) + 1}" if rest else repr(name)


class StrictModel(BaseModel):
    """Refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Figure(StrictModel):
    """A number that answers may use; `text` is the literal string with its unit, e.g. "20 ms"."""

    text: Text
    meaning: Text


class WrongBelief(StrictModel):
    """A false sentence that customers often believe, and the sentence that corrects it."""

    belief: Text
    correction: Text


class Comparison(StrictModel):
    """Two options between which a customer hesitates ("an eSIM or a plastic SIM card"), and the advice."""

    options: Text
    advice: Text


class Card(StrictModel):
    """Everything an agent may say about one term; field meanings are in the header of glossary.yaml."""

    id: CardId
    term: Text
    aliases: list[Text]
    category: CardId
    definition: Text
    facts: Annotated[list[Text], Field(min_length=4, max_length=6)]
    wrong_beliefs: Annotated[list[WrongBelief], Field(min_length=2, max_length=4)]
    figures: Annotated[list[Figure], Field(min_length=1)]
    diagnosis: Annotated[list[Text], Field(min_length=3, max_length=5)]
    resolution: Annotated[list[Text], Field(min_length=3, max_length=5)]
    escalate_when: Text
    source: Text | None
    fault_reports: Annotated[list[Text], Field(min_length=3, max_length=6)]
    billing_disputes: Annotated[list[Text], Field(min_length=2, max_length=4)]
    billing_answer: Text
    change_requests: Annotated[list[Text], Field(min_length=2, max_length=4)]
    change_answer: Text
    comparisons: Annotated[list[Comparison], Field(min_length=2, max_length=4)]

    @property
    def names(self) -> list[str]:
        """The term and its aliases."""
        return [self.term, *self.aliases]

    @cached_property
    def allowed_figures(self) -> frozenset[tuple[str, str | None]]:
        """The (number, unit) pairs that an answer may hold: the listed figures and the digits in the term's names."""
        texts = [figure.text for figure in self.figures] + self.names
        return frozenset(figure for text in texts for figure in figures_in(text))

    def agent_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (field, text) of everything that an answer may quote: no customer sentences, no beliefs."""
        yield "definition", self.definition
        for field in ("facts", "diagnosis", "resolution"):
            for i, text in enumerate(getattr(self, field)):
                yield f"{field}[{i}]", text
        for i, wrong in enumerate(self.wrong_beliefs):
            yield f"wrong_beliefs[{i}].correction", wrong.correction
        for field in ("escalate_when", "billing_answer", "change_answer"):
            yield field, getattr(self, field)
        for i, comparison in enumerate(self.comparisons):
            yield f"comparisons[{i}].advice", comparison.advice


# Digits inside a name are not a figure: 5G, IPv6, WPA3, n78, H.264, 802.11ax, Wi-Fi 6.
_NAMES = re.compile(
    r"\b[2-6]G\b|\bWi-?Fi \d\w?\b|\b802\.\d+\w*|\b[A-Za-z][A-Za-z]*[.\-]?\d+[A-Za-z]*(?:\.\d+)?\b", re.I
)
_UNITS = (
    "%|percent|per cent|dBm|dB|[kMGT]bit/s|[kMGT]bps|[kMGT]?B|[kMG]?Hz|ms|milliseconds?|seconds?|s|minutes?|min|"
    "hours?|h|working days?|business days?|calendar days?|days?|weeks?|months?|years?|digits?|characters?|"
    "attempts?|pence|euros?|pounds?|dollars?|km|metres?|m|mm|volts?|V|watts?|W|bits?|bytes?|pixels?"
)
_FIGURE = re.compile(
    rf"(?P<currency>(?:EUR|GBP|USD)\s|[£$€])?(?P<number>\d+(?:[.,]\d+)*)(?:[\s\-]?(?P<unit>{_UNITS})(?![A-Za-z/]))?"
)
_SYNONYMS = {
    "percent": "%", "per cent": "%", "millisecond": "ms", "s": "second", "min": "minute", "h": "hour",
    "business day": "working day", "metre": "m", "volt": "V", "watt": "W", "pound": "£", "euro": "€", "dollar": "$",
    "GBP": "£", "EUR": "€", "USD": "$",
    "kbps": "kbit/s", "Mbps": "Mbit/s", "Gbps": "Gbit/s", "Tbps": "Tbit/s",
}  # fmt: skip


def _unit(raw: str | None) -> str | None:
    if raw is None:
        return None
    if raw in _SYNONYMS:
        return _SYNONYMS[raw]
    single = raw.removesuffix("s") if raw.islower() and len(raw) > 2 else raw  # days, but neither ms nor Mbps
    return _SYNONYMS.get(single, single)


def figures_in(text: str) -> list[tuple[str, str | None]]:
    """Return (number, unit or None) of every figure in `text`; digits inside names such as 5G or IPv6 do not count."""
    return [
        (match["number"].replace(",", ""), _unit((match["currency"] or match["unit"] or "").strip() or None))
        for match in _FIGURE.finditer(_NAMES.sub(" ", text))
    ]


def unknown_figures(text: str, card: Card) -> list[str]:
    """Return the figures in `text` that the card does not list.

    A number with a unit must match a listed number with the same unit, or one listed without a unit. A bare number
    ("between 20 and 40 ms") matches on the number alone.
    """
    allowed = card.allowed_figures
    numbers = {number for number, _ in allowed}
    unknown = []
    for number, unit in figures_in(text):
        known = number in numbers if unit is None else bool({(number, unit), (number, None)} & allowed)
        if not known:
            unknown.append(f"{number} {unit}" if unit else number)
    return unknown


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key; PyYAML alone keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, count in Counter(keys).items():
            if count > 1:
                raise ConstructorError(None, None, f"key {key!r} given {count} times", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file. Raises ValueError, naming file and line, for repeated keys and syntax errors."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def _field_name(location: Iterable[str | int]) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return name.lstrip(".") or "(card)"


def _repeated_names(cards: list[tuple[int, Card]]) -> list[Located]:
    """List the ids, terms and aliases that two cards share: a term must lead to one card."""
    ids = Counter(card.id for _, card in cards)
    faults = [(i, "id", f"{card.id!r} used by {ids[card.id]} cards") for i, card in cards if ids[card.id] > 1]
    owner: dict[str, str] = {}
    for position, card in cards:
        for i, name in enumerate(card.names):
            field = "term" if i == 0 else f"aliases[{i - 1}]"
            first = owner.setdefault(name.casefold(), card.id)
            if first != card.id or (i and name.casefold() == card.term.casefold()):
                faults.append((position, field, f"{name!r} already names card {first!r}"))
    return faults


def parse_cards(
    raw_cards: Any, path: Path | str = "glossary", rows: list[int] | None = None, faults: Sequence[Located] = ()
) -> list[Card]:
    """Validate a list of raw cards from the file `path`. Raises GlossaryError with every fault of every card.

    For a table, `rows` is the row of each card and `faults` lists the faulty cells; the error names row and column.
    """
    if not isinstance(raw_cards, list) or not raw_cards:
        raise GlossaryError(path, [("(none)", "(file)", "expected a non-empty list of cards")])
    reported = {(position, field.partition("[")[0]) for position, field, _ in faults}
    cards, problems = [], list(faults)
    for i, raw in enumerate(raw_cards):
        try:
            cards.append((i, Card.model_validate(raw)))
        except ValidationError as error:
            details = [(_field_name(e["loc"]), f"{e['msg']} (got {e['input']!r:.60})") for e in error.errors()]
            problems += [(i, *detail) for detail in details if (i, detail[0].partition("[")[0]) not in reported]
    problems += _repeated_names(cards)
    for i, card in cards:
        unlisted = [(field, figure) for field, text in card.agent_texts() for figure in unknown_figures(text, card)]
        problems += [(i, field, f"figure {figure!r} is not listed under figures") for field, figure in unlisted]
    if problems:
        problems.sort(key=lambda fault: fault[0])
        named = [(_name_of(raw_cards[i], i), field, problem) for i, field, problem in problems]
        raise GlossaryError(path, named, None if rows is None else [rows[i] for i, _, _ in problems])
    return [card for _, card in cards]


def _name_of(raw: Any, position: int) -> str:
    name = raw.get("id") if isinstance(raw, dict) else None
    return name if isinstance(name, str) and name else f"number {position + 1}"


def load_cards(path: Path | str) -> list[Card]:
    """Load the cards of a glossary, in the order of the file.

    Args:
        path: a .yaml or .csv file, or the validated .json that 01_glossary writes.

    Raises:
        GlossaryError: a card is faulty.
        ValueError: the file is not YAML, CSV or JSON.
    """
    path = Path(path)
    if path.suffix == ".csv":
        raw, rows, faults = _read_csv(path)
        return parse_cards(raw, path, rows, faults)
    if path.suffix in (".yaml", ".yml"):
        return parse_cards(read_yaml(path), path)
    if path.suffix != ".json":
        ending = path.suffix or "without ending"
        raise ValueError(f"{path.name}: a glossary is a .yaml, .csv or .json file, not {ending}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return parse_cards(raw, path)


# A table has one row per card and one column per field. ITEM separates the items of a list in their cell. Each item of
# a PARTS column has two parts, separated by PART.
ITEM, PART = "|", "=>"
PARTS = {
    "wrong_beliefs": ("belief", "correction"), "figures": ("text", "meaning"), "comparisons": ("options", "advice")
}  # fmt: skip
LISTS = ("aliases", "facts", "diagnosis", "resolution", "fault_reports", "billing_disputes", "change_requests", *PARTS)
MAY_BE_EMPTY = ("aliases", "source")


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[int], list[Located]]:
    """Read a glossary table: UTF-8, with commas or semicolons, as spreadsheets write it.

    Returns (raw cards, their rows as a spreadsheet counts them, faulty cells). Raises GlossaryError if the header is
    not the fields of a card, and ValueError if the file is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: save it as UTF-8 ({error})") from error
    header = text.partition("\n")[0]
    table = list(csv.reader(io.StringIO(text), delimiter=";" if header.count(";") > header.count(",") else ","))
    columns = [name.strip() for name in table[0]] if table else []
    _check_header(columns, path)
    cards, rows, faults = [], [], []
    for number, cells in enumerate(table[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            problem = f"{len(cells)} cells where the header has {len(columns)}; is a quotation mark missing?"
            faults.append((len(cards), columns[min(len(cells), len(columns)) - 1], problem))
        raw = {column: cell.strip() for column, cell in zip(columns, cells, strict=False)}
        faults += [(len(cards), *fault) for fault in _unpack(raw)]
        cards.append(raw)
        rows.append(number)
    return cards, rows, faults


def _check_header(columns: list[str], path: Path) -> None:
    fields = list(Card.model_fields)
    faults = [("header", name, "this column is missing") for name in fields if name not in columns]
    faults += [("header", name, "no field of a card has this name") for name in columns if name not in fields]
    faults += [("header", name, f"given {n} times") for name, n in Counter(columns).items() if n > 1]
    if faults:
        raise GlossaryError(path, faults, [1] * len(faults))


def _unpack(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Turn the cells of a row into the values of a card, in place; return (field, problem) of the faulty cells."""
    faults = []
    for field, cell in raw.items():
        if not cell and field not in MAY_BE_EMPTY:
            faults.append((field, "this cell is empty"))
        if field in LISTS:
            raw[field] = [item.strip() for item in cell.split(ITEM)] if cell else []
            empty = [i for i, item in enumerate(raw[field]) if not item]
            faults += [(f"{field}[{i}]", f"nothing between two {ITEM}") for i in empty]
    for field, names in PARTS.items():
        for i, item in enumerate(raw.get(field, ())):
            parts = [part.strip() for part in item.split(PART)]
            if item and len(parts) != 2:
                faults.append((f"{field}[{i}]", f"expected '{names[0]} {PART} {names[1]}', got {item!r:.60}"))
            raw[field][i] = dict(zip(names, parts, strict=False))
    raw["source"] = raw.get("source") or None
    return faults


def write_csv(cards: list[Card], path: Path | str) -> None:
    """Write cards as a table that `load_cards` reads. Raises ValueError if a text holds one of the separators."""
    rows = []
    for card in cards:
        row = card.model_dump()
        for field in LISTS:
            items = [f" {PART} ".join(item.values()) if field in PARTS else item for item in row[field]]
            if any(ITEM in item or item.count(PART) != (field in PARTS) for item in items):
                raise ValueError(f"card {card.id!r}, field {field!r}: {ITEM!r} or {PART!r} in a text; keep it in YAML")
            row[field] = f" {ITEM} ".join(items)
        rows.append({name: row[name] or "" for name in Card.model_fields})
    with Path(path).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(Card.model_fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_cards(cards: list[Card], path: Path | str) -> None:
    """Write cards to `path` as the JSON list that later steps read (same order, UTF-8, one trailing newline)."""
    text = json.dumps([card.model_dump() for card in cards], ensure_ascii=False, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def cards_table(cards: list[Card]) -> pd.DataFrame:
    """Return one row per card: names, counts of its parts, and the number of words that answers can draw on."""
    rows = [
        {
            "term_id": card.id,
            "term": card.term,
            "category": card.category,
            "aliases": len(card.aliases),
            "facts": len(card.facts),
            "figures": len(card.figures),
            "diagnosis_steps": len(card.diagnosis),
            "resolution_steps": len(card.resolution),
            "agent_words": sum(len(words(text)) for _, text in card.agent_texts()),
            "has_source": card.source is not None,
        }
        for card in cards
    ]
    return pd.DataFrame(rows)


def overlaps(cards: list[Card], top: int = 10, shingle: int = 3) -> pd.DataFrame:
    """Find the most similar cards.

    Args:
        cards: the cards.
        top: the number of pairs returned.
        shingle: the length of the word n-grams.

    Returns:
        Columns term_a, term_b, jaccard (Jaccard similarity of the n-grams of the agent texts), most similar first.
    """
    grams = {c.id: {gram for _, text in c.agent_texts() for gram in ngrams(words(text), shingle)} for c in cards}
    pairs = [
        {"term_a": a, "term_b": b, "jaccard": len(grams[a] & grams[b]) / max(1, len(grams[a] | grams[b]))}
        for a, b in combinations(grams, 2)
    ]
    pairs_df = pd.DataFrame(pairs, columns=["term_a", "term_b", "jaccard"])
    return pairs_df.sort_values(["jaccard", "term_a", "term_b"], ascending=[False, True, True]).head(top)


def readability_table(cards: list[Card]) -> pd.DataFrame:
    """Return one row per card: term_id, category, Flesch reading ease of its agent texts, words per sentence."""
    rows = []
    for card in cards:
        text = " ".join(text if text.endswith((".", "?", "!")) else f"{text}." for _, text in card.agent_texts())
        per_sentence = round(len(text.split()) / len(sentences(text)), 1)
        rows.append((card.id, card.category, round(flesch_reading_ease(text), 1), per_sentence))
    return pd.DataFrame(rows, columns=["term_id", "category", "reading_ease", "words_per_sentence"])
