"""Records which batches were handed over to a provider, and which of them are not collected yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telco_nb.hosted.lines import StoreError, append_lines, is_amount
from telco_nb.study.record import parse_line

LEDGER = "batches.jsonl"  # the ledger's name, beside the store whose requests it lists


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

    Opening writes nothing. A last line that a kill cut short is skipped: what it would have said had not begun.

    Raises:
        StoreError: any other line is not an event, or an amount of dollars cannot be trusted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.batches: list[BatchRecord] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                self._apply(_event(line))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    continue
                raise StoreError(
                    f"{path}:{number}: not an event of a batch ({error!s:.80}), and the cap counts on it. Restore the "
                    "file from a copy, or look at the provider which batches are open."
                ) from None

    def _apply(self, event: dict[str, Any]) -> None:
        usd = event.get("usd_at_most")
        match event["event"]:
            case "submitting":
                if usd is not None and not is_amount(usd):
                    raise ValueError(f"usd_at_most is {usd!r:.40}")
                self.batches.append(BatchRecord(list(event["ids"]), usd_at_most=usd))
            case "submitted":
                self.batches[self._number(event)].handle = event["handle"]
            case "collected" | "forgotten":
                batch = self.batches[self._number(event)]
                if usd is not None:
                    batch.usd_at_most = self._left(batch, usd)
                batch.closed = True
            case other:
                raise ValueError(f"event {other!r:.40} is unknown")

    def _number(self, event: dict[str, Any]) -> int:
        if type(event["entry"]) is not int or event["entry"] < 0:
            raise ValueError(f"entry is {event['entry']!r:.40}")
        return event["entry"]

    def _left(self, batch: BatchRecord, subtracted: Any) -> float:
        """What a batch still counts as spent; no more than it was given can be subtracted."""
        at_most = batch.usd_at_most or 0.0
        if isinstance(subtracted, int | float) and is_amount(-subtracted) and -subtracted <= at_most * (1 + 1e-9):
            return max(0.0, at_most + subtracted)
        raise ValueError(f"usd_at_most is {subtracted!r:.40}, of a batch of at most {at_most} dollars")

    def write(self, event: str, **fields: Any) -> None:
        """Append an event and wait until it is on disk."""
        line = {"event": event, **fields}
        append_lines(self.path, [json.dumps(line, allow_nan=False).encode("ascii") + b"\n"])
        self._apply(line)

    def close(self, i: int, event: str, share: float = 1.0) -> None:
        """Record that batch `i` is `collected` or `forgotten`, and subtract this share of the most that it may cost."""
        at_most = self.batches[i].usd_at_most
        self.write(event, entry=i, usd_at_most=None if at_most is None else -share * at_most)

    def open(self) -> Iterator[tuple[int, BatchRecord]]:
        """The batches that are not closed, each with its number."""
        return ((i, batch) for i, batch in enumerate(self.batches) if not batch.closed)

    @property
    def usd_at_most(self) -> float:
        """Dollars that count as spent on top of the stored answers."""
        return sum(batch.usd_at_most or 0.0 for batch in self.batches)

    @property
    def under_way(self) -> set[str]:
        """Ids of the requests in open batches."""
        return {identity for _, batch in self.open() for identity in batch.ids}

    @property
    def unconfirmed(self) -> list[int]:
        """Numbers of the open batches without a handle."""
        return [i for i, batch in self.open() if batch.handle is None]


def _event(line: bytes) -> dict[str, Any]:
    event = parse_line(line)
    if event is None:
        raise ValueError("no JSON object, or a name stands twice")
    return event


def ledger_of(store: Path) -> BatchLedger:
    """The ledger in the folder of a store of attempts."""
    return BatchLedger(store.with_name(LEDGER))
