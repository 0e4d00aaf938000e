"""Energy of a window of work: measured where a sensor exists, otherwise an interval that says it is an estimate.

The primary reading is the device's own counter (NVML on NVIDIA cards, RAPL on bare-metal Intel and AMD). Without one,
the processor's energy is modelled from CPU time and declared watts per core. carbontracker watches the same window.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.study.machine import AT_ONCE_VARIABLE, device_facts

RAPL = Path("/sys/class/powercap")
JOULES_PER_WH = 3600.0
# Shorter windows hold too few sensor updates (NVML ~10/s, RAPL ~1000/s); the CPU-time model only needs its clock.
SHORTEST_WINDOW_S = {"nvml_energy_counter": 20.0, "rapl": 10.0, "cpu_time_model": 1.0}
SENSOR_ACCURACY = 0.05  # of NVML counters on data-centre cards, as published; taken for RAPL too, a guess
MAX_DISAGREEMENT = 0.05  # ratio to carbontracker's figure from which on a reader is warned
WEAKEST_LAST = ("measured", "external", "allocated", "estimated", "none")
SHOWN_COLUMNS = [  # columns of a statement that its reader sees in the notebook; the table on disk has all
    "component", "kind", "source", "gross_j", "low_j", "high_j", "window_s", "carbontracker_j", "valid",
    "invalid_reason",
]  # fmt: skip


def rapl_domains() -> list[Path]:
    """Processor packages whose energy counter this process may read now."""
    return [
        d for d in sorted(RAPL.glob("intel-rapl:?")) if os.access(d / "energy_uj", os.R_OK) and _read_microjoules(d) > 0
    ]


def _read_microjoules(domain: Path, name: str = "energy_uj") -> int:
    return int((domain / name).read_text())


def nvml_handle() -> Any | None:
    """NVML handle of the CUDA device in use, matched by UUID; None without an NVIDIA card or driver."""
    import torch

    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


class Meter:
    """Accumulates time, CPU time and sensor readings over one or more windows.

    `watts` are (low, mid, high) per busy core, `idle_share` the share of it that an idle core draws: declared
    assumptions, used only where no sensor is readable.
    """

    def __init__(self, watts: tuple[float, float, float], idle_share: float):
        self.watts, self.idle_share = watts, idle_share
        self.cores, self.at_once = device_facts()["cores"], int(os.environ.get(AT_ONCE_VARIABLE, "1"))
        self.rapl, self.gpu = rapl_domains(), nvml_handle()
        self.tracker = _Carbontracker(self.gpu)
        self.total = dict.fromkeys(("window_s", "cpu_s", "rapl_j", "gpu_j", "tracker_cpu_s", "tracker_gpu_j"), 0.0)
        self.n_windows = 0
        self._mark: dict[str, Any] | None = None

    def start(self) -> None:
        """Open a window; does nothing if one is open."""
        if self._mark is None:
            self.tracker.start()
            self._mark = self._snapshot()

    def pause(self) -> None:
        """Close the open window and add it up; does nothing if none is open."""
        if self._mark is None:
            return
        before, after = self._mark, self._snapshot()
        self._mark = None
        self.total["window_s"] += after["time"] - before["time"]
        self.total["cpu_s"] += after["cpu"] - before["cpu"]
        self.total["gpu_j"] += after["gpu_j"] - before["gpu_j"]
        for domain, first, last in zip(self.rapl, before["rapl"], after["rapl"], strict=True):
            wrapped = last < first
            self.total["rapl_j"] += (
                last - first + (_read_microjoules(domain, "max_energy_range_uj") if wrapped else 0)
            ) / 1e6
        cpu_s, gpu_j = self.tracker.pause()
        self.total["tracker_cpu_s"] += cpu_s
        self.total["tracker_gpu_j"] += gpu_j
        self.n_windows += 1

    def stop(self) -> None:
        self.pause()
        self.tracker.close()

    def readings(self) -> dict[str, float]:
        """Totals so far, to be kept beside a checkpoint."""
        return {**self.total, "n_windows": self.n_windows}

    def restore(self, readings: dict[str, float]) -> None:
        """Go on from the totals of an earlier process."""
        self.n_windows = int(readings["n_windows"])
        self.total = {name: float(readings[name]) for name in self.total}

    def _snapshot(self) -> dict[str, Any]:
        gpu_j = 0.0
        if self.gpu is not None:
            import pynvml
            import torch

            torch.cuda.synchronize()
            gpu_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu) / 1e3
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        return {
            "time": time.perf_counter(),
            "cpu": cpu,
            "gpu_j": gpu_j,
            "rapl": [_read_microjoules(d) for d in self.rapl],
        }

    def _watts(self, watts_per_core: float, utilisation: float) -> float:
        """Power of the cores: idle part, shared by the jobs that run at once, plus the busy part times utilisation."""
        busy = (1 - self.idle_share) * utilisation
        return watts_per_core * self.cores * (self.idle_share / self.at_once + busy)

    @property
    def utilisation(self) -> float:
        """Share of the cores' time that this process used, 0-1."""
        return min(1.0, self.total["cpu_s"] / (self.total["window_s"] * self.cores)) if self.total["window_s"] else 0.0

    def statement(self, window: str) -> pd.DataFrame:
        """One row per component (cpu, gpu, total) of this window, every value with its kind and source."""
        rows = [self._cpu_row(), self._gpu_row()]
        present = [row for row in rows if row["kind"] != "none"]
        total = {name: sum(r[name] for r in present) for name in ("gross_j", "low_j", "high_j")}
        kinds = [r["kind"] for r in present]
        total |= {
            "component": "total",
            "kind": max(kinds, key=WEAKEST_LAST.index),
            "source": " + ".join(r["source"] for r in present),
            "idle_w": sum(r["idle_w"] for r in present) if all(r["idle_w"] is not None for r in present) else None,
            "net_j": sum(r["net_j"] for r in present) if all(r["net_j"] is not None for r in present) else None,
            "valid": all(r["valid"] for r in present),
            "invalid_reason": "; ".join(r["invalid_reason"] for r in present if r["invalid_reason"]) or None,
        }
        common = {"window": window, "scope": "work window", "window_s": self.total["window_s"]}
        common |= {
            "n_samples": self.n_windows,
            "n_repeats": 1,
            "utilisation": self.utilisation,
            "device": self._device(),
        }
        frame = pd.DataFrame([common | row for row in (*rows, total)])
        # carbontracker's seconds at our own watts, measured or not: so only a different window makes a difference.
        share = self.total["tracker_cpu_s"] / self.total["window_s"] if self.total["window_s"] else math.nan
        tracked = rows[0]["gross_j"] * share + self.total["tracker_gpu_j"]
        frame["carbontracker_j"] = [None, None, tracked]
        ratio = tracked / total["gross_j"] if total["gross_j"] else math.nan
        frame["carbontracker_pue_removed_ratio"] = [None, None, ratio]
        return frame

    def _device(self) -> str:
        if self.gpu is None:
            return device_facts()["cpu"]
        import pynvml

        return pynvml.nvmlDeviceGetName(self.gpu)

    def _cpu_row(self) -> dict[str, Any]:
        if self.rapl:
            row = self._row("cpu", "measured", "rapl", self.total["rapl_j"], idle_w=None)
            shared = {
                "valid": False,
                "invalid_reason": f"cpu: the counter holds all {self.at_once} jobs that ran at once",
            }
            return row | (shared if self.at_once > 1 else {})
        low, mid, high = (self._watts(w, self.utilisation) * self.total["window_s"] for w in self.watts)
        row = self._row("cpu", "estimated", "cpu_time_model", mid, idle_w=self._watts(self.watts[1], 0.0))
        return row | {"low_j": low, "high_j": high}

    def _gpu_row(self) -> dict[str, Any]:
        if self.gpu is None:
            nothing = dict.fromkeys(("gross_j", "idle_w", "net_j", "low_j", "high_j"))
            return {
                "component": "gpu",
                "kind": "none",
                "source": "none",
                "valid": False,
                "invalid_reason": "no GPU",
            } | nothing
        return self._row("gpu", "measured", "nvml_energy_counter", self.total["gpu_j"], idle_w=None)

    def _row(self, component: str, kind: str, source: str, gross_j: float, idle_w: float | None) -> dict[str, Any]:
        shortest = SHORTEST_WINDOW_S[source]
        valid = self.total["window_s"] >= shortest and gross_j > 0
        reason = f"{component}: a window of {self.total['window_s']:.1f} s is under {shortest:.0f} s or reads 0 J"
        return {
            "component": component, "kind": kind, "source": source, "gross_j": gross_j, "idle_w": idle_w,
            "net_j": None if idle_w is None else gross_j - idle_w * self.total["window_s"],
            "low_j": gross_j * (1 - SENSOR_ACCURACY), "high_j": gross_j * (1 + SENSOR_ACCURACY),
            "valid": valid, "invalid_reason": None if valid else reason,
        }  # fmt: skip


def energy_metrics(statement: pd.DataFrame, prefix: str) -> dict[str, Any]:
    """The figure to quote as metrics `<prefix>_energy_wh`, `_low_wh`, `_high_wh`, with its kind and source.

    A measured GPU speaks for itself; otherwise the total does, with its weakest label.
    """
    rows = statement.set_index("component")
    row = rows.loc["gpu" if rows.loc["gpu", "kind"] == "measured" else "total"]
    values = {f"{prefix}_energy_wh": row["gross_j"], f"{prefix}_energy_low_wh": row["low_j"]}
    values |= {f"{prefix}_energy_high_wh": row["high_j"]}
    return {name: float(v) / JOULES_PER_WH for name, v in values.items()} | {
        "energy_kind": row["kind"],
        "energy_source": row["source"],
        "energy_valid": bool(row["valid"]),
        "carbontracker_ratio": float(rows.loc["total", "carbontracker_pue_removed_ratio"]),
    }


def carbontracker_note(statement: pd.DataFrame) -> str:
    """A sentence on carbontracker's figure beside ours, with a warning if they are more than 5 % apart."""
    ratio = statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"]
    text = f"Over the same windows carbontracker reads **{ratio:.3f}** times the total."
    if abs(ratio - 1) <= MAX_DISAGREEMENT:
        return text
    return f"{text} **They are more than {MAX_DISAGREEMENT:.0%} apart**: one of them missed part of the work. Quote neither."


class _Carbontracker:
    """carbontracker over the same windows, silenced, offline, and without its power usage effectiveness.

    Without a readable sensor it would fall back to a name table at half load, or end the process; so it is told that
    the cores draw 1 W, and what it reads are the seconds it saw, which our own model turns into joules: it serves as a
    check of the windows, not as a second opinion on the watts.
    """

    def __init__(self, gpu: Any | None):
        from carbontracker.components.gpu.nvidia import NvidiaGPU
        from carbontracker.emissions.intensity.intensity import IntensityService
        from carbontracker.tracker import CarbonTracker

        # The constructor would ask a web service where this machine stands; there is no option against it.
        IntensityService._fetch_geo_location = lambda _: None
        NvidiaGPU._get_handles = lambda _: [gpu]  # it would read all cards of this machine
        self._silence = io.StringIO()
        with contextlib.redirect_stdout(self._silence), contextlib.redirect_stderr(self._silence):
            self._tracker = CarbonTracker(
                epochs=1_000_000, epochs_before_pred=0, monitor_epochs=-1, interpretable=False, verbose=0,
                components="cpu" if gpu is None else "gpu,cpu",
                sim_cpu=device_facts()["cpu"], sim_cpu_tdp=1.0, sim_cpu_util=1.0,
            )  # fmt: skip
            until = time.monotonic() + 0.1
            while "simulated CPU" not in self._silence.getvalue() and time.monotonic() < until:
                time.sleep(0.002)  # its thread prints that once while it starts
        self._thread = self._tracker.tracker

    def start(self) -> None:
        self._tracker.epoch_start()

    def pause(self) -> tuple[float, float]:
        """(seconds of the cores, joules of the GPU) of the window that ends now."""
        self._tracker.epoch_end()
        read = {c.name: c.energy_usage(self._thread.epoch_times)[-1] * 3.6e6 for c in self._thread.components}
        return float(read["cpu"]), float(read.get("gpu", 0.0))

    def close(self) -> None:
        with contextlib.redirect_stdout(self._silence), contextlib.redirect_stderr(self._silence):
            self._thread.stop()
            self._tracker.intensity_stopper.set()
