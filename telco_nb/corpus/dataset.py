"""The data set: filtering, balanced samples, statistics for the data card, and the check that splits share nothing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from telco_nb.corpus import duplicates
from telco_nb.corpus.cards import Card
from telco_nb.corpus.filters import FILTERS, Conversation, Reject, reject_reason
from telco_nb.corpus.scenarios import AXES, SPLITS, stable_hash
from telco_nb.corpus.text_measures import compression_ratio, distinct_n, self_bleu

SIMILAR_MARGIN = (
    0.005  # the filter's threshold is this much lower, because dropped rows change the TF-IDF weights a little
)
SPLIT_POINTS = {"train": 80.0, "val": 10.0, "test": 10.0}  # per cent of the conversations
SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2}  # of two duplicates the train row is dropped
SAMPLE_SIZE = (
    2000  # distinct-n and compression depend on the amount of text, so all corpora are measured on as many texts
)
CELL_TEXTS = 20  # self-BLEU of a scenario: at most this many of its texts


# --- filters -----------------------------------------------------------------------------------------


def first_turn(conversation: Conversation) -> str:
    return conversation["messages"][0]["content"]


def first_answer(conversation: Conversation) -> str:
    return conversation["messages"][1]["content"]


PARTS: dict[str, Callable[[Conversation], str]] = {"first_turn": first_turn, "answer": first_answer}
DUPLICATE_REASONS = [f"{kind}_duplicate_{name}" for name in PARTS for kind in ("exact", "near")]
REASONS = (*FILTERS, *DUPLICATE_REASONS, "similar_across_splits")


def _duplicates(rows: list[Conversation], name: str) -> dict[int, Reject]:
    """Return the positions to drop because a part repeats that of a row with priority (test, then val, then train)."""
    part = PARTS[name]
    order = sorted(range(len(rows)), key=lambda i: (SPLIT_PRIORITY[rows[i]["split"]], i))
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

    Row i has priority (test, then val, then train). Rows of different terms are not compared: the names of the terms
    alone make them different.
    """
    if not rows:
        return []
    exchanges = [f"{first_turn(row)}\n{first_answer(row)}" for row in rows]
    priority = [SPLIT_PRIORITY[row["split"]] for row in rows]
    return duplicates.similar_pairs(exchanges, [row["term_id"] for row in rows], priority, threshold)


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


def balanced_order(rows: list[Conversation], seed: int) -> list[int]:
    """Order all rows so that every prefix is balanced over terms, then intents, then the other axes.

    Terms take turns. Each gives its least used scenario, preferably of the rarest intent, situation and customer so
    far, and of this scenario the conversation with the rarest opening and mood. A hash decides ties.
    """
    pools: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        pools[row["term_id"]][row["scenario_id"]].append(i)
    tie_break = partial(stable_hash, seed, "sample")
    counts: Counter = Counter()

    def scenario_rank(pool: list[int]) -> tuple:
        row = rows[pool[0]]
        return (counts[row["scenario_id"]], *(counts[row[axis]] for axis in AXES), tie_break(row["scenario_id"]))

    def row_rank(i: int) -> tuple:
        row = rows[i]
        return counts[row["opening"]], counts[row["mood"]], tie_break(row["conversation_id"])

    order: list[int] = []
    turn = 0
    while len(order) < len(rows):
        turn += 1
        open_terms = [term for term, scenarios in pools.items() if any(scenarios.values())]
        for term in sorted(open_terms, key=lambda term: tie_break(turn, term)):
            pool = min(filter(None, pools[term].values()), key=scenario_rank)
            chosen = min(pool, key=row_rank)
            pool.remove(chosen)
            order.append(chosen)
            counts.update([rows[chosen][key] for key in (*AXES, "opening", "mood", "scenario_id")])
    return order


def sample_split(rows: list[Conversation], split: str, n: int | None, seed: int) -> list[Conversation]:
    """Take a balanced sample of a split.

    Args:
        rows: conversations of all splits.
        split: "train", "val" or "test".
        n: the number of conversations; None for the whole split in grid order.
        seed: the seed of the sample. A larger sample contains the smaller one.

    Raises:
        ValueError: the split has fewer than `n` rows.
    """
    own = [row for row in rows if row["split"] == split]
    if n is None:
        return own
    if n > len(own):
        raise ValueError(f"{n} conversations requested from split {split!r}, which has {len(own)}")
    return [own[i] for i in balanced_order(own, seed)[:n]]


def _by_scenario(rows: Iterable[Conversation]) -> dict[str, list[Conversation]]:
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for row in rows:
        groups[row["scenario_id"]].append(row)
    return groups


def test_prompts(rows: list[Conversation], n: int | None, seed: int) -> list[dict[str, Any]]:
    """Take one prompt per test scenario: the first user turn, with the answer of its conversation as reference.

    Args:
        rows: conversations of all splits.
        n: the number of scenarios, taken in balanced order; None for all.
        seed: the seed of the sample and of the hash that draws the conversation of a scenario.

    Raises:
        ValueError: there are fewer than `n` test scenarios.
    """
    scenarios = _by_scenario(row for row in rows if row["split"] == "test").values()
    drawn = [min(own, key=lambda row: stable_hash(seed, "prompt", row["conversation_id"])) for own in scenarios]
    return [
        {
            "prompt_id": row["conversation_id"],
            **{key: row[key] for key in ("scenario_id", "term_id", *AXES)},
            "messages": row["messages"][:1],
            "reference": first_answer(row),
        }
        for row in sample_split(drawn, "test", n, seed)
    ]


# --- statistics --------------------------------------------------------------------------------------


def turns_table(conversations: Iterable[Conversation]) -> pd.DataFrame:
    """Return one row per message: conversation_id, split, intent, role, turn (from 0) and words."""
    rows = [
        (c["conversation_id"], c["split"], c["intent"], m["role"], i // 2, len(m["content"].split()))
        for c in conversations
        for i, m in enumerate(c["messages"])
    ]
    return pd.DataFrame(rows, columns=["conversation_id", "split", "intent", "role", "turn", "words"])


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


def diversity_table(conversations: list[Conversation], seed: int) -> pd.DataFrame:
    """Measure the diversity of first turns and of answers on a seeded sample of at most 2,000 conversations.

    Returns the columns text, texts, distinct_1 to distinct_3 and gzip_ratio.
    """
    drawn = _stable_sample(conversations, SAMPLE_SIZE, seed)
    rows = []
    for name, part in {"customer, first turn": first_turn, "agent, first answer": first_answer}.items():
        texts = [part(row) for row in drawn]
        distinct = {f"distinct_{n}": round(distinct_n(texts, n), 4) for n in (1, 2, 3)}
        ratio = round(compression_ratio(texts), 3)
        rows.append({"text": name, "texts": len(texts)} | distinct | {"gzip_ratio": ratio})
    return pd.DataFrame(rows)


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
        One row per scenario: scenario_id, term_id, the axes, texts, and self_bleu_<part> (0 to 1) for each part.
    """
    by_scenario = _by_scenario(rows)
    table = []
    for name in sorted(by_scenario, key=lambda name: stable_hash(seed, "diversity", name))[:cells]:
        own = _stable_sample(by_scenario[name], CELL_TEXTS, seed)
        values = {f"self_bleu_{part}": self_bleu([text_of(row) for row in own]) for part, text_of in parts.items()}
        head = {key: own[0][key] for key in ("scenario_id", "term_id", *AXES)}
        table.append(head | {"texts": len(own)} | values)
    return pd.DataFrame(table)


def self_bleu_summary(cells: pd.DataFrame) -> dict[str, Any]:
    """Return the number of scenarios measured and the mean self-BLEU by intent, None where undefined."""
    means = cells.groupby("intent")[[f"self_bleu_{name}" for name in PARTS]].mean().round(4)
    by_intent = means.astype(object).where(means.notna(), None).to_dict("index")
    return {"scenarios_measured": len(cells), "mean_by_intent": by_intent}


def level_counts(conversations: list[Conversation]) -> dict[str, dict[str, dict[str, int]]]:
    """Return axis -> level -> {split: conversations} for the axes of the grid, moods, openings and turns."""
    axes = [*AXES, "mood", "opening", "n_turns"]
    frame = pd.DataFrame(conversations, columns=["split", *axes])
    counts = {}
    for axis in axes:
        table = pd.crosstab(frame[axis].astype(str), frame["split"]).reindex(columns=list(SPLITS), fill_value=0)
        counts[axis] = table.to_dict("index")
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


def leak_gates(conversations: list[Conversation], leaks: dict[str, int]) -> pd.DataFrame:
    """Check that the splits are fit for use, from `count_leaks`: columns gate, value, limit, passed."""
    total = max(1, len(conversations))
    sizes = Counter(c["split"] for c in conversations)
    drift = max(abs(100 * sizes[name] / total - target) for name, target in SPLIT_POINTS.items())
    present = {(axis, c[axis], c["split"]) for c in conversations for axis in (*AXES, "term_id")}
    levels = {(axis, level) for axis, level, _ in present}
    absent = sum((axis, level, name) not in present for axis, level in levels for name in SPLIT_POINTS)
    rows: list[tuple[str, float, int]] = [
        (f"{name.replace('_', ' ')} between splits", n, 0) for name, n in leaks.items()
    ]
    rows.append(("levels or terms absent from a split", absent, 0))
    rows.append(("points between a split and its target share", round(drift, 2), 2))
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
