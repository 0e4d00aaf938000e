"""What all configurations compute alike is computed once, and only while nothing has changed that decides about it."""

import threading

import numpy as np
import pandas as pd
import pytest

from telco_nb.study.once import FOLDER, made_once

COMMON, DECIDES = {"modules": "a"}, {"dtype": "float32"}


class Maker:
    """Makes a table of awkward numbers and counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        values = [np.array([0.1 + 0.2, 1e-300, -0.0]), np.array([np.nextafter(1.0, 2.0)])]
        return pd.DataFrame({"conversation_id": ["b", "a"], "losses": values})


def ask(root, make, common=COMMON, decides=DECIDES, by="c01/03_train"):
    return made_once(root, "val_before", common, decides, by, make)


def test_the_second_configuration_reads_the_first_ones_table_bit_for_bit_and_learns_whose_it_is(tmp_path):
    make = Maker()
    first, second = ask(tmp_path, make), ask(tmp_path, make, by="c02/03_train")
    assert make.calls == 1 and second.attrs["made_by"] == first.attrs["made_by"] == "c01/03_train"
    for table in (first, second):
        assert [v.tobytes() for v in table["losses"]] == [v.tobytes() for v in make()["losses"]]


@pytest.mark.parametrize("changed", [{"common": {"modules": "b"}}, {"decides": {"dtype": "bfloat16"}}])
def test_a_change_of_anything_that_decides_computes_it_again(tmp_path, changed):
    make = Maker()
    ask(tmp_path, make)
    ask(tmp_path, make, **changed)
    assert make.calls == 2


def test_tables_of_other_code_or_data_are_deleted_and_those_of_other_options_stay(tmp_path):
    make = Maker()
    for decides in ({"dtype": "float32"}, {"dtype": "bfloat16"}):
        ask(tmp_path, make, decides=decides)
    assert len(list((tmp_path / FOLDER).rglob("*.parquet"))) == 2
    ask(tmp_path, make, common={"modules": "b"})
    assert len(list((tmp_path / FOLDER).rglob("*.parquet"))) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    make = Maker()
    whole = ask(tmp_path, make)
    (path,) = (tmp_path / FOLDER).rglob("*.parquet")
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF  # within the first page
    path.write_bytes({"cut": data[:-20], "empty": b"", "flipped": bytes(data)}[damage])
    again = ask(tmp_path, make)
    assert make.calls == 2 and again["conversation_id"].tolist() == whole["conversation_id"].tolist()


def test_of_two_that_ask_at_once_one_waits_for_the_other(tmp_path):
    make = Maker()
    threads = [threading.Thread(target=ask, args=(tmp_path, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1


def test_after_a_failure_the_next_one_computes_it(tmp_path):
    with pytest.raises(ValueError, match="no tokens"):
        ask(tmp_path, lambda: (_ for _ in ()).throw(ValueError("no tokens")))
    make = Maker()
    ask(tmp_path, make)
    assert make.calls == 1
