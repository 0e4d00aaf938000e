"""A card's energy counter and power reading: how often they move, whether they agree, how long a window must be.

`python bench/counter.py log FILE SECONDS` writes readings of the first card every 10 ms or so, beside whatever runs.
`python bench/counter.py tell FILE [FROM TO]` reads them back, all or those between two times (seconds since 1970).
Choose times of steady work: what differs between windows is then the sensor, not the work.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from telco_nb.lora import sensors

INTERVAL_S = 0.01
DOUBLED_S = 4.0
LENGTHS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def log(file: Path, seconds: float) -> None:
    """Readings of the counter (J), the power (W), the temperature and the clock of the multiprocessors."""
    import pynvml

    handle = sensors.nvml_handle()
    if handle is None:
        raise SystemExit("bench/counter.py log needs an NVIDIA card.")
    end = time.time() + seconds
    with file.open("w", encoding="utf-8", buffering=1 << 16) as stream:
        stream.write("at_s,counter_j,power_w,celsius,mhz\n")
        while (now := time.time()) < end:
            counter_j, power_w = sensors.read_gpu_j(handle), pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
            mhz = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            stream.write(f"{now:.4f},{counter_j:.3f},{power_w:.3f},{celsius},{mhz}\n")
            time.sleep(INTERVAL_S)


def moves(readings: pd.DataFrame, column: str) -> tuple[float, float]:
    """(seconds, amount) between two changes of a reading; medians."""
    changed = readings[readings[column].diff() != 0]
    return float(changed["at_s"].diff().median()), float(changed[column].diff().abs().median())


def windows(readings: pd.DataFrame, length_s: float) -> pd.DataFrame:
    """Windows of this length from start to end, each beginning half a length after the last: energy by both readings.

    Each begins and ends where a reading was taken, as a meter reads the counter: no value between two is made up.
    """
    at, counter = readings["at_s"].to_numpy(), readings["counter_j"].to_numpy()
    integral = np.concatenate([[0.0], np.cumsum(readings["power_w"].to_numpy()[:-1] * np.diff(at))])
    starts = np.searchsorted(at, np.arange(at[0], at[-1] - length_s, length_s / 2))
    ends = np.searchsorted(at, at[starts] + length_s).clip(max=len(at) - 1)
    seconds = at[ends] - at[starts]
    rows = {"counter_w": (counter[ends] - counter[starts]) / seconds}
    rows["samples_w"] = (integral[ends] - integral[starts]) / seconds
    return pd.DataFrame(rows)


def doubling(readings: pd.DataFrame, length_s: float) -> tuple[float, float, int]:
    """(least, most, windows): the energy of a window of twice the length over that of its first half."""
    at, counter = readings["at_s"].to_numpy(), readings["counter_j"].to_numpy()
    starts = np.searchsorted(at, np.arange(at[0], at[-1] - 2 * length_s, length_s / 4))
    halves, ends = (np.searchsorted(at, at[starts] + n * length_s).clip(max=len(at) - 1) for n in (1, 2))
    per_second = (counter[halves] - counter[starts]) / (at[halves] - at[starts])
    ratios = (counter[ends] - counter[starts]) / (at[ends] - at[starts]) * 2 / per_second
    return float(ratios.min()), float(ratios.max()), len(ratios)


def tell(readings: pd.DataFrame) -> pd.DataFrame:
    """Print how the sensors behave; returns one row for each length of a window.

    `spread` is the standard deviation of the windows' mean powers, `worst` the largest distance from the mean of all,
    both relative; `samples` is the energy by power samples over that by the counter, less 1, of a window on average.
    """
    every_s, step_j = moves(readings, "counter_j")
    power_every_s, _ = moves(readings, "power_w")
    seconds = readings["at_s"].iloc[-1] - readings["at_s"].iloc[0]
    whole = windows(readings, seconds * 0.999).iloc[0]
    print(
        f"{seconds:.0f} s, {len(readings)} readings, {len(readings) / seconds:.0f} a second; the counter moves every "
        f"{1e3 * every_s:.0f} ms by {step_j:.1f} J, the power every {1e3 * power_every_s:.0f} ms; mean "
        f"{whole.counter_w:.1f} W by the counter and {whole.samples_w:.1f} W by power samples; "
        f"{readings['celsius'].min()} to {readings['celsius'].max()} degrees, {readings['mhz'].median():.0f} MHz"
    )
    if seconds > 3 * DOUBLED_S:
        least, most, n = doubling(readings, DOUBLED_S)
        times = f"{least:.2f} to {most:.2f} times the energy"
        print(f"twice {DOUBLED_S:.0f} s take {times} of {DOUBLED_S:.0f} s ({n} windows)")
    rows = []
    for length_s in LENGTHS_S:
        if seconds < 2 * length_s:
            break
        found = windows(readings, length_s)
        apart = found["counter_w"] / whole["counter_w"] - 1
        ratio = float((found["samples_w"] / found["counter_w"]).mean() - 1)
        rows.append((length_s, len(found), apart.std(), apart.abs().max(), ratio))
    table = pd.DataFrame(rows, columns=["window_s", "windows", "spread", "worst", "samples"])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    return table


if __name__ == "__main__":
    what, name, *numbers = sys.argv[1:]
    if what == "log":
        log(Path(name), float(numbers[0]))
    else:
        found = pd.read_csv(name)
        between = tuple(float(number) for number in numbers) or (0.0, np.inf)
        tell(found[found["at_s"].between(*between)].reset_index(drop=True))
