"""Tests reach loopback alone: what tries more is stopped and fails its test (see `loopback_only/sitecustomize.py`)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from loopback_only.sitecustomize import NOTES, watch

FOLDER = Path(__file__).parent / "loopback_only"


def start_watching() -> Path:
    """Watch this process and the Python that it starts; returns the file of its notes."""
    stream, os.environ[NOTES] = tempfile.mkstemp(prefix="beyond-loopback-")
    os.close(stream)
    os.environ["PYTHONPATH"] = python_path(FOLDER)
    if not hasattr(sys.modules.get("sitecustomize"), "NOTES"):  # a worker has started it itself
        sys.addaudithook(watch)
    return Path(os.environ[NOTES])


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH for a child: these folders, then those of this process, so that the child is watched as well."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(filter(None, [*map(str, folders), *inherited])))


def watched() -> dict[str, str]:
    """What an environment made from nothing needs, so that its Python is watched."""
    return {NOTES: os.environ[NOTES], "PYTHONPATH": str(FOLDER)}


def take_notes() -> list[str]:
    """The lines noted since the last call."""
    path = Path(os.environ[NOTES])
    lines = path.read_text(encoding="utf-8").splitlines() if path.stat().st_size else []
    if lines:
        path.write_text("", encoding="utf-8")
    return lines
