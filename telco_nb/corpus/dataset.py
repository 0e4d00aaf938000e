"""The data set: filtering, balanced samples, statistics for the data card, and the check that splits share nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from telco_nb.corpus import duplicates
from telco_nb.corpus.cards import Card
from telco_nb.corpus.filters import FILTERS, Conversation, Reject, reject_reason
from telco_nb.corpus.scenarios import FACTORS, SPLITS, Scenario, stable_hash
from telco_nb.corpus.text_measures import compression_ratio, distinct_n, self_bleu

SIMILAR_MARGIN = (
    0.005  # the filter's threshold is this much lower, because dropped rows change the TF-IDF weights a little
)
SPLIT_PRIORITY = {"unseen": 0, "test": 1, "val": 2, "train": 3}  # of two duplicates the train row is dropped
DRIFT_POINTS = 10  # per cent points by which filtering may move a split's share: 3.7 here, 7 with a small glossary
SHIPPED_GOLD = "telco_nb/data/conversations"  # the value of gold_path of which WRITTEN_BY is true
SHIPPED_REVIEWS = "telco_nb/data/reviews"  # the value of reviews_path that BLIND_READING was compared with
WRITTEN_BY = (
    "A language model wrote the gold conversations one by one, to the plan of telco_nb/data/WRITING.md; other "
    "instances of a language model read them a second time and scored them. No customer and no operator's staff wrote "
    "or read them."
)
# Shipped gold conversations, scored by a reader who did not know the second reading (LOG.md, Content).
BLIND_READING = {
    "conversations": 60, "mean": 4.63, "second_reading_of_the_same": 4.87, "right": 4.08, "ends_well": 4.48,
}  # fmt: skip
CELL_TEXTS = 20  # self-BLEU of a scenario: at most this many of its texts


def blind_reading_note(gold_path: str | None, reviews_path: str | None) -> str:
    """How the scores of the second reading compare with a blind one; empty for other conversations than the shipped."""
    if (gold_path, reviews_path) != (SHIPPED_GOLD, SHIPPED_REVIEWS):
        return ""
    found = BLIND_READING
    return (
        "These scores come from another instance of a language model, and are generous: a blind reading of "
        f"{found['conversations']} conversations gave a mean of {found['mean']} where the second one had given "
        f"{found['second_reading_of_the_same']}, and only {found['right']} for what is right and "
        f"{found['ends_well']} for how it ends. Many texts have been edited for language and for missing steps "
        "since they were last scored (LOG.md, Content)."
    )


# --- filters -----------------------------------------------------------------------------------------


def first_turn(conversation: Conversation) -> str:
    return conversation["messages"][0]["content"]


def first_answer(conversation: Conversation) -> str:
    return conversation["messages"][1]["content"]


PARTS: dict[str, Callable[[Conversation], str]] = {"first_turn": first_turn, "answer": first_answer}
DUPLICATE_REASONS = [f"{kind}_duplicate_{name}" for name in PARTS for kind in ("exact", "near")]
REASONS = (*FILTERS, *DUPLICATE_REASONS, "similar_across_splits")


def _priority(row: Conversation) -> int:
    """Order of keeping among duplicates: gold conversations first, then held-out splits, then training."""
    return SPLIT_PRIORITY[row["split"]] + (0 if row["origin"] == "gold" else len(SPLIT_PRIORITY))


def _duplicates(rows: list[Conversation], name: str) -> dict[int, Reject]:
    """Return the positions to drop because a part repeats that of a row with priority (`_priority`)."""
    part = PARTS[name]
    order = sorted(range(len(rows)), key=lambda i: (_priority(rows[i]), i))
    first: dict[str, int] = {}
    dropped: dict[int, Reject] = {}
    for i in order:
        original = first.setdefault(duplicates.text_hash(part(rows[i])), i)
        if original != i:
            dropped[i] = (f"exact_duplicate_{name}", rows[original]["conversation_id"])
    rest = [i for i in order if i not in dropped]
    for later, (earlier, jaccard) in duplicates.near_duplicates_to_drop([part(rows[i]) for i in rest]).items():
        detail = f"{rows[rest[earlier]]['conversation_id']} ({jaccard:.2f})"
        dropped[rest[later]] = (f"near_duplicate_{name}", detail)
    return dropped


def similar_across_splits(rows: list[Conversation], threshold: float = duplicates.SIMILAR) -> list[duplicates.Pair]:
    """Return pairs (i, j, cosine) of similar first exchanges (TF-IDF cosine >= threshold) in different splits.

    Row i has priority (`_priority`). Rows of different terms are not compared: the names of the terms alone make them
    different.
    """
    if not rows:
        return []
    exchanges = [f"{first_turn(row)}\n{first_answer(row)}" for row in rows]
    priority = [_priority(row) for row in rows]
    pairs = duplicates.similar_pairs(exchanges, [row["term_id"] for row in rows], priority, threshold)
    return [(i, j, cosine) for i, j, cosine in pairs if rows[i]["split"] != rows[j]["split"]]


def _similar(rows: list[Conversation]) -> dict[int, Reject]:
    dropped: dict[int, Reject] = {}
    for i, j, cosine in similar_across_splits(rows, duplicates.SIMILAR - SIMILAR_MARGIN):
        if i not in dropped:
            dropped.setdefault(j, ("similar_across_splits", f"{rows[i]['conversation_id']} ({cosine:.2f})"))
    return dropped


def apply_filters(
    conversations: Iterable[Any], cards: list[Card]
) -> tuple[list[Conversation], pd.DataFrame, dict[str, int]]:
    """Apply all filters, first those on one conversation, then those that compare conversations.

    Args:
        conversations: rows of any shape: they may come from a language model. A bad row is refused, never an error.
        cards: the cards.

    Returns:
        The kept conversations; the rejects (conversation_id, reason, detail, and the row itself as JSON); the number of
        rejects for each reason, zeros included.
    """
    by_id = {card.id: card for card in cards}
    kept, rejects = [], []
    for conversation in conversations:
        term = conversation.get("term_id") if isinstance(conversation, dict) else None
        if refused := reject_reason(conversation, by_id.get(term) if isinstance(term, str) else None):
            rejects.append(_rejected_row(conversation, refused))
        else:
            kept.append(conversation)
    for compare in (*(partial(_duplicates, name=name) for name in PARTS), _similar):
        dropped = compare(kept)
        rejects += [_rejected_row(kept[i], refused) for i, refused in sorted(dropped.items())]
        kept = [conversation for i, conversation in enumerate(kept) if i not in dropped]
    frame = pd.DataFrame(rejects, columns=["conversation_id", "reason", "detail", "conversation"])
    counts = Counter(frame["reason"])
    return kept, frame, {reason: counts[reason] for reason in REASONS}


def _rejected_row(conversation: Any, refused: Reject) -> tuple[str | None, str, str, str]:
    """Return a line of the reject file: text only, so that any row can be written."""
    name = conversation.get("conversation_id") if isinstance(conversation, dict) else None
    raw = json.dumps(conversation, default=repr, sort_keys=False)  # ASCII, so that broken Unicode is kept as escapes
    return (None if name is None else str(name).encode(errors="replace").decode(), *refused, raw)


# --- samples -----------------------------------------------------------------------------------------


def balanced_order(rows: list[Conversation], seed: int, asked: Iterable[Conversation] = ()) -> list[int]:
    """Order all rows so that gold stands first, and is balanced over terms, then kinds and contexts, as the rest is.

    Terms take turns. Each gives its least used scenario, preferably of the rarest kind and context so far, and of this
    scenario the next conversation by hash. A hash decides ties. Among gold, and among the rest, the problems of `asked`
    come first and are balanced on their own; of one term each of them once before one comes twice.
    """
    problems = {_problem(row) for row in asked}
    groups: dict[tuple[bool, bool], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["origin"] != "gold", _problem(row) not in problems].append(i)
    parts = sorted(groups.items())
    return [own[i] for (_, other), own in parts for i in _balanced([rows[i] for i in own], seed, not other)]


def _problem(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["term_id"], row["problem_id"]


def _balanced(rows: list[Conversation], seed: int, by_problem: bool) -> list[int]:
    pools: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    tie_break = partial(stable_hash, seed, "sample")
    for i in sorted(range(len(rows)), key=lambda i: tie_break(rows[i]["conversation_id"])):
        pools[rows[i]["term_id"]][rows[i]["scenario_id"]].append(i)
    counts: Counter = Counter()

    def uses(row: Conversation) -> list:
        return [row["scenario_id"], *[_problem(row)] * by_problem, *(row[key] for key in FACTORS)]

    def scenario_rank(pool: list[int]) -> tuple:
        row = rows[pool[0]]
        return (*(counts[use] for use in uses(row)), tie_break(row["scenario_id"]))

    order: list[int] = []
    turn = 0
    while len(order) < len(rows):
        turn += 1
        open_terms = [term for term, scenarios in pools.items() if any(scenarios.values())]
        for term in sorted(open_terms, key=lambda term: tie_break(turn, term)):
            chosen = min(filter(None, pools[term].values()), key=scenario_rank).pop(0)
            order.append(chosen)
            counts.update(uses(rows[chosen]))
    return order


def first_exchanges(rows: Iterable[Conversation], n: int | None) -> list[Conversation]:
    """Return the conversations with their first `n` exchanges (a customer's and an agent's message); None: whole.

    `n_turns` stays that of the whole conversation.
    """
    return [{**row, "messages": row["messages"][: 2 * n]} if n else row for row in rows]


def sample_split(
    rows: list[Conversation], split: str, n: int | None, seed: int, asked: Iterable[Conversation] = ()
) -> list[Conversation]:
    """Take a balanced sample of a split, gold conversations first.

    Args:
        rows: conversations of all splits.
        split: one of `scenarios.SPLITS`.
        n: the number of conversations; None for all, in balanced order.
        seed: the seed of the sample. With the same `asked` a larger sample contains the smaller one.
        asked: held-out conversations or prompts whose problems the sample takes first. In the whole data set each
            held-out scenario has its problem in training, in other contexts; so it has in a sample that is large
            enough.

    Raises:
        ValueError: the split has fewer than `n` such rows.
    """
    own = [row for row in rows if row["split"] == split]
    if n is not None and n > len(own):
        raise ValueError(f"{n} conversations requested from split {split!r}, which has {len(own)}")
    return [own[i] for i in balanced_order(own, seed, asked)[:n]]


def trained_problems(train: Iterable[Conversation], held_out: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Count the held-out rows, and those of them whose problem occurs in training."""
    known = {_problem(row) for row in train}
    met = [_problem(row) in known for row in held_out]
    return len(met), sum(met)


def validation_rows(rows: list[Conversation]) -> list[Conversation]:
    """Return the rows from which validation conversations are taken: gold ones alone, where there are any."""
    val = [row for row in rows if row["split"] == "val"]
    return [row for row in val if row["origin"] == "gold"] or val


def _by_scenario(rows: Iterable[Conversation]) -> dict[str, list[Conversation]]:
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for row in rows:
        groups[row["scenario_id"]].append(row)
    return groups


def test_prompts(rows: list[Conversation], test_set: str, n: int | None, seed: int) -> list[dict[str, Any]]:
    """Take one prompt per scenario: the first customer message, with the answer of its conversation as reference.

    Args:
        rows: the conversations of this test set; of a scenario with several, the gold one, or one drawn by hash.
        test_set: its name: test, noisy or unseen.
        n: the number of prompts, taken in balanced order; None for all.
        seed: the seed of the sample.

    Raises:
        ValueError: there are fewer than `n` such scenarios.
    """

    def rank(row: Conversation) -> tuple:
        return row["origin"] != "gold", stable_hash("prompt", row["conversation_id"])

    drawn = [min(own, key=rank) for own in _by_scenario(rows).values()]
    if n is not None and n > len(drawn):
        raise ValueError(f"{n} prompts requested from test set {test_set!r}, which has {len(drawn)}")
    return [
        {
            "prompt_id": row["conversation_id"],
            "test_set": test_set,
            **{key: row[key] for key in ("scenario_id", "term_id", "problem_id", *FACTORS)},
            "messages": row["messages"][:1],
            "reference": first_answer(row),
        }
        for row in (drawn[i] for i in balanced_order(drawn, seed)[:n])
    ]


# --- statistics --------------------------------------------------------------------------------------


def turns_table(conversations: Iterable[Conversation]) -> pd.DataFrame:
    """Return one row per message: conversation_id, origin, split, kind, role, turn (from 0) and words."""
    rows = [
        (c["conversation_id"], c["origin"], c["split"], c["kind"], m["role"], i // 2, len(m["content"].split()))
        for c in conversations
        for i, m in enumerate(c["messages"])
    ]
    return pd.DataFrame(rows, columns=["conversation_id", "origin", "split", "kind", "role", "turn", "words"])


def length_stats(turns: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return words per message by role (mean, median, min, 5th and 95th percentile, max) of a table of turns."""
    stats = {}
    for role, lengths in turns.groupby("role")["words"]:
        low, p05, median, p95, high = (float(x) for x in lengths.quantile([0, 0.05, 0.5, 0.95, 1]))
        mean = round(float(lengths.to_numpy().mean()), 2)
        stats[str(role)] = {"mean": mean, "median": median, "min": int(low), "p05": p05, "p95": p95, "max": int(high)}
    return stats


def _stable_sample(rows: Sequence[Conversation], n: int, seed: int) -> list[Conversation]:
    """Draw `n` conversations (or all) by hash."""
    return sorted(rows, key=lambda row: stable_hash(seed, "diversity", row["conversation_id"]))[:n]


def self_bleu_per_cell(
    rows: Sequence[Conversation], parts: dict[str, Callable[[Conversation], str]], cells: int, seed: int
) -> pd.DataFrame:
    """Measure self-BLEU within scenarios.

    Args:
        rows: the conversations.
        parts: name -> function that takes the text of a conversation, as `PARTS`.
        cells: the number of scenarios, drawn by hash; at most `CELL_TEXTS` conversations of each are used.
        seed: the seed of the hash.

    Returns:
        One row per scenario: scenario_id, term_id, kind, context, texts, and self_bleu_<part> (0 to 1) by part.
    """
    by_scenario = _by_scenario(rows)
    table = []
    for name in sorted(by_scenario, key=lambda name: stable_hash(seed, "diversity", name))[:cells]:
        own = _stable_sample(by_scenario[name], CELL_TEXTS, seed)
        values = {f"self_bleu_{part}": self_bleu([text_of(row) for row in own]) for part, text_of in parts.items()}
        head = {key: own[0][key] for key in ("scenario_id", "term_id", *FACTORS)}
        table.append(head | {"texts": len(own)} | values)
    return pd.DataFrame(table)


def variety_table(conversations: Sequence[Conversation], seed: int) -> pd.DataFrame:
    """Compare who wrote what: one row per origin (gold, variant, a hosted model) with measures of its answers.

    Columns: origin, conversations, texts (sampled first answers), distinct_2, gzip_ratio, asks_share (agent messages
    with a question), same_ending_share (agent messages that end with the most frequent last sentence), short_share
    (customer messages under 12 words).
    """
    rows = []
    for origin in dict.fromkeys(row["origin"] for row in conversations):
        own = [row for row in conversations if row["origin"] == origin]
        texts = [first_answer(row) for row in _stable_sample(own, 1000, seed)]
        agent = [m["content"] for row in own for m in row["messages"] if m["role"] == "assistant"]
        customer = [m["content"] for row in own for m in row["messages"] if m["role"] == "user"]
        last = Counter(re.split(r"(?<=[.!?])\s+", text.strip())[-1].lower() for text in agent)
        rows.append(
            {
                "origin": origin,
                "conversations": len(own),
                "texts": len(texts),
                "distinct_2": round(distinct_n(texts, 2), 4),
                "gzip_ratio": round(compression_ratio(texts), 3),
                "asks_share": sum("?" in text for text in agent) / len(agent),
                "same_ending_share": max(last.values()) / len(agent),
                "short_share": sum(len(text.split()) < 12 for text in customer) / len(customer),
            }
        )
    return pd.DataFrame(rows)


def self_bleu_summary(cells: pd.DataFrame) -> dict[str, Any]:
    """Return the number of scenarios measured and the mean self-BLEU by kind of problem, None where undefined."""
    means = cells.groupby("kind")[[f"self_bleu_{name}" for name in PARTS]].mean().round(4)
    by_kind = means.astype(object).where(means.notna(), None).to_dict("index")
    return {"scenarios_measured": len(cells), "mean_by_kind": by_kind}


def level_counts(conversations: list[Conversation]) -> dict[str, dict[str, dict[str, int]]]:
    """Return column -> level -> {split: conversations} for kind, context, origin, manner and number of exchanges."""
    columns = [*FACTORS, "origin", "manner", "n_turns"]
    frame = pd.DataFrame(conversations, columns=["split", *columns])
    counts = {}
    for column in columns:
        table = pd.crosstab(frame[column].astype(str), frame["split"]).reindex(columns=list(SPLITS), fill_value=0)
        counts[column] = table.to_dict("index")
    return counts


# --- separation of the splits ------------------------------------------------------------------------


def count_leaks(conversations: list[Conversation]) -> dict[str, int]:
    """Count what splits share: scenario ids, exact and near-duplicate first turns and answers, similar exchanges."""
    split = pd.Series([c["split"] for c in conversations])

    def shared(values: list[str]) -> int:
        return int((split.groupby(values).nunique().to_numpy() > 1).sum())

    leaks = {"shared_scenarios": shared([c["scenario_id"] for c in conversations])}
    for name, part in PARTS.items():
        texts = [part(c) for c in conversations]
        leaks[f"exact_{name}"] = shared([duplicates.text_hash(text) for text in texts])
        leaks[f"near_{name}"] = sum(split[i] != split[j] for i, j, _ in duplicates.near_duplicates(texts))
    leaks["similar_exchange"] = len(similar_across_splits(conversations))
    return leaks


def leak_gates(conversations: list[Conversation], leaks: dict[str, int], grid: Sequence[Scenario]) -> pd.DataFrame:
    """Check that the splits are fit for use, from `count_leaks`: columns gate, value, limit, passed.

    Args:
        conversations: what the filters keep.
        leaks: what the splits share.
        grid: the scenarios, whose splits set the share of conversations that each split should have.
    """
    sizes, planned = Counter(c["split"] for c in conversations), Counter(s.split for s in grid)
    total = max(1, len(conversations))
    drift = max(abs(100 * sizes[name] / total - 100 * planned[name] / len(grid)) for name in planned)
    seen = {(c["context"], c["split"]) for c in conversations}
    expected = {(s.context, s.split) for s in grid}
    rows: list[tuple[str, float, int]] = [
        (f"{name.replace('_', ' ')} between splits", n, 0) for name, n in leaks.items()
    ]
    rows.append(("contexts absent from a split that should have them", len(expected - seen), 0))
    rows.append(("scenarios without any conversation", len(grid) - len({c["scenario_id"] for c in conversations}), 0))
    rows.append(("points between a split and its share of the scenarios", round(drift, 2), DRIFT_POINTS))
    frame = pd.DataFrame(rows, columns=["gate", "value", "limit"])
    return frame.assign(passed=frame["value"] <= frame["limit"])


def content_hash(conversations: Iterable[Conversation]) -> str:
    """Return the sha256 of all conversations as JSON lines with sorted keys."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps(conversation, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows (conversations or prompts) as Parquet, with messages as list<struct<role, content>>."""
    fields = [
        (key, _MESSAGES if key == "messages" else pa.int64() if isinstance(value, int) else pa.string())
        for key, value in rows[0].items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
