"""What each kind of sensor gives in a window of work, whole, in part and not at all, and how the meter tells it."""

import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sensors import (
    Card,
    Clock,
    install_clock,
    install_nvml,
    not_supported,
    spend,
    write_supply,
    write_zone,
)

from telco_nb.lora import energy
from telco_nb.lora.gpu_state import state_note

WATTS = (2.0, 5.0, 12.0)
INTEL_RANGE_UJ = 262_143_328_850


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path) -> Clock:
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    monkeypatch.setattr(energy, "BATTERIES", tmp_path / "power_supply")
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)
    return install_clock(monkeypatch)


@pytest.fixture
def card(clock, monkeypatch) -> Card:
    card = Card(clock)
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=card.counter_mj)
    return card


@pytest.fixture
def powered(clock, monkeypatch) -> Card:
    """A card that tells its power and has no counter."""
    card = Card(clock)
    functions = {"nvmlDeviceGetTotalEnergyConsumption": not_supported, "nvmlDeviceGetPowerUsage": card.power_mw}
    install_nvml(monkeypatch, **functions)
    clock.spend(10, 60)
    return card


def train(clock: Clock, meter: energy.Meter, seconds: float, watts: float = 300.0) -> None:
    """Steps of a training: work, then a moment of less power. Samples are taken at irregular times."""
    rng, end = np.random.default_rng(3), clock.perf_counter() + seconds
    while clock.perf_counter() < end:
        clock.spend(min(rng.uniform(0.05, 0.15), end - clock.perf_counter()), watts)
        for sampler in meter._samplers.values():
            sampler.sample()


def window(clock: Clock, seconds: float, watts: float = 300.0) -> tuple[energy.Meter, float]:
    """A meter after one window, and the true energy of the window."""
    meter = energy.Meter(WATTS, 0.3)
    before = clock.joules[-1]
    meter.start()
    train(clock, meter, seconds, watts)
    meter.stop()
    return meter, clock.joules[-1] - before


def rows(meter: energy.Meter, external_wh: float | None = None):
    return meter.statement("train", external_wh).set_index("component")


def test_a_rapl_counter_that_starts_again_twice_in_a_window_is_followed(clock):
    write_zone(energy.RAPL / "intel-rapl:0", "package-0", 10**6, 65_532_610_987)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    for _ in range(20):  # of the 30 s after which the counter is read again
        clock.spend(energy.RAPL_WRAP_S, 0)
        spend(energy.RAPL / "intel-rapl:0", 280 * energy.RAPL_WRAP_S)
        meter._count_zones()
    meter.stop()
    assert rows(meter).loc["cpu", "gross_j"] == pytest.approx(280 * 600)


def test_a_card_without_a_counter_is_measured_by_its_power_with_a_wider_interval(clock, powered, monkeypatch):
    meter, true_j = window(clock, 30)
    row = rows(meter).loc["gpu"]
    assert (row.kind, row.source, row.valid) == ("measured", "nvml_power_samples", True)
    assert row.low_j < true_j < row.high_j
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=powered.counter_mj)
    counted = rows(window(clock, 30)[0]).loc["gpu"]
    assert counted.source == "nvml_energy_counter"
    assert row.high_j - row.low_j > counted.high_j - counted.low_j


def test_a_window_too_short_for_a_second_sample_adds_little_and_spoils_nothing(clock, powered):
    meter, true_j = window(clock, 30)
    meter.start()
    clock.spend(0.02, 300)
    meter.stop()
    row = rows(meter).loc["gpu"]
    assert row.valid and row.low_j < true_j + 6 < row.high_j and meter.n_windows == 2


def test_a_card_whose_power_fails_in_mid_window_has_no_figure(clock, powered, monkeypatch):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    train(clock, meter, 10)
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=not_supported)
    train(clock, meter, 20)
    meter.stop()
    row = rows(meter).loc["gpu"]
    assert row.kind == "none" and math.isnan(row.gross_j) and "Not Supported" in row.invalid_reason


def test_a_counter_that_was_reset_in_mid_window_gives_no_figure(clock, card):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    clock.spend(30, 300)
    card.reset_j = 1e6
    meter.pause()
    meter.start()
    clock.spend(3000, 300)
    meter.stop()
    row = rows(meter).loc["gpu"]
    assert (row.kind, row.valid) == ("none", False) and "the energy counter went back" in row.invalid_reason


def test_the_card_that_torch_uses_is_read_whatever_the_order_of_the_cards(clock, monkeypatch):
    cards = {"GPU-2": 500, "GPU-1": 100}  # W, in NVML's order, which is not torch's

    def counter_mj(handle: str) -> int:
        return round(1e3 * cards[handle] * clock.perf_counter())

    install_nvml(monkeypatch, uuid="1", nvmlDeviceGetTotalEnergyConsumption=counter_mj)
    meter, _ = window(clock, 30)
    assert rows(meter).loc["gpu", "gross_j"] == pytest.approx(100 * 30)


def find_mig(uuid: str) -> str:
    return uuid if uuid.startswith("MIG-") else str(not_supported())


@pytest.mark.parametrize("uuid", ["MIG-1", "1"], ids=["torch names a MIG instance", "torch names a bare number"])
def test_a_part_of_a_card_is_allocated_a_share_and_never_measured(clock, card, monkeypatch, uuid):
    functions = {"nvmlDeviceGetTotalEnergyConsumption": card.counter_mj, "nvmlDeviceGetHandleByUUID": find_mig}
    install_nvml(monkeypatch, uuid=uuid, **functions)
    meter, true_j = window(clock, 30)
    table = rows(meter)
    row = table.loc["gpu"]
    assert (row.kind, row.gross_j) == ("allocated", pytest.approx(true_j / 4, rel=0.01))
    assert row.low_j == 0 and row.high_j > true_j and "25% of the card's energy" in row.note
    assert table.loc["total", "kind"] == "estimated"
    assert energy.energy_metrics(table.reset_index(), "train")["energy_kind"] == "allocated"


@pytest.fixture
def laptop():
    """An unplugged laptop; the battery of its mouse is no battery of the machine."""
    write_supply(energy.BATTERIES / "AC", type="Mains", online=0)
    write_supply(energy.BATTERIES / "BAT0", type="Battery", status="Discharging", power_now=20_000_000)
    write_supply(energy.BATTERIES / "mouse", type="Battery", scope="Device", status="Discharging", power_now=10**9)
    return energy.BATTERIES


@pytest.mark.usefixtures("laptop")
def test_an_unplugged_laptop_s_battery_measures_the_whole_machine(clock):
    table = rows(window(clock, 90)[0])
    row = table.loc["battery"]
    assert (row.kind, row.source, row.valid, row.gross_j) == ("measured", "battery_power", True, pytest.approx(1800))
    assert table.loc["cpu", "kind"] == "estimated"
    assert tuple(table.loc["total", ["kind", "source"]]) == ("measured", "battery_power")


def test_a_battery_that_tells_current_and_voltage_is_read_as_well(clock, laptop):
    (laptop / "BAT0" / "power_now").unlink()
    write_supply(laptop / "BAT0", current_now=2_000_000, voltage_now=12_000_000)
    assert rows(window(clock, 90)[0]).loc["battery", "gross_j"] == pytest.approx(24 * 90)


def test_a_laptop_that_is_plugged_in_has_no_battery_to_read(clock, laptop):
    write_supply(laptop / "AC", online=1)
    table = rows(window(clock, 90)[0])
    assert "battery" not in table.index and table.loc["total", "kind"] == "estimated"


def test_a_laptop_that_is_plugged_in_during_the_window_falls_back_to_the_estimate(clock, laptop):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    train(clock, meter, 60)
    write_supply(laptop / "AC", online=1)
    train(clock, meter, 60)
    meter.stop()
    table = rows(meter)
    assert table.loc["battery", "kind"] == "none" and "AC is plugged in" in table.loc["battery", "invalid_reason"]
    assert tuple(table.loc["total", ["kind", "source"]]) == ("estimated", "cpu_time_model")


def test_the_figure_of_a_wall_meter_is_external_and_stands_before_an_estimate(clock):
    meter, _ = window(clock, 90)
    table = rows(meter, external_wh=2.0)
    row = table.loc["wall_meter"]
    assert (row.kind, row.gross_j) == ("external", 7200.0) and row.low_j < 7200 < row.high_j
    assert table.loc["total", "kind"] == "external"
    assert energy.energy_metrics(table.reset_index(), "train")["train_energy_wh"] == pytest.approx(2.0)
    assert "wall_meter" not in rows(meter).index


def test_the_figure_of_a_wall_meter_does_not_replace_a_measured_card(clock, card):
    meter, true_j = window(clock, 90)
    figures = energy.energy_metrics(meter.statement("train", 50.0), "train")
    assert (figures["energy_kind"], figures["train_energy_wh"]) == ("measured", pytest.approx(true_j / 3600, rel=0.01))


def test_windows_and_the_time_between_them_add_up_to_the_time_on_the_clock(clock):
    rng, meter, between_s = np.random.default_rng(6), energy.Meter(WATTS, 0.3), 0.0
    began = clock.perf_counter()
    for _ in range(50):
        meter.start()
        clock.spend(rng.uniform(0.1, 20), 100)
        meter.pause()
        pause_s = rng.uniform(0.1, 5)
        clock.spend(pause_s, 50)
        between_s += pause_s
    assert meter.total["window_s"] + between_s == pytest.approx(clock.perf_counter() - began, rel=1e-12)
    assert meter.n_windows == 50


@pytest.mark.parametrize("sensor", ["card", "powered"])
def test_the_energy_above_rest_is_what_the_work_added_to_the_power_of_an_idle_card(clock, sensor, request):
    request.getfixturevalue(sensor)
    meter = energy.Meter(WATTS, 0.3)
    assert meter.rest(20.0) == {"gpu": pytest.approx(60, rel=0.02)}
    meter.start()
    train(clock, meter, 100, watts=300)
    meter.stop()
    gpu = rows(meter).loc["gpu"]
    assert gpu.window_s == pytest.approx(100) and gpu.n_windows == 1  # the rest is no part of the work
    assert gpu.gross_j == pytest.approx(30_000, rel=0.02) and gpu.net_j == pytest.approx(24_000, rel=0.02)
    note = energy.rest_note(meter.statement("train"))
    assert re.search(r"cpu \d\.\d W, assumed, .*; gpu (59|60)\.\d W, measured, 80% of its energy above", note)


def test_rapl_at_rest_is_told_by_zone(clock, tmp_path):
    for number, watts in enumerate((20.0, 30.0)):
        write_zone(tmp_path / f"powercap/intel-rapl:{number}", f"package-{number}", 1_000_000, INTEL_RANGE_UJ)
        rests = (tmp_path / f"powercap/intel-rapl:{number}", watts)
        clock.sleep = (lambda slept, zone: lambda s: (slept(s), spend(zone[0], zone[1] * s)))(clock.sleep, rests)
    meter = energy.Meter(WATTS, 0.3)
    assert meter.rest(15.0) == {"cpu": pytest.approx(50.0)} and clock.perf_counter() == 15
    assert meter.rest(1.0) == {"cpu": pytest.approx(50.0)} and clock.perf_counter() == 15 + 10  # RAPL's shortest window


def test_the_rest_of_a_laptop_on_its_battery_is_that_of_the_whole_machine(clock, laptop):
    meter = energy.Meter(WATTS, 0.3)
    watts = meter.rest(10.0)
    assert set(watts) == {"battery"} and clock.perf_counter() == pytest.approx(60, abs=1)
    meter.start()
    train(clock, meter, 100)
    meter.stop()
    assert f"battery {watts['battery']:.1f} W, measured" in energy.rest_note(meter.statement("train"))


def test_without_a_sensor_nobody_rests_and_the_rest_of_the_cores_is_the_assumed_one(clock, monkeypatch):
    meter = energy.Meter(WATTS, 0.3)
    assert meter.rest(15.0, 40.0) == {} and clock.perf_counter() == 0
    monkeypatch.setattr(energy.os, "times", lambda: (0.9 * clock.perf_counter(), 0.0, 0.0, 0.0))
    meter.start()
    clock.spend(100, 300)
    meter.stop()
    note = energy.rest_note(meter.statement("train"))
    assert re.fullmatch(r"At rest: cpu \d\.\d W, assumed, \d+% of its energy above\.", note)


@pytest.mark.parametrize("recovers", [True, False])
def test_a_counter_that_fails_at_rest_costs_the_rest_alone_and_the_work_only_if_it_fails_there_too(
    clock, card, monkeypatch, recovers
):
    fake = sys.modules["pynvml"]

    def sleep(seconds: float) -> None:
        clock.spend(seconds, 60)
        fake.nvmlDeviceGetTotalEnergyConsumption = not_supported

    meter = energy.Meter(WATTS, 0.3)
    monkeypatch.setattr(clock, "sleep", sleep)
    assert meter.rest(20.0) == {}
    if recovers:
        fake.nvmlDeviceGetTotalEnergyConsumption = card.counter_mj
    meter.start()
    clock.spend(100, 300)
    meter.stop()
    gpu = rows(meter).loc["gpu"]
    assert gpu.kind == ("measured" if recovers else "none") and np.isnan(gpu.net_j)
    assert recovers or "Not Supported" in gpu.invalid_reason


def test_of_a_part_of_a_card_nobody_knows_the_rest(clock, monkeypatch):
    card = Card(clock)
    install_nvml(monkeypatch, "MIG-1", nvmlDeviceGetTotalEnergyConsumption=card.counter_mj)
    meter = energy.Meter(WATTS, 0.3)
    assert meter.gpu_share < 1 and meter.rest(20.0) == {} and clock.perf_counter() == 0


def warm(monkeypatch, clock: Clock, celsius_at) -> None:
    fake = sys.modules["pynvml"]
    fake.NVML_TEMPERATURE_GPU, fake.NVML_CLOCK_SM = 0, 1
    fake.nvmlDeviceGetTemperature = lambda *_: celsius_at(clock.perf_counter())


def test_a_hot_card_cools_down_before_it_rests_and_one_that_stays_hot_is_not_waited_for_longer_than_five_minutes(
    clock, card, monkeypatch
):
    warm(monkeypatch, clock, lambda at: round(80 - at / 2))
    energy.Meter(WATTS, 0.3).rest(0.0, 50.0)
    assert clock.perf_counter() == pytest.approx(60, abs=2)
    warm(monkeypatch, clock, lambda _: 90)
    before = clock.perf_counter()
    energy.Meter(WATTS, 0.3).rest(20.0, 50.0)
    assert clock.perf_counter() - before == pytest.approx(300 + 20, abs=2)


def test_what_slows_a_card_down_or_shares_it_is_a_warning_and_what_it_does_not_tell_is_none(clock, card, monkeypatch):
    warm(monkeypatch, clock, lambda at: round(60 + at / 10))
    fake, meter = sys.modules["pynvml"], energy.Meter(WATTS, 0.3)
    heat_s = 0.3  # of a window's time, and already some before it
    seen = {0: 0.0, 1: lambda: 7 + heat_s * clock.perf_counter()}

    def violation(_: object, policy: int) -> SimpleNamespace:
        return SimpleNamespace(violationTime=round(1e9 * (seen[policy]() if policy else seen[policy])))

    fake.nvmlDeviceGetViolationStatus = violation
    fake.nvmlDeviceGetEnforcedPowerLimit = lambda _: 350_000
    fake.nvmlDeviceGetComputeRunningProcesses = lambda _: [SimpleNamespace(pid=pid) for pid in (os.getpid(), 1)]
    assert meter.card.facts() == {}
    for _ in range(2):
        meter.start()
        clock.spend(50, 300)
        meter.pause()
    facts = meter.card.facts()
    assert facts == {
        "gpu_celsius_before": 60, "gpu_celsius_after": 70, "gpu_power_limit_w": 350.0, "gpu_sm_clock_mhz": None,
        "gpu_other_processes": 1, "gpu_slowed_by_power_s": 0.0, "gpu_slowed_by_heat_s": pytest.approx(30.0),
        "gpu_slowed_by_sync_boost_s": None, "gpu_slowed_by_board_limit_s": None, "gpu_slowed_by_reliability_s": None,
    }  # fmt: skip
    note = state_note(facts, cool_to_celsius=50)
    assert "slowed down**: 30.0 s by heat." in note and "1 other process computed" in note and "began at 60" in note
    assert state_note(facts | {"gpu_slowed_by_heat_s": 0.0, "gpu_other_processes": 0}, 65) == state_note({}) == ""


def test_in_a_container_that_numbers_its_own_processes_nobody_is_called_another_one(clock, card, monkeypatch):
    warm(monkeypatch, clock, lambda _: 60)
    fake, meter = sys.modules["pynvml"], energy.Meter(WATTS, 0.3)
    fake.nvmlDeviceGetComputeRunningProcesses = lambda _: [SimpleNamespace(pid=10**9)]
    meter.start()
    meter.pause()
    assert meter.card.facts()["gpu_other_processes"] is None
