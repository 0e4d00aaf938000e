"""carbontracker over the same windows as our meter, as a check of it."""

from __future__ import annotations

import contextlib
import io
import math
import time
from typing import Any

from telco_nb.study.machine import device_facts


class Carbontracker:
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
        self._thread = getattr(self._tracker, "tracker", None)  # None after an error at its start

    def start(self) -> None:
        """Begin a window."""
        self._tracker.epoch_start()

    def pause(self) -> tuple[float, float]:
        """(seconds of the cores, joules of the GPU) of the window that ends now; NaN for what it has not read."""
        self._tracker.epoch_end()
        if self._thread is None or not self._thread.running or not self._thread.epoch_times:
            return math.nan, math.nan
        times = self._thread.epoch_times
        values = {c.name: c.energy_usage(times)[-1] * 3.6e6 for c in self._thread.components}
        return values.get("cpu", math.nan), values.get("gpu", math.nan)

    def close(self) -> None:
        """End its thread."""
        if self._thread is None:
            return
        with contextlib.redirect_stdout(self._output), contextlib.redirect_stderr(self._output):
            self._thread.stop()
            self._tracker.intensity_stopper.set()
