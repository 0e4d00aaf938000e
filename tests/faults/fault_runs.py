"""Runs studies of small notebooks with the real runner, for the tests beside it. Not a test."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from fault_study import write_notebook

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


def can_unshare() -> bool:
    return (
        bool(shutil.which("unshare")) and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    )
