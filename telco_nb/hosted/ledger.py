"""Records which batches were handed over to a provider, and which of them are not collected yet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class BatchRecord:
    """One batch. Without a handle it is unknown if the provider has received it."""

    ids: list[str]
    handle: dict[str, Any] | None = None
    closed: bool = False
    usd_at_most: float | None = None  # None: no price is known


class BatchLedger:
    """Append-only JSONL with the events of each batch: `submitting`, `submitted` with its handle, `collected`.

    A batch without a handle was being submitted when the process died, and may exist at the provider. It is never
    submitted again without the user's decision, because it could be paid for twice. `usd_at_most` is the most that a
    batch may cost, so `attempts.spent_usd` counts a batch under way as spent. When the results are stored with their
    own dollars, the amount is subtracted again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.batches: list[BatchRecord] = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            self._apply(json.loads(line))

    def _apply(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "submitting":
                self.batches.append(BatchRecord(event["ids"], usd_at_most=event["usd_at_most"]))
            case "submitted":
                self.batches[event["entry"]].handle = event["handle"]
            case "collected" | "forgotten":
                self.batches[event["entry"]].closed = True

    def write(self, event: str, **fields: Any) -> None:
        """Append an event and wait until it is on disk."""
        line = {"event": event, **fields}
        with self.path.open("a", encoding="ascii") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._apply(line)

    def close(self, i: int, event: str, share: float = 1.0) -> None:
        """Record that batch `i` is `collected` or `forgotten`, and subtract this share of the most that it may cost."""
        at_most = self.batches[i].usd_at_most
        self.write(event, entry=i, usd_at_most=None if at_most is None else -share * at_most)

    def open(self) -> Iterator[tuple[int, BatchRecord]]:
        """The batches that are not closed, each with its number."""
        return ((i, batch) for i, batch in enumerate(self.batches) if not batch.closed)

    @property
    def under_way(self) -> set[str]:
        """Ids of the requests in open batches."""
        return {identity for _, batch in self.open() for identity in batch.ids}

    @property
    def unconfirmed(self) -> list[int]:
        """Numbers of the open batches without a handle."""
        return [i for i, batch in self.open() if batch.handle is None]


def ledger_of(store: Path) -> BatchLedger:
    """The ledger in the folder of a store of attempts."""
    return BatchLedger(store.with_name("batches.jsonl"))
