"""Ways in which a file that a step wrote can be damaged."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd


def _other_table() -> bytes:
    stream = io.BytesIO()
    pd.DataFrame({"something": [1]}).to_parquet(stream)
    return stream.getvalue()


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a brace": lambda data: b"{",
    "a list": lambda data: b"[]",
    "bytes that are no text": lambda data: b"\xff\xfe\xfd" * 40,
    "a table with other columns": lambda data: _other_table(),
    "zeros after the beginning": lambda data: data[:8] + bytes(len(data)),
}


def damage(path: Path, way: str) -> None:
    """Damage a file in one of the ways."""
    path.write_bytes(DAMAGES[way](path.read_bytes()))
