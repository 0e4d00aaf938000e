"""Batches under way: what was handed over to a provider, and what is not collected yet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class BatchRecord:
    """One batch as the book knows it. Without a handle, nobody knows whether the provider has it."""

    ids: list[str]
    handle: dict[str, Any] | None = None
    collected: bool = False
    usd_at_most: float | None = None  # None: no price is known


class BatchLedger:
    """Append-only JSONL of batches: `submitting` before one is handed over, `submitted` with its handle, `collected`.

    A batch that was being submitted when the process died may exist at the provider: it is never submitted again
    unseen, as it would be paid twice. `usd_at_most` is what a batch may cost, and is given back when its results are
    stored with their own dollars: so calls.spent_usd counts a batch under way as spent.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[BatchRecord] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.is_file() else []:
            self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "submitting":
                self.entries.append(BatchRecord(event["ids"], usd_at_most=event["usd_at_most"]))
            case "submitted":
                self.entries[event["entry"]].handle = event["handle"]
            case "collected":
                self.entries[event["entry"]].collected = True
            case "forgotten":
                self.entries[event["entry"]] = BatchRecord([], collected=True)

    def note(self, event: str, **more: Any) -> None:
        line = {"event": event, **more}
        with self.path.open("a", encoding="ascii") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._take(line)

    def close(self, i: int, event: str, share: float = 1.0) -> None:
        """Note that a batch is `collected` or `forgotten`, and give back a share of what it may cost."""
        at_most = self.entries[i].usd_at_most
        self.note(event, entry=i, usd_at_most=None if at_most is None else -share * at_most)

    def open(self) -> Iterator[tuple[int, BatchRecord]]:
        return ((i, e) for i, e in enumerate(self.entries) if not e.collected)

    @property
    def under_way(self) -> set[str]:
        return {identity for _, entry in self.open() for identity in entry.ids}

    @property
    def doubtful(self) -> list[int]:
        return [i for i, entry in self.open() if entry.handle is None]


def ledger_of(store: Path) -> BatchLedger:
    """The book that lies beside a store of attempts."""
    return BatchLedger(store.with_name("batches.jsonl"))
