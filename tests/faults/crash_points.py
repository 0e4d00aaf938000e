"""Counts every change of a file below one folder, and stops the process at a chosen one.

`install()` must run before anything else is imported: it replaces `open`, `os.write`, `os.replace`, `os.rename`,
`os.fsync`, `os.unlink` and `shutil.rmtree` for the whole process and those that it forks. `watch` then names the
folder, a log that gets one line per change, and the fault. A point is `kind path n`: the n-th change of that kind of
that path in a run. What libraries write without Python (Parquet, safetensors) is not seen; it all lies in work folders
without a manifest.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOW = {
    "append": ("before", "torn", "after"), "write": ("before", "torn", "after"), "rmtree": ("before", "torn", "after"),
    "replace": ("before", "after"), "fsync": ("before", "after"), "unlink": ("before", "after"),
}  # fmt: skip
EXIT_CODE = 99


@dataclass
class Watch:
    """What to count, and where to stop: `how` is before, torn or after; with `whole` the runner is killed as well."""

    folder: str
    log: str
    point: str | None = None
    how: str = "before"
    whole: bool = False
    runner: int = 0


_watch: Watch | None = None
_inside = False  # a removal of a folder consists of many
_real: dict[str, Any] = {}


def watch(plan: Watch) -> None:
    """Start to count below a folder, in this process and those that it forks."""
    global _watch
    _watch = plan
    os.close(_real["os.open"](plan.log, os.O_CREAT | os.O_WRONLY, 0o600))


def install() -> None:
    """Replace the functions that change files."""
    _real.update({"open": io.open, "rmtree": shutil.rmtree, "os.open": os.open})
    for name in ("replace", "fsync", "unlink", "write"):
        _real[name] = getattr(os, name)
    os.replace = os.rename = _replace
    os.unlink = os.remove = lambda path, **more: _unlink(path, more)
    os.write = _write
    os.fsync = lambda file: _change("fsync", _path_of(file), lambda: _real["fsync"](file))
    shutil.rmtree = _rmtree
    io.open = builtins.open = _open


def _replace(src: Any, dst: Any, **more: Any) -> None:
    _change("replace", dst, lambda: _real["replace"](src, dst, **more))


def _unlink(path: Any, more: dict[str, Any]) -> None:
    exists = not more.get("dir_fd") and os.path.lexists(path)  # what is not there cannot be half removed
    return _change("unlink" if exists else None, path, lambda: _real["unlink"](path, **more))


def _write(file: int, data: Any) -> int:
    """A write to what `os.open` has opened, such as the log of calls."""
    half = memoryview(data)[: len(data) // 2]
    act, torn = (lambda part=part: _real["write"](file, part) for part in (data, half))
    return _change("append", _path_of(file), act, torn)


def _path_of(file: Any) -> str:
    return str(Path(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").readlink())


def _relative(path: Any) -> str | None:
    """The path below the watched folder, without the process id that temporary names carry; None elsewhere."""
    if _watch is None or isinstance(path, int):
        return None
    whole = Path(os.fsdecode(path)).absolute()
    if not whole.is_relative_to(_watch.folder) or str(whole) == _watch.folder:
        return None
    return re.sub(r"\.\d+\.(tmp|work|old)\b", r".PID.\1", str(whole.relative_to(_watch.folder)))


def _change(kind: str | None, path: Any, act: Any, torn: Any = None) -> Any:
    """Note a change and do it, unless the fault says otherwise."""
    relative = None if kind is None or _inside else _relative(path)
    how = _arrive(f"{kind} {relative}") if relative else None
    if how == "before":
        _stop()
    if how == "torn":
        torn()
        _stop()
    result = act()
    if how == "after":
        _stop()
    return result


def _arrive(what: str) -> str | None:
    """Write a point to the log; returns how to fail at it, if this is the one."""
    assert _watch
    file = _real["os.open"](_watch.log, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        seen = os.pread(file, 1 << 24, 0).decode().splitlines()
        point = f"{what} {1 + sum(line.rpartition(' ')[0] == what for line in seen)}"
        _real["write"](file, f"{point}\n".encode())
    finally:
        os.close(file)
    return _watch.how if point == _watch.point else None


def _stop() -> None:
    assert _watch
    if _watch.whole:
        os.kill(_watch.runner, signal.SIGKILL)
    os._exit(EXIT_CODE)


@contextmanager
def _one_change():
    global _inside
    _inside = True
    try:
        yield
    finally:
        _inside = False


def _rmtree(path: Any, *arguments: Any, **options: Any) -> None:
    def act() -> None:
        with _one_change():
            _real["rmtree"](path, *arguments, **options)

    def half() -> None:
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        for file in files[: (len(files) + 1) // 2]:
            _real["unlink"](file)

    _change("rmtree" if os.path.lexists(path) else None, path, act, half)


class _CountingFile(io.FileIO):
    """A file whose every write to the system is a point."""

    kind = "write"

    def write(self, data: Any) -> int:
        half = memoryview(data)[: len(data) // 2]
        return _change(self.kind, self.name, lambda: super(_CountingFile, self).write(data), lambda: self._put(half))

    def _put(self, data: Any) -> None:
        super().write(data)


def _open(file: Any, mode: str = "r", buffering: int = -1, encoding=None, errors=None, newline=None, *rest, **more):
    if not set(mode) & set("wax+") or _relative(file) is None or rest or more:
        return _real["open"](file, mode, buffering, encoding, errors, newline, *rest, **more)
    raw = _CountingFile(file, mode.replace("b", "").replace("t", ""))
    raw.kind = "append" if "a" in mode else "write"
    buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
