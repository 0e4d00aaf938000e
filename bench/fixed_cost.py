"""Measures the time of a configuration beyond its training, its evaluation and its answers.

`python bench/fixed_cost.py [repeats]`. First a job with the imports of 03_train runs, with new and forked kernels in
turn, so that other load affects both. Then 03_train and 04_energy of two configurations of the laptop study run: the
time of their jobs less training, answering, the checkpoints and the two evaluations.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from telco_nb import ROOT
from telco_nb.engine import fork_server
from telco_nb.engine.job import common_environment

NOTEBOOK = """
from telco_nb.notebook import open_run  # isort: skip
import json, os, time
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from peft import LoraConfig
from transformers import TrainingArguments
from telco_nb.lora import base_model, data_parallel, energy, packing, preflight, step, trainer
ready = time.time()
a, b, seconds = torch.ones(1024, 1024), torch.ones(1024, 1024), []
for _ in range(30):
    start = time.perf_counter()
    (a @ b)[0, 0].item()
    seconds.append(time.perf_counter() - start)
gflops = 2 * 1024**3 / min(seconds) / 1e9
torch.manual_seed(1)
layer = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.SiLU(), torch.nn.Linear(1536, 576))
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
for _ in range(20):
    x = torch.randn(512, 576)
    loss = ((layer(x) - x) ** 2).mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
bits = [w.detach().sum().item().hex() for w in layer.parameters()] + [loss.item().hex()]
"""
WORK = {"03_train": ("train_seconds", "checkpoint_seconds_total"), "04_energy": ("answer_seconds",)}
SAVE = """
Path(os.environ["TELCO_NB_JOB"]).with_name("result.json").write_text(
    json.dumps({"first": first, "ready": ready, "gflops": gflops, "threads": torch.get_num_threads(), "bits": bits}))
"""


def write_job(folder: Path) -> Path:
    """Write a job whose notebook records the time of its first cell and of the end of its imports."""
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for i, source in enumerate(["import time\nfirst = time.time()", NOTEBOOK, SAVE])
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "x.ipynb").write_text(json.dumps(content))
    (folder / "s").mkdir()
    values = {"root": str(folder), "scope": "s", "step": "x", "key": "", "parameters": {}, "key_parts": {}}
    path = folder / "job.json"
    path.write_text(json.dumps(values | {"work": str(folder / "work"), "notebook": str(folder / "x.ipynb")}))
    return path


def fresh(job: Path) -> list[dict]:
    """Run a job as a new process; return its events."""
    command = [sys.executable, "-m", "telco_nb.engine.job", str(job), str(os.getpid())]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def forked(server: fork_server.ForkServer, job: Path) -> list[dict]:
    """Run a job as a process of the fork server; return its events."""
    with (job.parent / "log").open("wb") as log, (job.parent / "lock").open("w") as lock:
        child = server.fork(job, log, lock, lambda: True)
        assert child, "there is no fork server here"
        events = [json.loads(line) for line in child.stdout]
        child.wait()
    return events


def measure(run) -> dict:
    """Return the seconds to the first cell, to the end of the imports and to the end, with the notebook's results."""
    folder = Path(tempfile.mkdtemp(prefix="fixed-cost-"))
    job = write_job(folder)
    start = time.time()
    events = run(job)
    whole = time.time() - start
    result = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    warm = next(event["warm"] for event in events if "kernel_pid" in event)
    return result | {"first": result["first"] - start, "ready": result["ready"] - start, "whole": whole, "warm": warm}


def in_the_study(configs: list[str], repeats: int) -> None:
    """Print the fixed seconds of configurations of the laptop study, medians over the repeats."""
    with tempfile.TemporaryDirectory(prefix="fixed-cost-") as folder:
        command = [sys.executable, "run_all.py", "--outputs", folder, "--configs", ",".join(configs)]
        summary = Path(folder, "summary.json")
        seconds: dict[str, list[float]] = {}
        for repeat in range(repeats):
            again = ["--force", "03", "--force", "04"] if repeat else []
            steps = ["--steps", "01-04", "--json", str(summary)]
            subprocess.run([*command, *steps, *again], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            jobs = {job["id"]: job["seconds"] for job in json.loads(summary.read_text())["jobs"]}
            for config in configs:
                parts = beyond_work(Path(folder, "laptop", config), jobs)
                for name, value in parts.items():
                    seconds.setdefault(f"{config} {name}", []).append(value)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


def beyond_work(folder: Path, jobs: dict[str, float]) -> dict[str, float]:
    """Return the seconds of a configuration's two jobs without the work itself."""
    seconds = {}
    for step, work in WORK.items():
        metrics = json.loads((folder / step / "metrics.json").read_text())
        worked = sum(metrics[name] for name in work) * metrics.get("answer_passes", 1)
        for cell in json.loads((folder / f"{step}.ipynb").read_text())["cells"]:
            if "answer_losses(" in "".join(cell["source"]):
                worked += cell["metadata"]["papermill"]["duration"]
        seconds[step] = jobs[f"{folder.name}/{step}"] - worked
    return seconds | {"both": sum(seconds.values())}


def main(repeats: int = 5) -> None:
    start = time.monotonic()
    server = fork_server.ForkServer(os.environ | common_environment({}))
    assert server.wait_until_ready(lambda: True), "there is no fork server here"
    print(f"the fork server is ready after {time.monotonic() - start:.1f} s")
    kinds = {"fresh": fresh, "forked": lambda job: forked(server, job)}
    results = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, run in kinds.items():
            results[kind].append(measure(run))
    server.close()
    for kind, runs in results.items():
        assert all(run["warm"] == (kind == "forked") for run in runs)
        middle = {name: statistics.median(run[name] for run in runs) for name in ("first", "ready", "whole")}
        best = max(run["gflops"] for run in runs)
        print(
            f"{kind:>6}: {middle['first']:.2f} s to the first cell, {middle['ready']:.2f} s with the imports, "
            f"{middle['whole']:.2f} s in all; {best:.0f} GFLOP/s with {runs[0]['threads']} threads"
        )
        results[kind] = middle | {"bits": {tuple(run["bits"]) for run in runs}}
    for name in ("first", "ready", "whole"):
        print(f"{name}: {results['fresh'][name] / results['forked'][name]:.1f} times faster")
    print("bit-identical results:", results["fresh"]["bits"] == results["forked"]["bits"])
    print("beyond training, evaluation and answering:")
    in_the_study(["c01", "c16"], repeats)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
