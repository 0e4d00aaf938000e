"""The same training first and last: what differs is the machine."""

import pytest

from telco_nb.analysis.drift import drift_findings

FIRST = {
    "train_energy_wh": 10.0, "energy_kind": "measured", "energy_valid": True, "train_seconds": 100.0, "val_loss": 1.5,
    "train_started_at": "2026-01-01T10:00:00+00:00",
}  # fmt: skip
LAST = FIRST | {"train_energy_wh": 10.4, "train_seconds": 102.0, "train_started_at": "2026-01-01T16:30:00+00:00"}


BETWEEN = FIRST | {"train_started_at": "2026-01-01T12:00:00+00:00"}


def found(**changed):
    (finding,) = drift_findings({"c01": FIRST, "c02": BETWEEN}, {"c01-drift": LAST | changed})
    return finding


def test_the_drift_is_the_ratio_of_the_energies_with_the_time_between_them():
    finding = found()
    assert finding.id == "drift" and finding.value == pytest.approx(1.04)
    assert "c01 was trained again 6.5 h later" in finding.statement and "(+4.0%, measured)" in finding.statement
    assert "in 1.02 times the time" in finding.statement and "less than 4.0%" in finding.statement
    assert "the same to the last bit" in finding.statement


def test_the_power_at_rest_of_both_ends_is_told_where_it_was_measured(monkeypatch):
    assert "At rest" not in found().statement and "At rest" not in found(idle_gpu_w=60.0).statement
    monkeypatch.setitem(FIRST, "idle_gpu_w", 55.0)
    assert "At rest the gpu drew 55.0 W, then 61.3 W. Energies" in found(idle_gpu_w=61.3, idle_cpu_w=9.0).statement
    assert "At rest" not in found(idle_gpu_w=None).statement


def test_a_loss_that_was_no_number_is_told_as_missing():
    assert "a validation loss is missing" in found(val_loss=None).statement


def test_another_loss_of_the_same_training_is_told():
    assert "differs by 0.02 nats per token" in found(val_loss=1.52).statement


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"train_energy_wh": None}, "missing or not valid"),
        ({"energy_valid": False}, "missing or not valid"),
        ({"energy_kind": "estimated"}, "one energy is measured, the other estimated"),
        ({"train_started_at": "2026-01-01T11:00:00+00:00"}, "not first and last"),
        ({"train_started_at": "2026-01-01T09:00:00+00:00"}, "not first and last"),
        ({"train_started_at": None}, "does not say when"),
        ({"visible_gpus": "1"}, "different cards or machines"),
        ({"node": "b"}, "different cards or machines"),
    ],
)
def test_without_two_energies_of_one_kind_there_is_no_drift(changed, reason):
    finding = found(**changed)
    assert finding.verdict == "not estimable" and finding.value is None and reason in finding.statement


def test_without_a_second_training_there_is_no_finding():
    assert drift_findings({"c01": FIRST}, {}) == []
