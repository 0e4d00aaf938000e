"""Time, memory and files of studies of 100, 1,000 and 10,000 configurations whose steps do nothing, and of summarising.

`python bench/limits.py [summarise] [configurations ...]`. With `summarise`, 06 and the report of a study with planted
results (tests/support/fake_study.py) of 50, 100 and 200 configurations. Without it the parameters, the plan, the
content keys, the records, the seal and the status are the real ones; only the execution of a notebook is left out: a
step writes one byte into each file that others read. Each phase is a process of its own. The slope is that of
log(processor seconds) over log(configurations).
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from telco_nb import ROOT
from telco_nb.study import machine, params

PHASES = ("plan", "run", "again", "status", "verify")
SUMMARISING = ("planted", "analysis", "report")  # planted: the steps before 06, written as files
PROFILE = "many"


def write_params(folder: Path, n: int) -> None:
    """Parameter files of a study of n configurations that differ in rank and learning rate."""
    shutil.copytree(params.PARAMS_DIR, folder)
    (folder / PROFILE).mkdir()
    names = [f"c{i:0{len(str(n))}}" for i in range(1, n + 1)]
    for i, name in enumerate(names):
        text = f"rank: {i % 1024 + 1}\nlearning_rate: {1e-4 * (i // 1024 + 1):.4f}\n"
        (folder / PROFILE / f"{name}.yaml").write_text(text)
    lists = {"lora_folder": PROFILE, "configs": names, "repeat_configs": [], "repeat_seeds": []}
    smoke = [line for line in (folder / "profiles/smoke.yaml").read_text().splitlines() if line[:1].isalpha()]
    kept = [line for line in smoke if line.partition(":")[0] not in lists]
    added = [f"{name}: {json.dumps(value)}" for name, value in lists.items()]
    (folder / "profiles" / f"{PROFILE}.yaml").write_text("\n".join([*kept, *added]) + "\n")


def do_nothing(run_of_study, state, place) -> None:
    """Stands for Runner._run_job: the record of a step, without the notebook."""
    from telco_nb.engine import archive
    from telco_nb.notebook import Run
    from telco_nb.study.plan import READS

    root, job = run_of_study.root, state.job
    job_file = run_of_study.write_job(state)
    values = json.loads(job_file.read_text())
    run = Run(job, root, Path(values["work"]), values["key"], values["key_parts"], batch=True)
    for step, scope, pattern in job.inputs:
        run.input(step, pattern.replace("*", "weights"), scope)
    for read in (read for reads in READS.values() for read in reads if read.step == job.step):
        path = run.work / read.pattern.replace("*", "weights")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    run.finish("did nothing")
    archive.running_notebook(root, job.scope, job.step).write_text('{"cells": [], "metadata": {}}')
    archive.keep_record(root, job.scope, job.step)
    job_file.unlink(missing_ok=True)


def no_report(root: Path, jobs: list) -> Path:
    (root / "report").mkdir(exist_ok=True)
    (root / "report" / "telco_report.html").write_text(f"{len(jobs)} jobs")
    return root / "report" / "telco_report.html"


def summarise(name: str, folder: Path, n: int) -> int:
    """One of SUMMARISING on a study of n configurations and two judges in a folder; returns 0."""
    import matplotlib

    matplotlib.use("Agg")
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import fake_study
    import pytest

    from telco_nb.report.build import build_report

    judges, repeats = ("checklist", "embedding"), 4
    if name == "planted":
        fake_study.build_study(folder, n, judges, repeats)
    elif name == "analysis":
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
            fake_study.run_analysis(folder / "laptop", n, judges, repeats, patch)
    else:
        build_report(folder / "laptop")
    return 0


def phase(name: str, params_dir: Path) -> int:
    """One phase in this process; returns its exit code."""
    from telco_nb.engine import runner, status, worker
    from telco_nb.engine.progress import Output

    worker.Runner._run_job = do_nothing
    options = runner.Options(profile=PROFILE, params_dir=params_dir, dry_run=name == "plan")
    if name == "status":
        return status.status(options, None, Output())
    if name == "verify":
        return runner.verify(PROFILE, None, None)
    return runner.run(options, runner.Services(estimate=None, build_report=no_report))


def measured(name: str, folder: Path, n: int) -> dict:
    """Seconds, of them on the processor, peak memory in MB and printed kB of a phase of a study of n configurations."""
    command = [sys.executable, __file__, "--phase", name, str(folder), str(n)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TELCO_NB_OUTPUTS": str(folder / "outputs")},
                          capture_output=True, text=True)  # fmt: skip
    seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    used = json.loads((folder / "used").read_text())
    return used | {"seconds": seconds, "output_kb": len(done.stdout) / 1000}


def main(phases: tuple[str, ...], sizes: list[int]) -> None:
    seconds: dict[str, list[float]] = {}
    for n in sizes:
        with tempfile.TemporaryDirectory(prefix="limits-") as name:
            folder = Path(name)
            if phases == PHASES:
                write_params(folder / "params", n)
            for which in phases:
                found = measured(which, folder, n)
                seconds.setdefault(which, []).append(found["cpu_seconds"])
                print(f"{n:>7,} {which:8} {found['seconds']:8.1f} s, {found['cpu_seconds']:8.1f} s on the processor, "
                      f"{found['memory_mb']:6.0f} MB, {found['output_kb']:6.0f} kB printed", flush=True)  # fmt: skip
            files = [path.lstat() for path in (folder / "outputs").rglob("*")]
            print(f"{n:>7,} {len(files):,} files and folders, {sum(s.st_blocks for s in files) * 512 / 1e6:,.0f} MB",
                  flush=True)  # fmt: skip
    for which, took in seconds.items():
        pairs = zip(pairwise(took), pairwise(sizes), strict=True)
        slopes = [math.log(b / a) / math.log(m / k) for (a, b), (k, m) in pairs]
        print(f"slope of {which}: {', '.join(f'{slope:.2f}' for slope in slopes) or '-'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--phase"]:
        name, folder = sys.argv[2], Path(sys.argv[3])
        in_study = name in SUMMARISING
        code = summarise(name, folder / "outputs", int(sys.argv[4])) if in_study else phase(name, folder / "params")
        used = {"cpu_seconds": time.process_time(), "memory_mb": machine.peak_memory_bytes() / 1e6}
        (folder / "used").write_text(json.dumps(used))
        sys.exit(code)
    words = sys.argv[1:]
    if words[:1] == ["summarise"]:
        main(SUMMARISING, [int(word) for word in words[1:]] or [50, 100, 200])
    else:
        main(PHASES, [int(word) for word in words] or [100, 1_000, 10_000])
