"""Energy: what is measured is counted right, what is estimated says so, and nobody is asked where we are."""

import errno
import json
import math
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fake_sensors import install_clock, install_nvml, not_supported, spend, write_supply, write_zone

from telco_nb.lora import energy, sensors
from telco_nb.lora.power_samples import PowerSampler, PowerSource
from telco_nb.study import machine

WATTS = (2.0, 5.0, 12.0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def metered(meter: energy.Meter, work: Callable[[], object]) -> float:
    """Meter some work. Returns the most that carbontracker's window can be of the meter's, which lies within it."""
    began = time.perf_counter()
    meter.start()
    work()
    meter.stop()
    return (time.perf_counter() - began) / meter.total["window_s"]


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

    def work() -> None:
        busy(1.5)
        rapl(str(20_000_000))  # 30 J: far from what the declared watts would say of this window

    most = metered(meter, work)
    total = meter.statement("train").set_index("component").loc["total"]
    assert total["gross_j"] == pytest.approx(30.0)
    assert 0.999 <= total["carbontracker_pue_removed_ratio"] <= most + 0.001


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
    assert "nothing to compare" in energy.carbontracker_note(statement)


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
    assert meter.readings()["tracker_gpu_j"] is None and "nothing to compare" in energy.carbontracker_note(statement)


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
    assert "times our figure of the processor." in energy.carbontracker_note(statement)


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
    assert "nothing to compare" in energy.carbontracker_note(statement)


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


def test_readings_restored_from_a_checkpoint_are_added_to(monkeypatch):
    clock = install_clock(monkeypatch)
    first = energy.Meter(WATTS, 0.3)
    first.start()
    clock.spend(3, 50)
    first.stop()
    second = energy.Meter(WATTS, 0.3)
    second.restore(first.readings())
    second.start()
    clock.spend(4, 50)
    second.stop()
    assert (second.total["window_s"], second.n_windows) == (7.0, 2)


def test_pausing_leaves_time_out(monkeypatch):
    clock = install_clock(monkeypatch)
    meter = energy.Meter(WATTS, 0.3)
    for seconds in (1, 2):
        meter.start()
        clock.spend(seconds, 50)
        meter.pause()
        clock.spend(100, 50)
    assert meter.total["window_s"] == 3.0


def test_carbontracker_agrees_over_the_same_window_and_looks_nothing_up(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    meter = energy.Meter(WATTS, 0.3)
    most = metered(meter, lambda: busy(2.5))
    statement = meter.statement("train")
    ratio = statement.set_index("component").loc["total", "carbontracker_pue_removed_ratio"]
    assert 0.999 <= ratio <= most + 0.001
    assert f"**{ratio:.3f}** times" in energy.carbontracker_note(statement)


def test_carbontracker_s_figure_stands_beside_the_same_part_of_the_machine_only(card):
    counter = iter(range(0, 10_000_000, 900_000))
    card.nvmlDeviceGetTotalEnergyConsumption = lambda _: next(counter)
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.stop()
    meter.total |= {"window_s": 30.0, "cpu_s": 30.0, "tracker_cpu_s": 30.0, "tracker_gpu_j": 900.0}
    statement = meter.statement("train", external_wh=1000.0)
    rows = statement.set_index("component")
    assert rows.loc["cpu", "carbontracker_j"] == pytest.approx(rows.loc["cpu", "gross_j"])
    assert rows.loc["gpu", "carbontracker_j"] == 900.0
    assert rows.loc["total", "kind"] == "external" and rows.loc[["wall_meter", "total"], "carbontracker_j"].isna().all()
    assert rows.loc["total", "carbontracker_pue_removed_ratio"] == pytest.approx(1.0)
    assert "1.000** times our figure of processor and GPU together." in energy.carbontracker_note(statement)
    parts = meter.statement("train").set_index("component")
    assert parts.loc["total", "carbontracker_j"] == pytest.approx(parts.loc["total", "gross_j"])


def test_a_missing_energy_is_said_in_words_and_the_sensor_that_failed_is_named(card):
    card.nvmlDeviceGetTotalEnergyConsumption = not_supported
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.stop()
    meter.total["window_s"] = 30.0
    statement = meter.statement("answer")
    figures = energy.energy_metrics(statement, "answer")
    assert energy.energy_text(figures, "answer", "mWh", 4) == "an unknown energy"
    reason = "**Not valid**: gpu: the card's energy counter cannot be read: Not Supported."
    assert energy.invalid_note(statement) == reason
    shown = energy.shown_statement(statement).set_index("component")
    assert "cannot be read" in shown.loc["gpu", "why it is not valid"]


def test_a_known_energy_has_its_interval_its_kind_and_nothing_to_complain_of():
    meter = energy.Meter(WATTS, 0.3)
    meter.total |= {"window_s": 36.0, "cpu_s": 36.0 * meter.cores, "tracker_cpu_s": 36.0}
    statement = meter.statement("answer")
    meter.tracker.close()
    figures = energy.energy_metrics(statement, "answer")
    per_core = "50 mWh (20 to 120 mWh, estimated)"  # 36 s at 5, 2 and 12 W
    assert energy.energy_text(figures, "answer", "mWh", meter.cores) == per_core
    assert energy.invalid_note(statement) == ""  # a machine without a GPU lacks nothing


def test_a_sensor_that_counted_nothing_is_not_called_a_short_window(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    meter.stop()
    meter.total["window_s"] = 30.0
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert row.invalid_reason == "cpu: the sensor counted 0 J in 30.0 s"


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [
        (["Not charging"], "BAT0 Not charging"),
        (["Full"], "BAT0 Full"),
        (["Unknown"], "BAT0 Unknown"),
        ([""], "BAT0 unknown"),
        (["Discharging", "Charging"], "BAT1 Charging"),
    ],
)
def test_a_battery_counts_only_while_it_discharges(tmp_path, statuses, reason):
    for i, status in enumerate(statuses):
        write_supply(tmp_path / f"BAT{i}", type="Battery", status=status, power_now=20_000_000)
    with pytest.raises(sensors.SensorError, match=f"must be Discharging .*{reason}"):
        sensors.read_battery_w(tuple(sorted(tmp_path.glob("BAT*"))))
    assert sensors.find_batteries(tmp_path) == ()


def test_of_two_batteries_the_one_that_rests_is_left_out(tmp_path):
    write_supply(tmp_path / "BAT0", type="Battery", status="Discharging", power_now=20_000_000)
    write_supply(tmp_path / "BAT1", type="Battery", status="Full", power_now=7_000_000)
    assert sensors.read_battery_w(sensors.find_batteries(tmp_path)) == 20.0


def test_a_power_is_sampled_in_the_background_while_the_work_runs():
    asked, state = [], random.getstate()
    source = PowerSource(lambda: asked.append(1) or 100.0, interval_s=0.01, accuracy=0.05, lag_s=0.0)
    sampler = PowerSampler(source)
    for wanted in (15, 30):
        outside = time.perf_counter()
        sampler.start()
        inside = time.perf_counter()
        while len(asked) < wanted:  # however long a busy machine takes: the thread is real
            assert time.perf_counter() < outside + 60
            time.sleep(0.01)
        least = time.perf_counter() - inside
        found = sampler.stop()
        assert 100 * least <= found.joules <= 100 * (time.perf_counter() - outside)
        assert found.half_j == pytest.approx(0.05 * found.joules)  # a steady power: the sensor's own error alone
    after = len(asked)
    time.sleep(0.1)
    assert len(asked) == after
    assert random.getstate() == state  # the order of a training is drawn from it


def test_energy_per_token_per_supervised_token_and_per_second_are_those_worked_out_by_hand():
    figures = {"train_energy_wh": 2.0, "answer_energy_wh": 1.0}
    assert energy.energy_rates(figures, "train", tokens=14_400, supervised_tokens=7200, window_s=60.0) == {
        "train_joules_per_token": 0.5, "train_joules_per_supervised_token": 1.0, "train_mean_w": 120.0
    }  # fmt: skip
    assert energy.energy_rates(figures, "answer", 100, 100, 36.0)["answer_mean_w"] == 100.0


@pytest.mark.parametrize(("wh", "tokens", "window_s"), [(math.nan, 10, 60.0), (2.0, 0, 0.0)])
def test_a_rate_of_a_missing_energy_or_of_nothing_is_missing_and_no_0(wh, tokens, window_s):
    rates = energy.energy_rates({"train_energy_wh": wh}, "train", tokens, tokens, window_s)
    assert len(rates) == 3 and all(map(math.isnan, rates.values()))
