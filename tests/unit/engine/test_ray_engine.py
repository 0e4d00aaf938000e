"""What a run on a cluster refuses or chooses, without Ray; tests/faults/test_ray_faults.py runs it on nodes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import run_all as program
from telco_nb import ROOT
from telco_nb.engine import archive, progress, ray_engine, ray_node, runner, schedule, shared_folder, worker
from telco_nb.engine.schedule import Options, UnfitError, UsageError
from telco_nb.hosted import egress, hosts
from telco_nb.study import params, record
from telco_nb.study.content_key import content_key
from telco_nb.study.plan import Job, plan_jobs

# ---------------------------------------------------------------- options


def run_all(*words: str, hide_ray: bool = False) -> subprocess.CompletedProcess:
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'ray' else find(n); "
    code = f"import runpy, sys; {hide if hide_ray else ''}sys.argv[:] = {['run_all.py', *words]!r}; "
    code += "runpy.run_path('run_all.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_a_missing_extra_is_exit_code_3_with_the_command_that_installs_it():
    done = run_all("--engine", "ray", "--dry-run", hide_ray=True)
    assert done.returncode == 3 and "Run: pip install --no-deps -r requirements-ray.txt" in done.stderr
    assert (ROOT / "requirements-ray.txt").is_file()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "slurm"}, "Known: local, ray"),
        ({"address": "auto"}, "add --engine ray"),
        ({"engine": "ray", "gpus": ("0",)}, "Leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_the_fix(values, words):
    with pytest.raises(UsageError, match=words):
        schedule.check_engine(Options(**values))


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("8.8.8.8:6379", 4, "the host 8.8.8.8 lies outside this network (parameter --address)"),
        ("ray://cluster.example.com:10001", 4, "cluster.example.com lies outside"),
        ("[2001:4860::1]:6379", 4, "lies outside"),
        ("0x08080808:6379", 4, "lies outside"),
        ("[::1", 2, "names no host"),
        (":6379", 2, "names no host"),
        ("127.0.0.1:6379", 3, "package ray"),
        ("ray://10.0.0.1:10001", 3, "package ray"),
        ("auto", 3, "package ray"),
    ],
)
def test_without_egress_no_job_goes_to_a_cluster_outside_this_network(address, code, words):
    done = run_all("--engine", "ray", "--address", address, "--no-egress", "--dry-run", hide_ray=True)
    assert done.returncode == code and words in done.stderr, done.stderr


def test_without_egress_a_cluster_with_a_node_outside_this_network_is_refused(tmp_path, monkeypatch):
    nodes = [{"Alive": True, "Resources": {}, "NodeManagerAddress": host} for host in ("10.0.0.1", "8.8.4.4")]
    stopped = []
    ray = SimpleNamespace(init=lambda **_: None, nodes=lambda: nodes, shutdown=lambda: stopped.append(True))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv(egress.NO_EGRESS, "1")
    with pytest.raises(egress.EgressRefused, match=r"8\.8\.4\.4"):
        ray_engine.RayEngine([], tmp_path, "auto", print)
    assert stopped


def test_a_job_takes_what_was_agreed_to_along_to_its_node(tmp_path, monkeypatch):
    """Else a node that resolves a name to another address would ask it, though the plan has shown one nearby."""
    monkeypatch.setenv(egress.AGREED, "")
    egress.agree([hosts.parse_address("http://127.0.0.1:8000")])
    given, engine, job = [], object.__new__(ray_engine.RayEngine), Job("train", "s", {}, ())
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *words: given.append(words[-1])))
    engine.ray, engine.demands = SimpleNamespace(remote=lambda function: task), {job.id: {}}
    engine._submit(job, tmp_path / "job.json", SimpleNamespace(token="t"))
    assert given[0][egress.AGREED] == os.environ[egress.AGREED]
    with pytest.raises(egress.EgressRefused, match="farther away"):
        egress.require_agreed(hosts.parse_address("http://8.8.8.8/v1"), "judge_endpoint")


def test_the_command_that_goes_on_names_the_engine_and_the_cluster():
    assert Options(engine="ray", address="head:6379").command().endswith("--engine ray --address head:6379")


def test_a_run_that_does_not_ask_for_ray_does_not_import_it():
    code = "import sys; from telco_nb.engine import runner; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("url", ["s3://bucket/study", "gs://b", "file:///tmp/x", "memory://x"])
def test_an_outputs_url_is_refused_with_the_fix(url):
    with pytest.raises(params.ParameterError, match=r"is a URL.* need a folder. Copy a finished study there"):
        record.use_outputs(Path(url))


# ---------------------------------------------------------------- what a job needs, and what a cluster lacks


def test_jobs_ask_for_whole_gpus_or_for_a_processor():
    def job(**values) -> Job:
        return Job("03_train", "c01", values, ())

    gpus, processor = {"num_gpus": 2, "resources": {}}, {"num_gpus": 0, "resources": {"processor": 1}}
    assert ray_engine.demand(job(device="cuda", processes=2), 0) == gpus
    assert ray_engine.demand(job(device="auto", processes=2), 8) == gpus
    assert ray_engine.demand(job(device="auto", processes=2), 0) == processor
    assert ray_engine.demand(job(device="cpu"), 8) == ray_engine.demand(job(), 8) == processor
    study = params.load_study("paper")
    asked = {j.step: ray_engine.demand(j, 8)["num_gpus"] for j in plan_jobs(study)}
    assert asked == dict.fromkeys(("01_glossary", "02_synth", "05_judge", "06_analysis"), 0) | dict.fromkeys(
        ("03_train", "04_energy"), 1
    )


@pytest.mark.parametrize(
    ("values", "resources", "expected"),
    [
        ({"processes": 1}, ([8, 8], 2), {"03_train": 16, "05_judge": 2}),
        ({"processes": 4}, ([8, 8], 2), {"03_train": 4, "05_judge": 2}),
        ({"processes": 2}, ([3, 3], 2), {"03_train": 2, "05_judge": 2}),  # the third ones belong to no pair
        ({"processes": 1}, ([0], 3), {"03_train": 3, "05_judge": 3}),
        ({"processes": 1}, ([], 0), {"03_train": 1, "05_judge": 1}),
    ],
)
def test_as_many_jobs_of_a_step_run_at_once_as_have_what_they_need(values, resources, expected):
    jobs = [Job("03_train", "c01", {"device": "auto"} | values, ()), Job("05_judge", "judge-x", {}, ())]
    assert ray_engine.at_once(jobs, *resources) == expected


def cluster_of(*resources: dict) -> ray_engine.RayEngine:
    """An engine that has joined nodes with these resources."""
    engine = object.__new__(ray_engine.RayEngine)
    engine.ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": r} for r in resources])
    return engine


def test_a_cluster_without_a_node_for_some_job_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(ray_engine, "JOIN_SECONDS", 0.0)
    engine = cluster_of({"GPU": 1}, {"GPU": 1})
    engine.demands = {"a": {"num_gpus": 2, "resources": {}}, "b": {"num_gpus": 0, "resources": {"processor": 1}}}
    with pytest.raises(UnfitError) as refused:
        engine._wait_for_nodes()
    assert "No node has 2 GPUs" in str(refused.value)
    assert """ray start ... --resources='{"processor": 1}'""" in str(refused.value)
    engine.ray = cluster_of({"GPU": 2}, {"processor": 1}).ray
    engine._wait_for_nodes()


def test_jobs_that_share_a_nodes_processors_are_counted():
    facts = {"Resources": {"GPU": 8.0, "processor": 1.0}}
    assert [ray_node.jobs_at_once(facts, gpus) for gpus in (0, 1, 4)] == [9, 9, 3]
    assert ray_node.jobs_at_once({"Resources": {"processor": 1.0}}, 0) == 1


def test_a_node_that_would_compute_something_else_is_named_by_what_differs(tmp_path):
    job = plan_jobs(params.load_study("smoke"))[0]
    key, parts = content_key(job, tmp_path)
    values = {"step": job.step, "scope": job.scope, "parameters": job.parameters, "inputs": []}
    values |= {"root": str(tmp_path), "notebook": str(ROOT / "notebooks" / f"{job.step}.ipynb")}
    assert ray_node.difference_here(values | {"key": key, "key_parts": parts}) is None
    other = parts | {"versions": parts["versions"] | {"torch": "1.0"}}
    found = ray_node.difference_here(values | {"key": "0" * 64, "key_parts": other})
    assert found == f"torch 1.0 -> {parts['versions']['torch']}"


# ---------------------------------------------------------------- retries, without Ray


class Tasks:
    """Stands in for Ray: each submitted task is a list of events, at whose end a loss may stand."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def __init__(self, *tasks: list):
        self.tasks = [iter(task) for task in tasks]

    def wait(self, streams: list, timeout: float) -> tuple:
        return streams, []

    def get(self, event: object) -> dict:
        if isinstance(event, Exception):
            raise event
        return event


END = {"exit_code": 0, "failure": None}
LOST = Tasks.exceptions.RayError("the node is gone")


def run_tasks(root: Path, monkeypatch, *tasks: list, stops: int = 0) -> list[dict]:
    engine, job = object.__new__(ray_engine.RayEngine), Job("train", "s", {}, ())
    engine.ray, engine.root = Tasks(*tasks), root
    monkeypatch.setattr(engine, "_submit", lambda *_: engine.ray.tasks.pop(0), raising=False)
    monkeypatch.setattr(shared_folder, "FENCE_SECONDS", 0.0)
    job_file = archive.job_file(root, "s", "train")
    record.write_json(job_file, {"key": "k"})
    control = SimpleNamespace(stops=stops, keep_waiting=lambda: True)
    events = [*engine.start(job, job_file, None, control)]
    assert not shared_folder.claim_file(root, "s", "train").exists()
    return events


def test_a_lost_job_starts_again_and_fails_after_the_third_loss(tmp_path, monkeypatch):
    events = run_tasks(tmp_path, monkeypatch, [{"node": "a"}, LOST], [{"node": "b"}, END])
    assert events == [{"node": "a"}, {"lost": "RayError: the node is gone"}, {"node": "b"}, END]
    events = run_tasks(tmp_path, monkeypatch, *([LOST] for _ in range(3)))
    assert events[-1]["failure"]["kind"] == "died" and "lost 3 times" in events[-1]["failure"]["reason"]
    assert archive.failed_notebook(tmp_path, "s", "train").is_file()


def test_a_fault_of_the_task_itself_is_not_tried_again_and_a_stop_ends_a_lost_job(tmp_path, monkeypatch):
    (event,) = run_tasks(tmp_path, monkeypatch, [Tasks.exceptions.RayTaskError("no module telco_nb")])
    assert event["failure"] == {"kind": "not started", "reason": "RayTaskError: no module telco_nb", "cell": None}
    (event,) = run_tasks(tmp_path, monkeypatch, [LOST], stops=1)
    assert event["failure"]["kind"] == "interrupted"


def test_the_table_tells_where_a_job_runs_and_why_it_waits_again(tmp_path, monkeypatch):
    events = [{"node": "a"}, {"cell": 2, "of": 5}, {"lost": "NodeDiedError: x"}, {"node": "b, GPU 1"}, {"cell": 1}, END]
    state, lines = run_state(tmp_path, monkeypatch, events)
    assert lines == ["queued: new", "running on a", "queued again, as NodeDiedError: x", "running on b, GPU 1"]
    assert (state.status, state.cell, state.exit_code) == ("done", 1, 0)


def test_a_job_that_never_started_waits_as_before(tmp_path, monkeypatch):
    state, lines = run_state(tmp_path, monkeypatch, [{}, {"withdrawn": True}])
    assert (state.status, state.seconds, lines) == ("waiting", None, ["queued: new"])


def run_state(root: Path, monkeypatch, events: list[dict]) -> tuple[progress.State, list[str]]:
    """Run a job whose engine tells these events; returns its state and the lines of a log from the status on."""
    state, out = progress.State(Job("train", "s", {}, ()), "run", "new"), io.StringIO()
    engine = SimpleNamespace(places=[None], first_status="queued", start=lambda *_: iter(events))
    made = worker.Runner([state], root, Options(), None, engine)
    made.display = progress.Lines(Console(file=out, width=200), [state])
    monkeypatch.setattr(made, "write_job", lambda state: root / "job.json")
    made._execute(state, None)
    return state, [line.split("s/train ")[1] for line in out.getvalue().splitlines()]


# ---------------------------------------------------------------- the shared folder

PROBE = """
import json, sys
from telco_nb.engine import shared_folder
print(json.dumps(shared_folder.find_problems(json.loads(sys.argv[1]))))
"""


def problems_elsewhere(probe: dict, before: str = "") -> list[str]:
    command = [sys.executable, "-c", before + PROBE, json.dumps(probe)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_a_folder_that_another_process_shares_with_its_locks_has_no_problem(tmp_path):
    with shared_folder.probe(tmp_path) as probe:
        assert problems_elsewhere(probe) == []
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("import fcntl; fcntl.flock = lambda *_: None\n", "a lock of the driver does not hold on this node"),
        ("import fcntl\ndef flock(*_): raise OSError(38, 'no locks')\nfcntl.flock = flock\n", "locks fail: no locks"),
        (
            "import os\ndef replace(*_): raise OSError(18, 'not here')\nos.replace = replace\n",
            "a rename fails: not here",
        ),
    ],
)
def test_a_folder_without_shared_locks_or_renames_is_refused_with_the_fix(tmp_path, before, words):
    with shared_folder.probe(tmp_path) as probe:
        (problem,) = problems_elsewhere(probe, before)
    assert words in problem and "NFS 4, Lustre with -o flock" in problem


def test_a_folder_of_the_same_name_that_is_not_the_drivers_is_refused(tmp_path):
    (problem,) = problems_elsewhere({"root": "/shared", "folder": str(tmp_path), "token": "x"})
    assert "is not the driver's" in problem


def test_a_task_stops_when_its_claim_is_gone_or_anothers_and_passes_requests_to_stop_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(shared_folder, "FENCE_SECONDS", 0.0)
    place = (tmp_path, "s", "train")
    claim = shared_folder.Claim(*place)
    orders = shared_folder.Orders(*place, claim.token)
    assert orders() == 0
    claim.tell(2)
    assert orders() == 2
    shared_folder.Claim(*place)
    with pytest.raises(shared_folder.TakenError):
        orders()
    shared_folder.sweep_claims(tmp_path)
    with pytest.raises(shared_folder.TakenError):
        shared_folder.Orders(*place, claim.token)()


# ---------------------------------------------------------------- Slurm and Kubernetes


def test_the_slurm_script_is_valid_and_hands_its_arguments_to_the_run():
    script = ROOT / "tools" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert 'exec python run_all.py --engine ray --address "$address" "$@"' in text
    assert text.count("ray start") == 2 and "RAY_AUTH_MODE=token" in text and "--include-dashboard=false" in text


def test_the_kubernetes_manifest_has_the_fields_that_a_study_needs():
    job, policy = yaml.safe_load_all((ROOT / "tools" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (pin,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    assert pin == f"ray=={cluster['rayVersion']}" and cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == {ray_node.PROCESSOR: 1}
    pods = [group["template"]["spec"] for group in (head, workers)]
    for pod in pods:  # both see the same outputs, and fill a cache of their own
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/shared", "cache": "/cache"} == mounted
        assert "persistentVolumeClaim" in next(v for v in pod["volumes"] if v["name"] == "shared")
        assert {"name": "TELCO_NB_CACHE", "value": "/cache"} in container["env"]
    assert int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Egress"]
    words = job["spec"]["entrypoint"].split("run_all.py ")[1].split()
    assert words[:4] == ["--engine", "ray", "--address", "auto"] and words[-1].startswith("/shared/")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def cluster_commands() -> dict[str, list[str]]:
    """The arguments of run_all.py in every command for several GPUs or machines that the project shows or starts."""
    found = {}
    lines = re.findall(r"^\./run_all\.py (.*?)(?:  #|$)", text_of("README.md"), re.MULTILINE)
    lines += re.findall(r"`\./run_all\.py (.*?)`", text_of("run_all.py"))
    for line in lines:
        if "--engine" in line or "--gpus" in line:
            found[line] = shlex.split(line)
    (sbatch,) = re.findall(r"^sbatch .*? tools/slurm\.sh (.*?)  #", text_of("README.md"), re.MULTILINE)
    (started,) = re.findall(r"^exec python run_all\.py (.*?)(?:  #|$)", text_of("tools/slurm.sh"), re.MULTILINE)
    found["slurm.sh"] = shlex.split(started.replace('"$address"', "10.0.0.1:6379").replace('"$@"', sbatch))
    job, _ = yaml.safe_load_all(text_of("tools/kuberay.yaml"))
    found["kuberay.yaml"] = shlex.split(job["spec"]["entrypoint"].split("run_all.py ")[1])
    return found


@pytest.mark.parametrize("name", cluster_commands())
def test_every_command_for_several_gpus_or_machines_is_one_that_the_program_takes(name, tmp_path, monkeypatch):
    """Each goes through the real command line to the plan of a small study, on a machine that lacks nothing."""
    words, seen = cluster_commands()[name], []
    monkeypatch.setattr(ray_engine, "require_ray", lambda: None)
    monkeypatch.setattr(ray_engine, "resources_here", lambda: (8, 8, 1))
    monkeypatch.setattr(runner, "check_machine", lambda *given: None)
    monkeypatch.setattr(runner, "load_study", lambda options: seen.append(options) or params.load_study("smoke"))
    result = CliRunner().invoke(program.app, [*words, "--outputs", str(tmp_path), "--dry-run"])  # the last one counts
    assert result.exit_code == 0, result.output
    (options,) = seen
    assert "03_train" in result.output and options.dry_run and options.profile == "paper"
    assert (options.engine == "ray") != bool(options.gpus)
    assert bool(options.address) == ("--address" in words)


def test_there_are_commands_for_a_box_a_cluster_slurm_and_kubernetes():
    found = cluster_commands()
    assert {"slurm.sh", "kuberay.yaml"} < set(found) and sum("--gpus" in name for name in found) >= 1
    assert {"--address" in name for name in found if "--engine ray" in name} == {True, False}


def test_a_cluster_reports_nothing_to_rays_makers_wherever_the_project_starts_one():
    """RAY_USAGE_STATS_ENABLED=0 alone still sends the word that reports are off."""
    assert ray_engine.NO_USAGE_REPORT["RAY_USAGE_STATS_REPORT_URL"].startswith("http://127.0.0.1:")
    starters = [path for path in (ROOT / "tools").iterdir() if "RAY_USAGE_STATS_ENABLED" in path.read_text()]
    assert {path.name for path in starters} == {"slurm.sh", "kuberay.yaml"}
    for path in starters:
        assert re.search(r"RAY_USAGE_STATS_REPORT_URL(=|, value: \")http://127\.0\.0\.1:9/", path.read_text()), path
