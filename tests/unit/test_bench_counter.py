"""bench/counter.py finds what was planted in made-up readings."""

import numpy as np
import pandas as pd
import pytest

from bench import counter


@pytest.fixture
def readings():
    """60 s of 400 W, read every 10 ms; the counter moves every 100 ms, the power reads 3 % too much."""
    at = 1e9 + np.arange(0, 60, 0.01)
    moved = 400 * np.floor((at - at[0]) / 0.1 + 1e-6) * 0.1
    power = 412 + (np.arange(len(at)) // 10 % 2)
    return pd.DataFrame({"at_s": at, "counter_j": moved, "power_w": power, "celsius": 40, "mhz": 1980})


def test_the_steps_of_both_readings_are_found(readings):
    assert counter.moves(readings, "counter_j") == pytest.approx((0.1, 40.0), rel=0.02)
    assert counter.moves(readings, "power_w") == pytest.approx((0.1, 1.0), rel=0.02)


def test_long_windows_agree_and_short_ones_are_off_by_a_step_at_most(readings, capsys):
    table = counter.tell(readings).set_index("window_s")
    assert list(table.index) == [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    assert (table["worst"] <= 0.1 / table.index + 0.01).all() and table.loc[20.0, "worst"] < 0.01
    assert table["samples"].to_numpy() == pytest.approx(0.03125, abs=0.01)
    said = capsys.readouterr().out
    assert "the counter moves every 100 ms by 40.0 J" in said and "twice 4 s take" in said


def test_twice_the_work_is_twice_the_energy_within_a_step_of_the_counter(readings):
    least, most, n = counter.doubling(readings, 4.0)
    assert 2 * (1 - 0.1 / 4) < least <= 2 <= most < 2 * (1 + 0.1 / 4) and n > 40
