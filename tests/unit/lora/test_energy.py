"""Energy: what is measured is counted right, what is estimated says so, and nobody is asked where we are."""

import socket
import time
from types import SimpleNamespace

import pytest

from telco_nb.lora import energy
from telco_nb.study import machine

WATTS = (2.0, 5.0, 12.0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture(autouse=True)
def no_sensors(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)


@pytest.fixture
def rapl(tmp_path):
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    (domain / "max_energy_range_uj").write_text("1000000000")

    def write(microjoules: int) -> None:
        (domain / "energy_uj").write_text(str(microjoules))

    write(990_000_000)
    return write


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
    rapl(20_000_000)  # from 990 J over the top at 1000 J to 20 J
    meter.stop()
    meter.total["window_s"] = 12.0
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert (row.kind, row.source, row.gross_j) == ("measured", "rapl", pytest.approx(30.0))


def test_a_counter_that_several_jobs_share_is_no_figure_of_one_of_them(rapl, monkeypatch):
    monkeypatch.setenv(machine.AT_ONCE_VARIABLE, "2")
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    rapl(995_000_000)
    meter.stop()
    meter.total["window_s"] = 60.0
    row = meter.statement("train").set_index("component").loc["total"]
    assert not row.valid and "the counter holds all 2 jobs" in row.invalid_reason
    assert meter._watts(5.0, 1.0) == pytest.approx(meter.cores * 5.0 * (0.3 / 2 + 0.7))


def test_a_measured_processor_over_the_same_window_is_no_reason_for_a_warning(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    busy(1.5)
    rapl(20_000_000)  # 30 J: far from what the declared watts would say of this window
    meter.stop()
    statement = meter.statement("train")
    assert statement.set_index("component").loc["total", "gross_j"] == pytest.approx(30.0)
    assert "apart" not in energy.carbontracker_note(statement)


def test_an_unreadable_or_empty_rapl_counter_is_no_sensor(rapl):
    rapl(0)
    assert energy.rapl_domains() == []


def test_a_window_too_short_for_its_sensor_is_marked_invalid_with_the_reason(rapl):
    meter = energy.Meter(WATTS, 0.3)
    meter.start()
    rapl(995_000_000)
    meter.stop()
    row = meter.statement("train").set_index("component").loc["cpu"]
    assert not row.valid and "under 10 s" in row.invalid_reason


def test_a_measured_gpu_is_the_headline_and_the_total_inherits_the_weakest_label(monkeypatch):
    import sys

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
