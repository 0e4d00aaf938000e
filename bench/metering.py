"""What metering costs: pairs of windows of the same work, one with the meter and one without, in a random order.

`python bench/metering.py [pairs] [seconds]`. The work is a product of matrices on one core, again and again, for about
`seconds`. The meter reads all that this machine has, and carbontracker runs beside it; once more with a power
sampled ten times a second, from a stand-in that takes as long as NVML's call may (1 ms).

Printed is the time with the meter over the time without, less 1: the median of the pairs and its 95 % interval, by the
clock on the wall, which other load disturbs, and by processor time, which it hardly does. Before that, the processor
time that the meter alone takes in a window without work.
"""

import random
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import bootstrap

from telco_nb.lora import energy
from telco_nb.lora.power_samples import PowerSampler, PowerSource

MOST = 0.01  # of a window
READING_S = 1e-3


def slow_reading() -> float:
    """A power, after the time that a driver takes."""
    time.sleep(READING_S)
    return 300.0


def work(n: int, a: torch.Tensor) -> None:
    """`n` products of about a millisecond."""
    for _ in range(n):
        (a @ a)[0, 0].item()


def timed(call: Callable[[], object]) -> np.ndarray:
    """Seconds on the wall's clock and of processor time, shape (2,)."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - start, time.process_time() - cpu])


def metered(meter: energy.Meter, n: int, a: torch.Tensor, idle_s: float = 0.0) -> None:
    """The work in a window of the meter, and some time without work."""
    meter.start()
    work(n, a)
    time.sleep(idle_s)
    meter.pause()


def own_share(meter: energy.Meter, seconds: float) -> float:
    """The meter's own processor time in a window without work, over the window."""
    return float(timed(lambda: metered(meter, 0, torch.empty(0), seconds))[1]) / seconds


def overheads(meter: energy.Meter, pairs: int, n: int, a: torch.Tensor) -> np.ndarray:
    """Time with the meter over time without, less 1, by pair and clock: shape (pairs, 2)."""
    found = []
    for _ in range(pairs):
        calls = {"with": lambda: metered(meter, n, a), "without": lambda: work(n, a)}
        seconds = {name: timed(calls[name]) for name in random.sample(sorted(calls), 2)}
        found.append(seconds["with"] / seconds["without"] - 1)
    return np.array(found)


def report(name: str, found: np.ndarray) -> None:
    """Print median, interval and verdict of the overheads by one clock."""
    low, high = bootstrap((found,), np.median, random_state=0).confidence_interval
    verdict = f"under {MOST:.0%}" if high < MOST else f"not shown to be under {MOST:.0%}"
    print(f"  {name:15} {np.median(found):+.2%} [{low:+.2%}, {high:+.2%}]: {verdict}")


def main() -> None:
    pairs, seconds = (float(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 20), (2, 2.0)))
    torch.set_num_threads(1)
    a = torch.rand(384, 384)
    work(50, a)
    n = max(1, round(seconds / (timed(lambda: work(100, a))[0] / 100)))
    sampled = energy.Meter((2.0, 5.0, 12.0), 0.3)
    sampled.battery = PowerSampler(PowerSource(slow_reading, energy.GPU_SAMPLE_S, 0.05, energy.GPU_LAG_S))
    meters = {"as on this machine": energy.Meter((2.0, 5.0, 12.0), 0.3), "with a power sampled": sampled}
    for name, meter in meters.items():
        print(f"{name}: alone {own_share(meter, 3.0):.2%} of one core; {round(pairs)} pairs of {seconds:g} s")
        found = overheads(meter, round(pairs), n, a)
        report("wall clock", found[:, 0])
        report("processor time", found[:, 1])
        meter.stop()


if __name__ == "__main__":
    main()
