"""Energy: what is measured is counted right, what is estimated says so, and nobody is asked where we are."""

import errno
import json
import math
import random
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fake_sensors import install_nvml, not_supported, spend, write_zone

from telco_nb.lora import energy
from telco_nb.lora.power_samples import PowerSampler, PowerSource
from telco_nb.study import machine

WATTS = (2.0, 5.0, 12.0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture(autouse=True)
def no_sensors(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "BATTERIES", tmp_path / "power_supply")
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)


@pytest.fixture
def rapl(tmp_path):
    write_zone(tmp_path / "intel-rapl:0", "package-0", 990_000_000)
    return (tmp_path / "intel-rapl:0" / "energy_uj").write_text


def measured(root: Path, joules: dict[str, int]) -> pd.DataFrame:
    """The statement of a window of 30 s in which these zones counted these joules."""
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    for zone, spent in joules.items():
        spend(root / zone, spent)
    meter.stop()
    meter.total["window_s"] = 30.0
    return meter.statement("train").set_index("component")


def test_without_a_sensor_the_statement_is_an_interval_labelled_estimated():
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(1.1)
    meter.stop()
    rows = meter.statement("train").set_index("component")
    assert rows.loc["total", "kind"] == rows.loc["cpu", "kind"] == "estimated"
    assert rows.loc["cpu", "source"] == "cpu_time_model"
    assert rows.loc["cpu", "low_j"] < rows.loc["cpu", "gross_j"] < rows.loc["cpu", "high_j"]
    assert rows.loc["gpu", "kind"] == "none"
    assert rows.loc["gpu", ["gross_j", "low_j", "high_j"]].isna().all()  # missing, not 0
    assert rows.loc["total", "valid"]


def test_the_estimate_is_time_times_cores_times_the_declared_watts():
    meter = energy.Meter(WATTS, 0.25)
    meter.total |= {"window_s": 10.0, "cpu_s": 10.0 * meter.cores * 0.5}
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert row.gross_j == pytest.approx(10 * meter.cores * 5.0 * (0.25 + 0.75 * 0.5))
    assert row.idle_w == pytest.approx(meter.cores * 5.0 * 0.25)
    assert row.net_j == pytest.approx(row.gross_j - 10 * row.idle_w)
    meter.tracker.close()


def test_a_rapl_counter_that_wraps_around_is_added_up_right(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    rapl(str(20_000_000))  # from 990 J over the top at 1000 J to 20 J
    meter.stop()
    meter.total["window_s"] = 12.0
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert (row.kind, row.source, row.gross_j) == ("measured", "rapl", pytest.approx(30.0))


def test_a_counter_that_several_jobs_share_is_no_figure_of_one_of_them(rapl, monkeypatch):
    monkeypatch.setenv(machine.AT_ONCE_VARIABLE, "2")
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    rapl(str(995_000_000))
    meter.stop()
    meter.total["window_s"] = 60.0
    row = meter.statement("train").set_index("component").loc["total"]
    assert not row.valid and "the counter holds all 2 jobs" in row.invalid_reason
    assert meter._watts(5.0, 1.0) == pytest.approx(meter.cores * 5.0 * (0.3 / 2 + 0.7))


def test_a_measured_processor_over_the_same_window_is_no_reason_for_a_warning(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(1.5)
    rapl(str(20_000_000))  # 30 J: far from what the declared watts would say of this window
    meter.stop()
    statement = meter.statement("train")
    assert statement.set_index("component").loc["total", "gross_j"] == pytest.approx(30.0)
    assert "apart" not in energy.carbontracker_note(statement)


@pytest.mark.parametrize(
    ("zones", "spent", "joules", "apart"),
    [
        (
            {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"},
            {"intel-rapl:0": 300, "intel-rapl:0:0": 200, "intel-rapl:0:1": 60, "intel-rapl:1": 700},
            300,
            {"package-0 core": 200, "package-0 dram": 60, "psys": 700},
        ),
        (
            {"intel-rapl:0": "package-0", "intel-rapl-mmio:0": "package-0", "intel-rapl:1": "package-0"},
            {"intel-rapl:0": 300, "intel-rapl-mmio:0": 299, "intel-rapl:1": 301},
            300,
            {},
        ),
        (
            {f"intel-rapl:{i}": f"package-{i}" for i in range(12)},
            {f"intel-rapl:{i}": 10 + i for i in range(12)},
            186,
            {},
        ),
        (
            {"intel-rapl:0": "package-0-die-0", "intel-rapl:1": "package-0-die-1"},
            {"intel-rapl:0": 20, "intel-rapl:1": 30},
            50,
            {},
        ),
    ],
    ids=["psys and parts beside a package", "the same package twice", "twelve packages", "two dies"],
)
def test_rapl_zones_are_taken_by_name_and_each_package_once(tmp_path, zones, spent, joules, apart):
    for zone, name in zones.items():
        write_zone(tmp_path / zone, name, 10**6)
    rows = measured(tmp_path, spent)
    assert (rows.loc["cpu", "source"], rows.loc["cpu", "gross_j"]) == ("rapl", pytest.approx(joules))
    assert rows.loc["total", "gross_j"] == pytest.approx(joules) and rows.loc["total", "valid"]
    shown = rows.drop(index=["cpu", "gpu", "total"])["gross_j"]
    assert dict(shown) == pytest.approx(apart)


UNUSABLE = ["reads 0", "no number", "no name", "no range", "of two packages one", "no data"]


@pytest.mark.parametrize("fault", UNUSABLE)
def test_a_rapl_counter_that_cannot_be_used_at_the_start_gives_an_estimate_that_says_why(
    tmp_path, rapl, monkeypatch, fault
):
    zone = tmp_path / "intel-rapl:0"
    if fault == "reads 0":
        rapl("0")
    elif fault == "no number":
        rapl("")
    elif fault == "no name":
        (zone / "name").unlink()
    elif fault == "no range":
        (zone / "max_energy_range_uj").unlink()
    elif fault == "no data":  # of a counter that the firmware has switched off
        read = Path.read_text

        def refuse(path: Path, **options: str) -> str:
            if path.name == "energy_uj":
                raise OSError(errno.ENODATA, "No data available")
            return read(path, **options)

        monkeypatch.setattr(Path, "read_text", refuse)
    else:
        write_zone(tmp_path / "intel-rapl:1", "package-1", 10**6)
        (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    row = measured(tmp_path, {}).loc["cpu"]
    assert (row.kind, row.source, row.valid) == ("estimated", "cpu_time_model", True)
    assert row.note.startswith("no counter: ") and "intel-rapl:" in row.note


def test_a_powercap_folder_that_a_container_masks_gives_an_estimate_that_says_so(tmp_path):
    row = measured(tmp_path, {}).loc["cpu"]
    assert (row.kind, row.valid) == ("estimated", True) and "lists no processor package" in row.note


def test_a_rapl_counter_that_fails_in_mid_window_invalidates_its_component_and_nothing_else(tmp_path, rapl):
    write_zone(tmp_path / "intel-rapl:0:0", "dram", 10**6)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    meter.stop()
    meter.total["window_s"] = 30.0
    statement = meter.statement("train")
    rows = statement.set_index("component")
    assert (rows.loc["cpu", "kind"], rows.loc["cpu", "valid"]) == ("estimated", False)
    assert "energy_uj cannot be read: No such file" in rows.loc["cpu", "invalid_reason"]
    assert not rows.loc["total", "valid"] and "energy_uj" in rows.loc["total", "invalid_reason"]
    assert rows.loc["package-0 dram", "gross_j"] == 0
    figures = energy.energy_metrics(statement, "train")
    assert (figures["energy_kind"], figures["energy_valid"]) == ("estimated", False)


def test_a_failure_before_a_checkpoint_is_still_known_after_it(tmp_path, rapl):
    first = energy.Meter(WATTS, 0.3)
    first.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    first.stop()
    rapl(str(991_000_000))
    second = energy.Meter(WATTS, 0.3)
    second.restore(json.loads(json.dumps(first.readings())))
    second.start()
    second.stop()
    second.total["window_s"] = 30.0
    row = second.statement("train").set_index("component").loc["cpu"]
    assert not row.valid and "before the training was resumed" in row.invalid_reason


@pytest.fixture
def card(monkeypatch):
    """A card whose energy counter and power are functions that a test replaces."""
    return install_nvml(monkeypatch)


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_card_without_an_energy_counter_is_invalid_with_the_reason_and_has_no_total(card, broken):
    setattr(card, broken, not_supported)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.stop()
    meter.total["window_s"] = 30.0
    statement = meter.statement("train")
    rows = statement.set_index("component")
    assert (rows.loc["gpu", "kind"], rows.loc["gpu", "valid"]) == ("none", False)
    assert "Not Supported" in rows.loc["gpu", "invalid_reason"]
    assert rows.loc["total", "kind"] == "none" and not rows.loc["total", "valid"]
    figures = energy.energy_metrics(statement, "train")
    assert math.isnan(figures["train_energy_wh"]) and not figures["energy_valid"]
    assert "no total" in energy.carbontracker_note(statement)


def test_a_card_whose_counter_fails_in_mid_window_is_invalid_with_the_reason(card):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    card.nvmlDeviceGetTotalEnergyConsumption = not_supported
    meter.stop()
    meter.total["window_s"] = 30.0
    rows = meter.statement("train").set_index("component")
    assert not rows.loc["gpu", "valid"] and "Not Supported" in rows.loc["gpu", "invalid_reason"]
    assert rows.loc["cpu", "valid"] and not rows.loc["total", "valid"]


def test_a_card_without_power_is_measured_and_has_nothing_to_compare_carbontracker_with(card):
    counter = iter(range(0, 10_000_000, 900_000))
    card.nvmlDeviceGetTotalEnergyConsumption = lambda _: next(counter)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.stop()
    meter.total["window_s"] = 30.0
    statement = meter.statement("train")
    assert statement.set_index("component").loc["gpu", "gross_j"] == pytest.approx(900.0)
    assert meter.readings()["tracker_gpu_j"] is None and "no total" in energy.carbontracker_note(statement)


def test_what_has_no_reading_is_null_in_a_checkpoint_and_missing_after_it(card):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    card.nvmlDeviceGetTotalEnergyConsumption = not_supported
    meter.stop()
    saved = json.loads(json.dumps(meter.readings(), allow_nan=False))
    assert saved["gpu_j"] is None and saved["cpu_s"] is not None
    meter.restore(saved)
    assert math.isnan(meter.total["gpu_j"]) and not math.isnan(meter.total["cpu_s"])


def test_without_a_gpu_carbontracker_is_compared_with_the_cores_alone():
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(1.1)
    meter.stop()
    statement = meter.statement("train")
    assert meter.readings()["gpu_j"] is None and meter.readings()["tracker_gpu_j"] is None
    assert statement.set_index("component").loc["gpu", "invalid_reason"] == "no GPU"
    assert "times the total" in energy.carbontracker_note(statement)


def test_an_error_inside_carbontracker_does_not_end_the_process(monkeypatch):
    from carbontracker.tracker import CarbonTrackerThread

    def fail(_: object) -> None:
        raise OSError("the sensor is gone")

    monkeypatch.setattr(CarbonTrackerThread, "_collect_measurements", fail)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(1.1)
    meter.stop()
    statement = meter.statement("train")
    assert statement.set_index("component").loc["total", "valid"]
    assert "no total" in energy.carbontracker_note(statement)


def test_a_window_too_short_for_its_sensor_is_marked_invalid_with_the_reason(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    rapl(str(995_000_000))
    meter.stop()
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert not row.valid and "under 10 s" in row.invalid_reason


def test_a_measured_gpu_is_the_headline_and_the_total_inherits_the_weakest_label(monkeypatch):
    counter = iter([1_000_000, 1_900_000])
    fake = SimpleNamespace(
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(counter), nvmlDeviceGetName=lambda _: "Test GPU"
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    meter = energy.Meter(WATTS, 0.3)
    meter.gpu = object()
    meter.start()
    meter.stop()
    meter.total["window_s"] = 30.0
    statement = meter.statement("train")
    rows = statement.set_index("component")
    assert rows.loc["gpu", "gross_j"] == pytest.approx(900.0)
    assert (rows.loc["gpu", "kind"], rows.loc["total", "kind"]) == ("measured", "estimated")
    figures = energy.energy_metrics(statement, "train")
    assert (figures["energy_kind"], figures["train_energy_wh"]) == ("measured", pytest.approx(0.25))


def test_readings_restored_from_a_checkpoint_are_added_to():
    first = energy.Meter(WATTS, 0.3)
    first.start()
    busy(0.3)
    first.stop()
    second = energy.Meter(WATTS, 0.3)
    second.restore(first.readings())
    second.start()
    busy(0.3)
    second.stop()
    assert second.total["window_s"] == pytest.approx(first.total["window_s"] + 0.3, abs=0.25)
    assert second.n_windows == 2


def test_pausing_leaves_time_out():
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.pause()
    time.sleep(0.5)
    meter.start()
    meter.stop()
    assert meter.total["window_s"] < 0.4


def test_carbontracker_agrees_over_the_same_window_and_looks_nothing_up(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(2.5)
    meter.stop()
    statement = meter.statement("train")
    ratio = statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"]
    assert ratio == pytest.approx(1.0, abs=0.05)
    assert f"**{ratio:.3f}** times" in energy.carbontracker_note(statement)
    assert "apart" not in energy.carbontracker_note(statement)


def test_a_reader_is_warned_where_carbontracker_saw_another_window():
    meter = energy.Meter(WATTS, 0.3)
    meter.total |= {"window_s": 10.0, "cpu_s": 10.0, "tracker_cpu_s": 9.0}
    statement = meter.statement("train")
    meter.tracker.close()
    assert statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"] == pytest.approx(0.9)
    assert "**They are more than 5% apart**" in energy.carbontracker_note(statement)


def test_carbontracker_watches_the_card_in_use_and_no_other(monkeypatch):
    from carbontracker.components.gpu import nvidia

    card = object()
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(nvidia.pynvml, name, lambda: None)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetName", lambda handle: "Test GPU")
    asked = []
    monkeypatch.setattr(nvidia.pynvml, "nvmlDeviceGetPowerUsage", lambda handle: asked.append(handle) or 300_000)
    tracker = energy._Carbontracker(card)
    tracker.start()
    time.sleep(0.3)
    _, joules = tracker.pause()
    tracker.close()
    assert asked and {*asked} == {card}
    assert joules == pytest.approx(300 * 0.3, rel=0.5)


def test_a_power_is_sampled_in_the_background_while_the_work_runs():
    asked, state = [], random.getstate()
    source = PowerSource(lambda: asked.append(1) or 100.0, interval_s=0.01, accuracy=0.05, lag_s=0.0)
    sampler = PowerSampler(source)
    for _ in range(2):
        start = time.perf_counter()
        sampler.start()
        time.sleep(0.3)
        found = sampler.stop()
        assert found.joules == pytest.approx(100 * (time.perf_counter() - start), rel=0.1)
        assert found.half_j == pytest.approx(0.05 * found.joules)  # a steady power: the sensor's own error alone
    after = len(asked)
    time.sleep(0.1)
    assert len(asked) == after > 20
    assert random.getstate() == state  # the order of a training is drawn from it
