"""What metering costs: pairs of windows of the same work, one with the meter and one without, in a random order.

`python bench/metering.py [pairs] [seconds]`. The work is a product of matrices on the processor, again and again, as
much as fills a window of `seconds` once. The meter reads all that this machine has, and carbontracker runs beside it.
Further rows have a card's and a battery's power sampled, from stand-ins that take as long as NVML's call does (1 ms).
Printed is the time with the meter over the time without, its median over the pairs and a 95 % interval.
"""

import random
import statistics
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
    """`n` products, each of about a millisecond, with the Python of a training step between them."""
    for _ in range(n):
        (a @ a)[0, 0].item()


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def metered(meter: energy.Meter, n: int, a: torch.Tensor) -> None:
    meter.start()
    work(n, a)
    meter.pause()


def overheads(meter: energy.Meter, pairs: int, n: int, a: torch.Tensor) -> list[float]:
    """Time with the meter over time without, less 1, by pair."""
    found = []
    for _ in range(pairs):
        calls = {"with": lambda: metered(meter, n, a), "without": lambda: work(n, a)}
        seconds = {name: timed(calls[name]) for name in random.sample(sorted(calls), 2)}
        found.append(seconds["with"] / seconds["without"] - 1)
    return found


def main() -> None:
    pairs, seconds = (float(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 12), (2, 2.0)))
    a = torch.rand(384, 384)
    work(50, a)
    n = max(1, round(seconds / (timed(lambda: work(200, a)) / 200)))
    meter = energy.Meter((2.0, 5.0, 12.0), 0.3)
    sampled = energy.Meter((2.0, 5.0, 12.0), 0.3)
    sampled.battery = PowerSampler(PowerSource(slow_reading, energy.GPU_SAMPLE_S, 0.05, energy.GPU_LAG_S))
    for name, one in (("as on this machine", meter), ("power sampled ten times a second", sampled)):
        found = overheads(one, round(pairs), n, a)
        low, high = bootstrap((np.array(found),), np.median, random_state=0).confidence_interval
        median = statistics.median(found)
        verdict = f"under {MOST:.0%}" if high < MOST else f"not shown to be under {MOST:.0%}"
        print(f"{name:34} {median:+.2%} [{low:+.2%}, {high:+.2%}] of {seconds:g} s, {round(pairs)} pairs: {verdict}")
        one.stop()


if __name__ == "__main__":
    main()
