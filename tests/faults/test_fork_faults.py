"""Kernels forked from the fork server do what fresh ones do, and a fork server that fails is done without."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from fault_runs import LIBRARIES, SLEEP, Study, alive, wait_for
from fault_study import FINISH, write_notebook
from loopback import python_path

ABOUT = """
import json, os, pathlib, sys
about = {"pid": os.getpid(), "environment": dict(os.environ), "path": sys.path, "folder": os.getcwd()}
about |= {"stdin": os.readlink("/proc/self/fd/0"), "leads": os.getpgrp() == os.getsid(0) == os.getpid()}
command = pathlib.Path("/proc/self/cmdline").read_text()
about |= {"hash": hash("a word"), "warm": "telco_nb.engine.fork_server" in command}
about |= {"modules": [name for name in sys.modules if name.startswith("telco_nb")]}
about |= {"files": sorted({os.readlink(f"/proc/self/fd/{i}").split(":")[0] for i in (1, 2)})}
pathlib.Path(os.environ["TELCO_NB_JOB"]).with_name("about.json").write_text(json.dumps(about))
"""


@pytest.fixture
def warm_study(tmp_path):
    study = Study(tmp_path, "1")
    yield study
    wait_for(lambda: not alive(study.processes()), 2.5)


def also_import_from(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": python_path(folder)}


def about(study: Study) -> dict:
    return json.loads((study.root / "s" / "about.json").read_text())


def test_a_forked_kernel_finds_what_a_fresh_one_finds(warm_study):
    seen = {}
    for value, warm_study.warm in enumerate("01", start=1):
        warm_study.jobs.clear()
        warm_study.add("01_a", ABOUT, FINISH, value=value)
        assert warm_study.run()[0] == 0
        seen[warm_study.warm] = notes = about(warm_study)
        notes.pop("pid")
        for name in ("JPY_PARENT_PID", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            assert notes["environment"].pop(name)
        notes["environment"].pop("TELCO_NB_WARM_KERNELS")
        assert notes["leads"]
    assert seen["0"].pop("warm") is False
    assert seen["1"].pop("warm") is True
    assert {*seen["1"].pop("modules")} - {*seen["0"].pop("modules")} == {"telco_nb.engine.kernel"}, "else __main__"
    assert seen["0"].pop("stdin").startswith("pipe:")
    assert seen["1"].pop("stdin") == "/dev/null"
    assert seen["1"] == seen["0"]


def test_a_hub_model_gets_a_kernel_that_imports_for_itself(warm_study):
    write_notebook(warm_study.folder / "notebooks" / "01_a.ipynb", "base_model = ''", ABOUT, FINISH)
    warm_study.jobs.append(("01_a", "s", {"value": 1, "base_model": "owner/name"}, []))
    assert warm_study.run()[0] == 0
    assert not about(warm_study)["warm"]
    assert about(warm_study)["environment"]["HF_HUB_OFFLINE"] == "0"


def test_a_dead_fork_server_fails_its_job_and_the_next_runs_without(warm_study):
    warm_study.add("01_a", "import os\n" + SLEEP, FINISH)
    warm_study.add("02_b", ABOUT, FINISH)
    process = warm_study.start()
    children = warm_study.wait_until_asleep()
    (server,) = psutil.Process(process.pid).children()
    server.kill()
    wait_for(lambda: not alive([p for p in children if p.pid != server.pid]), 2.5)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert warm_study.failure("01_a")["kind"] == "died"
    assert warm_study.status("02_b") == "done"
    assert not about(warm_study)["warm"]


def test_a_fork_server_is_replaced_when_a_source_has_changed(warm_study):
    who = "import psutil; about['server'] = psutil.Process(os.getppid()).ppid()\n"
    noted = ABOUT.replace("pathlib.Path(os.environ", who + "pathlib.Path(os.environ")
    touch = "import os, telco_nb, pathlib; os.utime(pathlib.Path(telco_nb.__file__).with_name('hosted') / 'ledger.py')"
    warm_study.add("01_a", noted + touch, FINISH)
    warm_study.add("02_b", noted.replace("about.json", "about_2.json"), FINISH)
    warm_study.add("03_c", noted.replace("about.json", "about_3.json"), FINISH)
    assert warm_study.run()[0] == 0
    notes = [json.loads((warm_study.root / "s" / f"about{n}.json").read_text()) for n in ("", "_2", "_3")]
    assert all(note["warm"] for note in notes)
    assert notes[0]["server"] != notes[1]["server"] == notes[2]["server"]


def test_a_fork_server_that_cannot_import_is_done_without(warm_study):
    warm_study.libraries = ["no_such_library"]
    warm_study.add("01_a", ABOUT, FINISH)
    assert warm_study.run()[0] == 0
    assert not about(warm_study)["warm"]


def test_a_fork_server_with_unknown_threads_is_done_without(warm_study):
    (warm_study.folder / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    warm_study.libraries = [*LIBRARIES, "threads"]
    warm_study.add("01_a", ABOUT, FINISH)
    assert warm_study.run(environment=also_import_from(warm_study.folder))[0] == 0
    assert not about(warm_study)["warm"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_runner_stopped_while_the_fork_server_imports_leaves_nothing(warm_study, number):
    (warm_study.folder / "slow.py").write_text("import time\ntime.sleep(60)")
    warm_study.libraries = ["slow"]
    warm_study.add("01_a", FINISH)
    process = warm_study.start(environment=also_import_from(warm_study.folder))
    wait_for(lambda: psutil.Process(process.pid).children(), 20)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)


def test_the_fork_server_leaves_no_zombie_while_the_run_goes_on(warm_study):
    warm_study.add("01_a", "import os; os._exit(3)")
    warm_study.add("02_b", FINISH)
    warm_study.add("03_c", "import os\n" + SLEEP, FINISH)
    process = warm_study.start()
    children = warm_study.wait_until_asleep()
    assert len(children) == 3, "the fork server, the job and its kernel"
    below = psutil.Process(process.pid).children(recursive=True)
    assert not [p for p in below if p.status() == psutil.STATUS_ZOMBIE]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_forked_kernels_compute_what_fresh_ones_compute_on_all_cores(warm_study):
    training = """
import json, os, pathlib, torch
torch.manual_seed(1)
layer = torch.nn.Sequential(torch.nn.Linear(288, 768), torch.nn.SiLU(), torch.nn.Linear(768, 288))
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
for _ in range(5):
    x = torch.randn(512, 288)
    loss = ((layer(x) - x) ** 2).mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
bits = [w.detach().double().sum().item().hex() for w in layer.parameters()]
found = {"threads": torch.get_num_threads(), "bits": bits, "seed": torch.initial_seed()}
pathlib.Path(os.environ["TELCO_NB_JOB"]).with_name("found.json").write_text(json.dumps(found))
"""
    warm_study.libraries = None
    seen = {}
    for value, warm_study.warm in enumerate("01", start=1):
        warm_study.jobs.clear()
        warm_study.add("01_a", training, ABOUT, FINISH, value=value)
        assert warm_study.run()[0] == 0
        assert about(warm_study)["warm"] == (warm_study.warm == "1")
        seen[warm_study.warm] = json.loads((warm_study.root / "s" / "found.json").read_text())
    assert seen["0"] == seen["1"]
