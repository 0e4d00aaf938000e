"""Stores every request to a hosted model as one line on disk; the money spent is the sum over the lines."""

from __future__ import annotations

import glob
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb.hosted.ledger import LEDGER, BatchLedger
from telco_nb.hosted.lines import StoreError, append_lines, check_money
from telco_nb.study.record import parse_line, write_bytes
from telco_nb.study.seal import require_unchanged


class AttemptStore:
    """Append-only JSONL, one line per attempt; each write is flushed to the disk before anything else happens.

    Args:
        path: the file; the first `append` creates it.
        key: the field of a line that holds the request's id.

    Opening writes nothing, because another process may be writing a line at this moment. A last line that a kill cut
    short is skipped, so its request is sent again; the next `append` removes it. Any other unreadable line is skipped
    here, and refused by `spent_usd`, so that nothing is sent.

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


def store_for(root: Path, target: Path | None, name: str) -> Path:
    """The file of a store to work with: a study's, or for results that go elsewhere a copy there: the record stays.

    Args:
        root: the study's folder.
        target: the folder of the results; None for the study itself. A copy gets the lines that it lacks.
        name: the file's path below either.

    Raises:
        RecordError: a sealed line of the study's store was changed.
    """
    require_unchanged(root, f"{glob.escape(str(Path(name).parent))}/*")
    store, copy = root / name, (target or root) / name
    if copy != store and store.is_file():
        known = set(copy.read_bytes().splitlines(keepends=True)) if copy.is_file() else set()
        lines = store.read_bytes().splitlines(keepends=True)
        append_lines(copy, [line for line in lines if line.endswith(b"\n") and line not in known])
    if copy != store and store.with_name(LEDGER).is_file():  # what is under way is not asked for by hand either
        write_bytes(copy.with_name(LEDGER), store.with_name(LEDGER).read_bytes())
    return copy


def cost_usd(attempt: Mapping[str, Any]) -> float:
    """Dollars that an attempt cost; if its answer was lost, the most that it may have cost."""
    return attempt.get("usd") or attempt.get("usd_at_most") or 0.0


def spent_usd(root: Path) -> float:
    """Dollars that all stores of the study in `root` have recorded so far, at most, batches under way included.

    Raises StoreError if an amount cannot be trusted, or a line cannot be read: then the sum is not known. A last line
    that a kill cut short does not count.
    """
    stores = sorted(root.glob("*/store/*.jsonl"))
    ledgers = [BatchLedger(path) for path in stores if path.name == LEDGER]
    answered = (line for p in stores if p.name != LEDGER for line in _checked_lines(p, all_readable=True))
    return sum(map(cost_usd, filter(None, answered))) + sum(ledger.usd_at_most for ledger in ledgers)


def read_attempts(store: Path) -> Iterator[dict[str, Any]]:
    """The readable lines of a store; none if there is no store. Raises StoreError for a bad amount of dollars."""
    return (line for line in _checked_lines(store) if line is not None)


def _checked_lines(path: Path, all_readable: bool = False) -> Iterator[dict[str, Any] | None]:
    """The lines of a store, None for one that cannot be read. With `all_readable` only a torn last line may be one."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, data in enumerate(stream, 1):
            line = parse_line(data)
            if line is not None:
                check_money(line, f"{path}:{number}")
            elif all_readable and data.endswith(b"\n") and data.strip():
                raise StoreError(
                    f"{path}:{number}: no JSON object, or one that gives a name twice, so what it cost is not known, "
                    "and the cap counts on it. Nothing is sent. Restore the file from a copy; or delete the line, if "
                    "the provider says that it cost nothing."
                )
            yield line
