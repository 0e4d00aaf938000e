"""A study on Ray: on two nodes of one machine, with killed workers, nodes and drivers, ends as one of this machine."""

import hashlib
import importlib.util
import json
import os
import secrets
import signal
import time
from pathlib import Path

import psutil
import pytest
from fault_runs import Study, alive, wait_for
from fault_study import FINISH

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,  # not imported here: Ray reads the environment when it is
        reason="needs the optional package ray: pip install --no-deps -r requirements-ray.txt",
    ),
]

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
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


class Cluster:
    """Nodes on this machine, each for one job without a GPU, and a head for none."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster, self.nodes = Cluster(), {}
        self.add("head", {})

    def add(self, name: str, resources: dict) -> None:
        small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.nodes[name] = self.cluster.add_node(node_name=name, resources=resources, **small)

    def kill(self, name: str) -> None:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@pytest.fixture(scope="module")
def cluster():
    os.environ |= ON_LOOPBACK | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    made = Cluster()
    for name in ("a", "b"):
        made.add(name, {"processor": 1})
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
    assert "Nodes: 3; GPUs: 0; jobs at once without a GPU: 2" in output
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
