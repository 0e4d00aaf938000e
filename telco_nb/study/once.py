"""Tables that all configurations of a study compute alike, computed by the first of them and read by the others.

A table's file is named by the hash of all that decides about it. It lies in a hidden folder of the study: a working
file, which can be deleted at any time and is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = ".once"
MADE_BY = "made_by"  # of a table's `attrs`: the job that computed it


def hash_of(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def made_once(root: Path, name: str, common: Any, decides: Any, made_by: str, make: Callable[[], DataFrame]) -> Any:
    """The table of `make`, computed only if there is no whole file of it. A second process waits for the first one.

    Args:
        root: the study's folder.
        name: of the table.
        common: what decides about all tables of the study, as its code and data. Files of other ones are deleted.
        decides: what else decides about this one.
        made_by: the job that asks.
        make: computes the table.

    Returns:
        The table. Its `attrs["made_by"]` names the job that computed it, which need not be this one.
    """
    folder = root / FOLDER / hash_of(common)
    path = folder / f"{name}-{hash_of(decides)}.parquet"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (table := _read(path)) is None:
            for old in folder.parent.iterdir():
                if old.is_dir() and old != folder:
                    shutil.rmtree(old, ignore_errors=True)
            made = make()
            made.attrs[MADE_BY] = made_by
            _write(path, made)
            table = _read(path)  # as all others will have it
    return table


def _read(path: Path) -> Any:
    """A whole table, or None: pages that are damaged do not have their checksum."""
    import pandas as pd

    try:
        return pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except (OSError, ValueError):  # not there, cut short, or damaged
        return None


def _write(path: Path, table: DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    table.to_parquet(temporary, engine="pyarrow", index=False, write_page_checksum=True)
    os.replace(temporary, path)
