"""Windows and overhead are all of a notebook's time and energy, by the clock and the card that a test plants."""

import math

import pytest
from fake_sensors import Card, install_clock, install_nvml, not_supported

from telco_nb.lora import energy
from telco_nb.lora.overhead import Overhead

WATTS = (2.0, 5.0, 12.0)


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    monkeypatch.setattr(energy, "BATTERIES", tmp_path / "power_supply")
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)
    return install_clock(monkeypatch)


def notebook(clock, resumed=None):
    """Phases with planted seconds and power, and a training with a checkpoint of 2 s after each of three epochs."""
    overhead = Overhead(energy.Meter(WATTS, 0.3))
    overhead.enter("load")
    clock.spend(11, 90)
    overhead.enter("training")
    work = energy.Meter(WATTS, 0.3)
    work.rest(20.0)
    rest_s = clock.times[-1] - 11
    overhead.watch(work)
    clock.spend(3, 250)  # the warm-up
    if resumed:
        work.restore(resumed)
    for _ in range(3):
        for _ in range(10):
            work.start()
            clock.spend(4, 300)
        work.pause()
        clock.spend(2, 70)  # a checkpoint
    work.stop()
    overhead.enter("evaluation")
    clock.spend(7, 200)
    overhead.enter("load")
    clock.spend(1, 100)
    return work, overhead.stop(), rest_s


def test_windows_and_overhead_add_up_to_the_time_and_the_energy_of_the_card(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=Card(clock).counter_mj)
    work, found, rest_s = notebook(clock)
    seconds = {"load": 12, "training": 3 + 6 + rest_s, "evaluation": 7}
    assert {name: found[f"overhead_{name}_seconds"] for name in seconds} == pytest.approx(seconds)
    assert found["overhead_seconds"] + work.total["window_s"] == pytest.approx(clock.times[-1], rel=1e-9)
    spent_j = 3600 * found["overhead_energy_wh"] + work.total["gpu_j"]
    assert spent_j == pytest.approx(clock.joules[-1], rel=0.02) and found["overhead_energy_kind"] == "measured"
    assert found["overhead_load_energy_wh"] == pytest.approx((11 * 90 + 100) / 3600, rel=0.05)
    by_phase = sum(found[f"overhead_{name}_energy_wh"] for name in seconds)
    assert by_phase == pytest.approx(found["overhead_energy_wh"])


def test_the_overhead_of_a_resumed_training_is_that_of_this_process(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=Card(clock).counter_mj)
    earlier = energy.Meter(WATTS, 0.3)
    earlier.start()
    clock.spend(100, 300)
    earlier.stop()
    began = clock.times[-1]
    work, found, _ = notebook(clock, resumed=earlier.readings())
    here_s = work.total["window_s"] - earlier.total["window_s"]
    assert found["overhead_seconds"] + here_s == pytest.approx(clock.times[-1] - began, rel=1e-9)


def test_without_a_figure_the_energy_of_the_overhead_is_missing_and_its_seconds_are_known(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=not_supported)
    work, found, _ = notebook(clock)
    assert math.isnan(found["overhead_energy_wh"]) and math.isnan(found["overhead_load_energy_wh"])
    assert found["overhead_seconds"] + work.total["window_s"] == pytest.approx(clock.times[-1], rel=1e-9)


def test_without_a_card_it_is_the_estimate_of_the_cores_and_says_so(clock):
    _, found, _ = notebook(clock)
    assert found["overhead_energy_kind"] == "estimated" and found["overhead_energy_wh"] > 0
