"""The energy meter against CodeCarbon, offline, over the same windows of work.

`pip install codecarbon`, then `python bench/energy_check.py [windows] [seconds]`. CodeCarbon is no dependency: it is
asked here alone, with a fixed country, so that it looks nothing up; a connection to anywhere ends the script.

Where both read a sensor (RAPL, NVML) the ratio should be 1 within 5 %. Without one both guess, and the guesses differ:
ours is CPU time x declared watts per core, an interval from 2 to 12 W; CodeCarbon takes the processor's name from a
table, or 4 W a thread for one that it does not know, times a share of the load, and adds 5 W or more for main memory,
which ours leaves out. CodeCarbon also samples once a second, so it misses the ends of a short window.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Any, NoReturn

import torch

from telco_nb.lora import energy

WATTS, IDLE_SHARE = (2.0, 5.0, 12.0), 0.3  # as in params/base.yaml


def refuse(_: object, address: object) -> NoReturn:
    raise SystemExit(f"CodeCarbon tried to connect to {address}")


def work(seconds: float) -> None:
    """Products of matrices in all threads."""
    a, end = torch.rand(512, 512), time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a


def window(seconds: float, tracker_class: Any) -> tuple[Any, Any]:
    """CodeCarbon's data and our statement of one window."""
    tracker = tracker_class(
        country_iso_code="DEU", save_to_file=False, log_level="error", measure_power_secs=1, allow_multiple_runs=True
    )
    meter = energy.Meter(WATTS, IDLE_SHARE)
    tracker.start()
    meter.start()
    work(seconds)
    meter.stop()
    tracker.stop()
    return tracker.final_emissions_data, meter.statement("check").set_index("component")


def main() -> None:
    windows, seconds = (float(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 3), (2, 20.0)))
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:
        raise SystemExit("bench/energy_check.py needs CodeCarbon: pip install codecarbon") from None
    socket.socket.connect = refuse  # ty: ignore[invalid-assignment]  (on purpose)
    for _ in range(round(windows)):
        theirs, ours = window(seconds, OfflineEmissionsTracker)
        print(f"{theirs.duration:.1f} s by CodeCarbon, {ours.loc['total', 'window_s']:.1f} s by the meter")
        for component, kwh in (("cpu", theirs.cpu_energy), ("gpu", theirs.gpu_energy)):
            row, joules = ours.loc[component], kwh * 1e3 * energy.JOULES_PER_WH
            if row["kind"] == "none":
                print(f"  {component}: ours {row['invalid_reason']}; CodeCarbon {joules:.1f} J")
                continue
            text = f"ours {row['gross_j']:.1f} J [{row['low_j']:.1f}, {row['high_j']:.1f}] ({row['kind']})"
            inside = "inside" if row["low_j"] <= joules <= row["high_j"] else "outside"
            ratio = joules / row["gross_j"]
            print(f"  {component}: {text}; CodeCarbon {joules:.1f} J, {ratio:.2f} times, {inside} our interval")
        print(f"  main memory: CodeCarbon {theirs.ram_energy * 1e3 * energy.JOULES_PER_WH:.1f} J, not ours", flush=True)


if __name__ == "__main__":
    main()
