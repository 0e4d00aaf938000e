"""Reads which of the project's modules a Python source imports.

Content keys follow these imports, and a test holds the order of the rooms with them. Only text is read: nothing is
imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from telco_nb import ROOT

PACKAGE = "telco_nb"


def imported_files(source: str, root: Path = ROOT) -> list[Path]:
    """The files of the project that a source imports directly, each once; imports inside functions count too.

    `from telco_nb.judge.store import VerdictStore` gives `telco_nb/__init__.py`, `telco_nb/judge/__init__.py` and
    `telco_nb/judge/store.py`, below `root`: all that Python runs for it.
    Raises ValueError for a relative import, which this reader does not follow.
    """
    return list(dict.fromkeys(path for name in _imported_names(source) for path in _module_files(name, root)))


def all_files(source: str, root: Path = ROOT) -> dict[Path, str]:
    """The text of every file of the project that a source imports, directly or through others."""
    texts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        for path in imported_files(waiting.pop(), root):
            if path not in texts:
                texts[path] = path.read_text(encoding="utf-8")
                waiting.append(texts[path])
    return texts


def sources_sha256(source: str) -> str:
    """Hash of every file of the project that a source imports, for what is redone when its code has changed."""
    texts = all_files(source)
    return hashlib.sha256("".join(texts[path] for path in sorted(texts)).encode()).hexdigest()


def source_states(root: Path = ROOT) -> tuple[tuple[str, int, int], ...]:
    """Path, time of the last change (ns) and size (bytes) of each module, and of each file in telco_nb/data itself."""
    data, states = os.path.join(root, PACKAGE, "data"), []  # noqa: PTH118 - it runs before every step: Path is slow
    for folder, folders, names in os.walk(os.path.join(root, PACKAGE)):  # noqa: PTH118
        folders[:] = [] if folder == data else [name for name in folders if name != "__pycache__"]
        paths = [f"{folder}/{name}" for name in names if folder == data or name.endswith(".py")]
        found = [(path, os.stat(path)) for path in paths]  # noqa: PTH116
        states += [(path, state.st_mtime_ns, state.st_size) for path, state in found]
    return tuple(sorted(states))


@cache
def _imported_names(source: str) -> tuple[str, ...]:
    # Magics are not Python; none of them imports a module of the project.
    plain = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    return tuple(name for node in ast.walk(ast.parse(plain)) for name in _names(node))


def _names(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may mean: of modules, or of something inside a module."""
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"line {node.lineno}: write a relative import as `from {PACKAGE}...`")
        found = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    yield from (name for name in found if name.partition(".")[0] == PACKAGE)


def _module_files(name: str, root: Path) -> Iterator[Path]:
    folder = root
    for part in name.split("."):
        if (folder / part / "__init__.py").is_file():
            folder = folder / part
            yield folder / "__init__.py"
        else:
            if (folder / f"{part}.py").is_file():
                yield folder / f"{part}.py"
            return
