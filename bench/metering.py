"""What metering costs: windows of the same work in pairs, one with the meter and one without, in a random order.

`python bench/metering.py [pairs] [seconds]`. The work is a product of matrices in one thread, again and again, for
about `seconds`. The meter reads all that this machine has, and carbontracker runs beside it; once more with a power
sampled ten times a second, from a stand-in that takes as long as NVML's call may (1 ms).

Printed are medians over the pairs with 95 % intervals. *Beside the work* is the processor time of the process that its
working thread did not spend on the work: that of the meter's calls and of all its threads, as a share of the window,
less that of the window without the meter. Other load on the machine slows the work and leaves this figure alone, so it
decides. It holds no slowing of the work itself: by caches, or by waiting for Python's lock while the meter's thread,
which has it, waits for a core, as happens on a machine with more work than cores. *Wall clock* holds all, and is the
time with the meter over the time without, less 1: on a busy machine its interval is wide. Short windows cost most,
because each has its start and its end.
"""

import random
import sys
import time

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


def work(n: int, a: torch.Tensor) -> float:
    """`n` products of about a millisecond; returns the processor time that this thread spent on them, in seconds."""
    start = time.thread_time()
    for _ in range(n):
        (a @ a)[0, 0].item()
    return time.thread_time() - start


def window(meter: energy.Meter | None, n: int, a: torch.Tensor) -> tuple[float, float]:
    """A window of work with or without a meter: seconds on the wall, share of processor time beside the work."""
    start, cpu = time.perf_counter(), time.process_time()
    if meter:
        meter.start()
    worked_s = work(n, a)
    if meter:
        meter.pause()
    seconds = time.perf_counter() - start
    return seconds, (time.process_time() - cpu - worked_s) / seconds


def costs(meter: energy.Meter, pairs: int, n: int, a: torch.Tensor) -> np.ndarray:
    """By pair: share beside the work, with less without; wall clock, with over without less 1. Shape (pairs, 2)."""
    found = []
    for _ in range(pairs):
        order = random.sample([meter, None], 2)
        (with_s, with_beside), (without_s, without_beside) = (
            values for _, values in sorted(((m is None, window(m, n, a)) for m in order), key=lambda one: one[0])
        )
        found.append((with_beside - without_beside, with_s / without_s - 1))
    return np.array(found)


def report(name: str, found: np.ndarray) -> None:
    """Print median, interval and verdict."""
    low, high = bootstrap((found,), np.median, random_state=0).confidence_interval
    verdict = f"under {MOST:.0%}" if high < MOST else f"not shown to be under {MOST:.0%}"
    print(f"  {name:15} {np.median(found):+.3%} [{low:+.3%}, {high:+.3%}]: {verdict}", flush=True)


def main() -> None:
    pairs, seconds = (float(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 30), (2, 2.0)))
    torch.set_num_threads(1)
    a = torch.rand(384, 384)
    work(50, a)
    start = time.perf_counter()
    work(200, a)
    n = max(1, round(200 * seconds / (time.perf_counter() - start)))
    sampled = energy.Meter((2.0, 5.0, 12.0), 0.3)
    sampled.battery = PowerSampler(PowerSource(slow_reading, energy.GPU_SAMPLE_S, 0.05, energy.GPU_LAG_S))
    meters = {"as on this machine": energy.Meter((2.0, 5.0, 12.0), 0.3), "with a power sampled": sampled}
    for name, meter in meters.items():
        print(f"{name}: {round(pairs)} pairs of {seconds:g} s")
        found = costs(meter, round(pairs), n, a)
        report("beside the work", found[:, 0])
        report("wall clock", found[:, 1])
        meter.stop()


if __name__ == "__main__":
    main()
