"""A study on Ray: on two nodes of one machine, with killed workers, nodes and drivers, ends as one of this machine."""

import hashlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fault_runs import Study, alive, can_unshare, wait_for
from fault_study import FINISH, write_notebook
from ray_cluster import ON_LOOPBACK, Cluster

from telco_nb import ROOT

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,  # not imported here: Ray reads the environment when it is
        reason="needs the optional package ray: pip install --no-deps -r requirements-ray.txt",
    ),
]

NODE = "import os\nnode = os.environ['TELCO_NB_NODE']\n"
MARK = "import os\nfrom pathlib import Path\nplace = Path(os.environ['TELCO_NB_JOB']).parents[1]\n"
MEET = f"""{MARK}
import time
(place / f"here-{{value}}").touch()
while not (place / f"here-{{3 - value}}").exists():  # each waits for the other: on one node they would never end
    time.sleep(0.05)
"""
SLEEP_ONCE = f"""{MARK}
import time
first = not (place / "asleep").exists()
(place / "asleep").write_text(os.environ["TELCO_NB_NODE"])
if first:
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def cluster():
    os.environ |= ON_LOOPBACK | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    made = Cluster()
    for name in ("a", "b"):
        made.add(name)
    yield made
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    made.cluster.shutdown()
    wait_for(lambda: not alive(started), 20)


@pytest.fixture
def study(tmp_path, cluster):
    study = Study(tmp_path)
    study.address = cluster.cluster.address
    yield study
    wait_for(lambda: not alive(study.processes()), 5)


def start(study: Study, **options):
    return study.start(engine="ray", address=study.address, **options)


def finish(process) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def jobs_of(study: Study) -> list[psutil.Process]:
    """The processes that run notebooks of a study now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "telco_nb.engine.job" in words and str(study.root) in " ".join(words):
            found.append(process)
    return found


def results(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("artefacts/*") if path.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def manifest(study: Study, scope: str, step: str) -> dict:
    return json.loads((study.root / scope / step / "manifest.json").read_text())


def test_jobs_run_on_both_nodes_and_end_as_those_of_this_machine(study, tmp_path):
    (tmp_path / "local").mkdir()
    local = Study(tmp_path / "local")
    for made, first in ((study, MEET), (local, "")):
        made.add("train", first, FINISH, scope="c1", value=1)
        made.add("train", first, FINISH, scope="c2", value=2)
        made.add("compare", FINISH)
        made.jobs[-1][3].extend(("train", scope, "artefacts/*") for scope in ("c1", "c2"))
    output = finish(start(study))
    assert "Nodes: 2; GPUs: 0; jobs at once without a GPU: 2" in output
    assert local.run()[0] == 0
    assert results(study.root) == results(local.root) and len(results(study.root)) == 3
    nodes = {manifest(study, scope, "train")["device"]["node"] for scope in ("c1", "c2")}
    assert nodes == {"a", "b"} and all(f"c1/train running on {n}" in output or n in output for n in nodes)
    assert manifest(study, "c1", "train")["device"]["visible_gpus"] == ""
    keys = ("step", "scope", "key", "key_parts", "parameters", "outputs", "exports", "status")
    same = [manifest(study, "s", "compare")[key] for key in keys if key[:3] != "key"]
    assert same == [manifest(local, "s", "compare")[key] for key in keys if key[:3] != "key"]
    again = finish(start(study))
    assert "3 skipped" in again and "Ray cluster" not in again


def test_a_job_whose_worker_is_killed_starts_again(study):
    study.add("train", SLEEP_ONCE, FINISH)
    process = start(study)
    wait_for(lambda: (study.root / "asleep").exists(), 60)
    (job,) = jobs_of(study)
    job.parent().kill()
    output = finish(process)
    assert "s/train queued again, as WorkerCrashedError" in output
    assert study.status("train") == "done" and not [*study.root.glob("s/.*claim*")]


def test_a_driver_killed_at_any_time_is_started_again_and_ends_as_an_undisturbed_one(study):
    slow = "import time\nfor _ in range(4):\n    time.sleep(0.5)"
    for scope in ("c1", "c2", "c3"):
        study.add("train", slow, FINISH, scope=scope, value=int(scope[1]))
    for seconds in (1.5, 3.0, 5.0, 8.0):
        process = start(study)
        wait_for(lambda: jobs_of(study) or process.poll() is not None, 60)  # noqa: B023
        time.sleep(seconds - 1.5)
        process.kill()
        process.communicate(timeout=30)
    finish(start(study))
    assert {(study.root / c / "train" / "artefacts" / "value.txt").read_text() for c in ("c1", "c2", "c3")} == {*"123"}
    assert "3 skipped" in finish(start(study))


def test_a_new_driver_stops_what_the_killed_one_has_left_before_it_starts_the_job_again(study):
    study.add("train", SLEEP_ONCE, FINISH)
    process = start(study)
    wait_for(lambda: (study.root / "asleep").exists(), 60)
    (old,) = jobs_of(study)
    process.kill()
    process.communicate(timeout=30)
    finish(start(study))
    assert not alive([old])


def test_ctrl_c_stops_the_job_on_its_node_and_the_next_run_goes_on(study):
    study.add("train", SLEEP_ONCE, FINISH)
    process = start(study)
    wait_for(lambda: (study.root / "asleep").exists(), 60)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (study.root / "s" / "train.failed.ipynb").exists(), 15)  # SIGTERM would follow after 20 s
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert study.failure("train")["kind"] == study.status("train") == "interrupted"
    assert (study.root / "s" / ".train.work").is_dir() and not alive(jobs_of(study))
    finish(start(study))


def test_a_job_whose_node_dies_starts_again_on_another(study, cluster):
    for scope in ("c1", "c2"):  # one on each node; the head outlives the other
        study.add(
            "train", SLEEP_ONCE.replace('"asleep"', 'f"asleep-{value}"').replace("120", "20"), FINISH, scope=scope
        )
        study.jobs[-1][2]["value"] = int(scope[1])
    process = start(study)
    wait_for(lambda: len([*study.root.glob("asleep-*")]) == 2, 60)
    (lost,) = [path for path in study.root.glob("asleep-*") if path.read_text() == "b"]
    cluster.kill("b")
    output = finish(process)
    assert f"c{lost.name[-1]}/train queued again, as" in output
    assert {manifest(study, scope, "train")["device"]["node"] for scope in ("c1", "c2")} == {"a"}


def test_a_job_for_gpus_gets_whole_ones_of_its_node_and_one_without_gets_none(study, cluster, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with monkeypatch.context() as visible:
        visible.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        cluster.add("g", gpus=2)  # Ray takes the number on trust
    seen = "import os\nvalue = os.environ['CUDA_VISIBLE_DEVICES'] + ' of ' + os.environ['TELCO_NB_JOBS_AT_ONCE']"
    seen += " + ', threads: ' + os.environ.get('OMP_NUM_THREADS', 'all')"  # Ray's default, 1, makes other sums
    write_notebook(study.folder / "notebooks" / "pair.ipynb", "device = ''\nprocesses = 0", seen, FINISH)
    study.jobs.append(("pair", "s", {"value": 1, "device": "auto", "processes": 2}, []))
    study.add("single", seen, FINISH)
    output = finish(start(study))
    assert "s/pair running on g, GPU 0, 1" in output, output
    values = [(study.root / "s" / step / "artefacts" / "value.txt").read_text() for step in ("pair", "single")]
    assert values[0] == "0,1 of 2, threads: all" and values[1] in (" of 1, threads: all", " of 3, threads: all")
    assert manifest(study, "s", "pair")["device"]["visible_gpus"] == "0,1"


def test_without_an_address_a_cluster_of_this_machine_is_started_that_listens_on_loopback_only(tmp_path):
    study = Study(tmp_path)
    study.add("train", SLEEP_ONCE.replace("120", "5"), FINISH)
    process = study.start(engine="ray")
    wait_for(lambda: (study.root / "asleep").exists() or process.poll() is not None, 240)
    below = [p for p in psutil.Process(process.pid).children(recursive=True) if "raylet" in p.name()]
    listening = [c.laddr.ip for p in study.processes() for c in p.net_connections("inet") if c.status == "LISTEN"]
    output = finish(process)
    assert below and len(listening) >= 4
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert "on this machine alone, listening on loopback only" in output
    assert study.status("train") == "done" and not [*study.temporary.glob("*ray*")]
    wait_for(lambda: not alive(study.processes()), 20)


STAND_INS = {  # for Slurm: one machine is both nodes of the job
    "scontrol": "printf 'n1\\nn2\\n'",
    "srun": """while [[ $1 == -* ]]; do [ "$1" = -w ] && shift; shift; done
[ "$1" = hostname ] && { echo 127.0.0.1; exit; }
exec "$@" """,
    "python": f'exec {sys.executable} "$@"',
    "ray": f"""exec {sys.executable} -c 'from ray.scripts.scripts import main; main()' "$@" """,
}


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a network namespace")
def test_the_slurm_script_starts_its_nodes_and_runs_a_step_without_any_network_but_loopback(tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    study = Study(tmp_path)  # for its temporary folder, by which its processes are found
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-2]", "RAY_PORT": "6391", "RAY_TMPDIR": "/tmp"}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(study.temporary)}
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")} | slurm
    command = f"ip link set lo up; exec bash tools/slurm.sh --profile smoke --steps 01 --outputs {tmp_path}/outputs"
    log = tmp_path / "slurm.log"  # not a pipe, which the nodes would hold open
    with log.open("w") as stream:
        streams = {"stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(["unshare", "-n", "bash", "-c", command], env=environment, cwd=ROOT, **streams)
    try:
        code = process.wait(timeout=280)
    finally:
        for left in study.processes():  # Slurm ends what a job has started
            left.kill()
    assert code == 0, log.read_text()
    assert "Nodes: 2; GPUs: 0; jobs at once without a GPU: 2" in log.read_text()
    made = json.loads((tmp_path / "outputs" / "smoke" / "shared" / "01_glossary" / "manifest.json").read_text())
    assert made["device"]["node"] in ("n1", "n2")
