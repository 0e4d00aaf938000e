"""Sensors of energy that read what a test plants: a clock, a card behind NVML, powercap and battery folders."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from telco_nb.lora import energy, gpu_state, power_samples, sensors

MEMORY_BYTES = {"GPU-1": 80, "MIG-1": 20}


class Clock:
    """Time that passes only in `spend`; the true energy of the work is known at every moment."""

    def __init__(self, rest_w: float = 60.0) -> None:
        self.times, self.joules, self.rest_w = [0.0], [0.0], rest_w

    def perf_counter(self) -> float:
        return self.times[-1]

    def monotonic(self) -> float:
        return self.times[-1]

    def sleep(self, seconds: float) -> None:
        """Let the machine rest."""
        self.spend(seconds, self.rest_w)

    def spend(self, seconds: float, watts: float) -> None:
        """Let work of this power run."""
        self.times.append(self.times[-1] + seconds)
        self.joules.append(self.joules[-1] + seconds * watts)

    def energy_j(self, at: float | np.ndarray) -> float | np.ndarray:
        """The true energy spent until a time."""
        return np.interp(at, self.times, self.joules)


class Played:
    """Moments at which a sensor is read, and what it tells at each: known before, so 1,000 windows take seconds."""

    def __init__(self) -> None:
        self.seconds, self.watts, self.now = np.zeros(1), np.ones(1), 0

    def perf_counter(self) -> float:
        return float(self.seconds[self.now])

    def read_w(self, *_: object) -> float:
        return float(self.watts[self.now])

    def window(self, seconds: np.ndarray, watts: np.ndarray) -> energy.Meter:
        """A meter after a window from the first of these moments to the last one."""
        self.seconds, self.watts, self.now = seconds, watts, 0
        meter = energy.Meter((2.0, 5.0, 12.0), 0.3)
        meter.start()
        for self.now in range(1, len(seconds) - 1):
            for sampler in meter._samplers.values():
                sampler.sample()
        self.now = len(seconds) - 1
        meter.stop()
        return meter


class Card:
    """An NVIDIA card: its counter and power are renewed every `step_s` and are wrong by the factor `gain`."""

    def __init__(self, clock: Clock, step_s: float = 0.1):
        self.clock, self.step_s, self.gain, self.reset_j = clock, step_s, 1.0, 0.0

    def counter_mj(self, _: object) -> int:
        renewed = self.clock.perf_counter() // self.step_s * self.step_s
        return round(1e3 * (self.gain * self.clock.energy_j(renewed) + 1e6 - self.reset_j))

    def power_mw(self, _: object) -> int:
        return round(1e3 * float(reported_w(self.clock, np.array(self.clock.perf_counter()), self.gain)))


def reported_w(clock: Clock, at: np.ndarray, gain: float, every_s: float = 0.1, mean_s: float = 0.025) -> np.ndarray:
    """What a card reports at these times: every 100 ms anew, the mean of only the last 25 ms (as on A100 and H100)."""
    renewed = at // every_s * every_s
    spent = clock.energy_j(renewed) - clock.energy_j(renewed - mean_s)
    return gain * np.asarray(spent) / mean_s


def not_supported(*_: object) -> int:
    raise RuntimeError("Not Supported")


def install_nvml(monkeypatch: pytest.MonkeyPatch, uuid: str = "1", **functions: object) -> SimpleNamespace:
    """Let torch see one card, and NVML answer for it; functions of NVML can be replaced."""
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceIsMigDeviceHandle=lambda handle: int(handle.startswith("MIG-")),
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: handle.replace("MIG-", "GPU-"),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=MEMORY_BYTES[handle]),
        nvmlDeviceGetName=lambda _: "Test GPU",
        nvmlDeviceGetTotalEnergyConsumption=lambda _: 1_000_000,
        nvmlDeviceGetPowerUsage=not_supported,
    )
    fake.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(energy, "nvml_handle", sensors.nvml_handle)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    return fake


class NoTracker:
    """In carbontracker's place, where time is not real."""

    def __init__(self, _: object):
        pass

    def start(self) -> None:
        pass

    def pause(self) -> tuple[float, float]:
        return float("nan"), float("nan")

    def close(self) -> None:
        pass


def install_clock(monkeypatch: pytest.MonkeyPatch, clock: Any = None) -> Any:
    """Let the meter's time be that of the returned clock; threads that sample do not run."""
    clock = clock or Clock()
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(power_samples, "time", clock)
    monkeypatch.setattr(gpu_state, "time", clock)
    monkeypatch.setattr(power_samples.Periodic, "start", lambda _: None)
    monkeypatch.setattr(energy, "Carbontracker", NoTracker)
    return clock


def write_zone(folder: Path, name: str, microjoules: int, range_uj: int = 1_000_000_000) -> None:
    """A powercap folder of one counter."""
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{text}\n")


def spend(folder: Path, joules: float) -> None:
    """Let a powercap counter count on, around its end."""
    file, end = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
    file.write_text(str((int(file.read_text()) + round(joules * 1e6)) % end))


def write_supply(folder: Path, **files: object) -> None:
    """A folder of /sys/class/power_supply."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
