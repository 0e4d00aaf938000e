"""Runs small studies in forked processes, so that hundreds of crashes take minutes instead of hours.

`python crash_study.py FOLDER` writes the notebooks into FOLDER/notebooks and FOLDER/broken. Then it reads one JSON
object per line: notebooks, outputs, value, output, the fields of `Watch`, and when to kill. For each it forks a runner
and answers with its exit code. Runner, job, record, manifests, stores, exports and seal are the real ones; instead of a
Jupyter kernel, a forked process executes the cells and dies with them.
"""

from __future__ import annotations

import crash_points

crash_points.install()

import contextlib  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import judge_study  # noqa: E402
import psutil  # noqa: E402
from fault_study import write_notebook  # noqa: E402
from nbclient.exceptions import DeadKernelError  # noqa: E402
from papermill.engines import Engine, papermill_engines  # noqa: E402

from telco_nb import notebook  # noqa: E402, F401
from telco_nb.analysis import results  # noqa: E402, F401
from telco_nb.engine import job as job_module  # noqa: E402
from telco_nb.engine import kernel_manager, local_engine, runner  # noqa: E402
from telco_nb.engine.archive import is_executed  # noqa: E402
from telco_nb.report import build  # noqa: E402
from telco_nb.study import content_key, params  # noqa: E402
from telco_nb.study.plan import Job  # noqa: E402

OPEN = """
import json, os
from pathlib import Path
from telco_nb.notebook import Run
from telco_nb.study.plan import Job
job = json.loads(Path(os.environ["TELCO_NB_JOB"]).read_text())
made = Job(job["step"], job["scope"], job["parameters"], tuple(map(tuple, job["inputs"])))
run = Run(made, Path(job["root"]), Path(job["work"]), job["key"], job["key_parts"], batch=True)
"""
WRITE = """
from telco_nb.hosted.attempts import AttemptStore
from telco_nb.hosted.egress import Call, log_path, open_log
from telco_nb.hosted.ledger import ledger_of
from telco_nb.corpus.llm_writer import store_path
store = AttemptStore(store_path(run.root))
ledger, batch = ledger_of(store.path), value - 1
if len(ledger.batches) == batch:
    ledger.write("submitting", ids=[f"{value}-batch"], usd_at_most=0.02)
if ledger.batches[batch].handle is None:
    ledger.write("submitted", entry=batch, handle={"id": f"{value}-batch"})
if not ledger.batches[batch].closed:
    ledger.close(batch, "collected")
for call in (f"{value}-{n}" for n in range(2)):
    if call not in store.ok:
        run.log(f"asks {call}")
        with open_log(log_path(store.path)) as note:
            note(Call.now("localhost", "machine", "generator", call.encode()))
        store.append([{"call_id": call, "status": "ok", "usd": 0.01, "text": "Restart the router. " * 9}])
run.artefact("texts.txt").write_text("".join(store.ok[c]["text"] for c in sorted(store.ok) if c[0] == str(value)))
"""
TRAIN = """
from telco_nb.study.record import write_json
texts = run.input("02_synth", "artefacts/texts.txt").read_text()
place = run.work / ".checkpoints" / "progress.json"
write_json(place, {"step": 1})
write_json(run.artefact("adapter/adapter.json"), {"rank": 8, "loss": len(texts) / value})
run.metric(val_loss=len(texts) / value)
"""
JUDGE = """
import judge_study as js
from telco_nb.judge.protocol import store_path
from telco_nb.judge.store import VerdictStore, judged_rows
loss = json.loads(run.input("03_train", "artefacts/adapter/adapter.json", "c01").read_text())["loss"]
prompts = js.bare_prompts(1)
plan = js.design.plan_comparisons(prompts, ["c01", "c02"], **(js.SHARES | {"swap_share": 1.0, "anchor_share": 0.0}))
first = js.shipped.gold_rows()[0]["scenario_id"]
cases = [js.case_of(first, f"Restart it {loss}.", f"Wait {i}.") for i in range(len(plan))]
store = VerdictStore(store_path(run.root, "x"))
plan = js.put(js.StubJudge(js.first_seat), plan, cases, store)
run.artefact("winners.csv").write_text(judged_rows(plan, store)[["winner", "verdict"]].to_csv())
"""
ANALYSE = """
from telco_nb.study.record import write_json
winners = run.input("05_judge", "artefacts/winners.csv", "judge-x").read_text()
run.artefact("results.csv").write_text(f"config,loss\\nc01,{value}\\n{winners}")
write_json(run.artefact("findings.json"), {"value": value})
run.export("results.csv", run.work / "artefacts" / "results.csv")
run.export("findings.json", run.work / "artefacts" / "findings.json")
"""
FINISH = 'run.finish("done")'
STUDY = (
    ("02_synth", "shared", WRITE, ()),
    ("03_train", "c01", TRAIN, (("02_synth", "shared", "artefacts/*"),)),
    ("05_judge", "judge-x", JUDGE, (("03_train", "c01", "artefacts/*"),)),
    ("06_analysis", "study", ANALYSE, (("05_judge", "judge-x", "artefacts/*"),)),
)


def write_notebooks(folder: Path, broken: bool = False) -> None:
    """Write the notebooks of the study; a broken one fails in its third step, which leaves a failed record."""
    folder.mkdir()
    for step, _, source, _ in STUDY:
        cells = [OPEN, "1 / 0" if broken and step == "05_judge" else source, FINISH]
        write_notebook(folder / f"{step}.ipynb", *cells)


# ---------------------------------------------------------------- a kernel that is a fork


class ForkedCells:
    """Executes cells in a forked process, one after another, and tells when it died."""

    def __init__(self) -> None:
        (self.ours_in, theirs_out), (theirs_in, self.ours_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid == 0:
            os.setsid()
            os.close(self.ours_out)
            _execute_cells(theirs_in, theirs_out)
        os.close(theirs_in)
        os.close(theirs_out)

    def execute(self, source: str) -> str:
        """Run a cell; returns what went wrong, or nothing. Raises DeadKernelError if the process died."""
        os.write(self.ours_out, json.dumps(source).encode() + b"\n")
        answer = os.read(self.ours_in, 1 << 16)
        if not answer:
            raise DeadKernelError("Kernel died")
        return json.loads(answer)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


def _execute_cells(requests: int, answers: int) -> None:
    names: dict = {}
    with os.fdopen(requests) as lines:
        for line in lines:
            try:
                exec(json.loads(line), names)
                answer = ""
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(answers, json.dumps(answer).encode())
    os._exit(0)


class ForkingEngine(Engine):
    """papermill's engine without Jupyter."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options) -> None:
        process = ForkedCells()
        options["kernel_manager_class"].on_kernel(process)
        for index, cell in enumerate(nb_man.nb.cells):
            if is_executed(cell):
                nb_man.cell_start(cell, index)
                if fault := process.execute(cell.source):
                    raise RuntimeError(fault)
                nb_man.cell_complete(cell, index)


def _register_engine() -> str:
    papermill_engines.register("forking", ForkingEngine)
    return "forking"


def _start_afresh(self: local_engine.LocalEngine, job_file: Path, errors, place) -> SimpleNamespace:
    """What LocalEngine._start_afresh does, by a fork."""
    parent, (read, write) = os.getpid(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(write, 1)
        os.dup2(errors.fileno(), 2)
        os._exit(job_module.main(str(job_file), parent))
    os.close(write)
    child = SimpleNamespace(pid=pid, stdout=os.fdopen(read, encoding="utf-8"), returncode=None)

    def wait() -> None:
        child.returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    child.wait = wait
    return child


# ---------------------------------------------------------------- one run


def write_report(root: Path, jobs: list) -> Path:
    """A report of three files, put in place as the real one is."""
    work = root / ".report.work"
    build.shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in ("results.csv", "findings.json"):
        if (root / name).is_file():
            build.shutil.copyfile(root / name, work / name)
    findings = work / "findings.json"
    (work / "telco_report.html").write_text(findings.read_text() if findings.is_file() else "")
    return build._put_in_place(work, root / "report") / "telco_report.html"


def run_study(request: dict) -> int:
    """Run the study of a request in this process; returns the exit code."""
    params.NOTEBOOKS_DIR = Path(request["notebooks"])
    os.environ["TELCO_NB_OUTPUTS"] = request["outputs"]
    values = {"value": request["value"], "configs": ["c01", "c02"], "generator": "own", "judge_kind": "checklist"}
    jobs = [Job(step, scope, values, reads) for step, scope, _, reads in STUDY]
    runner.load_study = lambda options: SimpleNamespace(profile="faults")
    runner.plan_jobs = lambda study: jobs
    crash_points.watch(crash_points.Watch(**request["watch"], runner=os.getpid()))
    return runner.run(runner.Options(), runner.Services(estimate=None, build_report=write_report))


def _kill(pid: int, after_s: float, whole: bool) -> None:
    """Kill a runner after a while, and with `whole` all processes below it."""
    time.sleep(after_s)
    below = psutil.Process(pid).children(recursive=True) if whole else []
    os.kill(pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()


def serve(folder: Path) -> None:
    """Answer requests until the input ends."""
    write_notebooks(folder / "notebooks")
    write_notebooks(folder / "broken", broken=True)
    os.environ["TELCO_NB_WARM_KERNELS"] = "0"
    kernel_manager.register_engine, local_engine.LocalEngine._start_afresh = _register_engine, _start_afresh
    content_key.versions()
    judge_study.shipped.gold_rows()
    for code in ("from telco_nb.report import build", OPEN, *(source for _, _, source, _ in STUDY)):
        content_key.module_hashes(code)  # parses modules, which are then known in every fork
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            gc.disable()  # a collection would copy the libraries' pages
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                code = run_study(request)
            finally:
                sys.stdout.flush()
                os._exit(code)
        if request["kill"]:
            _kill(pid, **request["kill"])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
