"""`run_all.py status` names what stands and what does not, changes nothing, and writes what machines can read."""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fake_study
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from telco_nb.engine import archive, runner, status
from telco_nb.engine.archive import Failure
from telco_nb.engine.schedule import Options
from telco_nb.study import record
from telco_nb.study.plan import Job

JOBS = [
    Job("01_glossary", "shared", {}, ()),
    *(Job("03_train", scope, {}, ()) for scope in ("c01", "c02", "c03", "c04")),
]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """01 is done, c01 has an older result, c02 failed, c03 was interrupted, and c04 has never run."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    builder = fake_study.Builder(tmp_path, "smoke")
    for step, scope in (("01_glossary", "shared"), ("03_train", "c01")):
        builder.close(builder.open(step, scope), "done")
    (builder.root / "c02").mkdir()
    archive.keep_failed(builder.root, "c02", "03_train", Failure("error", "ValueError: no such layer", 7))
    record.prepare_work_dir(JOBS[3], builder.root, "0" * 64)
    monkeypatch.setattr(status.schedule, "load_study", lambda options: SimpleNamespace(profile="smoke"))
    monkeypatch.setattr(status, "plan_jobs", lambda study: JOBS)
    current = {"shared/01_glossary"}
    monkeypatch.setattr(
        status.schedule,
        "is_current",
        lambda job, root: (True, "up to date") if job.id in current else (False, "x changed"),
    )
    return builder.root


def told(tmp_path: Path, metrics: Path | None = None) -> tuple[dict, str]:
    said = io.StringIO()
    options = Options(profile="smoke", json_file=tmp_path / "status.json")
    assert status.status(options, metrics, Console(file=said, width=200)) == 0
    return json.loads((tmp_path / "status.json").read_text()), said.getvalue()


def tree(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def test_every_step_has_its_status_and_reason_and_nothing_is_changed(study, tmp_path):
    before = tree(study)
    content, said = told(tmp_path)
    steps = {step["scope"]: (step["status"], step["reason"]) for step in content["steps"]}
    assert steps["shared"] == ("done", "up to date") and steps["c01"] == ("stale", "x changed")
    assert steps["c02"][0] == "failed" and "ValueError: no such layer" in steps["c02"][1]
    assert steps["c03"][0] == "interrupted" and steps["c04"] == ("waiting", "x changed")
    assert content["counts"] == {"done": 1, "stale": 1, "failed": 1, "interrupted": 1, "waiting": 1}
    assert content["process"] is None and "No run is using it." in said and "./run_all.py --profile smoke" in said
    assert tree(study) == before


def test_while_a_run_holds_the_lock_its_job_is_running(study, tmp_path):
    archive.job_file(study, "c03", "03_train").write_text("{}")
    archive.running_log(study, "c03", "03_train").touch()
    with runner.lock(study):
        content, said = told(tmp_path)
    assert content["process"] == str(os.getpid()) and f"Process {os.getpid()} is using it." in said
    assert {s["scope"]: s["status"] for s in content["steps"]}["c03"] == "running"
    assert {s["scope"]: s["status"] for s in told(tmp_path)[0]["steps"]}["c03"] == "interrupted"


def test_a_job_that_no_node_of_a_cluster_has_taken_yet_is_queued(study, tmp_path):
    for scope in ("c03", "c04"):
        archive.job_file(study, scope, "03_train").parent.mkdir(exist_ok=True)
        archive.job_file(study, scope, "03_train").write_text("{}")
    archive.running_log(study, "c03", "03_train").touch()
    with runner.lock(study):
        content, said = told(tmp_path, tmp_path / "m.prom")
    found = {step["scope"]: step["status"] for step in content["steps"]}
    assert (found["c03"], found["c04"]) == ("running", "queued") and content["counts"]["queued"] == 1
    assert "queued" in said and 'status="queued"} 1.0' in (tmp_path / "m.prom").read_text()


def test_the_metrics_are_prometheus_text(study, tmp_path):
    told(tmp_path, tmp_path / "telco_nb.prom")
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "telco_nb.prom").read_text())}
    counts = {sample.labels["status"]: sample.value for sample in families["telco_nb_steps"].samples}
    assert counts == dict.fromkeys(status.ORDER, 0) | {
        "done": 1,
        "stale": 1,
        "failed": 1,
        "interrupted": 1,
        "waiting": 1,
    }
    assert {sample.labels["scope"] for sample in families["telco_nb_step_seconds"].samples} == {"shared", "c01"}
    assert families["telco_nb_running"].samples[0].value == 0


def test_a_study_that_was_moved_here_from_another_place_is_told_all_the_same(study, tmp_path, monkeypatch):
    moved = tmp_path / "from-the-box"
    shutil.move(study.parent / "smoke", moved / "smoke")
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(moved))
    assert told(tmp_path)[0]["counts"] == {"done": 1, "stale": 1, "failed": 1, "interrupted": 1, "waiting": 1}


def test_a_failed_notebook_that_cannot_be_read_says_so(study, tmp_path):
    archive.failed_notebook(study, "c02", "03_train").write_text("{")
    reasons = {step["scope"]: step["reason"] for step in told(tmp_path)[0]["steps"]}
    assert reasons["c02"].startswith("the reason cannot be read")


def test_a_file_that_cannot_be_written_is_refused_by_the_name_of_its_option(study, tmp_path, capsys):
    options = Options(profile="smoke")
    assert status.status(options, tmp_path, Console(file=io.StringIO())) == 2
    assert "--metrics" in capsys.readouterr().err
