"""The data set: which conversations are kept, how they are split, and what its card says of them."""

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

from telco_nb.corpus import duplicates, text_measures
from telco_nb.corpus.cards import Card
from telco_nb.corpus.filters import FILTERS, Conversation, Reject, reject_reason
from telco_nb.corpus.scenarios import AXES, stable_hash
from telco_nb.corpus.text_measures import CELL_TEXTS, self_bleu

SIMILAR_MARGIN = 0.005  # refused this much earlier, because the weights shift a little when rows go
SPLIT_POINTS = {"train": 80.0, "val": 10.0, "test": 10.0}  # per cent of the conversations
SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2}  # of two duplicates the train row goes


# --- duplicates --------------------------------------------------------------------------------------


def first_turn(conversation: Conversation) -> str:
    return conversation["messages"][0]["content"]


def first_answer(conversation: Conversation) -> str:
    return conversation["messages"][1]["content"]


def exchange(conversation: Conversation) -> str:
    return f"{first_turn(conversation)}\n{first_answer(conversation)}"


PARTS: dict[str, Callable[[Conversation], str]] = {"first_turn": first_turn, "answer": first_answer}


def _duplicates(kept: list[Conversation], name: str) -> dict[int, Reject]:
    """Rows to drop because a part repeats that of a row with a higher claim (test before val before train)."""
    part = PARTS[name]
    order = sorted(range(len(kept)), key=lambda i: (SPLIT_PRIORITY[kept[i]["split"]], i))
    first: dict[str, int] = {}
    dropped: dict[int, Reject] = {}
    for i in order:
        owner = first.setdefault(duplicates.text_hash(part(kept[i])), i)
        if owner != i:
            dropped[i] = (f"exact_duplicate_{name}", kept[owner]["conversation_id"])
    rows = [i for i in order if i not in dropped]
    for later, (earlier, jaccard) in duplicates.near_duplicates_to_drop([part(kept[i]) for i in rows]).items():
        detail = f"{kept[rows[earlier]]['conversation_id']} ({jaccard:.2f})"
        dropped[rows[later]] = (f"near_duplicate_{name}", detail)
    return dropped


def similar_across_splits(
    rows: list[Conversation], threshold: float = duplicates.SIMILAR
) -> list[tuple[int, int, float]]:
    """Pairs (i, j, cosine) of rows of one term in different splits whose exchanges have TF-IDF cosine >= threshold.

    Row i has the higher claim (test before val before train). Other terms are not compared: their names alone weigh
    enough to keep them apart.
    """
    if not rows:
        return []
    claim = [SPLIT_PRIORITY[row["split"]] for row in rows]
    return duplicates.similar_pairs([exchange(row) for row in rows], [row["term_id"] for row in rows], claim, threshold)


def _similar(kept: list[Conversation]) -> dict[int, Reject]:
    dropped: dict[int, Reject] = {}
    for i, j, cosine in similar_across_splits(kept, duplicates.SIMILAR - SIMILAR_MARGIN):
        if i not in dropped:
            dropped.setdefault(j, ("similar_across_splits", f"{kept[i]['conversation_id']} ({cosine:.2f})"))
    return dropped


REASONS = (
    *FILTERS,
    *(f"{kind}_duplicate_{name}" for name in PARTS for kind in ("exact", "near")),
    "similar_across_splits",
)


def apply_filters(
    conversations: Iterable[Any], cards: list[Card]
) -> tuple[list[Conversation], pd.DataFrame, dict[str, int]]:
    """Apply all filters, first those on one conversation, then those that compare conversations.

    Rows may come from a language model: whatever their shape, a bad one is refused and never raises. Returns the kept
    conversations, the rejects (conversation_id, reason, detail, and the row itself as JSON) and the number refused
    for each reason, zeros included.
    """
    by_id = {card.id: card for card in cards}
    kept, rejects = [], []
    for conversation in conversations:
        refused = reject_reason(conversation, _card_of(conversation, by_id))
        if refused:
            rejects.append(_rejected_row(conversation, refused))
        else:
            kept.append(conversation)
    for drop in (*(partial(_duplicates, name=name) for name in PARTS), _similar):
        dropped = drop(kept)
        rejects += [_rejected_row(kept[i], refused) for i, refused in sorted(dropped.items())]
        kept = [conversation for i, conversation in enumerate(kept) if i not in dropped]
    frame = pd.DataFrame(rejects, columns=["conversation_id", "reason", "detail", "conversation"])
    counts = Counter(frame["reason"])
    return kept, frame, {reason: counts.get(reason, 0) for reason in REASONS}


def _card_of(conversation: Any, by_id: dict[str, Card]) -> Card | None:
    term = conversation.get("term_id") if isinstance(conversation, dict) else None
    return by_id.get(term) if isinstance(term, str) else None


def _rejected_row(conversation: Any, refused: Reject) -> tuple[str | None, str, str, str]:
    """A line of the reject file: texts only, so that any row can be written."""
    name = conversation.get("conversation_id") if isinstance(conversation, dict) else None
    raw = json.dumps(conversation, default=repr, sort_keys=False)  # ASCII, so that broken Unicode is kept as escapes
    return (None if name is None else str(name).encode(errors="replace").decode(), *refused, raw)


# --- samples -----------------------------------------------------------------------------------------


def balanced_order(rows: list[Conversation], seed: int) -> list[int]:
    """Positions of all rows in an order of which every prefix is balanced over terms, then intents, then the rest.

    Terms take turns; each gives the scenario least used so far, whose intent, situation and customer are the
    rarest so far, and of it the conversation with the rarest opening and mood. Ties fall by keyed hash.
    """
    pools: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        pools[row["term_id"]][row["scenario_id"]].append(i)
    scenario_tie = {row["scenario_id"]: stable_hash(seed, "sample", row["scenario_id"]) for row in rows}
    row_tie = [stable_hash(seed, "sample", row["conversation_id"]) for row in rows]
    seen: Counter = Counter()
    order: list[int] = []
    turn = 0
    while pools:
        turn += 1
        for _, term in sorted((stable_hash(seed, "sample", turn, term), term) for term in pools):
            chosen = _least_seen(rows, pools[term], seen, scenario_tie, row_tie)
            row = rows[chosen]
            pool = pools[term][row["scenario_id"]]
            pool.remove(chosen)
            if not pool:
                del pools[term][row["scenario_id"]]
            order.append(chosen)
            seen.update([row[key] for key in (*AXES, "opening", "mood", "scenario_id")])
        pools = {term: pool for term, pool in pools.items() if pool}
    return order


def _least_seen(
    rows: list[Conversation],
    pools: dict[str, list[int]],
    seen: Counter,
    scenario_tie: dict[str, int],
    row_tie: list[int],
) -> int:
    def scenario_rank(scenario_id: str) -> tuple:
        row = rows[pools[scenario_id][0]]
        return (seen[scenario_id], *(seen[row[axis]] for axis in AXES), scenario_tie[scenario_id])

    scenario = min(pools, key=scenario_rank)
    return min(pools[scenario], key=lambda i: (seen[rows[i]["opening"]], seen[rows[i]["mood"]], row_tie[i]))


def sample_split(rows: list[Conversation], split: str, n: int | None, seed: int) -> list[Conversation]:
    """The first `n` rows of a split in balanced order; null (None) = the whole split in grid order.

    Raises ValueError if the split has fewer rows.
    """
    own = [row for row in rows if row["split"] == split]
    if n is None:
        return own
    if n > len(own):
        raise ValueError(f"{n} conversations asked of split {split!r}, which has {len(own)}")
    return [own[i] for i in balanced_order(own, seed)[:n]]


def test_prompts(rows: list[Conversation], n: int | None, seed: int) -> list[dict[str, Any]]:
    """One prompt per test scenario: the first user turn, with the answer given there as reference.

    The conversation is drawn by keyed hash within its scenario; `n` scenarios are taken in balanced order (None =
    all). Raises ValueError if there are fewer.
    """
    one: dict[str, Conversation] = {}
    for row in (row for row in rows if row["split"] == "test"):
        rank = stable_hash(seed, "prompt", row["conversation_id"])
        best = one.get(row["scenario_id"])
        if best is None or rank < stable_hash(seed, "prompt", best["conversation_id"]):
            one[row["scenario_id"]] = row
    return [
        {
            "prompt_id": row["conversation_id"],
            **{key: row[key] for key in ("scenario_id", "term_id", *AXES)},
            "messages": row["messages"][:1],
            "reference": first_answer(row),
        }
        for row in sample_split(list(one.values()), "test", n, seed)
    ]


test_prompts.__test__ = False  # not a test, whatever pytest thinks of its name


# --- what the corpus is like -------------------------------------------------------------------------


def turns_table(conversations: Iterable[Conversation]) -> pd.DataFrame:
    """One row per message: conversation_id, split, intent, role, turn (from 0) and words."""
    rows = [
        (c["conversation_id"], c["split"], c["intent"], m["role"], i // 2, len(m["content"].split()))
        for c in conversations
        for i, m in enumerate(c["messages"])
    ]
    return pd.DataFrame(rows, columns=["conversation_id", "split", "intent", "role", "turn", "words"])


def length_stats(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Words per message by role: mean, median, min, max and the 5th and 95th percentile."""
    stats = {}
    for role, lengths in frame.groupby("role")["words"]:
        stats[role] = {
            "mean": round(float(lengths.mean()), 2),
            "median": float(lengths.median()),
            "min": int(lengths.min()),
            "p05": float(lengths.quantile(0.05)),
            "p95": float(lengths.quantile(0.95)),
            "max": int(lengths.max()),
        }
    return stats


def diversity_table(conversations: list[Conversation], seed: int) -> pd.DataFrame:
    """Diversity of first turns and of answers, on a seeded sample of at most `diversity.SAMPLE` conversations."""
    drawn = stable_sample(conversations, text_measures.SAMPLE_SIZE, seed)
    parts = {"customer, first turn": first_turn, "agent, first answer": first_answer}
    return text_measures.variety_table({name: [part(c) for c in drawn] for name, part in parts.items()})


def self_bleu_summary(cells: pd.DataFrame) -> dict[str, Any]:
    """What the data set's card says of self-BLEU per cell: scenarios measured, mean by intent, null where undefined."""
    columns = [f"self_bleu_{name}" for name in PARTS]
    means = cells.groupby("intent")[columns].mean().round(4)
    by_intent = {intent: {k: None if v != v else v for k, v in row.items()} for intent, row in means.iterrows()}
    return {"scenarios_measured": len(cells), "mean_by_intent": by_intent}


def count_leaks(conversations: list[Conversation]) -> dict[str, int]:
    """What splits share: scenario ids, exact and near-duplicate first turns and answers, similar exchanges: 0 each."""
    found = {"shared_scenarios": 0}
    by_scenario = defaultdict(set)
    for c in conversations:
        by_scenario[c["scenario_id"]].add(c["split"])
    found["shared_scenarios"] = sum(len(splits) > 1 for splits in by_scenario.values())
    split_of = [c["split"] for c in conversations]
    for name, part in PARTS.items():
        by_text = defaultdict(set)
        for c in conversations:
            by_text[duplicates.text_hash(part(c))].add(c["split"])
        found[f"exact_{name}"] = sum(len(splits) > 1 for splits in by_text.values())
        pairs = duplicates.near_duplicates([part(c) for c in conversations])
        found[f"near_{name}"] = sum(split_of[a] != split_of[b] for a, b, _ in pairs)
    found["similar_exchange"] = len(similar_across_splits(conversations))
    return found


def leak_gates(conversations: list[Conversation], found: dict[str, int]) -> pd.DataFrame:
    """The conditions on which the study goes on: columns gate, value, limit, passed. `found` is from `leaks`."""
    total = max(1, len(conversations))
    shares = Counter(c["split"] for c in conversations)
    drift = max(abs(100 * shares[name] / total - target) for name, target in SPLIT_POINTS.items())
    seen = {(axis, c[axis]) for c in conversations for axis in (*AXES, "term_id")}
    present = {(axis, c[axis], c["split"]) for c in conversations for axis in (*AXES, "term_id")}
    absent = sum((axis, level, name) not in present for axis, level in seen for name in SPLIT_POINTS)
    rows = [(name.replace("_", " ") + " between splits", value, 0) for name, value in found.items()]
    rows.append(("levels or terms absent from a split", absent, 0))
    rows.append(("points between a split and its target share", round(drift, 2), 2))
    frame = pd.DataFrame(rows, columns=["gate", "value", "limit"])
    return frame.assign(passed=frame["value"] <= frame["limit"])


def content_hash(conversations: Iterable[Conversation]) -> str:
    """sha256 over all conversations as JSON lines with sorted keys: equal bytes, equal hash."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps(conversation, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def level_counts(conversations: list[Conversation]) -> dict[str, dict[str, dict[str, int]]]:
    """axis -> level -> {split: conversations}, for the axes of the grid, the moods, the openings and the turns."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for axis in (*AXES, "mood", "opening", "n_turns"):
        counter = Counter((str(c[axis]), c["split"]) for c in conversations)
        levels = sorted({level for level, _ in counter})
        counts[axis] = {level: {s: counter[level, s] for s in ("train", "val", "test")} for level in levels}
    return counts


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows (conversations or prompts) as Parquet, with messages as list<struct<role, content>>."""
    fields = [
        (key, _MESSAGES if key == "messages" else pa.int64() if isinstance(value, int) else pa.string())
        for key, value in rows[0].items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_parquet` wrote."""
    return pq.read_table(path).to_pylist()


def stable_sample(rows: Sequence[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` conversations (or all), drawn by keyed hash."""
    return sorted(rows, key=lambda row: stable_hash(seed, "diversity", row["conversation_id"]))[:n]


def self_bleu_per_cell(rows: Sequence[dict[str, Any]], parts: dict[str, Any], cells: int, seed: int) -> pd.DataFrame:
    """Self-BLEU within scenarios: columns scenario_id, the axes, texts, and self_bleu_<part> for each of `parts`.

    `cells` scenarios are drawn by keyed hash; of each, at most CELL_TEXTS conversations. `parts` maps a name to a
    function from a conversation to its text.
    """
    by_scenario = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario_id"]].append(row)
    chosen = sorted(by_scenario, key=lambda name: stable_hash(seed, "diversity", name))[:cells]
    found = []
    for name in chosen:
        texts = stable_sample(by_scenario[name], CELL_TEXTS, seed)
        values = {f"self_bleu_{part}": self_bleu([get(row) for row in texts]) for part, get in parts.items()}
        head = {key: texts[0][key] for key in ("scenario_id", "term_id", *AXES)}
        found.append(head | {"texts": len(texts)} | values)
    return pd.DataFrame(found)
