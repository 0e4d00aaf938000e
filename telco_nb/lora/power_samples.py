"""Energy from a power reading: samples in a thread of its own, integrated over a window, with an interval."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from telco_nb.lora.sensors import SensorError


class Periodic:
    """Calls a function again and again in a thread, at irregular times, between `start` and `stop`.

    At regular times every sample could fall on the same part of a training step.
    """

    def __init__(self, call: Callable[[], object], interval_s: float):
        self._call, self._interval_s = call, interval_s
        self._random = random.Random(0)  # its own: the training's order comes from the shared one
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to call."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._end,), daemon=True, name="energy-samples")
        self._thread.start()

    def stop(self) -> None:
        """End the calls; one in progress is waited for."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _run(self, end: threading.Event) -> None:
        while not end.wait(self._interval_s * self._random.uniform(0.5, 1.5)):
            self._call()


@dataclass(frozen=True)
class PowerSource:
    """What is known of a power reading.

    Args:
        read_w: the power now, in W. It raises SensorError.
        interval_s: mean time between samples.
        accuracy: largest relative error of a reading.
        lag_s: how old the power may be of which a reading tells.
    """

    read_w: Callable[[], float]
    interval_s: float
    accuracy: float
    lag_s: float


class Integral(NamedTuple):
    """Energy in J: the true value lies within `half_j` of `joules`."""

    joules: float
    half_j: float


def integrate(seconds: Sequence[float], watts: Sequence[float], accuracy: float, lag_s: float) -> Integral:
    """Trapezoidal integral of power samples over the time that they span.

    The interval adds up three errors: that of the sensor; that of the finite number of samples, twice the standard
    error from the differences of neighbours, so that a change which the samples follow counts little; and the delay
    of the sensor, during which the power may have been any that was seen.

    Args:
        seconds: when the samples were read, two or more.
        watts: the samples.
        accuracy, lag_s: of the sensor, see PowerSource.
    """
    power, jumps, window_s = np.asarray(watts), np.diff(watts), seconds[-1] - seconds[0]
    joules = float(np.trapezoid(power, seconds))
    sampling_w = 2 * float(np.sqrt(np.mean(jumps**2) / 2 / len(jumps)))
    half_j = accuracy * joules + sampling_w * window_s + lag_s * float(np.ptp(power))
    return Integral(joules, half_j)


class PowerSampler:
    """Energy of one window after the other: `start`, `stop`, `start`, ..."""

    def __init__(self, source: PowerSource):
        self.source = source
        self._seconds: list[float] = []
        self._watts: list[float] = []
        self._failure: SensorError | None = None
        self._periodic = Periodic(self.sample, source.interval_s)

    def start(self) -> None:
        """Begin a window."""
        self._seconds, self._watts, self._failure = [], [], None
        self.sample()
        self._periodic.start()

    def sample(self) -> None:
        """Read the power once. A failure is kept for `stop`: the rest of the window would be no whole one."""
        if self._failure is None:
            try:
                watts = self.source.read_w()
            except SensorError as error:
                self._failure = error
            else:
                self._seconds.append(time.perf_counter())
                self._watts.append(watts)

    def stop(self) -> Integral:
        """The energy of the window that ends now. Raises SensorError if a reading failed."""
        self._periodic.stop()
        self.sample()
        if self._failure is not None:
            raise self._failure
        return integrate(self._seconds, self._watts, self.source.accuracy, self.source.lag_s)
