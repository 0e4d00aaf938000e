"""Main memory that this process may still use: the least of what the machine has left and of every limit on it."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes; version 1 writes "no limit" as a number near 2^63


class Files(NamedTuple):
    """The files of a control group in one version of them, and the name of a line in `memory.stat`."""

    limits: tuple[str, ...]
    use: str
    kills: str
    idle_cache: str  # the part of the use that the system gives back at once


VERSION_1 = Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "memory.oom_control", "total_inactive_file")
VERSION_2 = Files(("memory.max", "memory.high"), "memory.current", "memory.events", "inactive_file")


def free_main_memory(processes: int = 1) -> float:
    """Free bytes for each of `processes` processes.

    They share what the machine and the control groups have left; a limit of the address space is each one's own.
    """
    return max(0.0, min(_free_address_space(), _free_together() / processes))


def _free_together() -> float:
    """Free bytes of the machine or, if one has fewer, of a control group around this process."""
    import psutil

    groups = (_free_in_group(folder, files) for folder, files in control_groups())
    return float(min([psutil.virtual_memory().available, *(free for free in groups if free is not None)]))


def _free_address_space() -> float:
    import psutil

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return math.inf if limit == resource.RLIM_INFINITY else float(limit - psutil.Process().memory_info().vms)


def control_groups() -> Iterator[tuple[Path, Files]]:
    """The folders of this process's memory control group and of all around it, each with the names of its files."""
    for line in _text(MEMBERSHIP).splitlines():  # number:controllers:path; version 2 names no controllers
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, files = CONTROL_GROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            top, files = CONTROL_GROUPS / "memory", VERSION_1
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield group, files


def _free_in_group(folder: Path, files: Files) -> int | None:
    """Bytes that a control group may still take; None without a limit. Its idle file cache counts as free."""
    numbers = [_number(_text(folder / name)) for name in files.limits]
    limits = [number for number in numbers if number is not None and number < UNLIMITED]
    use = _number(_text(folder / files.use))
    if not limits or use is None:
        return None
    return min(limits) - use + (_entry(folder / "memory.stat", files.idle_cache) or 0)


def oom_kills() -> int:
    """How many processes the system has killed for lack of memory; 0 if it does not count them.

    The nearest control group that counts them is asked, else the whole machine.
    """
    paths = [folder / files.kills for folder, files in control_groups()]
    counts = (_entry(path, "oom_kill") for path in (*paths, Path("/proc/vmstat")))
    return next((count for count in counts if count is not None), 0)


def _entry(path: Path, name: str) -> int | None:
    """The number of a line such as `oom_kill 3`; None if there is none."""
    lines = (line.partition(" ") for line in _text(path).splitlines())
    return next((_number(value) for key, _, value in lines if key == name), None)


def _text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*\d{1,20}\s*", text) else None
