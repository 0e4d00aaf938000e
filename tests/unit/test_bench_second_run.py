"""bench/second_run.py: what lies outside its interval is counted; scores count only where all were judged."""

import subprocess
import sys

import pandas as pd
import pytest

from telco_nb import ROOT

FIRST = pd.DataFrame(
    {
        "config": ["c01", "c02"], "val_loss": [3.0, 2.0], "val_loss_low": [2.9, 1.9], "val_loss_high": [3.1, 2.1],
        "train_energy_wh": [1.0, 4.0], "train_energy_low_wh": [0.4, 1.6], "train_energy_high_wh": [2.4, 9.6],
        "checklist_score": [0.0, 1.0], "checklist_low": [-0.5, 0.5], "checklist_high": [0.5, 1.5],
    }
)  # fmt: skip


def compare(tmp_path, second):
    FIRST.to_csv(tmp_path / "first.csv", index=False)
    second.to_csv(tmp_path / "second.csv", index=False)
    command = [sys.executable, ROOT / "bench" / "second_run.py", tmp_path / "first.csv", tmp_path / "second.csv"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("column", "inside", "outside"), [("val_loss", 2.05, 2.2), ("train_energy_wh", 9.0, 9.7),
                                                           ("checklist_score", 0.6, 0.4)])  # fmt: skip
def test_a_value_outside_its_interval_is_counted_and_ends_with_1(tmp_path, column, inside, outside):
    for value, code, count in ((inside, 0, "2 of 2"), (outside, 1, "1 of 2")):
        second = FIRST.copy()
        second.loc[1, column] = value
        ran = compare(tmp_path, second)
        assert ran.returncode == code and f"{column}: {count} inside" in ran.stdout, ran.stdout + ran.stderr


def test_scores_of_a_part_of_the_configurations_are_not_compared(tmp_path):
    ran = compare(tmp_path, FIRST.iloc[:1].assign(checklist_score=9.0))
    assert ran.returncode == 0 and "score" not in ran.stdout and "val_loss: 1 of 1" in ran.stdout


def test_nothing_in_common_is_said_and_no_success(tmp_path):
    ran = compare(tmp_path, FIRST.assign(config=["x", "y"]))
    assert ran.returncode == 1 and "No configuration" in ran.stderr
