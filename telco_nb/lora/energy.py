"""Energy of a window of work: measured where a sensor exists, otherwise an interval that is labelled as an estimate.

The primary reading is the device's own counter (NVML on NVIDIA cards, RAPL on bare-metal Intel and AMD). A card without
one tells its power, which is sampled. Without a counter the CPU's energy is modelled from CPU time and assumed watts
per core. An unplugged laptop's battery, or the figure of a wall meter, is that of the whole machine. carbontracker
watches the same window. A sensor that fails makes its component invalid, with the reason; it never ends the work.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.lora import sensors
from telco_nb.lora.gpu_state import CardWatch, cool_down
from telco_nb.lora.power_samples import Integral, Periodic, PowerSampler, PowerSource
from telco_nb.lora.sensors import SensorError, elapsed_j, find_rapl, gpu_name, has_power, nvml_handle, read_gpu_j
from telco_nb.lora.tracker import Carbontracker
from telco_nb.study.machine import AT_ONCE_VARIABLE, device_facts

RAPL = Path("/sys/class/powercap")
BATTERIES = Path("/sys/class/power_supply")
JOULES_PER_WH = 3600.0
# Shorter windows hold too few sensor updates (RAPL ~1000/s; NVML ~10/s, an H100's counter was within 4 % of its power
# over 5 s, within 1 % over 20 s: bench/counter.py); the CPU-time model only needs its clock.
SHORTEST_WINDOW_S = {
    "nvml_energy_counter": 5.0, "nvml_power_samples": 20.0, "rapl": 10.0, "battery_power": 60.0,
    "cpu_time_model": 1.0, "wall_meter": 0.0,
}  # fmt: skip
# Relative. NVIDIA's reference of nvmlDeviceGetPowerUsage: "accurate to within +/- 5%" on Fermi and Kepler cards. For
# newer cards (A100 and H100 sample a quarter of the time: arXiv:2312.02741), for NVML's counter and RAPL it is a guess.
SENSOR_ACCURACY = 0.05
COUNTER_STEP_S = 0.1  # between two updates of NVML's counter; RAPL's 1 ms needs no allowance
# NVML's power is the mean of the past second on many cards. A battery's chip tells its power every few seconds.
GPU_SAMPLE_S, GPU_LAG_S = 0.1, 1.0
BATTERY_SAMPLE_S, BATTERY_LAG_S, BATTERY_ACCURACY, WALL_METER_ACCURACY = 1.0, 5.0, 0.1, 0.02  # guesses
RAPL_WRAP_S = 30.0  # the counter is read at least so often: at 500 W AMD's starts again every 131 s
# Between carbontracker's figure and ours, relative, and with a card GPU_LAG_S of each window more: it samples a mean
# over about the past second, so the first second reads low. On an H100 that is .4 to .7 s of 5.7 to 37 s.
MAX_DISAGREEMENT = 0.05
NO_GPU = "no GPU"  # the reason of a row that nothing has failed for
KINDS = ("measured", "external", "allocated", "estimated", "none")  # from the strongest to the weakest
SHOWN_COLUMNS = {  # columns of a statement that a notebook shows, with their headers; the saved table has all
    "component": "component", "kind": "kind", "source": "source", "gross_j": "energy, Wh", "low_j": "low, Wh",
    "high_j": "high, Wh", "net_j": "above rest, Wh", "window_s": "window, s", "carbontracker_j": "carbontracker, Wh",
    "valid": "valid", "invalid_reason": "why it is not valid",
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
        self.gpu_share = 1.0  # of the card's energy; less for a MIG instance
        self.gpu_samples: PowerSampler | None = None  # only where the card has no energy counter
        self.gpu = self._find_gpu()
        self.battery = self._find_battery()
        tracked = self.gpu is not None and self.gpu_share == 1 and has_power(self.gpu)
        self.tracker = Carbontracker(self.gpu if tracked else None)
        self.idle_w: dict[str, float] = {}  # by component: what its sensor read at rest, in W
        self._set_to_zero()
        self._window_start: dict[str, Any] | None = None
        self._zones_uj: dict[str, float] = {}
        self._wrap_watch = Periodic(self._count_zones, RAPL_WRAP_S)
        self.on_start = self.on_pause = lambda: None  # called around each window

    def _set_to_zero(self) -> None:
        names = ("window_s", "cpu_s", "gpu_j", "gpu_half_j", "tracker_cpu_s", "tracker_gpu_j")
        self.total = dict.fromkeys(names, 0.0)
        self.total |= {"rapl_j": 0.0 if self.rapl else math.nan}
        self.total |= dict.fromkeys(("battery_j", "battery_half_j"), 0.0 if self.battery else math.nan)
        self.apart_j = {zone.name: 0.0 for zone in self.apart}
        self.card = CardWatch(self.gpu)
        self.n_windows = 0

    def rest(self, seconds: float, cool_to_celsius: float | None = None) -> dict[str, float]:
        """Measure the power at rest, before the work's first window; the statement then tells the energy above it too.

        A card first cools down to `cool_to_celsius`. Then the process sleeps for `seconds`, or longer where a sensor
        needs longer (SHORTEST_WINDOW_S), if there is a sensor: the model of the cores has an assumption for their rest.
        The card is read as it stands, with what is loaded; of a part of a card (MIG) nobody knows the rest.

        Returns:
            The power at rest in W by component, as `idle_w`; empty without a sensor.
        """
        if self.gpu is not None and cool_to_celsius is not None:
            cool_down(self.gpu, cool_to_celsius)
        sources = self._sources
        if not seconds or not sources:
            return {}
        known = dict(self.failures)
        self.start()
        time.sleep(max(seconds, *(SHORTEST_WINDOW_S[source] for source in sources.values())))
        self.pause()
        read = {name: self.total[f"{name}_j"] for name in ("gpu", "battery")} | {"cpu": self.total["rapl_j"]}
        watts = {name: joules / self.total["window_s"] for name, joules in (read | self.apart_j).items()}
        shown = sources.keys() | self.apart_j.keys()
        self.idle_w = {name: w for name, w in watts.items() if name in shown and not math.isnan(w)}
        self.failures = known  # what fails at rest need not fail during the work
        self._set_to_zero()
        return self.idle_w

    @property
    def _gpu_source(self) -> str:
        return "nvml_energy_counter" if self.gpu_samples is None else "nvml_power_samples"

    @property
    def _sources(self) -> dict[str, str]:
        """The sensors that can tell a power at rest, by component."""
        found = {"gpu": self._gpu_source} if self.gpu is not None and self.gpu_share == 1 else {}
        return found | ({"cpu": "rapl"} if self.rapl else {}) | ({"battery": "battery_power"} if self.battery else {})

    def _find_gpu(self) -> Any | None:
        """The card that tells its energy or, failing that, its power, which is then sampled."""
        try:
            gpu = nvml_handle()
            if gpu is None:
                return None
            gpu, self.gpu_share = sensors.whole_card(gpu)
            try:
                read_gpu_j(gpu)
            except SensorError:
                if not has_power(gpu):
                    raise
                source = PowerSource(lambda: sensors.read_gpu_w(gpu), GPU_SAMPLE_S, SENSOR_ACCURACY, GPU_LAG_S)
                self.gpu_samples = PowerSampler(source)
            return gpu
        except SensorError as error:
            self.failures["gpu"] = str(error)
            return None

    @staticmethod
    def _find_battery() -> PowerSampler | None:
        found = sensors.find_batteries(BATTERIES)
        if not found:
            return None
        read_w = partial(sensors.read_battery_w, found)
        return PowerSampler(PowerSource(read_w, BATTERY_SAMPLE_S, BATTERY_ACCURACY, BATTERY_LAG_S))

    def start(self) -> None:
        """Open a window; does nothing if one is open."""
        if self._window_start is None:
            self.on_start()
            self.card.open()
            self.tracker.start()
            self._window_start = self._snapshot()
            for sampler in self._samplers.values():
                sampler.start()
            self._zones_uj = self._read_zones()
            if self._zones_uj:
                self._wrap_watch.start()

    def pause(self) -> None:
        """Close the open window and add it to the totals; does nothing if none is open."""
        if self._window_start is None:
            return
        self._wrap_watch.stop()
        before, after = self._window_start, self._snapshot()
        self._window_start = None
        self._count_zones()
        spent = {name: after[name] - before[name] for name in ("window_s", "cpu_s", "gpu_j")}
        for name in ("window_s", "cpu_s"):
            self.total[name] += spent[name]
        integrals = {"gpu": self._counted(spent["gpu_j"], spent["window_s"])}
        integrals |= {name: self._integral(name, sampler) for name, sampler in self._samplers.items()}
        for name, energy in integrals.items():
            self.total[f"{name}_j"] += energy.joules
            self.total[f"{name}_half_j"] += energy.half_j
        cpu_s, gpu_j = self.tracker.pause()
        self.total["tracker_cpu_s"] += cpu_s
        self.total["tracker_gpu_j"] += gpu_j
        self.card.close()
        self.n_windows += 1
        self.on_pause()

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
        self.total = {name: _number(readings.get(name)) for name in self.total}
        self.apart_j = {name: _number(readings.get(name)) for name in self.apart_j}

    def _snapshot(self) -> dict[str, float]:
        gpu_j = math.nan
        if self.gpu_samples is not None:
            sensors.finish_gpu_work()
        elif self.gpu is not None:
            gpu_j = self._read("gpu", read_gpu_j, self.gpu)
        cpu_s = sum(os.times()[:4])  # user and system, of this process and its children
        return {"window_s": time.perf_counter(), "cpu_s": cpu_s, "gpu_j": gpu_j}

    @property
    def _samplers(self) -> dict[str, PowerSampler]:
        found = {"gpu": self.gpu_samples, "battery": self.battery}
        return {name: sampler for name, sampler in found.items() if sampler is not None}

    def _integral(self, component: str, sampler: PowerSampler) -> Integral:
        try:
            return sampler.stop()
        except SensorError as error:
            self.failures.setdefault(component, str(error))
            return Integral(math.nan, math.nan)

    def _counted(self, joules: float, window_s: float) -> Integral:
        """What the card's counter has counted; a counter that goes back has been reset, and counted something else."""
        if joules < 0:
            self.failures.setdefault("gpu", "the energy counter went back: the driver was loaded again")
            return Integral(math.nan, math.nan)
        return Integral(joules, joules * (SENSOR_ACCURACY + (COUNTER_STEP_S / window_s if window_s else 0.0)))

    def _read_zones(self) -> dict[str, float]:
        zones = {zone.name: self._read("cpu", zone.read_uj) for zone in self.rapl}
        return zones | {zone.name: self._read(zone.name, zone.read_uj) for zone in self.apart}

    def _count_zones(self) -> None:
        """Add what the RAPL counters have counted since they were last read."""
        before, self._zones_uj = self._zones_uj, self._read_zones()
        for zone in self.rapl:
            self.total["rapl_j"] += elapsed_j(zone, before[zone.name], self._zones_uj[zone.name])
        for zone in self.apart:
            self.apart_j[zone.name] += elapsed_j(zone, before[zone.name], self._zones_uj[zone.name])

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

    def statement(self, window: str, external_wh: float | None = None) -> pd.DataFrame:
        """The energy of all windows as a table.

        Args:
            window: name of the work, such as "train".
            external_wh: what a wall meter has shown over the same windows, in Wh.

        Returns:
            One row per component (cpu, gpu, total): energy in J (gross_j in the interval low_j to high_j, net_j above
            idle), its kind (one of KINDS) and source, and whether it is valid. Missing values are None, never 0.
            Further rows show counters that the total leaves out, such as `package-0 dram`, and readings of the whole
            machine (battery, wall_meter). The total is the sum of cpu and gpu, with the weakest of their kinds, or a
            valid reading of the whole machine whose kind is stronger. carbontracker_j stands beside the same part of
            the machine only; the total's row has the ratio of carbontracker's cpu and gpu to ours.
        """
        rows = self._tracked([self._cpu_row(), self._gpu_row()])
        parts = _total_row(rows if self._has_gpu else rows[:1])
        ratio = _number(parts["carbontracker_j"]) / parts["gross_j"] if parts["gross_j"] else math.nan
        rows += [self._apart_row(name, joules) for name, joules in self.apart_j.items()]
        whole = ([self._battery_row()] if self.battery else []) + ([self._wall_row(external_wh)] if external_wh else [])
        total = min((parts, *whole), key=lambda row: (not row["valid"], KINDS.index(row["kind"])))
        total = total | {"component": "total", "carbontracker_pue_removed_ratio": ratio}
        common = {"window": window, "scope": "work window", "window_s": self.total["window_s"]}
        common |= {"n_windows": self.n_windows, "n_repeats": 1, "utilisation": self.utilisation}
        common |= {"device": self._device_name()}
        return pd.DataFrame([common | row for row in (*rows, *whole, total)])

    def _tracked(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of cpu and gpu with carbontracker's energy of the same part in J.

        The processor's is carbontracker's seconds at our own power, measured or not: it differs if the window does.
        """
        window_s = self.total["window_s"]
        share = self.total["tracker_cpu_s"] / window_s if window_s else math.nan
        tracked = (rows[0]["gross_j"] * share, self.total["tracker_gpu_j"] if self._has_gpu else None)
        return [row | {"carbontracker_j": joules} for row, joules in zip(rows, tracked, strict=True)]

    @property
    def _has_gpu(self) -> bool:
        return self.gpu is not None or "gpu" in self.failures

    def _device_name(self) -> str:
        return device_facts()["cpu"] if self.gpu is None else gpu_name(self.gpu)

    def _cpu_row(self) -> dict[str, Any]:
        failure = self._failure("cpu", self.total["rapl_j"]) if self.rapl else None
        if self.rapl and not failure:
            row = self._row("cpu", "measured", "rapl", self.total["rapl_j"], self.idle_w.get("cpu"))
            reason = f"cpu: the counter holds all {self.at_once} jobs that ran at once"
            return row | ({"valid": False, "invalid_reason": reason} if self.at_once > 1 else {})
        low, middle, high = (self._watts(w, self.utilisation) * self.total["window_s"] for w in self.watts)
        row = self._row("cpu", "estimated", "cpu_time_model", middle, idle_w=self._watts(self.watts[1], 0.0))
        row |= {"low_j": low, "high_j": high, "note": f"no counter: {self.rapl_note}" if self.rapl_note else None}
        return row | ({"valid": False, "invalid_reason": failure} if failure else {})

    def _gpu_row(self) -> dict[str, Any]:
        if not self._has_gpu:
            return _missing_row("gpu", NO_GPU)
        if failure := self._failure("gpu", self.total["gpu_j"]):
            return _missing_row("gpu", failure)
        source = self._gpu_source
        joules, half_j = self.total["gpu_j"], self.total["gpu_half_j"]
        if self.gpu_share == 1:
            return self._row("gpu", "measured", source, joules, self.idle_w.get("gpu"), half_j)
        row = self._row("gpu", "allocated", source, joules * self.gpu_share, idle_w=None)
        note = f"{self.gpu_share:.0%} of the card's energy, as of its memory: the card cannot tell its parts apart"
        return row | {"low_j": 0.0, "high_j": joules + half_j, "note": note}

    def _battery_row(self) -> dict[str, Any]:
        if failure := self._failure("battery", self.total["battery_j"]):
            return _missing_row("battery", failure)
        joules, half_j = self.total["battery_j"], self.total["battery_half_j"]
        row = self._row("battery", "measured", "battery_power", joules, self.idle_w.get("battery"), half_j)
        reason = f"battery: it feeds all {self.at_once} jobs that ran at once"
        row |= {"valid": False, "invalid_reason": reason} if self.at_once > 1 else {}
        return row | {"note": "the whole machine, with its display"}

    def _wall_row(self, external_wh: float) -> dict[str, Any]:
        joules = external_wh * JOULES_PER_WH
        half_j = joules * WALL_METER_ACCURACY
        row = self._row("wall_meter", "external", "wall_meter", joules, idle_w=None, half_j=half_j)
        return row | {"note": "the whole machine, typed in"}

    def _apart_row(self, name: str, joules: float) -> dict[str, Any]:
        failure = self._failure(name, joules)
        idle_w = self.idle_w.get(name)
        row = _missing_row(name, failure) if failure else self._row(name, "measured", "rapl", joules, idle_w)
        return row | {"note": "shown apart: not in the total"}

    def _failure(self, component: str, joules: float) -> str | None:
        """Why a component has no figure of its sensor, in words; None if it has one.

        Args:
            component: as in the statement.
            joules: what its sensor counted; NaN after a failure, which a checkpoint keeps without its reason.
        """
        if component not in self.failures and not math.isnan(joules):
            return None
        return f"{component}: {self.failures.get(component, 'a reading failed before the training was resumed')}"

    def _row(
        self, component: str, kind: str, source: str, gross_j: float, idle_w: float | None, half_j: float | None = None
    ) -> dict[str, Any]:
        half_j = gross_j * SENSOR_ACCURACY if half_j is None else half_j
        window_s, shortest = self.total["window_s"], SHORTEST_WINDOW_S[source]
        reason = None if gross_j > 0 else f"{component}: the sensor counted 0 J in {window_s:.1f} s"
        if window_s < shortest:
            reason = f"{component}: the window of {window_s:.1f} s is under {shortest:.0f} s, too short for this source"
        return {
            "component": component, "kind": kind, "source": source, "gross_j": gross_j, "idle_w": idle_w,
            "net_j": None if idle_w is None else gross_j - idle_w * window_s,
            "low_j": max(0.0, gross_j - half_j), "high_j": gross_j + half_j,
            "valid": reason is None, "invalid_reason": reason, "note": None,
        }  # fmt: skip


def _missing_row(component: str, reason: str) -> dict[str, Any]:
    row = {"component": component, "kind": "none", "source": "none", "valid": False, "invalid_reason": reason}
    return row | dict.fromkeys(("gross_j", "idle_w", "net_j", "low_j", "high_j", "note"))


def _total_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the components, with the weakest kind; None where a component has no value."""
    sums = {}
    for name in ("gross_j", "low_j", "high_j", "idle_w", "net_j", "carbontracker_j"):
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
    """The headline figure of a statement: of the GPU if it has one, otherwise the total with its weakest label.

    Args:
        statement: from `Meter.statement`.
        prefix: of the names, such as "train".

    Returns:
        `<prefix>_energy_wh`, `<prefix>_energy_low_wh` and `<prefix>_energy_high_wh`: the energy of all windows and the
        ends of its interval, in Wh, NaN where it is missing. `<prefix>_net_energy_wh`: what of it is above rest.
        `energy_kind`: one of KINDS. `energy_source`: what was read, as "rapl". `energy_valid`: False if the figure must
        not be quoted. `carbontracker_ratio`: carbontracker's joules over ours, both of cpu and gpu; NaN if one of them
        is missing.
    """
    rows = statement.set_index("component")
    row = rows.loc["gpu" if rows.loc["gpu", "kind"] in ("measured", "allocated") else "total"]
    columns = {"energy_wh": "gross_j", "energy_low_wh": "low_j", "energy_high_wh": "high_j", "net_energy_wh": "net_j"}
    return {f"{prefix}_{name}": _number(row[column]) / JOULES_PER_WH for name, column in columns.items()} | {
        "energy_kind": row["kind"],
        "energy_source": row["source"],
        "energy_valid": bool(row["valid"]),
        "carbontracker_ratio": _number(rows.loc["total", "carbontracker_pue_removed_ratio"]),
    }


def energy_rates(
    figures: Mapping[str, Any], prefix: str, tokens: int, supervised_tokens: int, window_s: float
) -> dict[str, float]:
    """The energy of `energy_metrics` per token, per token that the loss counts, and per second.

    Returns:
        `<prefix>_joules_per_token`, `<prefix>_joules_per_supervised_token` and `<prefix>_mean_w`; NaN where the energy
        is missing.
    """
    joules = figures[f"{prefix}_energy_wh"] * JOULES_PER_WH
    per = {"joules_per_token": tokens, "joules_per_supervised_token": supervised_tokens, "mean_w": window_s}
    return {f"{prefix}_{name}": joules / count if count else math.nan for name, count in per.items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def shown_statement(statement: pd.DataFrame) -> pd.DataFrame:
    """The columns of a statement (`Meter.statement`) that a reader needs, with units in the headers, energies in Wh."""
    joules = [column for column in SHOWN_COLUMNS if column.endswith("_j")]
    in_wh = statement[joules].astype(float) / JOULES_PER_WH
    return statement.assign(**in_wh)[list(SHOWN_COLUMNS)].rename(columns=SHOWN_COLUMNS)


def energy_text(figures: Mapping[str, Any], prefix: str, unit: str, count: int = 1) -> str:
    """An energy as words: `0.2 Wh (0.1 to 0.5 Wh, estimated)`, or `an unknown energy` where it is missing.

    Args:
        figures, prefix: of `energy_metrics`.
        unit: Wh or mWh.
        count: what the energy is divided by, such as the number of answers.
    """
    scale = {"Wh": 1.0, "mWh": 1000.0}[unit] / count
    value, low, high = (scale * figures[f"{prefix}_energy{end}_wh"] for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "an unknown energy"
    return f"{value:.3g} {unit} ({low:.3g} to {high:.3g} {unit}, {figures['energy_kind']})"


def invalid_note(statement: pd.DataFrame) -> str:
    """A sentence that names each component whose figure is not valid, with the reason; empty if there is none."""
    reasons = statement.loc[(statement["component"] != "total") & ~statement["valid"].astype(bool), "invalid_reason"]
    return f"**Not valid**: {'; '.join(found)}." if (found := [text for text in reasons if text != NO_GPU]) else ""


def carbontracker_note(statement: pd.DataFrame) -> str:
    """A sentence that compares carbontracker's figure with ours, and a warning beyond what their sensors explain."""
    rows = statement.set_index("component")
    ratio = _number(rows.loc["total", "carbontracker_pue_removed_ratio"])
    if math.isnan(ratio):
        return "There is nothing to compare: carbontracker or the meter has no figure of the processor or the GPU."
    parts = "the processor" if rows.loc["gpu", "kind"] == "none" else "processor and GPU together"
    text = f"Over the same windows carbontracker reads **{ratio:.3f}** times our figure of {parts}."
    lag_s = 0.0 if rows.loc["gpu", "kind"] == "none" else GPU_LAG_S * max(1, rows.loc["total", "n_windows"])
    allowed = MAX_DISAGREEMENT + min(1.0, lag_s / _number(rows.loc["total", "window_s"]))
    if abs(ratio - 1) <= allowed:
        return text
    return f"{text} **They are more than {allowed:.0%} apart**: one of them missed part of the work. Quote neither."


def rest_note(statement: pd.DataFrame) -> str:
    """A sentence on the power at rest of each component, measured or assumed; empty where the statement has none."""
    rows = statement[statement["component"].isin(["cpu", "gpu", "battery"]) & statement["idle_w"].notna()]
    rows = rows[rows["valid"].astype(bool)]
    how = rows["kind"].map({"estimated": "assumed"}).fillna("measured")
    told = [
        f"{row.component} {row.idle_w:.1f} W, {word}, {row.net_j / row.gross_j:.0%} of its energy above"
        for row, word in zip(rows.itertuples(), how, strict=True)
    ]
    return f"At rest: {'; '.join(told)}." if told else ""
