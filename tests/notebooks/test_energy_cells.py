"""The cells of 04 that tell the cost of an answer, run on a machine whose sensor fails."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from fake_sensors import install_nvml, not_supported

from telco_nb import ROOT
from telco_nb.lora import energy
from telco_nb.notebook import readable

CELLS = [
    "".join(cell["source"])
    for cell in json.loads((ROOT / "notebooks" / "04_energy.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def told(meter: energy.Meter, passes: int = 1) -> tuple[str, str]:
    """What the cells show of a meter: their tables, and their prose."""
    tables, prose = [], []

    def shown(frame: pd.DataFrame) -> pd.DataFrame:
        tables.append(readable(frame).to_string())
        return readable(frame)

    names = {
        "energy": energy, "meter": meter, "pd": pd, "readable": shown, "markdown": prose.append, "lost": 0,
        "run": SimpleNamespace(table=lambda name, frame: frame), "answers": [1, 2], "tokens": 40, "seconds": 30.0,
        "passes": passes, "cool_down_celsius": None,
    }  # fmt: skip
    first = next(i for i, cell in enumerate(CELLS) if 'meter.statement("answer")' in cell)
    for cell in CELLS[first : first + 3]:
        exec(cell, names)
    return "\n".join(tables), "\n".join([*prose, names["cost"]])


@pytest.fixture
def meter(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "BATTERIES", tmp_path)
    monkeypatch.setattr(energy, "nvml_handle", lambda: None)

    def make() -> energy.Meter:
        made = energy.Meter((2.0, 5.0, 12.0), 0.3)
        made.tracker.close()
        made.total |= {"window_s": 30.0, "cpu_s": 30.0}
        return made

    return make


def test_a_sensor_that_failed_is_shown_by_name_and_reason_and_no_energy_is_called_nan(meter, monkeypatch):
    install_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=not_supported)
    tables, prose = told(meter())
    assert "gpu: the card's energy counter cannot be read: Not Supported" in tables
    assert "**an unknown energy**" in prose and "**Not valid**: gpu: the card's energy counter" in prose
    assert "nan" not in f"{tables} {prose}"


def test_an_estimated_answer_has_its_interval_and_no_warning(meter):
    tables, prose = told(meter())
    assert "mWh (" in prose and "estimated" in prose and "Not valid" not in prose
    assert "no GPU" in tables and "nan" not in f"{tables} {prose}"


def test_the_cost_of_an_answer_is_that_of_one_pass_however_often_the_meter_saw_it(meter):
    once, thrice = meter(), meter()
    thrice.total |= {"window_s": 90.0, "cpu_s": 90.0}
    assert told(once)[1].splitlines()[-1] == told(thrice, passes=3)[1].splitlines()[-1]
    assert told(once)[1] != told(thrice)[1]
