"""What makes one window of a card differ from the next: its temperature, its limits, and who else computes on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

LONGEST_COOL_DOWN_S = 300.0
NS_PER_S = 1e9
# NVML's policies that slow a card down (nvmlPerfPolicyType_t); it counts the time that each has done so.
SLOWED_BY = {"power": 0, "heat": 1, "sync_boost": 2, "board_limit": 3, "reliability": 5}


class CardWatch:
    """The state of a card over the windows of a meter: read when the first one opens and when each one closes.

    Args:
        handle: NVML's handle of the card; None without one: then nothing is read and there are no facts.
    """

    def __init__(self, handle: Any | None):
        self._handle = handle
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}

    def open(self) -> None:
        """Read the state before the work, once."""
        if self._handle is not None and not self._before:
            self._before = read_state(self._handle)

    def close(self) -> None:
        """Read the state right after the work of a window."""
        if self._handle is not None:
            self._after = read_state(self._handle)

    def facts(self) -> dict[str, Any]:
        """The state for the record; None for what the card does not tell, and nothing at all without a card.

        Returns:
            `gpu_celsius_before` and `_after` the work; `gpu_power_limit_w`, at which the card slows itself down;
            `gpu_sm_clock_mhz` right after the work; `gpu_slowed_by_<reason>_s`, the seconds between; and
            `gpu_other_processes`, the most that computed on it.
        """
        if not self._after:
            return {}
        before, after = self._before, self._after
        others = [state["other_processes"] for state in (before, after) if state["other_processes"] is not None]
        spent = {reason: _elapsed(before["slowed_s"][reason], after["slowed_s"][reason]) for reason in SLOWED_BY}
        return {
            "gpu_celsius_before": before["celsius"],
            "gpu_celsius_after": after["celsius"],
            "gpu_power_limit_w": after["power_limit_w"],
            "gpu_sm_clock_mhz": after["sm_clock_mhz"],
            "gpu_other_processes": max(others, default=None),
        } | {f"gpu_slowed_by_{reason}_s": seconds for reason, seconds in spent.items()}

    def note(self, cool_to_celsius: float | None = None) -> str:
        """The facts that are a warning, in words (`state_note`)."""
        return state_note(self.facts(), cool_to_celsius)


def read_state(handle: Any) -> dict[str, Any]:
    """Temperature, limit, clock, seconds slowed down by each reason, and other processes; None for what is not told."""
    import pynvml

    def slowed(policy: int) -> float:
        return pynvml.nvmlDeviceGetViolationStatus(handle, policy).violationTime / NS_PER_S

    return {
        "celsius": _told(lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        "power_limit_w": _told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "sm_clock_mhz": _told(lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))),
        "slowed_s": {reason: _told(lambda policy=policy: slowed(policy)) for reason, policy in SLOWED_BY.items()},
        "other_processes": _told(lambda: _others(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }


def _told(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception:  # NVMLError, or an older library that does not know the question
        return None


def _others(processes: list[Any]) -> int | None:
    """Processes besides this one; None if this one is not among them, as in a container that numbers its own."""
    numbers = {process.pid for process in processes}
    return len(numbers) - 1 if os.getpid() in numbers else None


def _elapsed(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else last - first


def cool_down(handle: Any, celsius: float, longest_s: float = LONGEST_COOL_DOWN_S) -> int | None:
    """Wait until the card is no warmer than `celsius`, at most `longest_s` seconds; its temperature then, or None."""
    until = time.monotonic() + longest_s
    while (now := read_state(handle)["celsius"]) is not None and now > celsius and time.monotonic() < until:
        time.sleep(1.0)
    return now


def state_note(facts: Mapping[str, Any], cool_to_celsius: float | None = None) -> str:
    """Warnings: what slowed the card down, who shared it, and that it was not cool when the work began.

    Args:
        facts: of `CardWatch.facts`.
        cool_to_celsius: what it should have cooled down to.
    """
    slowed = [(reason.replace("_", " "), facts.get(f"gpu_slowed_by_{reason}_s") or 0.0) for reason in SLOWED_BY]
    told = ", ".join(f"{seconds:.1f} s by {reason}" for reason, seconds in slowed if seconds > 0)
    notes = [f"**The card was slowed down**: {told}."] if told else []
    others = facts.get("gpu_other_processes") or 0
    if others:
        names = "other process" if others == 1 else "other processes"
        notes.append(f"**{others} {names} computed on the card**: the energy is not of this work alone.")
    began = facts.get("gpu_celsius_before")
    if cool_to_celsius is not None and began is not None and began > cool_to_celsius:
        notes.append(f"**The card began at {began} degrees Celsius**, warmer than cool_down_celsius.")
    return " ".join(notes)
