"""Main memory that this process may still use: the least of what the machine has left and of every limit on it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes; version 1 writes "no limit" as a number near 2^63
# Files of a control group by version: limits, use, and the cache in that use which the system gives back at once.
FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def free_main_memory(processes: int = 1) -> float:
    """Free bytes for each of `processes` processes: the least of `free_by_limit`, which all but one's own share."""
    found = free_by_limit()
    own = found.pop("RLIMIT_AS", float("inf"))
    return max(0.0, min(own, min(found.values()) / processes))


def free_by_limit() -> dict[str, float]:
    """Free bytes by what limits them: the machine, each control group around this process, its address space."""
    import psutil

    found = {"machine": float(psutil.virtual_memory().available)}
    for folder, version in control_groups():
        free = _free_in_group(folder, version)
        if free is not None:
            found[str(folder)] = free
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found["RLIMIT_AS"] = float(limit - psutil.Process().memory_info().vms)
    return found


def control_groups() -> Iterator[tuple[Path, int]]:
    """The folders of this process's memory control group and of all around it, each with its version, 1 or 2."""
    for line in (_text(MEMBERSHIP) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top, version = (CONTROL_GROUPS / "memory", 1) if controllers else (CONTROL_GROUPS, 2)
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield group, version


def _free_in_group(folder: Path, version: int) -> float | None:
    """Bytes that a control group may still take; None without a limit. Its idle file cache counts as free."""
    limit_names, use_name, cache_name = FILES[version]
    limits = [n for n in (_number(folder / name) for name in limit_names) if n is not None and n < UNLIMITED]
    use = _number(folder / use_name)
    if not limits or use is None:
        return None
    cache = re.search(rf"^{cache_name} (\d+)$", _text(folder / "memory.stat") or "", flags=re.M)
    return float(min(limits) - use + (int(cache.group(1)) if cache else 0))


def oom_kills() -> int:
    """How many processes the system has killed for lack of memory; 0 if it does not count them."""
    files = [
        folder / ("memory.events" if version == 2 else "memory.oom_control") for folder, version in control_groups()
    ]
    for path in (*files, Path("/proc/vmstat")):
        if match := re.search(r"^oom_kill (\d+)$", _text(path) or "", flags=re.M):
            return int(match.group(1))
    return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if re.fullmatch(r"\d{1,20}", text) else None
