"""With several GPUs, configurations run at once, each on its own, and stop together."""

import os
import signal
import time
from pathlib import Path

from fault_runs import SLEEP, Study
from fault_study import FINISH

RENDEZVOUS = """
import os, time
from pathlib import Path
place = Path(os.environ["TELCO_NB_JOB"]).parents[1]
(place / f"here-{value}").touch()
while not (place / f"here-{3 - value}").exists():  # each waits for the other: jobs in sequence would never end
    time.sleep(0.05)
value = os.environ["CUDA_VISIBLE_DEVICES"] + " of " + os.environ["TELCO_NB_JOBS_AT_ONCE"]
"""


def with_gpus(folder: Path, *names: str) -> dict[str, str]:
    """A PATH in which nvidia-smi lists GPUs of these indices."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {name}, GPU-{name}{name}\n" for name in names))
    tool.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_with_two_gpus_two_configurations_run_at_once_each_on_its_own(tmp_path):
    study = Study(tmp_path)
    study.add("train", RENDEZVOUS, FINISH, scope="c1", value=1)
    study.add("train", RENDEZVOUS, FINISH, scope="c2", value=2)
    study.add("compare", FINISH)
    study.jobs[-1][3].extend(("train", scope, "artefacts/*") for scope in ("c1", "c2"))
    code, output = study.run(gpus=["0", "1"], environment=with_gpus(tmp_path, "0", "1"))
    assert code == 0, output
    seen = {(study.root / scope / "train" / "artefacts" / "value.txt").read_text() for scope in ("c1", "c2")}
    assert seen == {"0 of 2", "1 of 2"}
    assert study.status("compare") == "done"


def test_one_interrupt_stops_the_configurations_on_all_gpus(tmp_path):
    study = Study(tmp_path)
    for number in (1, 2):
        study.add(f"train{number}", "import os", SLEEP, FINISH, scope=f"c{number}")
    process = study.start(gpus=["0", "1"], environment=with_gpus(tmp_path, "0", "1"))
    while not all((study.root / f"c{n}" / "asleep").exists() for n in (1, 2)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert [study.status(f"train{n}") for n in (1, 2)] == ["interrupted", "interrupted"]


def test_a_gpu_that_is_not_there_is_named_before_anything_runs(tmp_path):
    study = Study(tmp_path)
    study.add("train", FINISH)
    code, output = study.run(gpus=["0", "7"], environment=with_gpus(tmp_path, "0", "1"))
    assert code == 3 and "--gpus names 7, which nvidia-smi does not list" in output
