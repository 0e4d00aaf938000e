"""Tests of what a run leaves after faults, with small notebooks, real kernels and real signals."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fault_study import FINISH, write_notebook

from telco_nb.engine.fork_server import THREADED

DRIVER = Path(__file__).with_name("fault_study.py")
LIBRARIES = [*THREADED, "ipykernel.ipkernel", "ipykernel.kernelapp", "papermill"]  # all that these notebooks need
SLEEP = "import time, pathlib\npathlib.Path(os.environ['TELCO_NB_JOB']).with_name('asleep').touch()\ntime.sleep(120)"


class Study:
    """Notebooks and outputs in a temporary folder; `jobs` are (step, scope, parameters, inputs)."""

    def __init__(self, folder: Path, warm: str = "0", libraries: list | None = LIBRARIES):
        self.folder, self.root = folder, folder / "outputs" / "faults"
        self.warm, self.libraries = warm, libraries
        self.jobs: list = []
        (folder / "notebooks").mkdir()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def add(self, step: str, *cells: str, scope: str = "s", value: int = 1, reads: tuple = ()) -> None:
        write_notebook(self.folder / "notebooks" / f"{step}.ipynb", *cells)
        self.jobs.append((step, scope, {"value": value}, [(r, scope, "artefacts/*") for r in reads]))

    def start(self, *prefix: str, environment: dict | None = None, **options) -> subprocess.Popen:
        study = {
            "notebooks": str(self.folder / "notebooks"),
            "outputs": str(self.folder / "outputs"),
            "jobs": self.jobs,
            "libraries": self.libraries,
        }
        (self.folder / "study.json").write_text(json.dumps(study))
        options["json_file"] = str(self.folder / "summary.json")
        command = [*prefix, sys.executable, str(DRIVER), str(self.folder / "study.json"), json.dumps(options)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        settings = {"TMPDIR": str(self.temporary), "TELCO_NB_WARM_KERNELS": self.warm}
        surroundings = {**os.environ, **settings, **(environment or {})}
        return subprocess.Popen(command, **streams, env=surroundings, start_new_session=True)

    def run(self, *prefix: str, environment: dict | None = None, **options) -> tuple[int, str]:
        process = self.start(*prefix, environment=environment, **options)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    @property
    def jobs_summary(self) -> dict:
        jobs = json.loads((self.folder / "summary.json").read_text())["jobs"]
        return {job["step"]: job for job in jobs}

    def status(self, step: str) -> str:
        return self.jobs_summary[step]["status"]

    def failure(self, step: str) -> dict:
        return self.notebook(f"{step}.failed")["metadata"]["telco_nb_failure"]

    def notebook(self, name: str) -> dict:
        return json.loads((self.root / "s" / f"{name}.ipynb").read_text())

    def wait_until_asleep(self) -> list[psutil.Process]:
        """Wait for the sleeping cell; returns the processes of the run below the runner."""
        wait_for(lambda: (self.root / "s" / "asleep").exists(), 60)
        return [p for p in self.processes() if str(DRIVER) not in p.cmdline()]

    def processes(self) -> list[psutil.Process]:
        """All processes of the run: each was started with this temporary folder, or forked from one that was."""
        return [p for p in psutil.process_iter() if _temporary_folder(p) == str(self.temporary)]


def _temporary_folder(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("TMPDIR")
    return None


def job_process(runner: subprocess.Popen) -> psutil.Process:
    """The process that runs the notebook: below the runner, or below the fork server where there is one."""
    (child,) = psutil.Process(runner.pid).children()
    if "telco_nb.engine.fork_server" in child.cmdline():
        (child,) = child.children()
    return child


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(params=["0", "1"], ids=["plain", "warm"])
def study(tmp_path, request):
    study = Study(tmp_path, request.param)
    yield study
    wait_for(lambda: not [*study.temporary.glob("tnb-*")], 2.5)  # no temporary folder is left


# ---------------------------------------------------------------- one run with many faults


@pytest.fixture(scope="module", params=["0", "1"], ids=["plain", "warm"])
def faulty(tmp_path_factory, request):
    """One run over all faults that need no signal from outside."""
    study = Study(tmp_path_factory.mktemp("faulty"), request.param)
    study.add("01_error", "print('before')", "1 / 0", FINISH)
    study.add("02_exit_zero", "import sys; sys.exit(0)", FINISH)
    study.add("03_exit_hard", "import os; os._exit(7)", FINISH)
    study.add("04_killed", "import os; os.kill(os.getpid(), 9)", FINISH)
    study.add("05_no_manifest", "1 + 1")
    study.add("06_lines", "for i in range(20_000):\n    print('line', i, flush=True)", FINISH)
    study.add("07_other_key", FINISH.replace('job["key"]', '"another"'))
    study.add("08_after_error", FINISH, reads=("01_error",))
    study.add("09_after_that", FINISH, reads=("08_after_error",))
    study.add("10_after_lines", FINISH, reads=("06_lines",))
    study.add("11_timeout", "import time; time.sleep(60)", FINISH)
    study.exit_code, study.output = study.run(timeout_minutes=0.25)
    return study


def test_a_failed_step_gives_exit_code_1_and_the_others_go_on(faulty):
    assert faulty.exit_code == 1
    assert faulty.status("06_lines") == faulty.status("10_after_lines") == "done"


@pytest.mark.parametrize(
    ("step", "kind", "cell", "words"),
    [
        ("01_error", "error", 4, "ZeroDivisionError: division by zero"),
        ("02_exit_zero", "no result", 3, "sys.exit()"),
        ("03_exit_hard", "died", 3, "exit code 7"),
        ("04_killed", "died", 3, "SIGKILL"),
        ("05_no_manifest", "no result", None, "run.finish"),
        ("07_other_key", "no result", None, "not of this execution"),
        ("11_timeout", "timeout", 3, "15 s"),
    ],
)
def test_the_failed_record_names_the_class_and_the_cell(faulty, step, kind, cell, words):
    failure = faulty.failure(step)
    assert (failure["kind"], failure["cell"]) == (kind, cell)
    assert words in failure["reason"]
    banner = faulty.notebook(f"{step}.failed")["cells"][0]
    assert banner["cell_type"] == "markdown"
    assert words in "".join(banner["source"])
    assert words in faulty.output, "the summary repeats it"
    assert not (faulty.root / "s" / f"{step}.ipynb").exists()
    assert not (faulty.root / "s" / step).exists()


def test_cells_after_a_kernel_death_are_not_marked_as_completed(faulty):
    cells = faulty.notebook("04_killed.failed")["cells"][1:]
    assert [c["metadata"]["papermill"]["status"] for c in cells[-2:]] == ["failed", "pending"]


def test_dependants_are_blocked_all_the_way_down(faulty):
    assert faulty.jobs_summary["08_after_error"]["reason"] == "blocked by s/01_error"
    assert faulty.jobs_summary["09_after_that"]["reason"] == "blocked by s/08_after_error"
    assert not (faulty.root / "s" / "09_after_that.failed.ipynb").exists()


def test_twenty_thousand_lines_lose_nothing_and_stay_readable(faulty):
    (stream,) = [o for c in faulty.notebook("06_lines")["cells"] for o in c.get("outputs", []) if "text" in o]
    text = "".join(stream["text"])
    assert "19,940 lines left out" in text
    assert text.endswith("line 19999\n")


def test_records_hold_no_machine_paths(faulty):
    for path in [*faulty.root.glob("s/*.ipynb"), *faulty.root.glob("s/*.failed.log")]:
        assert str(faulty.root) not in path.read_text(), path
        assert sys.prefix not in path.read_text(), path


def test_nothing_is_left_over(faulty):
    assert not alive(faulty.processes())
    assert not [*faulty.root.glob("s/.*.running.*"), *faulty.root.glob("s/.*.job.json")]
    assert {path.suffix for path in (faulty.folder / "notebooks").iterdir()} == {".ipynb"}, "no sockets beside them"
    assert not [*faulty.temporary.glob("tnb-*")]


def test_the_summary_names_the_command_that_goes_on(faulty):
    assert "./run_all.py --profile laptop" in faulty.output
    assert (faulty.root / "report" / "telco_report.html").read_text() == "11 jobs"


# ---------------------------------------------------------------- runs after runs


def test_a_failure_keeps_the_last_good_record_and_a_success_removes_the_failed_one(study):
    study.add("01_a", FINISH)
    assert study.run()[0] == 0
    good = study.notebook("01_a")
    study.jobs.clear()
    study.add("01_a", FINISH, "raise ValueError('broken')", value=2)
    code, output = study.run()
    assert code == 1
    assert "value 1 -> 2" in output
    assert study.notebook("01_a") == good
    assert (study.root / "s" / "01_a" / "artefacts" / "value.txt").read_text() == "1"
    assert (study.root / "s" / "01_a.failed.ipynb").exists()
    study.jobs.clear()
    study.add("01_a", FINISH, value=2)
    assert study.run()[0] == 0
    assert (study.root / "s" / "01_a" / "artefacts" / "value.txt").read_text() == "2"
    assert not [*study.root.glob("s/*.failed.*")]


def test_a_second_run_starts_no_kernel_and_a_same_result_stops_the_chain(study):
    study.add("01_a", FINISH)
    study.add("02_b", FINISH, reads=("01_a",))
    assert study.run()[0] == 0
    assert study.run()[0] == 0
    assert {job["status"] for job in study.jobs_summary.values()} == {"skipped"}
    assert study.run(force=["01"])[0] == 0
    assert study.status("01_a") == "done"
    assert study.jobs_summary["02_b"]["reason"] == "inputs unchanged"
    study.jobs[0] = ("01_a", "s", {"value": 5}, [])
    assert study.run()[0] == 0
    assert study.status("02_b") == "done", "one of its inputs is another one now"


def test_fail_fast_stops_at_the_first_failure(study):
    study.add("01_a", "1 / 0")
    study.add("02_b", FINISH)
    assert study.run(keep_going=False)[0] == 1
    assert study.status("02_b") == "waiting"


def test_a_step_left_out_must_have_finished_before(study):
    study.add("01_a", FINISH)
    study.add("02_b", FINISH, reads=("01_a",))
    code, output = study.run(steps="02")
    assert code == 2
    assert "s/01_a" in output
    assert "--steps 01-02" in output


def test_a_kernel_of_another_environment_is_not_used(study):
    trap = study.folder / "jupyter" / "kernels" / "python3"
    trap.mkdir(parents=True)
    (trap / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    study.add("01_a", FINISH)
    assert study.run(environment={"JUPYTER_PATH": str(study.folder / "jupyter")})[0] == 0


def _can_unshare() -> bool:
    return (
        bool(shutil.which("unshare")) and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not _can_unshare(), reason="needs the right to make a network namespace")
def test_a_run_needs_no_network_not_even_loopback(study):
    study.add("01_a", FINISH)
    assert study.run("unshare", "-n")[0] == 0


# ---------------------------------------------------------------- signals


def test_ctrl_c_stops_the_run_and_keeps_its_work_folder(study):
    study.add("01_a", "import os\nrun_folder = os.path.dirname(os.environ['TELCO_NB_JOB'])", SLEEP, FINISH)
    study.add("02_b", FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 15
    assert study.failure("01_a")["kind"] == "interrupted"
    assert study.status("01_a") == "interrupted"
    assert study.status("02_b") == "waiting"
    assert "Go on with:" in output
    assert (study.root / "s" / ".01_a.work").is_dir()
    assert not alive(children)


def test_a_second_ctrl_c_ends_a_cell_that_ignores_the_first(study):
    deaf = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SLEEP.replace(
        "time.sleep(120)", "while True:\n    try: time.sleep(120)\n    except KeyboardInterrupt: pass"
    )
    study.add("01_a", deaf, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert study.failure("01_a")["kind"] == "interrupted"
    assert not alive(children)


def test_a_killed_runner_leaves_no_process_and_no_lock(study):
    child = "import os, subprocess; subprocess.Popen(['sleep', '120'])\n"
    study.add("01_a", child + SLEEP, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    assert len(alive(children)) >= 3, "the child, its kernel, and what the notebook started"
    process.kill()
    process.wait()
    wait_for(lambda: not alive(children), 2.5)
    study.jobs.clear()
    study.add("01_a", FINISH)
    assert study.run()[0] == 0


def test_a_child_killed_alone_takes_its_kernel_along_and_is_reported(study):
    study.add("01_a", "import os\n" + SLEEP, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    job_process(process).kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert study.failure("01_a")["reason"].startswith("the process that runs the notebook: killed by SIGKILL")
    wait_for(lambda: not alive(children), 2)


def test_a_second_run_on_the_same_outputs_is_refused_by_name(study):
    study.add("01_a", "import os\n" + SLEEP, FINISH)
    process = study.start()
    study.wait_until_asleep()
    try:
        code, output = study.run()
        assert code == 3
        assert f"process {process.pid}" in output
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


# ---------------------------------------------------------------- kernels forked from the fork server

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
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


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


EXIT_MESSAGE = """
import threading
from types import SimpleNamespace
from telco_nb.lora import data_parallel
data_parallel.GRACE_SECONDS = 0.1
gone = SimpleNamespace(has_died=True, exit_message=lambda: "process 2 of this training ended with code -9")
data_parallel._watch_peers([gone], threading.Event(), lambda text: None)
"""


def test_a_kernel_that_gives_up_on_a_dead_peer_leaves_the_reason_in_the_log(tmp_path):
    study = Study(tmp_path)
    study.add("train", EXIT_MESSAGE, FINISH)
    code, _ = study.run("env", "-u", "PYTEST_CURRENT_TEST")  # with it, ipykernel would leave the streams alone
    assert code == 1 and study.failure("train")["reason"] == "it ended with exit code 1"
    log = (study.root / "s" / "train.failed.log").read_text()
    assert "process 2 of this training ended with code -9" in log


# ---------------------------------------------------------------- one configuration per GPU

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
