"""Stores every request to a hosted model as one line on disk; the money spent is the sum over the lines."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class AttemptStore:
    """Append-only JSONL, one line per attempt; each write is flushed to the disk before anything else happens.

    Args:
        path: the file; it is created if it is missing.
        key: the field of a line that holds the request's id.

    A last line that a kill cut short is removed, so its request is sent again. Any other unreadable line is skipped.
    """

    def __init__(self, path: Path, key: str = "call_id"):
        self.path, self.key = path, key
        self.ok: dict[str, dict[str, Any]] = {}  # the first good line per id
        self.attempts: Counter[str] = Counter()  # number of lines per id
        self.statuses: Counter[str] = Counter()  # number of lines per status
        self.batches: dict[str, set[str]] = defaultdict(set)  # ids of the stored requests per batch id
        self.unreadable = 0  # number of unreadable lines
        self.spent_usd = 0.0  # dollars that the lines cost at most
        self.priced = True  # no good line lacks a price
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._repair_last_line()
        with path.open("rb") as stream:
            for line in stream:
                self._read(line)

    def _repair_last_line(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as stream:
            if _parse(data[end:]) is not None:  # only the line feed is missing, and the answer may have cost money
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            else:
                stream.truncate(end)
                self.unreadable += 1

    def _read(self, line: bytes) -> None:
        try:
            self._enter(json.loads(line))
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def _enter(self, attempt: dict[str, Any]) -> None:
        """Count an attempt. Raises KeyError or TypeError before it has any effect if the line is not an attempt."""
        identity, status = attempt[self.key], attempt["status"]
        self.attempts[identity] += 1
        self.statuses[status] += 1
        self.spent_usd += cost_usd(attempt)
        self.batches[attempt.get("batch_id") or ""].add(identity)
        if status == "ok":
            self.priced = self.priced and attempt.get("usd") is not None
            self.ok.setdefault(identity, attempt)

    def append(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Write attempts and wait until they are on disk."""
        if not attempts:
            return
        # In ASCII no text of a model can break a line or its encoding.
        lines = [json.dumps(a, allow_nan=False).encode("ascii") + b"\n" for a in attempts]
        with self.path.open("ab") as stream:
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        for line in lines:
            self._read(line)


def cost_usd(attempt: Mapping[str, Any]) -> float:
    """Dollars that an attempt cost; if its answer was lost, the most that it may have cost."""
    return attempt.get("usd") or attempt.get("usd_at_most") or 0.0


def spent_usd(root: Path) -> float:
    """Dollars that all stores of the study in `root` have recorded so far, at most."""
    return sum(cost_usd(line) for path in sorted(root.glob("*/store/*.jsonl")) for line in read_attempts(path))


def read_attempts(store: Path) -> Iterator[dict[str, Any]]:
    """The readable lines of a store; none if there is no store."""
    lines = store.read_bytes().splitlines() if store.is_file() else []
    return (attempt for line in lines if (attempt := _parse(line)) is not None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        attempt = json.loads(line)
    except ValueError:
        return None
    return attempt if isinstance(attempt, dict) else None
