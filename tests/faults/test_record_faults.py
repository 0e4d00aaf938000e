"""Tests of what a run does about a full disk, leftovers, and files that something else has changed."""

import json

from fault_study import FINISH


def test_a_disk_that_is_full_for_the_record_is_named_in_the_summary_and_the_log(study):
    # A limit on the size of files: writing beyond it fails like a full disk, in the process that saves the notebook.
    study.add("01_a", "print(('x' * 99 + '\\n') * 4_000)", FINISH)
    study.add("02_b", FINISH)
    code, output = study.run("bash", "-c", 'ulimit -f 300; exec "$0" "$@"')
    assert code == 1 and study.status("02_b") == "done"
    for text in (study.jobs_summary["01_a"]["reason"], output):
        assert "OSError: [Errno 27] File too large" in text


def test_what_dead_processes_left_is_swept_by_the_next_run(study):
    study.add("01_a", FINISH)
    (study.root / "s" / ".01_a.999999999.work").mkdir(parents=True)
    (study.root / ".results.csv.999999999.tmp").touch()
    assert study.run()[0] == 0
    assert not [path for path in study.root.rglob(".*") if "999999999" in path.name]


def test_the_next_run_tidies_up_after_a_step_that_was_published_and_then_stopped(study):
    study.add("01_a", FINISH)
    assert study.run()[0] == 0
    left = [".01_a.old", "01_a.failed.ipynb", "01_a.failed.log", ".01_a.running.ipynb", ".01_a.running.log"]
    left = [study.root / "s" / name for name in (*left, ".01_a.job.json")]
    left[0].mkdir()
    for path in left[1:]:
        path.touch()
    assert study.run()[0] == 0 and study.status("01_a") == "skipped"
    assert [path for path in left if path.exists()] == []


def test_a_stale_export_is_written_again_and_the_run_says_so_and_seals(study):
    study.add(
        "01_a",
        FINISH.replace(
            'run.finish("done")', 'run.export("results.csv", run.artefact("value.txt"))\nrun.finish("done")'
        ),
    )
    assert study.run()[0] == 0
    export, seal = study.root / "results.csv", json.loads((study.root / "seal.json").read_text())
    assert {"results.csv", "s/01_a.ipynb", "s/01_a/manifest.json", "report/telco_report.html"} <= set(seal["files"])
    export.write_text("an older number")
    code, output = study.run()
    assert code == 0 and study.status("01_a") == "skipped" and export.read_text() == "1"
    assert "results.csv was not that of the last analysis: exported again from s/01_a" in output
    assert "changed  results.csv" in output, "the run also says that something else changed it"
    assert json.loads((study.root / "seal.json").read_text())["files"] == seal["files"]


def test_a_changed_executed_notebook_or_manifest_runs_its_step_again(study):
    study.add("01_a", FINISH)
    assert study.run()[0] == 0
    for name in ("01_a.ipynb", "01_a/manifest.json"):
        path = study.root / "s" / name
        path.write_bytes(path.read_bytes().replace(b"01_a", b"01_b", 1))
        assert study.run()[0] == 0 and study.status("01_a") == "done", name


def test_a_changed_report_is_built_again(study):
    study.add("01_a", FINISH)
    assert study.run()[0] == 0
    report = study.root / "report" / "telco_report.html"
    whole = report.read_text()
    report.write_text("forged")
    assert study.run()[0] == 0 and report.read_text() == whole


def test_an_edited_store_is_refused_before_anything_runs(study):
    study.add("01_a", FINISH)
    store = study.root / "judge-x" / "store" / "verdicts.jsonl"
    store.parent.mkdir(parents=True)
    store.write_text("A\nB\n")
    assert study.run()[0] == 0
    store.write_text("B\nA\n")
    code, output = study.run()
    assert code == 3 and "verdicts.jsonl changed since a run last sealed it" in output
    store.unlink()
    assert study.run()[0] == 0
