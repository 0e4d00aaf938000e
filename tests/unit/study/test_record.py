"""The record of a step: damaged manifests, exports by hash, work folders, and what dead processes leave."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
from damage import DAMAGES, damage
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb.notebook import Run
from telco_nb.study import content_key, manifest, record, seal
from telco_nb.study.content_key import is_current
from telco_nb.study.plan import Job

JOB = Job("06_analysis", "study", {"profile": "p", "scope": "study"}, ())


def finished(root: Path, job: Job = JOB, text: str = "a,b\n", owner: int | None = None) -> Run:
    """A finished step with one output, which it exports as results.csv."""
    work = record.prepare_work_dir(job, root, "0" * 64, owner)
    run = Run(job, root, work, "0" * 64, {}, batch=owner is None)
    run.artefact("table.csv").write_text(text)
    run.export("results.csv", run.artefact("table.csv"))
    run.finish("done")
    if owner is None:
        record.publish_step(root, job.scope, job.step)
    return run


def path_of(root: Path) -> Path:
    return root / "study" / "06_analysis" / "manifest.json"


# ---------------------------------------------------------------- manifests


def test_a_finished_step_has_a_sealed_manifest(tmp_path):
    finished(tmp_path)
    found = record.read_manifest(tmp_path, "study", "06_analysis")
    assert found and manifest.is_sealed(found) and found["outputs"][0]["path"] == "artefacts/table.csv"


def test_a_flipped_byte_anywhere_in_a_manifest_makes_it_no_result(tmp_path):
    finished(tmp_path)
    whole = path_of(tmp_path).read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1
        path_of(tmp_path).write_bytes(data)
        found, reason = record.find_manifest(tmp_path, "study", "06_analysis")
        same = found is not None and found == json.loads(whole)  # white space between the values
        assert same or (found is None and "manifest.json" in reason), place


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FACTS = {
    "schema_version": 1, "step": "06_analysis", "scope": "study", "key": None, "key_parts": {}, "executor": "papermill",
    "status": "ok", "headline": "", "inputs": [], "outputs": [], "exports": {}, "environment": {}, "device": {},
    "started_at": "2026-06-05", "seconds": 1.0, "parameters": {},
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(value=JSON, key=st.sampled_from(sorted(FACTS)), whole=st.booleans(), seal=st.booleans())
def test_no_json_shape_of_a_manifest_ends_in_a_traceback(tmp_path_factory, value, key, whole, seal):
    root = tmp_path_factory.mktemp("shapes")
    path_of(root).parent.mkdir(parents=True)
    content = value if whole else FACTS | {key: value}
    if seal and isinstance(content, dict):
        content = manifest.sealed(content)
    path_of(root).write_text(json.dumps(content))
    current, reason = is_current(JOB, root)
    assert not current and reason
    record.export_again(root, "study", "06_analysis")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 5000, b"NaN",
        b'{"schema_version": Infinity}',        b'"\\ud800"', b"\x00" * 100, b"null", b"[]", b"1e999",
    ],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_named_as_damaged(tmp_path, content):
    path_of(tmp_path).parent.mkdir(parents=True)
    path_of(tmp_path).write_bytes(content)
    found, reason = record.find_manifest(tmp_path, "study", "06_analysis")
    assert found is None and "manifest.json" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": [{"path": "../../x", "sha256": "0" * 64, "bytes": 1}]},
        {"outputs": [{"path": "/etc/passwd", "sha256": "0" * 64, "bytes": 1}]},
        {"exports": {"../../results.csv": "a"}},
        {"exports": {".lock": "a"}},
        {"exports": {"results.csv": "../../../secret"}},
        {"scope": "c01"},
        {"step": "05_judge"},
    ],
)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path, change):
    path_of(tmp_path).parent.mkdir(parents=True)
    record.write_manifest(path_of(tmp_path), FACTS | change)
    assert record.read_manifest(tmp_path, "study", "06_analysis") is None


def test_a_folder_in_the_place_of_a_manifest_is_no_result(tmp_path):
    path_of(tmp_path).mkdir(parents=True)
    assert record.read_manifest(tmp_path, "study", "06_analysis") is None


# ---------------------------------------------------------------- the executed notebook


def test_a_step_whose_executed_notebook_was_changed_is_not_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(content_key, "content_key", lambda job, root: ("0" * 64, {}))
    finished(tmp_path)
    notebook = tmp_path / "study" / "06_analysis.ipynb"
    notebook.write_text("{}")
    assert is_current(JOB, tmp_path) == (False, "the executed notebook is not the one of its manifest")
    known = record.read_manifest(tmp_path, "study", "06_analysis")
    assert known
    record.write_manifest(path_of(tmp_path), known | {"notebook_sha256": record.sha256(notebook)})
    assert is_current(JOB, tmp_path) == (True, "up to date")
    notebook.write_text("{ }")
    assert not is_current(JOB, tmp_path)[0]


# ---------------------------------------------------------------- exports


def test_a_missing_old_or_changed_export_is_written_again_from_its_step(tmp_path):
    finished(tmp_path)
    export = tmp_path / "results.csv"
    assert record.export_again(tmp_path, "study", "06_analysis") == []
    for content, words in ((None, "was missing"), ("old\n", "was not that of the last analysis")):
        export.unlink() if content is None else export.write_text(content)
        assert record.export_again(tmp_path, "study", "06_analysis") == [f"results.csv {words}"]
        assert export.read_text() == "a,b\n"


def test_a_run_that_died_between_publishing_and_exporting_leaves_nothing_stale(tmp_path, monkeypatch):
    finished(tmp_path, text="old\n")
    with monkeypatch.context() as patch:
        patch.setattr(record, "export_again", lambda *_: [])
        finished(tmp_path, text="new\n")
    assert (tmp_path / "results.csv").read_text() == "old\n"
    assert record.export_again(tmp_path, "study", "06_analysis")
    assert (tmp_path / "results.csv").read_text() == "new\n"


def test_an_output_that_was_changed_itself_is_not_exported(tmp_path):
    finished(tmp_path)
    (tmp_path / "study" / "06_analysis" / "artefacts" / "table.csv").write_text("forged\n")
    (tmp_path / "results.csv").unlink()
    assert record.export_again(tmp_path, "study", "06_analysis") == []


# ---------------------------------------------------------------- work folders and leftovers


def test_a_notebook_run_by_hand_has_a_work_folder_of_its_own(tmp_path):
    of_runner = record.prepare_work_dir(JOB, tmp_path, "1" * 64)
    (of_runner / "checkpoint").write_text("hours of work")
    run = finished(tmp_path, owner=os.getpid())
    assert run.work != of_runner and (of_runner / "checkpoint").is_file()
    found = record.read_manifest(tmp_path, "study", "06_analysis")
    assert found and found["executor"] == "jupyter"


def test_two_processes_that_publish_the_same_step_at_once_both_succeed(tmp_path):
    errors: list[Exception] = []

    def publish(owner: int) -> None:
        try:
            for _ in range(20):
                record.prepare_work_dir(JOB, tmp_path, "0" * 64, owner)
                (record.work_dir(tmp_path, JOB.scope, JOB.step, owner) / "manifest.json").write_text("{}")
                record.publish_step(tmp_path, JOB.scope, JOB.step, owner)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(owner,)) for owner in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    scope = tmp_path / "c01"
    dead = [scope / f".03_train.{gone.pid}.work", scope / f".results.csv.{gone.pid}.tmp"]
    kept = [scope / f".03_train.{os.getpid()}.work", scope / ".03_train.work", scope / f"x.{gone.pid}.tmp"]
    for folder in (dead[0], kept[0], kept[1]):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    dead[1].touch()
    kept[2].touch()
    assert sorted(record.sweep(tmp_path)) == sorted(dead)
    assert not any(path.exists() for path in dead) and all(path.exists() for path in kept)


def test_a_dead_process_that_nobody_collected_is_swept_as_well(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays in the table of processes
    file = tmp_path / f".results.csv.{dead.pid}.tmp"
    file.touch()
    assert record.sweep(tmp_path) == [file]
    dead.wait()


def test_a_replaced_folder_goes_only_when_its_successor_is_there(tmp_path):
    old = tmp_path / "c01" / ".03_train.old"
    old.mkdir(parents=True)
    (old / "metrics.json").touch()
    record.sweep_replaced(tmp_path, "c01", "03_train")
    assert (tmp_path / "c01" / "03_train" / "metrics.json").exists(), "it is the last good result"
    assert not old.exists()
    old.mkdir()
    record.sweep_replaced(tmp_path, "c01", "03_train")
    assert not old.exists()


def test_who_reads_a_step_whose_swap_was_interrupted_finds_it_and_renames_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(content_key, "content_key", lambda job, root: ("0" * 64, {}))
    finished(tmp_path)
    whole = record.read_manifest(tmp_path, "study", "06_analysis")
    current = is_current(JOB, tmp_path)
    final = record.step_dir(tmp_path, "study", "06_analysis")
    os.replace(final, final.with_name(".06_analysis.old"))
    (tmp_path / ".publish.lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert record.read_manifest(tmp_path, "study", "06_analysis") == whole is not None
    assert record.finished(tmp_path, "study", "06_analysis")
    assert is_current(JOB, tmp_path) == current and list(record.altered_outputs(tmp_path, whole)) == []
    seal.require_unchanged(tmp_path, "study/06_analysis/*")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (held,) = final.with_name(".06_analysis.old").glob("artefacts/*.csv")
    whole_bytes = held.read_bytes()
    held.write_bytes(b"forged" + whole_bytes)
    with pytest.raises(record.RecordError, match=held.name):
        seal.require_unchanged(tmp_path, "study/06_analysis/*")
    held.write_bytes(whole_bytes)
    record.sweep_replaced(tmp_path, "study", "06_analysis")
    assert final.is_dir() and not final.with_name(".06_analysis.old").exists() and is_current(JOB, tmp_path) == current


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        record.write_bytes(tmp_path / "results.csv", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data", [b"", b"torn", b"a\n", b"a\nbc\n", b"a\nbc\ntorn line", b"\n", b"a\n\n\nlonger than a chunk"]
)
def test_the_whole_lines_of_a_file_end_at_its_last_line_feed(tmp_path, monkeypatch, data):
    monkeypatch.setattr(record, "CHUNK_BYTES", 3)
    (tmp_path / "lines").write_bytes(data)
    with (tmp_path / "lines").open("rb") as stream:
        assert record.whole_lines_bytes(stream) == data.rfind(b"\n") + 1


@pytest.mark.parametrize("way", DAMAGES)
def test_a_damaged_output_of_a_step_is_an_error_of_the_record_that_names_the_file(tmp_path, way):
    table, facts = tmp_path / "t.parquet", tmp_path / "metrics.json"
    pd.DataFrame({"answer": ["a" * 5000]}).to_parquet(table)
    facts.write_text(json.dumps({"dtype": "float32", "text": "a" * 5000}))
    assert record.read_table(table, ["answer"]).shape == (1, 1) and record.read_object(facts)["dtype"] == "float32"
    for read, path in ((lambda p: record.read_table(p, ["answer"]), table), (record.read_object, facts)):
        damage(path, way)
        with pytest.raises(record.RecordError, match=rf"{path.name} is damaged .*Run \./run_all\.py"):
            read(path)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            read(path)
