"""Lines of JSON on disk: appended whole by one writer at a time, and their amounts of dollars checked."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb.study.record import parse_line, whole_lines_bytes

MONEY = ("usd", "usd_at_most")  # the fields of a line that count as spent


class StoreError(ValueError):
    """A store or ledger holds a line that no sum of money can be trusted with. Exit code 2."""


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Appends whole lines to a file and waits until they are on disk; creates file and folder if need be.

    Writers take turns by a lock on the file, so what precedes without a line feed is of a writer that died: a whole
    JSON object gets its line feed, because its answer may have cost money, and the beginning of one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # closing the file gives it back
        end = whole_lines_bytes(stream)
        stream.seek(end)
        tail = stream.read()
        if tail and parse_line(tail) is None:
            stream.truncate(end)
        elif tail:
            lines = [b"\n", *lines]
        stream.write(b"".join(lines))
        stream.flush()
        os.fsync(stream.fileno())


def check_money(line: Mapping[str, Any], where: str) -> None:
    """Raises StoreError if an amount of dollars in a line is not null or a finite number from 0 up."""
    for name in MONEY:
        value = line.get(name)
        if value is not None and not is_amount(value):
            raise StoreError(
                f"{where}: {name} is {value!r:.40}, not a number of dollars from 0 up, and the cap counts on it. "
                "Restore the file from a copy, or set the amount that the provider billed."
            )


def is_amount(value: Any) -> bool:
    """True for a finite number from 0 up; text and truth values are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False
