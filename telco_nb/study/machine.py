"""Facts about this machine, this process and the state of the code, as records and plans show them."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from telco_nb import ROOT

AT_ONCE_VARIABLE = "TELCO_NB_JOBS_AT_ONCE"  # how many jobs share the machine's processors; unset: one
NODE_VARIABLE = "TELCO_NB_NODE"  # the node of a cluster on which a job runs; unset: no cluster


def home_folder() -> Path | None:
    """The user's home folder; None where neither HOME nor the list of users names one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


@cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the working tree; both None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


@cache
def device_facts() -> dict[str, Any]:
    """Processor name, cores this process may use, memory, operating system, and the NVIDIA cards with their driver.

    On a cluster `node` is the node's name. `visible_gpus` are the numbers of the cards that this process may use; None
    where nothing restricts it.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.M)
        name = match.group(1) if match else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = f"{platform.system()} {platform.release()}"
    place = {"node": os.environ.get(NODE_VARIABLE), "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    return {"cpu": name, "cores": cores, "memory_bytes": memory, "system": system} | place | gpu_facts()


def device_text(facts: dict[str, Any]) -> str:
    """`device_facts` of this or an older version in words: processor, cores, and the cards where there are any."""
    cards = [card["name"] for card in facts.get("gpus") or []]
    driver = f"driver {facts['gpu_driver']}" if cards and facts.get("gpu_driver") else None
    return ", ".join(filter(None, [str(facts.get("cpu")), f"{facts.get('cores')} cores", *cards, driver]))


def gpu_facts() -> dict[str, Any]:
    """The NVIDIA cards of this machine: "gpus" (name and memory of each), "gpu_driver", "cuda" (of the driver).

    Without a card the list is empty and the others are None; so they are where NVML does not tell.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "gpus": [{"name": str(pynvml.nvmlDeviceGetName(h)), "memory_bytes": _gpu_memory(h)} for h in handles],
            "gpu_driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
    except Exception:  # not installed, no driver, no permission, or a driver that does not know a question
        return {"gpus": [], "gpu_driver": nvidia_driver(), "cuda": None}


def _gpu_memory(handle: Any) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:  # cards that share the main memory
        return None


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded; None without one."""
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found.group(1) if found else None


def peak_memory_bytes(whose: int = resource.RUSAGE_SELF) -> int:
    """Largest resident set so far of this process; with RUSAGE_CHILDREN, of the largest child that has ended."""
    peak = resource.getrusage(whose).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024


def die_with_parent(poll_seconds: float = 0.5) -> None:
    """End this process at once when its parent is gone, so that a killed runner leaves nothing running."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os._exit(130)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()
