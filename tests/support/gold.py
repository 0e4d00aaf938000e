"""The plan of the gold conversations, and what can be checked of cards and conversations beyond their form.

`python tests/support/gold.py` prints the table of progress; `python tests/support/gold.py TERM` checks one term.
How they are written: telco_nb/data/WRITING.md.
"""

import hashlib
import itertools
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import shipped

from telco_nb.corpus.cards import Card
from telco_nb.corpus.gold import POINTS, load_reviews, read_lines

DATA = Path(__file__).resolve().parents[2] / "telco_nb" / "data"
CONTEXTS = ("usual", "away", "depended_on")
MANNERS = (
    "terse", "rambling", "angry", "kind", "misspelling", "lower_case", "non_native", "two_problems", "formal",
    "worried", "sceptical", "casual",
)  # fmt: skip
LATER = (
    "misunderstands_step", "comes_back_with_another_symptom", "answers_the_question", "answers_the_question",
    "closes_satisfied", "asks_a_follow_up", "cannot_do_the_step", "pushes_back",
)  # fmt: skip
ENDINGS = (
    "solved", "next_step_with_customer", "agent_acts_and_reports", "handed_over", "open_until_customer_answers",
    "refused_with_a_way_out", "told_where_to_find_out",
)  # fmt: skip


def terms() -> list[str]:
    """Terms whose conversations are written."""
    return sorted(path.stem for path in (DATA / "conversations").glob("*.jsonl"))


def card(term: str) -> Card:
    return shipped.by_id()[term]


@cache
def conversations(term: str) -> list[dict[str, Any]]:
    return [value for _, value in read_lines(DATA / "conversations" / f"{term}.jsonl")]


@cache
def reviews(term: str) -> list[dict[str, Any]]:
    """The scores of the second reading of a term, in the order of its conversations."""
    found = {row["scenario_id"]: row for row in load_reviews(DATA / "reviews", shipped.grid())}
    return [found[row["id"]] | {"id": row["id"]} for row in conversations(term) if row["id"] in found]


# ---------------------------------------------------------------- the plan


def plan(term: str, problems: list[str]) -> list[dict[str, Any]]:
    """The plan of a term's 30 conversations: exchanges, manner, opening, a special, what comes later, an ending.

    12 conversations have one exchange, 12 two, 4 three and 2 four; no problem has three of one length.
    """
    rng = random.Random(int(hashlib.sha256(term.encode()).hexdigest()[:12], 16))
    cells = [(problem, context) for problem in problems for context in CONTEXTS]
    lengths = [1] * 12 + [2] * 12 + [3] * 4 + [4] * 2
    rng.shuffle(lengths)
    while any(len(set(lengths[i : i + 3])) == 1 for i in range(0, 30, 3)):
        rng.shuffle(lengths)
    manners = _deal(rng, MANNERS)
    openings = _deal(rng, ("4-11 words", "12-35 words", "12-35 words", "36-90 words"))
    specials = ["holds_a_wrong_belief"] * 3 + ["gives_away_or_is_asked_for_a_secret"] * 2 + [None] * 25
    rng.shuffle(specials)
    later, endings = _deal(rng, LATER), _deal(rng, ENDINGS)
    columns = zip(cells, lengths, manners, openings, specials, later, endings, strict=True)
    return [
        {
            "id": f"{term}.{problem}.{context}",
            "exchanges": n,
            "manner": manner,
            "opening": "4-11 words" if manner == "terse" else opening,
            "special": special,
            "later": after if n > 1 else None,
            "ending_idea": ending,
        }
        for (problem, context), n, manner, opening, special, after, ending in columns
    ]


def _deal(rng: random.Random, options: tuple[str, ...], n: int = 30) -> list[str]:
    dealt: list[str] = []
    while len(dealt) < n:
        block = list(options)
        rng.shuffle(block)
        dealt += block
    return dealt[:n]


# ---------------------------------------------------------------- checks by rule

_NUMBER = re.compile(r"(?<![\w])\d[\d.,:/]*\d|\d")


def agent_texts(conversation: dict[str, Any]) -> list[str]:
    return [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w'’]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def alike(a: str, b: str) -> float:
    """Jaccard similarity of word 5-shingles, 0 to 1."""
    one, two = shingles(a), shingles(b)
    return len(one & two) / max(1, len(one | two))


def faults(term: str) -> list[str]:
    """What is wrong with the form of a term's card and conversations; every fault names its conversation."""
    held, rows = card(term), conversations(term)
    found = _house_limits(held)
    planned = {row["id"]: row for row in plan(held.id, [problem.id for problem in held.problems])}
    ids = [row["id"] for row in rows]
    if sorted(ids) != sorted(planned):
        found.append(f"scenarios: missing {sorted(set(planned) - set(ids))}, unknown {sorted(set(ids) - set(planned))}")
    for row in rows:
        found += [f"{row['id']}: {fault}" for fault in _form_faults(row, planned.get(row["id"]))]
    answers = {row["id"]: " ".join(agent_texts(row)) for row in rows}
    for (a, text), (b, other) in itertools.combinations(answers.items(), 2):
        if (likeness := alike(text, other)) > (0.25 if a.split(".")[1] == b.split(".")[1] else 0.15):
            found.append(f"{a} and {b}: answers too alike ({likeness:.2f})")
    last = Counter(re.split(r"(?<=[.!?])\s+", text.strip())[-1].lower() for row in rows for text in agent_texts(row))
    return found + [f"last sentence used {n} times: {text!r}" for text, n in last.items() if n > 1]


def _house_limits(held: Card) -> list[str]:
    """What the shipped cards hold themselves to beyond the loader: ten problems, 4 to 9 facts, 2 to 4 wordings, ..."""
    sizes = {
        "problems": (len(held.problems), 10, 10), "facts": (len(held.facts), 4, 9),
        "wrong beliefs": (len(held.wrong_beliefs), 2, 4),
    }  # fmt: skip
    for problem in held.problems:
        sizes[f"{problem.id}: says"] = len(problem.says), 5, 10
        sizes[f"{problem.id}: steps"] = len(problem.steps), 2, 7
        sizes[f"{problem.id}: never"] = len(problem.never), 1, 99
        for i, step in enumerate(problem.steps):
            sizes[f"{problem.id}: wordings of step {i + 1}"] = len(step.say), 2, 4
    return [f"{name}: {n}, not {low} to {high}" for name, (n, low, high) in sizes.items() if not low <= n <= high]


def _form_faults(row: dict[str, Any], planned: dict[str, Any] | None) -> list[str]:
    messages = row["messages"]
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2) or not messages:
        return ["roles do not alternate from user to assistant"]
    found, n = [], len(messages) // 2
    if planned and n != planned["exchanges"] and not (planned["exchanges"] >= 3 and n in (3, 4)):
        found.append(f"{n} exchanges, planned {planned['exchanges']}")
    for message in messages:
        low, high = (3, 95) if message["role"] == "user" else (18, 115)
        if not low <= (words := len(message["content"].split())) <= high:
            found.append(f"a {message['role']} message of {words} words")
    return found


def unknown_figures(term: str) -> list[str]:
    """Figures that an agent says and neither the card nor the customer holds, by conversation."""
    on_card = set(_NUMBER.findall((DATA / "cards" / f"{term}.yaml").read_text(encoding="utf-8")))
    found = []
    for row in conversations(term):
        said = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
        numbers = {n for text in agent_texts(row) for n in _NUMBER.findall(text)}
        odd = [n for n in numbers if n not in on_card and n not in said and n not in "123456"]
        found += [f"{row['id']}: {odd}"] if odd else []
    return found


def measures(term: str) -> dict[str, Any]:
    """Counts and shares of a term: what the plan aims at."""
    rows = conversations(term)
    agent = [text for row in rows for text in agent_texts(row)]
    customer = [m["content"] for row in rows for m in row["messages"] if m["role"] == "user"]
    scores = [review[point] for review in reviews(term) for point in POINTS]
    return {
        "conversations": len(rows),
        "agent words, median": sorted(len(text.split()) for text in agent)[len(agent) // 2],
        "agent asks": f"{sum('?' in text for text in agent) / len(agent):.0%}",
        "customer under 12 words": f"{sum(len(text.split()) < 12 for text in customer) / len(customer):.0%}",
        "read again": len(reviews(term)),
        "mean score": f"{sum(scores) / len(scores):.2f}" if scores else "-",
        "rewritten": sum(bool(review["rewritten"]) for review in reviews(term)) if scores else "-",
    }


def main() -> int:
    if len(sys.argv) > 1:
        found = faults(sys.argv[1])
        print("\n".join([*found, *(f"look: figures {text}" for text in unknown_figures(sys.argv[1]))]) or "no fault")
        return bool(found)
    table = {term: measures(term) for term in terms()}
    print("| term | " + " | ".join(next(iter(table.values()))) + " |")
    print("|" + " --- |" * (1 + len(next(iter(table.values())))))
    for term, row in table.items():
        print(f"| {term} | " + " | ".join(map(str, row.values())) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
