"""Energy of a window of work: measured where a sensor exists, otherwise an interval that is labelled as an estimate.

The primary reading is the device's own counter (NVML on NVIDIA cards, RAPL on bare-metal Intel and AMD). Without one,
the CPU's energy is modelled from CPU time and assumed watts per core. carbontracker watches the same window. A sensor
that fails makes its component invalid, with the reason; it never ends the work that it measures.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.lora.sensors import SensorError, elapsed_j, find_rapl, gpu_name, has_power, nvml_handle, read_gpu_j
from telco_nb.study.machine import AT_ONCE_VARIABLE, device_facts

RAPL = Path("/sys/class/powercap")
JOULES_PER_WH = 3600.0
# Shorter windows hold too few sensor updates (NVML ~10/s, RAPL ~1000/s); the CPU-time model only needs its clock.
SHORTEST_WINDOW_S = {"nvml_energy_counter": 20.0, "rapl": 10.0, "cpu_time_model": 1.0}
SENSOR_ACCURACY = 0.05  # published for NVML counters on data-centre cards; for RAPL a guess
MAX_DISAGREEMENT = 0.05  # between carbontracker's figure and ours, relative; beyond it the reader is warned
KINDS = ("measured", "external", "allocated", "estimated", "none")  # from the strongest to the weakest
SHOWN_COLUMNS = {  # columns of a statement that a notebook shows, with their headers; the saved table has all
    "component": "component", "kind": "kind", "source": "source", "gross_j": "energy, Wh", "low_j": "low, Wh",
    "high_j": "high, Wh", "window_s": "window, s", "carbontracker_j": "carbontracker, Wh", "valid": "valid",
    "invalid_reason": "why it is not valid",
}  # fmt: skip


class Meter:
    """Adds up time, CPU time and sensor readings over one or more windows: `start`, `pause`, ..., `stop`, `statement`.

    `total["window_s"]` is the time in seconds. The assumptions are used only where no sensor is readable.

    Args:
        watts: power of a busy core in W, assumed: (low, middle, high).
        idle_share: share of it that an idle core draws, 0-1.
    """

    def __init__(self, watts: tuple[float, float, float], idle_share: float):
        self.watts, self.idle_share = watts, idle_share
        self.cores, self.at_once = device_facts()["cores"], int(os.environ.get(AT_ONCE_VARIABLE, "1"))
        zones = find_rapl(RAPL)
        self.rapl, self.apart, self.rapl_note = zones.packages, zones.apart, zones.reason
        self.failures: dict[str, str] = {}  # component: why its sensor gives no figure
        self.gpu = self._find_gpu()
        self.tracker = _Carbontracker(self.gpu if self.gpu is not None and has_power(self.gpu) else None)
        self.total = dict.fromkeys(("window_s", "cpu_s", "rapl_j", "gpu_j", "tracker_cpu_s", "tracker_gpu_j"), 0.0)
        self.apart_j = {zone.name: 0.0 for zone in self.apart}
        self.n_windows = 0
        self._window_start: dict[str, Any] | None = None

    def _find_gpu(self) -> Any | None:
        try:
            gpu = nvml_handle()
            if gpu is not None:
                read_gpu_j(gpu)
            return gpu
        except SensorError as error:
            self.failures["gpu"] = str(error)
            return None

    def start(self) -> None:
        """Open a window; does nothing if one is open."""
        if self._window_start is None:
            self.tracker.start()
            self._window_start = self._snapshot()

    def pause(self) -> None:
        """Close the open window and add it to the totals; does nothing if none is open."""
        if self._window_start is None:
            return
        before, after = self._window_start, self._snapshot()
        self._window_start = None
        for name in ("window_s", "cpu_s", "gpu_j"):
            self.total[name] += after[name] - before[name]
        for zone in self.rapl:
            self.total["rapl_j"] += elapsed_j(zone, before["zones"][zone.name], after["zones"][zone.name])
        for zone in self.apart:
            self.apart_j[zone.name] += elapsed_j(zone, before["zones"][zone.name], after["zones"][zone.name])
        cpu_s, gpu_j = self.tracker.pause()
        self.total["tracker_cpu_s"] += cpu_s
        self.total["tracker_gpu_j"] += gpu_j
        self.n_windows += 1

    def stop(self) -> None:
        """Close the open window and end carbontracker."""
        self.pause()
        self.tracker.close()

    def readings(self) -> dict[str, float | None]:
        """The totals so far, for a checkpoint; None for a component that had no reading in every window."""
        found = {**self.total, **self.apart_j, "n_windows": self.n_windows}
        return {name: None if math.isnan(value) else value for name, value in found.items()}

    def restore(self, readings: Mapping[str, float | None]) -> None:
        """Continue from the totals of an earlier process."""
        self.n_windows = int(_number(readings["n_windows"]))
        self.total = {name: _number(readings[name]) for name in self.total}
        self.apart_j = {name: _number(readings.get(name)) for name in self.apart_j}

    def _snapshot(self) -> dict[str, Any]:
        gpu_j = math.nan if self.gpu is None else self._read("gpu", read_gpu_j, self.gpu)
        cpu_s = sum(os.times()[:4])  # user and system, of this process and its children
        zones = {zone.name: self._read("cpu", zone.read_uj) for zone in self.rapl}
        zones |= {zone.name: self._read(zone.name, zone.read_uj) for zone in self.apart}
        return {"window_s": time.perf_counter(), "cpu_s": cpu_s, "gpu_j": gpu_j, "zones": zones}

    def _read(self, component: str, read: Callable[..., float], *arguments: Any) -> float:
        """A reading; NaN after a failure, which all sums with it, also those of a checkpoint, then show."""
        try:
            return read(*arguments)
        except SensorError as error:
            self.failures.setdefault(component, str(error))
            return math.nan

    def _watts(self, watts_per_core: float, utilisation: float) -> float:
        """Power of the cores: the idle part, shared by jobs that run at once, and the busy part times utilisation."""
        busy = (1 - self.idle_share) * utilisation
        return watts_per_core * self.cores * (self.idle_share / self.at_once + busy)

    @property
    def utilisation(self) -> float:
        """Share of the cores' time that this process used, 0-1."""
        return min(1.0, self.total["cpu_s"] / (self.total["window_s"] * self.cores)) if self.total["window_s"] else 0.0

    def statement(self, window: str) -> pd.DataFrame:
        """The energy of all windows as a table.

        Args:
            window: name of the work, such as "train".

        Returns:
            One row per component (cpu, gpu, total): energy in J (gross_j in the interval low_j to high_j, net_j above
            idle), its kind (one of KINDS) and source, and whether it is valid. Missing values are None, never 0.
            Further rows show counters that the total leaves out, such as `package-0 dram`.
        """
        rows = [self._cpu_row(), self._gpu_row()]
        total = _total_row(rows if self._has_gpu else rows[:1])
        rows += [self._apart_row(name, joules) for name, joules in self.apart_j.items()]
        window_s = self.total["window_s"]
        common = {"window": window, "scope": "work window", "window_s": window_s, "n_samples": self.n_windows}
        common |= {"n_repeats": 1, "utilisation": self.utilisation, "device": self._device_name()}
        frame = pd.DataFrame([common | row for row in (*rows, total)])
        # carbontracker's seconds at our own power, measured or not: a difference means a different window.
        share = self.total["tracker_cpu_s"] / window_s if window_s else math.nan
        tracked = rows[0]["gross_j"] * share + (self.total["tracker_gpu_j"] if self._has_gpu else 0.0)
        ratio = tracked / total["gross_j"] if total["gross_j"] else math.nan
        frame["carbontracker_j"] = [*[None] * len(rows), tracked]
        frame["carbontracker_pue_removed_ratio"] = [*[None] * len(rows), ratio]
        return frame

    @property
    def _has_gpu(self) -> bool:
        return self.gpu is not None or "gpu" in self.failures

    def _device_name(self) -> str:
        return device_facts()["cpu"] if self.gpu is None else gpu_name(self.gpu)

    def _cpu_row(self) -> dict[str, Any]:
        failure = self._failure("cpu", self.total["rapl_j"])
        if self.rapl and not failure:
            row = self._row("cpu", "measured", "rapl", self.total["rapl_j"], idle_w=None)
            reason = f"cpu: the counter holds all {self.at_once} jobs that ran at once"
            return row | ({"valid": False, "invalid_reason": reason} if self.at_once > 1 else {})
        low, middle, high = (self._watts(w, self.utilisation) * self.total["window_s"] for w in self.watts)
        row = self._row("cpu", "estimated", "cpu_time_model", middle, idle_w=self._watts(self.watts[1], 0.0))
        row |= {"low_j": low, "high_j": high, "note": f"no counter: {self.rapl_note}" if self.rapl_note else None}
        return row | ({"valid": False, "invalid_reason": failure} if failure else {})

    def _gpu_row(self) -> dict[str, Any]:
        if not self._has_gpu:
            return _missing_row("gpu", "no GPU")
        if failure := self._failure("gpu", self.total["gpu_j"]):
            return _missing_row("gpu", failure)
        return self._row("gpu", "measured", "nvml_energy_counter", self.total["gpu_j"], idle_w=None)

    def _apart_row(self, name: str, joules: float) -> dict[str, Any]:
        failure = self._failure(name, joules)
        row = _missing_row(name, failure) if failure else self._row(name, "measured", "rapl", joules, idle_w=None)
        return row | {"note": "shown apart: not in the total"}

    def _failure(self, component: str, joules: float) -> str | None:
        """Why a component has no figure of its sensor; None if it has one."""
        if component not in self.failures and not math.isnan(joules):
            return None
        return f"{component}: {self.failures.get(component, 'a reading failed before the training was resumed')}"

    def _row(self, component: str, kind: str, source: str, gross_j: float, idle_w: float | None) -> dict[str, Any]:
        shortest = SHORTEST_WINDOW_S[source]
        valid = self.total["window_s"] >= shortest and gross_j > 0
        reason = f"{component}: a window of {self.total['window_s']:.1f} s is under {shortest:.0f} s or reads 0 J"
        return {
            "component": component, "kind": kind, "source": source, "gross_j": gross_j, "idle_w": idle_w,
            "net_j": None if idle_w is None else gross_j - idle_w * self.total["window_s"],
            "low_j": gross_j * (1 - SENSOR_ACCURACY), "high_j": gross_j * (1 + SENSOR_ACCURACY),
            "valid": valid, "invalid_reason": None if valid else reason, "note": None,
        }  # fmt: skip


def _missing_row(component: str, reason: str) -> dict[str, Any]:
    row = {"component": component, "kind": "none", "source": "none", "valid": False, "invalid_reason": reason}
    return row | dict.fromkeys(("gross_j", "idle_w", "net_j", "low_j", "high_j", "note"))


def _total_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the components, with the weakest kind; None where a component has no value."""
    sums = {}
    for name in ("gross_j", "low_j", "high_j", "idle_w", "net_j"):
        values = [row[name] for row in rows]
        sums[name] = None if None in values else sum(values)
    return sums | {
        "component": "total",
        "kind": max((row["kind"] for row in rows), key=KINDS.index),
        "source": " + ".join(row["source"] for row in rows),
        "valid": all(row["valid"] for row in rows),
        "invalid_reason": "; ".join(row["invalid_reason"] for row in rows if row["invalid_reason"]) or None,
    }


def energy_metrics(statement: pd.DataFrame, prefix: str) -> dict[str, Any]:
    """The headline figure of a statement: of the GPU if it is measured, otherwise the total with its weakest label.

    Args:
        statement: from `Meter.statement`.
        prefix: of the names, such as "train".

    Returns:
        `<prefix>_energy_wh`, `<prefix>_energy_low_wh` and `<prefix>_energy_high_wh` in Wh, energy_kind,
        energy_source, energy_valid and carbontracker_ratio. An energy that is missing is NaN.
    """
    rows = statement.set_index("component")
    row = rows.loc["gpu" if rows.loc["gpu", "kind"] == "measured" else "total"]
    columns = {"energy_wh": "gross_j", "energy_low_wh": "low_j", "energy_high_wh": "high_j"}
    return {f"{prefix}_{name}": _number(row[column]) / JOULES_PER_WH for name, column in columns.items()} | {
        "energy_kind": row["kind"],
        "energy_source": row["source"],
        "energy_valid": bool(row["valid"]),
        "carbontracker_ratio": _number(rows.loc["total", "carbontracker_pue_removed_ratio"]),
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def shown_statement(statement: pd.DataFrame) -> pd.DataFrame:
    """The columns of a statement (`Meter.statement`) that a reader needs, with units in the headers, energies in Wh."""
    joules = [column for column in SHOWN_COLUMNS if column.endswith("_j")]
    in_wh = statement[joules].astype(float) / JOULES_PER_WH
    return statement.assign(**in_wh)[list(SHOWN_COLUMNS)].rename(columns=SHOWN_COLUMNS)


def carbontracker_note(statement: pd.DataFrame) -> str:
    """A sentence that compares carbontracker's figure with ours, and a warning beyond MAX_DISAGREEMENT."""
    ratio = _number(statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"])
    if math.isnan(ratio):
        return "There is no total and reading of carbontracker to compare."
    text = f"Over the same windows carbontracker reads **{ratio:.3f}** times the total."
    if abs(ratio - 1) <= MAX_DISAGREEMENT:
        return text
    warning = (
        f"**They are more than {MAX_DISAGREEMENT:.0%} apart**: one of them missed part of the work. Quote neither."
    )
    return f"{text} {warning}"


class _Carbontracker:
    """carbontracker over the same windows: silent, offline, and without its power usage effectiveness.

    Without a readable sensor it would take the power from a table of names or end the process. So it gets 1 W for all
    cores, and its reading is the number of seconds that it saw. Our own model turns them into joules: this checks the
    windows, not the watts.
    """

    def __init__(self, gpu: Any | None):
        from carbontracker.components.gpu.nvidia import NvidiaGPU
        from carbontracker.emissions.intensity.intensity import IntensityService
        from carbontracker.tracker import CarbonTracker, CarbonTrackerThread

        # The constructor would ask a web service for this machine's location and has no option against it.
        IntensityService._fetch_geo_location = lambda _: None  # ty: ignore[invalid-assignment]  (replaced on purpose)
        NvidiaGPU._get_handles = lambda _: [gpu]  # ty: ignore[invalid-assignment]  (else it reads all of the machine)
        # Both would end the whole process after an error of a sensor.
        for kind in (CarbonTracker, CarbonTrackerThread):
            kind._handle_error = lambda *_: None  # ty: ignore[invalid-assignment]
        self._output = io.StringIO()
        with contextlib.redirect_stdout(self._output), contextlib.redirect_stderr(self._output):
            self._tracker = CarbonTracker(
                epochs=1_000_000, epochs_before_pred=0, monitor_epochs=-1, interpretable=False, verbose=0,
                components="cpu" if gpu is None else "gpu,cpu",
                sim_cpu=device_facts()["cpu"], sim_cpu_tdp=1.0, sim_cpu_util=1.0,
            )  # fmt: skip
            until = time.monotonic() + 0.1
            while "simulated CPU" not in self._output.getvalue() and time.monotonic() < until:
                time.sleep(0.002)  # its thread prints this once at its start
        self._thread = self._tracker.tracker

    def start(self) -> None:
        self._tracker.epoch_start()

    def pause(self) -> tuple[float, float]:
        """(seconds of the cores, joules of the GPU) of the window that ends now; NaN for what it has not read."""
        self._tracker.epoch_end()
        times = self._thread.epoch_times
        if not self._thread.running or not times:
            return math.nan, math.nan
        values = {c.name: c.energy_usage(times)[-1] * 3.6e6 for c in self._thread.components}
        return _number(values.get("cpu")), _number(values.get("gpu"))

    def close(self) -> None:
        with contextlib.redirect_stdout(self._output), contextlib.redirect_stderr(self._output):
            self._thread.stop()
            self._tracker.intensity_stopper.set()
