"""A folder of unpacked weights: the hashes of its files, recorded when it is made and compared before it is used.

Hashing a gigabyte takes a second, so a stamp beside the files notes size, times and inode of each file that was found
right, and what has the same stamp is not read again. A program that writes to a file or replaces it changes the stamp.
Bytes that decay on the disk, and a writer who forges the stamp, are not noticed.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from telco_nb.study.record import sha256, write_json

RECORD = "source.json"  # where the weights come from, and the hash of every file
STAMP = ".verified.json"

_right: set[str] = set()  # folders that this process, or the one it was forked from, has found right


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Record the hashes of all files of a new folder, with `facts` about their origin."""
    hashes = {name: sha256(folder / name) for name in _files(folder)}
    write_json(folder / RECORD, facts | {"files": hashes})
    write_json(folder / STAMP, {name: _state(folder / name) for name in hashes})


def recorded_hashes(folder: Path) -> dict[str, str] | None:
    """The recorded hashes by file; None for a folder that has no such record."""
    files = _read_json(folder / RECORD, {}).get("files")
    return files if isinstance(files, dict) and files else None


def find_change(folder: Path) -> str | None:
    """What differs from the record, in words; None if nothing does. Files are read once per process at most."""
    if str(folder) in _right:
        return None
    recorded, stamps = recorded_hashes(folder) or {}, _read_json(folder / STAMP, {})
    present = _files(folder)
    if unknown := sorted(present - recorded.keys()):
        return f"{unknown[0]} does not belong there"
    if missing := sorted(recorded.keys() - present):
        return f"{missing[0]} is missing"
    states = {name: _state(folder / name) for name in recorded}
    for name in recorded:
        if stamps.get(name) != states[name] and sha256(folder / name) != recorded[name]:
            return f"{name} was changed"
    if stamps != states:
        with contextlib.suppress(OSError):  # a cache that may not be written is hashed each time
            write_json(folder / STAMP, states)
    _right.add(str(folder))
    return None


def _files(folder: Path) -> set[str]:
    paths = (p for p in folder.rglob("*") if p.is_file() and STAMP not in p.name)  # also one that is being written
    return {p.relative_to(folder).as_posix() for p in paths} - {RECORD}


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_json(path: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise
    return value if isinstance(value, dict) else otherwise
