"""What carbontracker does where it is used bare, and that the meter, which uses it as a check, survives each of it."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pandas as pd
import pytest
from carbontracker import constants, exceptions
from carbontracker.components.component import Component
from carbontracker.components.cpu import generic, intel
from carbontracker.components.gpu import nvidia
from carbontracker.emissions.intensity import intensity
from carbontracker.tracker import CarbonTracker, CarbonTrackerThread
from fake_sensors import install_nvml, not_supported, spend, write_zone

from telco_nb.lora import energy
from telco_nb.study.machine import AT_ONCE_VARIABLE

WATTS = (2.0, 5.0, 12.0)


@pytest.fixture(autouse=True)
def no_sensors(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "BATTERIES", tmp_path / "power_supply")
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)


class Log:
    """Its logger; keeps the critical messages."""

    def __init__(self) -> None:
        self.critical: list[str] = []

    def err_critical(self, text: str) -> None:
        self.critical.append(text)

    def info(self, *_: object, **__: object) -> None:
        pass

    output = err_warn = info


def simulated(watts: float) -> Component:
    return Component("cpu", [], False, Log(), sim_cpu="a processor", sim_cpu_tdp=watts, sim_cpu_util=1.0)


@pytest.fixture
def thread() -> Iterator[CarbonTrackerThread]:
    started = CarbonTrackerThread([simulated(10.0)], Log(), ignore_errors=False, delete=lambda: None)
    yield started
    started.stop()


def test_bare_every_total_is_multiplied_by_an_overhead_of_data_centres_and_the_meter_leaves_it_out(thread):
    thread.epoch_start()
    time.sleep(0.2)
    thread.epoch_end()
    joules = float(thread.total_energy_per_epoch()[0]) * 3.6e6
    assert joules == pytest.approx(10.0 * thread.epoch_times[0] * constants.PUE_2023)
    assert constants.PUE_2023 > 1.5
    meter = energy.Meter(WATTS, 0.3)
    began = time.perf_counter()
    meter.start()
    time.sleep(1.2)
    meter.stop()
    most = (time.perf_counter() - began) / meter.total["window_s"]  # carbontracker's window lies around the meter's
    total = meter.statement("train").set_index("component").loc["total"]
    assert 0.999 <= total["carbontracker_pue_removed_ratio"] <= most + 0.001 < constants.PUE_2023


@pytest.mark.parametrize("fault", ["no permission", "starts again", "no package"])
def test_bare_a_counter_that_it_cannot_use_is_an_energy_of_0_and_the_meter_s_an_estimate(monkeypatch, tmp_path, fault):
    write_zone(tmp_path / "intel-rapl:0", "core" if fault == "no package" else "package-0", 999_000_000)
    monkeypatch.setattr(intel, "RAPL_DIR", str(tmp_path))
    monkeypatch.setattr(intel, "MEASURE_DELAY", 0.01)
    handler, readings = intel.IntelCPU([], False), iter([999_000_000, 2_000_000])
    handler.init()
    if fault == "no permission":

        def refuse(*_: object) -> int:
            raise PermissionError("energy_uj")

        monkeypatch.setattr(handler, "_read_energy", refuse)
        with pytest.raises(exceptions.IntelRaplPermissionError):
            handler.power_usage()
    elif fault == "starts again":
        monkeypatch.setattr(handler, "_read_energy", lambda _: next(readings))
    component = Component("cpu", [], False, Log())
    component._handler = handler
    component.collect_power_usage(1)
    assert sum(component.energy_usage([60.0])) == 0


def test_a_counter_that_starts_again_is_followed_and_one_without_a_package_is_an_estimate(tmp_path):
    write_zone(tmp_path / "intel-rapl:0", "package-0", 999_000_000)
    for zone, kind, joules in (("package-0", "measured", 3.0), ("core", "estimated", None)):
        (tmp_path / "intel-rapl:0" / "name").write_text(zone)
        meter = energy.Meter(WATTS, 0.3)
        meter.start()
        spend(tmp_path / "intel-rapl:0", 3.0)
        meter.stop()
        row = meter.statement("train").set_index("component").loc["cpu"]
        assert row["kind"] == kind and row["gross_j"] > 0
        assert joules is None or row["gross_j"] == pytest.approx(joules)


def test_bare_an_epoch_without_a_sample_takes_its_neighbour_s_power():
    component, power_w = simulated(100.0), 100.0
    component.handler.power_usage = lambda: [power_w]
    component.collect_power_usage(1)
    power_w = 10.0
    component.collect_power_usage(3)  # nothing was sampled in epoch 2, which was as quiet as epoch 3
    first, second, third = (3.6e6 * kwh for kwh in component.energy_usage([1.0, 1.0, 1.0]))
    assert (first, second, third) == pytest.approx((100.0, 100.0, 10.0))


def test_the_meter_s_short_windows_are_added_up_and_none_takes_the_place_of_another(tmp_path):
    write_zone(tmp_path / "intel-rapl:0", "package-0", 10**6)
    meter = energy.Meter(WATTS, 0.3)
    for joules in (1.0, 0.1, 0.1):
        meter.start()
        spend(tmp_path / "intel-rapl:0", joules)
        meter.pause()
    meter.stop()
    assert meter.total["rapl_j"] == pytest.approx(1.2)


def test_bare_an_error_of_a_sensor_ends_the_process_and_the_meter_s_goes_on(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr("carbontracker.tracker.os._exit", lambda code: ended.set() if code == 70 else None)

    def fail(*_: object) -> list[float]:
        raise OSError("the sensor is gone")

    component = simulated(10.0)
    component.handler.power_usage = fail
    monkeypatch.setattr(CarbonTrackerThread, "_handle_error", HANDLE_ERROR)  # a meter of another test replaces it
    bare = CarbonTrackerThread([component], Log(), ignore_errors=False, delete=lambda: None)
    bare.epoch_start()
    assert ended.wait(60)
    bare.stop()
    meter = energy.Meter(WATTS, 0.3)  # which replaces it for its own
    monkeypatch.setattr(meter.tracker._thread, "components", [component])
    ended.clear()
    meter.start()
    time.sleep(1.1)
    meter.stop()
    assert not ended.is_set() and meter.statement("train").set_index("component").loc["total", "valid"]


HANDLE_ERROR = CarbonTrackerThread._handle_error  # as the library has it, before any meter
GET_HANDLES = nvidia.NvidiaGPU._get_handles
FETCH_GEO_LOCATION = intensity.IntensityService._fetch_geo_location


def test_bare_a_processor_without_a_counter_has_half_the_watts_of_a_table_and_the_meter_s_follows_the_load(monkeypatch):
    monkeypatch.setattr(generic.GenericCPU, "get_cpu_brand", lambda self: "EPYC 7232P")
    handler = generic.GenericCPU([], False)
    handler.init()
    idle_w = handler.power_usage()
    sum(range(10**6))
    assert handler.power_usage() == idle_w == [120.0 / 2], "whatever it does"
    joules = []
    for cpu_s in (0.0, 10.0):
        meter = energy.Meter(WATTS, 0.3)
        meter.total |= {"window_s": 10.0, "cpu_s": cpu_s, "tracker_cpu_s": 10.0}
        joules.append(meter.statement("train").set_index("component").loc["cpu", "gross_j"])
        meter.tracker.close()
    assert joules[0] < 0.9 * joules[1]


def test_bare_a_stop_in_mid_epoch_loses_the_epoch_and_the_meter_s_stop_keeps_the_window(thread):
    thread.epoch_start()
    time.sleep(0.2)
    thread.stop()
    assert list(thread.epoch_times) == [] and thread.total_energy_per_epoch().sum() == 0
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    time.sleep(0.2)
    meter.stop()
    assert meter.total["tracker_cpu_s"] >= 0.2 and meter.total["window_s"] >= 0.2


def test_bare_it_asks_the_network_where_it_is_and_the_meter_s_does_not(monkeypatch):
    asked = []
    monkeypatch.setattr(intensity.geocoder, "ip", lambda whose: asked.append(whose) or None)
    monkeypatch.setattr(intensity.IntensityService, "_fetch_geo_location", FETCH_GEO_LOCATION)
    FETCH_GEO_LOCATION(SimpleNamespace(logger=SimpleNamespace(err_debug=lambda text: None)))
    assert asked == ["me"]
    asked.clear()
    energy.Meter(WATTS, 0.3).stop()
    assert asked == []


def test_a_reader_is_warned_where_carbontracker_saw_another_window():
    meter = energy.Meter(WATTS, 0.3)
    meter.total |= {"window_s": 10.0, "cpu_s": 10.0, "tracker_cpu_s": 9.0}
    statement = meter.statement("train")
    meter.tracker.close()
    assert statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"] == pytest.approx(0.9)
    meter.total["tracker_cpu_s"] = 9.6
    assert "apart" not in energy.carbontracker_note(meter.statement("train"))
    assert "**They are more than 5% apart**" in energy.carbontracker_note(statement)


# Ratios of the published run on an H100, whose power reading is the mean of about the past second.
@pytest.mark.parametrize(("window_s", "ratio", "warned"), [(5.7, 0.924, ""), (37.0, 0.981, ""), (57.0, 0.924, "7%")])
def test_of_a_short_window_on_a_card_the_lag_of_its_power_is_no_missing_work(window_s, ratio, warned):
    meter = energy.Meter(WATTS, 0.3)
    statement = meter.statement("train").set_index("component")
    meter.tracker.close()
    statement.loc["gpu", "kind"] = "measured"
    statement.loc["total", ["window_s", "carbontracker_pue_removed_ratio"]] = window_s, ratio
    note = energy.carbontracker_note(statement.reset_index())
    assert f"more than {warned} apart" in note if warned else "apart" not in note


def test_carbontracker_watches_the_card_in_use_and_no_other(monkeypatch):
    card = object()
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(nvidia.pynvml, name, lambda: None)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetName", lambda handle: "Test GPU")
    asked = []
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetPowerUsage", lambda handle: asked.append(handle) or 300_000)
    tracker, began = energy.Carbontracker(card), time.perf_counter()
    tracker.start()
    time.sleep(0.3)
    _, joules = tracker.pause()
    most = time.perf_counter() - began
    tracker.close()
    assert asked and {*asked} == {card}
    assert 300 * 0.299 <= joules <= 300 * most


def ends_the_process(monkeypatch, component: Component) -> bool:
    """Whether the library's thread, bare, calls os._exit(70) with this component."""
    ended = threading.Event()
    monkeypatch.setattr("carbontracker.tracker.os._exit", lambda code: ended.set() if code == 70 else None)
    monkeypatch.setattr(CarbonTrackerThread, "_handle_error", HANDLE_ERROR)
    bare = CarbonTrackerThread([component], Log(), ignore_errors=False, delete=lambda: None)
    bare.join(60)
    return ended.is_set()


def bare_tracker(monkeypatch, **options) -> CarbonTracker:
    """The library as it is, but for the look-up of the place."""
    monkeypatch.setattr(intensity.IntensityService, "_fetch_geo_location", lambda _: None)
    monkeypatch.setattr(CarbonTracker, "_handle_error", HANDLE_TRACKER_ERROR)
    monkeypatch.setattr(CarbonTrackerThread, "_handle_error", HANDLE_ERROR)
    simulation = {"sim_cpu": "a processor", "sim_cpu_tdp": 10.0, "sim_cpu_util": 1.0}
    return CarbonTracker(**{"epochs": 1, "verbose": 0, "components": "cpu"} | simulation | options)


HANDLE_TRACKER_ERROR = CarbonTracker._handle_error


def test_bare_a_card_that_is_asked_for_and_missing_ends_the_process_and_the_meter_has_no_figure_of_it(monkeypatch):
    def no_library() -> None:
        raise nvidia.pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(nvidia.pynvml, "nvmlInit", no_library)
    assert ends_the_process(monkeypatch, Component("gpu", [], False, Log()))
    row = window_of(energy.Meter(WATTS, 0.3)).loc["gpu"]
    assert row["kind"] == "none" and pd.isna(row["gross_j"])


def window_of(meter: energy.Meter):
    """The statement of a window of 0.1 s."""
    meter.start()
    time.sleep(0.1)
    meter.stop()
    return meter.statement("train").set_index("component")


def test_bare_a_counter_that_a_container_masks_ends_the_process_and_the_meter_s_is_an_estimate(monkeypatch, tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()  # the name stands there, its files do not
    monkeypatch.setattr(intel, "RAPL_DIR", str(tmp_path))
    assert ends_the_process(monkeypatch, Component("cpu", [], False, Log()))
    row = window_of(energy.Meter(WATTS, 0.3)).loc["cpu"]
    assert row["kind"] == "estimated" and row["gross_j"] > 0


def test_bare_the_readings_are_gone_after_the_last_epoch_and_the_meter_s_stay(monkeypatch):
    bare = bare_tracker(monkeypatch, epochs_before_pred=0)
    bare.epoch_start()
    bare.epoch_end()
    with pytest.raises(AttributeError, match="tracker"):
        _ = bare.tracker
    meter, seconds = energy.Meter(WATTS, 0.3), []
    for end in (meter.pause, meter.stop):
        meter.start()
        time.sleep(0.1)
        end()
        seconds.append(meter.total["tracker_cpu_s"])
    assert seconds[0] >= 0.1 and seconds[1] >= seconds[0] + 0.1
    assert meter.statement("train").set_index("component").loc["cpu", "carbontracker_j"] > 0


def test_bare_two_of_them_count_the_machine_twice_and_the_meter_s_counter_is_then_not_valid(monkeypatch, tmp_path):
    pair = [CarbonTrackerThread([simulated(10.0)], Log(), False, lambda: None) for _ in range(2)]
    for bare in pair:
        bare.epoch_start()
    began = time.perf_counter()
    time.sleep(0.3)
    for bare in pair:
        bare.epoch_end()
    joules = sum(float(bare.total_energy_per_epoch()[0]) for bare in pair) * 3.6e6 / constants.PUE_2023
    assert joules >= 2 * 10.0 * 0.3 and joules > 1.5 * 10.0 * (time.perf_counter() - began)
    for bare in pair:
        bare.stop()
    write_zone(tmp_path / "intel-rapl:0", "package-0", 10**6)
    monkeypatch.setenv(AT_ONCE_VARIABLE, "2")
    row = window_of(energy.Meter(WATTS, 0.3)).loc["cpu"]
    assert not row["valid"] and "holds all 2 jobs" in row["invalid_reason"]


@pytest.mark.parametrize("visible", ["GPU-1", "MIG-1", ""])
def test_bare_cards_that_are_named_otherwise_than_by_number_are_all_counted_and_the_meter_reads_its_own(
    monkeypatch, visible
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(nvidia.pynvml, name, lambda: None)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(nvidia.NvidiaGPU, "_get_handles", GET_HANDLES)
    bare = nvidia.NvidiaGPU([], False)
    bare.init()
    assert bare._handles == [0, 1, 2, 3]
    meter = energy.Carbontracker("GPU-1")
    bare.init()
    meter.close()
    assert bare._handles == ["GPU-1"]


def test_bare_an_error_at_the_start_is_not_ignored_though_told_so_and_the_meter_s_work_goes_on(monkeypatch):
    with pytest.raises(AttributeError, match="tracker"):
        bare_tracker(monkeypatch, ignore_errors=True, components="disk")
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=not_supported)
    row = window_of(energy.Meter(WATTS, 0.3)).loc["gpu"]
    assert not row["valid"] and "Not Supported" in row["invalid_reason"]
    monkeypatch.setattr("carbontracker.components.component.create_components", lambda **_: 1 / 0)
    rows = window_of(energy.Meter(WATTS, 0.3))
    assert rows.loc["cpu", "gross_j"] > 0 and pd.isna(rows.loc["total", "carbontracker_pue_removed_ratio"])


def test_bare_it_prints_though_told_to_be_quiet_and_the_meter_s_does_not(monkeypatch, capsys):
    bare = bare_tracker(monkeypatch)
    said, until = "", time.monotonic() + 60
    while not said and time.monotonic() < until:
        time.sleep(0.01)
        said += capsys.readouterr().out
    bare.tracker.stop()
    assert "simulated CPU" in said
    window_of(energy.Meter(WATTS, 0.3))
    assert capsys.readouterr().out == ""


def test_bare_told_to_confirm_it_waits_for_a_key_and_an_n_ends_the_process_and_the_meter_asks_nobody(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
    bare = bare_tracker(monkeypatch, epochs=2, epochs_before_pred=1, monitor_epochs=2, stop_and_confirm=True)
    bare.epoch_start()
    time.sleep(0.1)
    with pytest.raises(SystemExit):
        bare.epoch_end()
    bare.tracker.stop()
    window_of(energy.Meter(WATTS, 0.3))
    assert asked == [1]
