"""Stores every request to a hosted model as one line on disk; the money spent is the sum over the lines."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MONEY = ("usd", "usd_at_most")  # the fields of a line that count as spent
LEDGER = "batches.jsonl"  # the file beside a store that says what batches may cost (ledger.BatchLedger)


class StoreError(ValueError):
    """A store or ledger holds a line that no sum of money can be trusted with. Exit code 2."""


class AttemptStore:
    """Append-only JSONL, one line per attempt; each write is flushed to the disk before anything else happens.

    Args:
        path: the file; the first `append` creates it.
        key: the field of a line that holds the request's id.

    Opening writes nothing, because another process may be writing a line at this moment. A last line that a kill cut
    short is skipped, so its request is sent again; the next `append` removes it. Any other unreadable line is skipped.

    Raises:
        StoreError: an amount of dollars is not a finite number from 0 up.
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
        for line in _checked_lines(path):
            self._read(line)

    def _read(self, line: dict[str, Any] | None) -> None:
        try:
            self._enter(line if line is not None else {})
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def _enter(self, attempt: dict[str, Any]) -> None:
        """Count an attempt. Raises KeyError or TypeError before it has any effect if the line is not an attempt."""
        identity, status = attempt[self.key], attempt["status"]
        if not (isinstance(identity, str) and isinstance(status, str)):
            raise TypeError("the id and the status of an attempt are texts")
        self.attempts[identity] += 1
        self.statuses[status] += 1
        self.spent_usd += cost_usd(attempt)
        self.batches[str(attempt.get("batch_id") or "")].add(identity)
        if status == "ok":
            self.priced = self.priced and attempt.get("usd") is not None
            self.ok.setdefault(identity, attempt)

    def append(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Write attempts and wait until they are on disk. Raises StoreError, and writes nothing, for a bad amount."""
        if not attempts:
            return
        for attempt in attempts:
            check_money(attempt, f"{self.path}: a new line")
        # In ASCII no text of a model can break a line or its encoding.
        lines = [json.dumps(a, allow_nan=False).encode("ascii") + b"\n" for a in attempts]
        append_lines(self.path, lines)
        for line in lines:
            self._read(json.loads(line))


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Appends whole lines to a file and waits until they are on disk; creates file and folder if need be.

    Writers take turns by a lock on the file, so what precedes without a line feed is of a writer that died: a whole
    JSON object gets its line feed, because its answer may have cost money, and the beginning of one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # closing the file gives it back
        tail = _torn_tail(stream)
        if tail and _parse(tail) is None:
            stream.truncate(stream.seek(0, os.SEEK_END) - len(tail))
        elif tail:
            lines = [b"\n", *lines]
        stream.write(b"".join(lines))
        stream.flush()
        os.fsync(stream.fileno())


def _torn_tail(stream: Any) -> bytes:
    """What follows the last line feed of a file."""
    end = stream.seek(0, os.SEEK_END)
    if end == 0 or (stream.seek(end - 1), stream.read(1))[1] == b"\n":
        return b""
    stream.seek(0)
    data = stream.read()
    return data[data.rfind(b"\n") + 1 :]


def cost_usd(attempt: Mapping[str, Any]) -> float:
    """Dollars that an attempt cost; if its answer was lost, the most that it may have cost."""
    return attempt.get("usd") or attempt.get("usd_at_most") or 0.0


def spent_usd(root: Path) -> float:
    """Dollars that all stores of the study in `root` have recorded so far, at most, batches under way included.

    Raises StoreError if an amount cannot be trusted.
    """
    from telco_nb.hosted.ledger import BatchLedger

    stores = sorted(root.glob("*/store/*.jsonl"))
    ledgers = [BatchLedger(path) for path in stores if path.name == LEDGER]
    answered = sum(cost_usd(line) for path in stores if path.name != LEDGER for line in read_attempts(path))
    return answered + sum(ledger.usd_at_most for ledger in ledgers)


def read_attempts(store: Path) -> Iterator[dict[str, Any]]:
    """The readable lines of a store; none if there is no store. Raises StoreError for a bad amount of dollars."""
    return (line for line in _checked_lines(store) if line is not None)


def _checked_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a store, None for one that cannot be read."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, data in enumerate(stream, 1):
            line = _parse(data)
            if line is not None:
                check_money(line, f"{path}:{number}")
            yield line


def check_money(line: Mapping[str, Any], where: str) -> None:
    """Raises StoreError if an amount of dollars in a line is not null or a finite number from 0 up."""
    for name in MONEY:
        value = line.get(name)
        if value is not None and not is_amount(value):
            raise StoreError(
                f"{where}: {name} is {value!r:.40}, not a number of dollars from 0 up, and the cap counts on it. Restore "
                "the file from a copy, or set the amount that the provider billed."
            )


def is_amount(value: Any) -> bool:
    """True for a finite number from 0 up; text and truth values are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        attempt = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return attempt if isinstance(attempt, dict) else None
