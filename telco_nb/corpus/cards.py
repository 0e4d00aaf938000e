"""Cards: one per telecom term, the ground truth of generation, filtering and judging.

A glossary is a folder of YAML files, one a card; or a folder with the tables `cards.csv` and `problems.csv`
(`corpus/tables`); or the validated `glossary.json` that 01_glossary writes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from telco_nb.corpus import personal_data, tables
from telco_nb.corpus.tables import Fault, RawCard
from telco_nb.corpus.text_measures import content_stems, flesch_reading_ease, ngrams, sentences, words
from telco_nb.study.input_files import InputFileError, read_json, read_yaml

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=2)]
Name = Annotated[str, StringConstraints(strict=True, pattern=r"^[a-z][a-z0-9_]*$")]
Who = Literal["customer", "agent"]
Kind = Literal["fault", "charge", "change", "choice", "fraud", "misunderstanding", "safety"]


class GlossaryError(InputFileError):
    """Raised for a glossary that cannot be used; `faults` lists every fault, the message shows the first 40."""

    def __init__(self, path: Path | str, faults: Sequence[Fault]):
        self.path, self.faults = Path(path), list(faults)
        more = [f"  and {len(self.faults) - 40} more"] if len(self.faults) > 40 else []
        lines = [*(f"  {fault}" for fault in self.faults[:40]), *more]
        super().__init__("\n".join([f"{self.path.name}: {len(self.faults)} fault(s)", *lines]))


class StrictModel(BaseModel):
    """Refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Fact(StrictModel):
    """A statement that answers may use. `applies_in` names the countries, `valid_until` the date where it ends."""

    text: Text
    applies_in: Text = "any"
    valid_until: Text | None = None


class Figure(StrictModel):
    """A number that answers may use; `text` is the literal string with its unit, e.g. "20 ms"."""

    text: Text
    meaning: Text
    applies_in: Text = "any"
    valid_until: Text | None = None


class WrongBelief(StrictModel):
    """A false sentence that customers often believe, and the sentence that corrects it."""

    belief: Text
    correction: Text


class Ask(StrictModel):
    """The one thing that the agent must know first, and ways to ask for it."""

    what: Text
    say: Annotated[list[Text], Field(min_length=1)]


class First(StrictModel):
    """The protective step before all others; with `when`, only under that condition."""

    who: Who
    do: Text
    when: Text | None
    say: Annotated[list[Text], Field(min_length=1)]


class Step(StrictModel):
    """One step towards the solution, and ways to say it; `needs_identity`: only after the customer is identified."""

    who: Who
    do: Text
    say: Annotated[list[Text], Field(min_length=1)]
    needs_identity: bool = False


class Problem(StrictModel):
    """One reason for which customers with this term in mind write; the fields are explained in data/WRITING.md."""

    id: Name
    weight: Annotated[float, Field(ge=0, le=1)]
    kind: Kind
    cause: Text
    says: Annotated[list[Text], Field(min_length=5)]
    tells: Text
    ask: Ask | None
    first: First | None
    steps: Annotated[list[Step], Field(min_length=1)]
    never: list[Text]
    done: Text
    escalate_when: Text
    contexts: Annotated[dict[Name, Text], Field(min_length=1)]
    applies_in: Text = "any"
    valid_until: Text | None = None
    facts: list[Text] = []

    @cached_property
    def stems(self) -> frozenset[str]:
        """The content words of all that is said about this problem, as stems."""
        texts = [*self.says, *(text for _, text in self.agent_texts())]
        return frozenset(stem for text in texts for stem in content_stems(text))

    def agent_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (field, text) of everything about this problem that an answer may quote."""
        for name, part in (("ask", self.ask), ("first", self.first)):
            for i, text in enumerate(part.say if part else ()):
                yield f"{name}.say[{i}]", text
        for i, step in enumerate(self.steps):
            yield f"steps[{i}].do", step.do
            for j, text in enumerate(step.say):
                yield f"steps[{i}].say[{j}]", text
        yield "done", self.done
        yield "escalate_when", self.escalate_when
        for name, text in self.contexts.items():
            yield f"contexts.{name}", text
        for i, text in enumerate(self.facts):
            yield f"facts[{i}]", text


class Card(StrictModel):
    """Everything that an agent may say about one term."""

    id: Name
    term: Text
    aliases: list[Text]
    category: Name
    definition: Text
    facts: Annotated[list[Fact], Field(min_length=1)]
    wrong_beliefs: list[WrongBelief]
    figures: list[Figure]
    source: Text | None
    problems: Annotated[list[Problem], Field(min_length=1)]

    @property
    def names(self) -> list[str]:
        """The term and its aliases."""
        return [self.term, *self.aliases]

    @cached_property
    def by_problem(self) -> dict[str, Problem]:
        """The problems by id."""
        return {problem.id: problem for problem in self.problems}

    @cached_property
    def allowed_figures(self) -> frozenset[tuple[str, str | None]]:
        """The (number, unit) pairs that an answer may hold: those of the card's own texts."""
        texts = [figure.text for figure in self.figures] + self.names + [text for _, _, text in self.agent_texts()]
        return frozenset(figure for text in texts for figure in figures_in(text))

    def agent_texts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (problem or "", field, text) of all that an answer may quote: no customer sentences, no beliefs."""
        yield "", "definition", self.definition
        for i, fact in enumerate(self.facts):
            yield "", f"facts[{i}].text", fact.text
        for i, wrong in enumerate(self.wrong_beliefs):
            yield "", f"wrong_beliefs[{i}].correction", wrong.correction
        for problem in self.problems:
            for field, text in problem.agent_texts():
                yield problem.id, field, text


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


def _plain(number: str) -> str:
    """A number without thousands separators and with a decimal point: 1,000 -> 1000, 0,40 -> 0.40."""
    return re.sub(r",(?=\d{3}(?:\D|$))", "", number).replace(",", ".")


def figures_in(text: str) -> list[tuple[str, str | None]]:
    """Return (number, unit or None) of every figure in `text`; digits inside names such as 5G or IPv6 do not count."""
    return [
        (_plain(match["number"]), _unit((match["currency"] or match["unit"] or "").strip() or None))
        for match in _FIGURE.finditer(_NAMES.sub(" ", text))
    ]


def _value(number: str) -> float:
    """The value of a number as it is written: 37.50, 37,50 or 1.234.567 (then the last part counts as decimals)."""
    whole, _, decimals = number.replace(",", ".").rpartition(".")
    return float(f"{whole.replace('.', '')}.{decimals}") if whole else float(decimals)


def _named_by(customer: str) -> set[float]:
    """The numbers that a customer names, with the sums and differences of any two of them."""
    values = [_value(number) for number, _ in figures_in(customer)]
    return {*values, *(round(abs(a + sign * b), 6) for a, b in combinations(values, 2) for sign in (1, -1))}


def unknown_figures(text: str, card: Card, customer: str = "") -> list[str]:
    """Return the figures in `text` that neither the card nor the customer's own words hold.

    A number with a unit must match a known number with the same unit, or one without a unit. A bare number ("between
    20 and 40 ms") matches on the number alone, and so does a number that the customer has named, or the sum or
    difference of two such numbers. A bare digit counts something ("port 2") and is no figure.
    """
    allowed = card.allowed_figures
    numbers = {number for number, _ in allowed}
    named = _named_by(customer)
    unknown = []
    for number, unit in figures_in(text):
        if unit is None:
            known = number in numbers or len(number) == 1
        else:
            known = bool({(number, unit), (number, None)} & allowed)
        if not known and _value(number) not in named:
            unknown.append(f"{number} {unit}" if unit else number)
    return unknown


# ---------------------------------------------------------------- loading and validating


def load_cards(path: Path | str) -> list[Card]:
    """Load the cards of a glossary: YAML files by name, tables and JSON in their order.

    Args:
        path: a folder of YAML files (one a card), a folder with cards.csv and problems.csv, or a .json file.

    Raises:
        GlossaryError: a card is faulty.
        InputFileError: a file cannot be read, or there is no glossary at this place.
    """
    path = Path(path)
    if path.is_dir():
        found = tables.find_tables(path)
        return parse_cards(*tables.read_tables(*found), path) if found else parse_cards(_read_folder(path), [], path)
    if path.suffix != ".json":
        raise InputFileError(
            f"{path}: a glossary is a folder (YAML files, or cards.csv and problems.csv) or a .json file"
            + ("" if path.exists() else "; nothing is there")
        )
    raw = read_json(path)
    return parse_cards([RawCard(path.name, values) for values in (raw if isinstance(raw, list) else [raw])], [], path)


def _read_folder(path: Path) -> list[RawCard]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".yaml", ".yml"))
    if not files:
        raise InputFileError(f"{path}: no YAML file and no cards.csv with problems.csv in this folder")
    return [RawCard(file.name, read_yaml(file)) for file in files]


def parse_cards(raw_cards: Sequence[RawCard], faults: Sequence[Fault], path: Path | str) -> list[Card]:
    """Validate raw cards. Raises GlossaryError with every fault of every card, `faults` of the reading included."""
    if not raw_cards and not faults:
        raise GlossaryError(path, [Fault(Path(path).name, "(none)", "", "(file)", "no card is given")])
    cards, found = [], []
    for raw in raw_cards:
        try:
            cards.append((raw.file, Card.model_validate(raw.values)))
        except ValidationError as error:
            found += _validation_faults(raw, error)
    found += _repeated_names(cards)
    for file, card in cards:
        found += _content_faults(file, card)
    found += _context_faults(cards)
    locate, known = {raw.file: raw.locate for raw in raw_cards}, {(fault.file, fault.field) for fault in faults}
    located = [locate[fault.file](fault) for fault in found]
    if faults or located:
        raise GlossaryError(path, [*faults, *(fault for fault in located if (fault.file, fault.field) not in known)])
    return [card for _, card in cards]


def _validation_faults(raw: RawCard, error: ValidationError) -> list[Fault]:
    card = _name(raw.values, "(no id)")
    found = []
    for detail in error.errors():
        where, problem = list(detail["loc"]), ""
        if where[:1] == ["problems"] and len(where) > 1:
            problem, where = _name(raw.values["problems"][where[1]], f"number {int(where[1]) + 1}"), where[2:]
        message = f"{detail['msg']} (got {detail['input']!r:.60})"
        found.append(Fault(raw.file, card, problem, _field_name(where), message))
    return found


def _name(values: Any, otherwise: str) -> str:
    name = values.get("id") if isinstance(values, dict) else None
    return name if isinstance(name, str) and name else otherwise


def _field_name(location: Iterable[str | int]) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return name.lstrip(".") or "(whole)"


def _repeated_names(cards: Sequence[tuple[str, Card]]) -> list[Fault]:
    """List the ids, terms and aliases that two cards share, and problem ids used twice in a card."""
    faults = []
    owner: dict[str, str] = {}
    for position, (file, card) in enumerate(cards):
        for i, name in enumerate([card.id, *card.names]):
            field = ("id", "term")[i] if i < 2 else f"aliases[{i - 2}]"
            first = owner.setdefault(f"{field == 'id'} {name.casefold()}", f"{card.id} ({position})")
            if first != f"{card.id} ({position})":
                faults.append(Fault(file, card.id, "", field, f"{name!r} already names card {first.split()[0]!r}"))
        for problem, count in Counter(problem.id for problem in card.problems).items():
            if count > 1:
                faults.append(Fault(file, card.id, problem, "id", f"given {count} times in this card"))
    return faults


def _content_faults(file: str, card: Card) -> list[Fault]:
    """List weights that do not sum to 1, and texts that look like personal data, which no answer may hold."""
    faults = []
    total = sum(problem.weight for problem in card.problems)
    if abs(total - 1) > 0.015:
        faults.append(Fault(file, card.id, "", "problems", f"the weights sum to {total:.2f}, not to 1"))
    said = [(p.id, f"says[{i}]", text) for p in card.problems for i, text in enumerate(p.says)]
    for problem, field, text in [*card.agent_texts(), *said]:
        for kind, found in personal_data.find_personal_data(text):
            message = f"{found!r} looks like personal data ({kind}); use a reserved example or word it differently"
            faults.append(Fault(file, card.id, problem, field, message))
    return faults


def _context_faults(cards: Sequence[tuple[str, Card]]) -> list[Fault]:
    """All problems have the contexts of the first one: the scenarios are a full grid of problems and contexts."""
    expected: list[str] = []
    faults = []
    for file, card in cards:
        for problem in card.problems:
            expected = expected or list(problem.contexts)
            if set(problem.contexts) != set(expected):
                message = f"{', '.join(problem.contexts)} given, but other problems have {', '.join(expected)}"
                faults.append(Fault(file, card.id, problem.id, "contexts", message))
    return faults


def write_cards(cards: list[Card], path: Path | str) -> None:
    """Write cards to `path` as the JSON list that later steps read (same order, UTF-8, one trailing newline)."""
    text = json.dumps([card.model_dump() for card in cards], ensure_ascii=False, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- tables for 01_glossary


def cards_table(cards: list[Card]) -> pd.DataFrame:
    """Return one row per card: names, counts of its parts, and the number of words that answers can draw on."""
    rows = [
        {
            "term_id": card.id,
            "term": card.term,
            "category": card.category,
            "aliases": len(card.aliases),
            "facts": len(card.facts) + sum(len(problem.facts) for problem in card.problems),
            "figures": len(card.figures),
            "problems": len(card.problems),
            "steps": sum(len(problem.steps) for problem in card.problems),
            "protective_steps": sum(problem.first is not None for problem in card.problems),
            "agent_words": sum(len(words(text)) for _, _, text in card.agent_texts()),
            "has_source": card.source is not None,
        }
        for card in cards
    ]
    return pd.DataFrame(rows)


def problems_table(cards: list[Card]) -> pd.DataFrame:
    """Return one row per problem: term_id, category, problem_id, kind, weight, cause, and what it protects or asks."""
    rows = [
        {
            "term_id": card.id,
            "category": card.category,
            "problem_id": problem.id,
            "kind": problem.kind,
            "weight": problem.weight,
            "cause": problem.cause,
            "says": len(problem.says),
            "steps": len(problem.steps),
            "asks_first": problem.ask is not None,
            "protects_first": problem.first is not None,
            "needs_identity": any(step.needs_identity for step in problem.steps),
            "applies_in": problem.applies_in,
            "valid_until": problem.valid_until,
        }
        for card in cards
        for problem in card.problems
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
    grams = {c.id: {gram for _, _, text in c.agent_texts() for gram in ngrams(words(text), shingle)} for c in cards}
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
        texts = [text for _, _, text in card.agent_texts()]
        text = " ".join(text if text.endswith((".", "?", "!")) else f"{text}." for text in texts)
        per_sentence = round(len(text.split()) / len(sentences(text)), 1)
        rows.append((card.id, card.category, round(flesch_reading_ease(text), 1), per_sentence))
    return pd.DataFrame(rows, columns=["term_id", "category", "reading_ease", "words_per_sentence"])
