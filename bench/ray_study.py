"""The smoke study on two Ray nodes of this machine: a node is killed in mid-training, then the driver time after time.

`python bench/ray_study.py [kills of the driver]`, 10 by default; needs `pip install --no-deps -r requirements-ray.txt`.
Two undisturbed studies of the local engine say which files and columns do not depend on the clock; those on Ray must
end with the same ones, adapters included, and one more run must find nothing to do.
"""

import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from study_kills import results, undisturbed

from telco_nb import ROOT

if TYPE_CHECKING:
    from ray_cluster import Cluster


def start(outputs: Path, address: str, log: Path) -> subprocess.Popen:
    """A run of the smoke study on the cluster, or the rest of it."""
    command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke", "--outputs", str(outputs)]
    command += ["--engine", "ray", "--address", address, "--json", str(log.with_suffix(".json"))]
    with log.open("a") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)


def trainings(outputs: Path) -> list[psutil.Process]:
    """The processes that run 03 of this study now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "telco_nb.engine.job" in line and str(outputs) in line and "03_train" in line:
            found.append(process)
    return found


def wait_until(condition: Callable[[], object], run: subprocess.Popen, log: Path) -> None:
    while not condition():
        if run.poll() is not None:
            raise SystemExit(f"the run has ended before its time:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def finish(run: subprocess.Popen, log: Path) -> dict:
    if run.wait():
        raise SystemExit(f"the study failed:\n{log.read_text()[-3000:]}")
    return json.loads(log.with_suffix(".json").read_text())


def node_of(process: psutil.Process) -> str:
    return process.environ()["TELCO_NB_NODE"]


def lose_a_node(cluster: "Cluster", outputs: Path, log: Path) -> None:
    """The second node dies some seconds into a training that it runs."""
    run = start(outputs, cluster.cluster.address, log)
    wait_until(lambda: [p for p in trainings(outputs) if node_of(p) == "b"], run, log)
    time.sleep(10)
    cluster.kill("b")
    finish(run, log)


def kill_drivers(cluster: "Cluster", outputs: Path, log: Path, kills: int, seconds: float) -> int:
    """Kill -9 the driver up to so many times on its way; returns how often."""
    done = 0
    while done < kills:
        run = start(outputs, cluster.cluster.address, log)
        try:
            run.wait(random.uniform(5, 5 + 2 * seconds / kills))
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            done += 1
    finish(start(outputs, cluster.cluster.address, log), log)
    return done


def tell(what: str, wanted: dict[str, object], outputs: Path) -> bool:
    """Print how many results are those of the local engine; returns whether all are."""
    found = results(outputs)
    differing = [path for path in wanted if found.get(path) != wanted[path]]
    print(
        f"{what}: {len(wanted) - len(differing)} of {len(wanted)} the same; differing: {differing[:5] or 'none'}",
        flush=True,
    )
    return not differing


def main(kills: int = 10) -> None:
    sys.path.append(str(ROOT / "tests" / "support"))
    from ray_cluster import ON_LOOPBACK, Cluster

    random.seed(0)
    os.environ |= ON_LOOPBACK | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, seconds = undisturbed(folder / "first")
        second, _ = undisturbed(folder / "second")
        wanted = {path: value for path, value in first.items() if second.get(path) == value}
        adapters = sum(path.endswith("adapter_model.safetensors") for path in wanted)
        print(
            f"{len(wanted)} of {len(first)} files and columns are the same twice, {adapters} adapters; {seconds:.0f} s"
        )
        cluster = Cluster()
        try:
            for node in ("a", "b"):
                cluster.add(node)
            lose_a_node(cluster, folder / "node", folder / "node.log")
            same = tell("a node killed in mid-training", wanted, folder / "node")
            cluster.add("b")
            done = kill_drivers(cluster, folder / "driver", folder / "driver.log", kills, seconds)
            same &= tell(f"the driver killed {done} times", wanted, folder / "driver")
            again = finish(
                start(folder / "driver", cluster.cluster.address, folder / "again.log"), folder / "again.log"
            )
            left = {job["status"] for job in again["jobs"]}
            print("one more run:", left)
            same &= left == {"skipped"}
        finally:
            cluster.cluster.shutdown()
    sys.exit(not same)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
