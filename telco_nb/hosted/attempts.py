"""Attempts on disk: every request to a hosted model is a line before anything else happens, and what was spent is their sum."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb.hosted.prices import Budget


class AttemptStore:
    """Append-only JSONL, one line per attempt, flushed to the disk before anything else happens.

    `ok` holds the first good line per id, `attempts` counts the lines per id, `spent_usd` is what they cost, at most.
    A last line torn by a kill is cut off (its question is asked again); an unreadable line elsewhere is skipped and
    counted in `unreadable`.
    """

    def __init__(self, path: Path, key: str = "call_id"):
        self.path, self.key = path, key
        self.ok: dict[str, dict[str, Any]] = {}
        self.attempts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.unreadable = 0
        self.batches: dict[str, set[str]] = defaultdict(set)
        self.spent_usd, self.priced = 0.0, True  # priced: no good answer lacks a price
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._cut_torn_line()
        with path.open("rb") as stream:
            for line in stream:
                self._take(line)

    def _cut_torn_line(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as stream:
            if _is_whole(data[end:]):  # only the line feed is missing: an answer that may have cost money
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            else:
                stream.truncate(end)
                self.unreadable += 1

    def _take(self, line: bytes) -> None:
        try:
            self._enter(json.loads(line))
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def _enter(self, attempt: dict[str, Any]) -> None:
        """Count an attempt. Raises KeyError, TypeError or ValueError for what is none, before it has any effect."""
        identity, status = attempt[self.key], attempt["status"]
        self.attempts[identity] += 1
        self.statuses[status] += 1
        self.spent_usd += cost_usd(attempt)
        self.batches[attempt.get("batch_id") or ""].add(identity)
        if status == "ok":
            self.priced = self.priced and attempt.get("usd") is not None
            self.ok.setdefault(identity, attempt)

    def of_batch(self, batch_id: str) -> set[str]:
        """Ids of the questions whose results of a batch are stored."""
        return self.batches[batch_id]

    def append(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Write attempts and wait until they are on disk."""
        if not attempts:
            return
        # In ASCII: no text of a model, whatever it holds, can break a line or its encoding.
        lines = [json.dumps(a, allow_nan=False).encode("ascii") + b"\n" for a in attempts]
        with self.path.open("ab") as stream:
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        for line in lines:
            self._take(line)


def cost_usd(attempt: Mapping[str, Any]) -> float:
    """Dollars of an attempt; where its answer was lost, what it may have cost at most."""
    return attempt.get("usd") or attempt.get("usd_at_most") or 0.0


def spent_usd(root: Path) -> float:
    """Dollars that all stores of a study have recorded so far, at most."""
    return sum(cost_usd(line) for path in sorted(root.glob("*/store/*.jsonl")) for line in read_attempts(path))


def read_attempts(store: Path) -> Iterator[dict[str, Any]]:
    """The lines of a store that can be read; none if there is no store."""
    for line in store.read_bytes().splitlines() if store.is_file() else []:
        if _is_whole(line):
            yield json.loads(line)


def open_budget(root: Path, max_usd: float | None) -> Budget:
    """What may still be spent on the study in `root`: `max_usd` of this run, less what its stores have recorded."""
    return Budget(max_usd, spent_usd(root))


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
