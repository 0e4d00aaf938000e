"""What is wrong with this machine is said before the first kernel starts."""

import re

import pytest

from telco_nb.engine import machine_checks
from telco_nb.study.plan import Job


@pytest.mark.parametrize(
    ("memory", "divided", "power", "said"),
    [
        ("3", "Disabled", "61.20", None),
        ("3", "[N/A]", "61.20", None),
        ("9000", "Disabled", "61.20", "GPU 0 already holds 9000 MiB of another process"),
        ("3", "Enabled", "[N/A]", r"GPU 0 is divided \(MIG\).* allocated a share"),
        ("3", "Disabled", "[N/A]", r"GPU 0 does not tell its power \(\[N/A\]\)"),
    ],
)
def test_a_gpu_whose_energy_is_not_that_of_a_job_alone_is_named_before_the_run(
    monkeypatch, memory, divided, power, said
):
    answers = {"index,memory.used": [["0", memory]], "index,mig.mode.current,power.draw": [["0", divided, power]]}
    monkeypatch.setattr(machine_checks, "_nvidia_smi", answers.__getitem__)
    found = machine_checks.find_warnings([Job("03_train", "c01", {"base_model": "m"}, ())])
    assert len(found) == (0 if said is None else 1) and re.match(said or "", "".join(found))
    assert machine_checks.find_warnings([Job("05_judge", "judge-x", {}, ())]) == []
