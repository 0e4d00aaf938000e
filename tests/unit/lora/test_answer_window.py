"""Answers repeat in one window until the sensors can tell their energy, and the energy of one pass comes out."""

import pandas as pd
import pytest
from fake_sensors import Card, install_clock, install_nvml, not_supported, write_zone

from telco_nb.lora import decoding, energy

PASS_S, PASS_W = 3.0, 300.0


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    monkeypatch.setattr(energy, "BATTERIES", tmp_path / "power_supply")
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)
    clock = install_clock(monkeypatch)
    monkeypatch.setattr(decoding, "time", clock)
    return clock


def answered(clock, seconds=PASS_S):
    """(answers, passes, statement) of a machine that takes so long for a pass; each pass numbers its answers."""
    meter, count = energy.Meter((2.0, 5.0, 12.0), 0.3), iter(range(1000))

    def answer():
        clock.spend(seconds, PASS_W)
        return pd.DataFrame({"pass": [next(count)]})

    answers, passes = decoding.answer_metered(meter, answer)
    assert answers["pass"].tolist() == [0] and next(count) == passes, "the answers are those of the first pass"
    return passes, meter.statement("answer")


def test_a_card_answers_until_its_counter_can_be_read_and_one_pass_has_its_true_energy(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=Card(clock).counter_mj)
    passes, statement = answered(clock)
    gpu = statement.set_index("component").loc["gpu"]
    assert passes == 2 and gpu["valid"] and gpu["window_s"] == pytest.approx(2 * PASS_S)
    assert gpu["low_j"] / passes <= PASS_S * PASS_W <= gpu["high_j"] / passes


@pytest.mark.parametrize(("seconds", "passes"), [(3.0, 1), (0.3, 4), (40.0, 1)])
def test_without_a_sensor_a_second_is_enough(clock, seconds, passes):
    assert answered(clock, seconds)[0] == passes


def test_a_processor_s_counter_needs_ten_seconds(clock, tmp_path):
    write_zone(tmp_path / "powercap" / "intel-rapl:0", "package-0", 1_000_000)
    assert answered(clock)[0] == 4


def test_a_card_that_tells_nothing_is_not_waited_for(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=not_supported)
    passes, statement = answered(clock)
    assert passes == 1 and statement.set_index("component").loc["gpu", "kind"] == "none"


def test_a_long_answering_is_not_repeated(clock, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=Card(clock).counter_mj)
    assert answered(clock, 5.5)[0] == 1
