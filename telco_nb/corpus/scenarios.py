"""The scenario grid: every term with every problem and every context, each as a sentence, and the split."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, ValidationError

from telco_nb.corpus.cards import Card, Name, Problem, StrictModel, Text
from telco_nb.study.input_files import InputFileError, read_yaml
from telco_nb.study.params import ParameterError

SPLITS = ("train", "val", "test", "unseen")
FACTORS = ("kind", "context")  # the columns over which samples are balanced and counts are shown
HELD_OUT_SHARE = 0.1  # of a term's cells, for validation and again for test: 3 + 3 of 30
FEWEST_CELLS = 3  # of a term that gives held-out cells; the cells of smaller terms are split together


class Context(StrictModel):
    """One of the contexts in which customers meet a problem; contexts.yaml explains the fields."""

    id: Name
    label: Text
    reading: Text
    clauses: list[Text]


class _Contexts(StrictModel):
    contexts: Annotated[list[Context], Field(min_length=1)]


@dataclass(frozen=True)
class Scenario:
    """One cell of the grid. `weight` is that of its problem."""

    scenario_id: str
    term_id: str
    category: str
    problem_id: str
    kind: str
    context: str
    weight: float
    reading: str
    split: str = "train"


def load_contexts(path: Path | str) -> list[Context]:
    """Load the contexts from YAML. Raises InputFileError naming the file and the faulty key, or an id used twice."""
    path = Path(path)
    try:
        contexts = _Contexts.model_validate(read_yaml(path)).contexts
    except ValidationError as error:
        first = error.errors()[0]
        raise InputFileError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    doubled = [name for name, count in Counter(context.id for context in contexts).items() if count > 1]
    if doubled:
        raise InputFileError(f"{path.name}: context ids must be unique; repeated: {', '.join(doubled)}")
    return contexts


def stable_hash(*parts: Any) -> int:
    """Return a 64-bit hash of the text of `parts`, equal on every machine: the only random source of the data.

    Python's hash() differs between processes, and random.choice may differ between versions.
    """
    text = "|".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _reading(problem: Problem, context: Context, place: int) -> str:
    """Say in sentences who writes what, what is behind it, and what the context changes."""
    said = problem.says[place % len(problem.says)].rstrip()
    stop = "" if said.endswith((".", "?", "!")) else "."
    changes = problem.contexts[context.id].rstrip(".")
    return f"{context.reading}: “{said}”{stop} Behind it: {problem.cause.rstrip('.')}. Here this matters: {changes}."


def build_scenarios(cards: list[Card], contexts: list[Context], unseen_terms: Collection[str]) -> list[Scenario]:
    """Build all scenarios with their split.

    Args:
        cards: the cards.
        contexts: the contexts, with the ids that the cards' problems use.
        unseen_terms: the ids of the terms that are kept out of training altogether.

    Returns:
        The scenarios by card, problem and context: terms x problems x contexts.

    Raises:
        ParameterError: a context or an unseen term is not on the cards, or there are too few cells to hold any out.
    """
    _check_names(cards, contexts, unseen_terms)
    scenarios = [
        Scenario(
            scenario_id=f"{card.id}.{problem.id}.{context.id}",
            term_id=card.id,
            category=card.category,
            problem_id=problem.id,
            kind=problem.kind,
            context=context.id,
            weight=problem.weight,
            reading=_reading(problem, context, place),
        )
        for card in cards
        for problem in card.problems
        for place, context in enumerate(contexts)
    ]
    expected = sum(len(card.problems) for card in cards) * len(contexts)
    assert len(scenarios) == len({s.scenario_id for s in scenarios}) == expected, "the grid is not complete"
    splits = split_scenarios(scenarios, unseen_terms)
    return [replace(s, split=splits[s.scenario_id]) for s in scenarios]


def _check_names(cards: list[Card], contexts: list[Context], unseen_terms: Collection[str]) -> None:
    given, used = {context.id for context in contexts}, set(cards[0].problems[0].contexts)
    if given != used:
        raise ParameterError(
            f"the contexts file has {', '.join(sorted(given))}, but the cards' problems have "
            f"{', '.join(sorted(used))}. Set contexts_path to a file with the cards' contexts."
        )
    unknown = sorted(set(unseen_terms) - {card.id for card in cards})
    if unknown:
        raise ParameterError(
            f"unseen_terms: no card has the id {', '.join(unknown)}. Set unseen_terms to ids of cards, or []."
        )
    if len(set(unseen_terms)) == len(cards):
        raise ParameterError("unseen_terms: all terms are kept out of training. Leave at least one for it.")


def split_scenarios(scenarios: Sequence[Scenario], unseen_terms: Collection[str] = ()) -> dict[str, str]:
    """Split by scenario id: whole terms to `unseen`; of every other term a tenth to validation, a tenth to test.

    The split is part of the data set, so it does not depend on the study's seed or on other terms: a hash orders the
    problems of a term, the first ones give a cell to test, the next ones to validation. Their contexts take turns, so a
    term's held-out cells are of different problems and contexts. With several contexts each of these problems stays in
    training in the others.
    Terms of fewer than `FEWEST_CELLS` cells are split together.

    Returns:
        {scenario id: "train", "val", "test" or "unseen"}.
    """
    by_term: dict[str, list[Scenario]] = defaultdict(list)
    for scenario in scenarios:
        by_term["" if scenario.term_id in unseen_terms else scenario.term_id].append(scenario)
    result = {scenario.scenario_id: "unseen" for scenario in by_term.pop("", [])}
    small = [scenario for cells in by_term.values() if len(cells) < FEWEST_CELLS for scenario in cells]
    groups = [cells for cells in (*by_term.values(), small) if len(cells) >= FEWEST_CELLS]
    if not groups:
        raise ParameterError(
            f"{len(small)} scenarios are too few: at least {FEWEST_CELLS} are needed, so that one is held out for "
            "validation and one for test. Add problems, contexts or cards."
        )
    result |= {scenario.scenario_id: "train" for scenario in small}
    for cells in groups:
        order = _held_out_order(cells)
        n = max(1, round(HELD_OUT_SHARE * len(cells)))
        result |= {scenario.scenario_id: "train" for scenario in cells}
        result |= {scenario.scenario_id: "test" for scenario in order[:n]}
        result |= {scenario.scenario_id: "val" for scenario in order[n : 2 * n]}
    return result


def _held_out_order(cells: Sequence[Scenario]) -> list[Scenario]:
    """Order cells so that neighbours differ in problem and context: a hash orders problems, contexts take turns."""
    by_problem: dict[tuple[str, str], list[Scenario]] = defaultdict(list)
    for scenario in cells:
        by_problem[scenario.term_id, scenario.problem_id].append(scenario)
    names = sorted(by_problem, key=lambda name: stable_hash("split", *name))
    start = stable_hash("split", "context", names[0][0])
    ordered = []
    for turn in range(max(map(len, by_problem.values()))):
        for place, name in enumerate(names):
            own = by_problem[name]
            if turn < len(own):
                ordered.append(own[(start + place + turn) % len(own)])
    return ordered


def conversation_row(
    scenario: Scenario, number: int, origin: str, messages: list[dict[str, str]], manner: str = "-"
) -> dict[str, Any]:
    """Return a conversation with the keys of conversations.parquet.

    Args:
        scenario: its scenario.
        number: its number within the scenario, from 0.
        origin: who wrote it: "gold", "variant" or the hosted generator's id.
        messages: the messages, customer and agent in turn.
        manner: how the customer writes, where that was planned.
    """
    return {
        "conversation_id": f"{scenario.scenario_id}.{number:02d}",
        **{key: getattr(scenario, key) for key in ("scenario_id", "term_id", "problem_id", *FACTORS)},
        "origin": origin,
        "manner": manner,
        "n_turns": len(messages) // 2,
        "messages": messages,
        "split": scenario.split,
    }


def scenarios_table(scenarios: list[Scenario]) -> pd.DataFrame:
    """Return one row per scenario, as written to scenarios.parquet."""
    columns = ["scenario_id", "term_id", "category", "problem_id", *FACTORS, "weight", "reading", "split"]
    return pd.DataFrame([vars(s) for s in scenarios], columns=columns)


def level_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Count scenarios by category, kind and context: columns factor, level and one for each split."""
    counts = {factor: pd.crosstab(frame[factor], frame["split"]) for factor in ("category", *FACTORS)}
    table = pd.concat(counts, names=["factor", "level"]).reindex(columns=list(SPLITS), fill_value=0)
    return table.rename_axis(columns=None).reset_index()
