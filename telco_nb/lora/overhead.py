"""What a notebook spends outside the metered windows: loading, checking, evaluating, saving."""

from __future__ import annotations

from collections import defaultdict

from telco_nb.lora.energy import Meter, energy_metrics


class Overhead:
    """Seconds and energy by phase, without the windows of the meter that is watched.

    Args:
        meter: of its own. It runs while the other one does not.
    """

    def __init__(self, meter: Meter):
        self.meter, self.phase = meter, ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.energy_wh: dict[str, float] = defaultdict(float)

    def watch(self, work: Meter, resume: bool = True) -> None:
        """Leave out the windows of `work` from now on.

        Without `resume` what follows a window counts again from the next phase on: with several processes the time that
        the peers have computed is told to this process when they end, after the last window.
        """
        work.on_start, work.on_pause = self.meter.pause, self.meter.start if resume else lambda: None

    def enter(self, phase: str) -> None:
        """End the phase so far and begin another one, or one again."""
        self._end_phase()
        self.phase = phase
        self.meter.start()

    def stop(self) -> dict[str, float | str]:
        """End the last phase.

        Returns:
            `overhead_seconds` and `overhead_energy_wh`, and both by phase as `overhead_<phase>_seconds` and
            `overhead_<phase>_energy_wh`; an energy is NaN where it is missing or not valid. `overhead_energy_kind`.
        """
        self._end_phase()
        self.meter.stop()
        figures = energy_metrics(self.meter.statement("overhead"), "overhead")
        known = 1.0 if figures["energy_valid"] else float("nan")
        found: dict[str, float | str] = {"overhead_energy_kind": figures["energy_kind"]}
        for name in ("", *self.seconds):
            label = f"overhead_{name}_" if name else "overhead_"
            found[f"{label}seconds"] = self.seconds[name] if name else sum(self.seconds.values())
            found[f"{label}energy_wh"] = known * (self.energy_wh[name] if name else sum(self.energy_wh.values()))
        return found

    def _end_phase(self) -> None:
        """Give what has been spent since the last phase to this one."""
        self.meter.pause()
        if self.phase:
            wh = energy_metrics(self.meter.statement("overhead"), "overhead")["overhead_energy_wh"]
            self.seconds[self.phase] += self.meter.total["window_s"] - sum(self.seconds.values())
            self.energy_wh[self.phase] += wh - sum(self.energy_wh.values())
