"""The seal of a study: one flipped byte anywhere is noticed, and the file is named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_study import Builder, flip

from telco_nb import ROOT
from telco_nb.engine import sealing
from telco_nb.study import record, seal

FILES = (
    "shared/01_glossary.ipynb", "shared/01_glossary/manifest.json", "shared/01_glossary/log.txt",
    "shared/01_glossary/tables/terms.csv", "c01/03_train.ipynb", "c01/03_train.failed.ipynb",
    "c01/03_train/artefacts/adapter/adapter_model.safetensors", "judge-checklist/store/verdicts.jsonl",
    "judge-checklist/store/batches.jsonl", "shared/store/conversations.jsonl", "results.csv", "findings.json",
    "report/index.html", "report/telco_report.html", "study/06_analysis.ipynb", "egress.jsonl",
)  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A small finished study, sealed, with working files that are not shown."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    root = tmp_path / "smoke"
    for name in (*FILES, ".lock", "c01/.03_train.running.log", "report/.key"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'{{"file": "{name}"}}\n' * 3)
    seal.seal_study(root)
    return root


def told(root: Path) -> dict[str, str]:
    return {difference.path: difference.kind for difference in seal.check_seal(root)}


def verify(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "run_all.py", "verify", "--profile", "smoke", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_untouched_study_is_as_it_was_sealed(study):
    assert told(study) == {}
    done = verify()
    assert (done.returncode, "every file is as" in done.stdout) == (0, True)


@pytest.mark.parametrize("name", [*FILES, "seal.json"])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_one_flipped_byte_in_any_file_of_a_study_is_noticed(study, name, place):
    data = bytearray((study / name).read_bytes())
    data[place] ^= 1
    (study / name).write_bytes(data)
    assert told(study) == {name: "changed"}


def test_white_space_in_the_seal_counts_too(study):
    (study / "seal.json").write_bytes((study / "seal.json").read_bytes().replace(b"\n", b" ", 1))
    assert told(study) == {"seal.json": "changed"}


def test_verify_names_changed_missing_and_new_files_and_exits_1(study):
    (study / "results.csv").write_text("forged\n")
    (study / "report" / "index.html").unlink()
    (study / "c01" / "notes.txt").write_text("new\n")
    done = verify()
    assert done.returncode == 1
    for words in (
        "changed  results.csv",
        "missing  report/index.html",
        "new      c01/notes.txt",
        "1 new, 1 missing, 1 changed",
    ):
        assert words in done.stdout


def test_verify_without_a_seal_exits_3_and_a_misspelt_profile_2(study):
    (study / "seal.json").unlink()
    done = verify()
    assert (done.returncode, "has no seal.json" in done.stderr) == (3, True)
    done = verify("--profile", "smok")
    assert (done.returncode, "smok.yaml: no such file" in done.stderr) == (2, True)
    assert verify("--profile", "../smoke").returncode == 2


def test_verify_reads_the_outputs_folder_that_its_option_names(study, tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "nowhere"))
    assert verify().returncode == 3
    assert verify("--outputs", str(tmp_path)).returncode == 0


def test_a_seal_that_was_made_anew_is_noticed_by_the_hash_that_somebody_kept(study):
    kept = seal.seal_hash(study)
    assert verify("--seal", kept).returncode == verify("--seal", kept[:16]).returncode == 0
    assert f"Its seal is {kept[:16]}." in verify().stdout
    (study / "results.csv").write_text("forged\n")
    seal.seal_study(study)
    assert verify().returncode == 0, "the forger has sealed it as well"
    done = verify("--seal", kept[:16])
    assert (done.returncode, "changed  seal.json" in done.stdout) == (1, True)


@pytest.mark.parametrize("known", ["", "abc", "x" * 16, "a" * 65])
def test_a_hash_too_short_to_prove_anything_is_refused(study, known):
    done = verify("--seal", known)
    assert (done.returncode, "give the 16 characters" in done.stderr) == (2, True)


def test_two_verdicts_that_change_places_are_noticed(study):
    store = study / "judge-checklist/store/verdicts.jsonl"
    store.write_text('{"verdict": "A"}\n{"verdict": "B"}\n')
    seal.seal_study(study)
    store.write_text('{"verdict": "B"}\n{"verdict": "A"}\n')
    assert told(study) == {"judge-checklist/store/verdicts.jsonl": "changed"}
    with pytest.raises(record.RecordError, match=r"verdicts\.jsonl changed since .*Restore it from a copy, or delete"):
        sealing.changes_since(study)


@pytest.mark.parametrize("name", ["judge-checklist/store/verdicts.jsonl", "egress.jsonl"])
def test_what_has_only_grown_is_told_apart_and_a_torn_last_line_is_not_sealed(study, name):
    store = study / name
    whole = store.read_bytes()
    store.write_bytes(whole + b'{"torn": ')
    assert told(study) == {}
    store.write_bytes(whole + b'{"more": 1}\n')
    assert told(study) == {name: "grown"}
    assert [change.kind for change in sealing.changes_since(study)] == ["grown"]
    store.write_bytes(whole[:-20])
    assert told(study) == {name: "changed"}


def test_an_unchanged_study_keeps_its_seal_and_a_changed_one_gets_another(study):
    first = json.loads((study / "seal.json").read_text())
    assert seal.seal_study(study) == first["seal"] == seal.seal_hash(study)
    (study / "results.csv").write_text("another run\n")
    assert seal.seal_study(study) == seal.seal_hash(study) != first["seal"]
    assert told(study) == {}


@pytest.mark.parametrize("content", ["", "[]", "null", '{"files": 3}', '{"files": {"a": 1}, "seal": "x"}', "[" * 9999])
def test_a_damaged_seal_is_a_difference_and_no_traceback(study, content):
    (study / "seal.json").write_text(content)
    assert told(study) == {"seal.json": "changed"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(study):
    (study / "results.csv").chmod(0)
    assert told(study) == {"results.csv": "changed"}


def test_a_run_names_what_was_changed_beside_it_but_not_what_manifests_name(study):
    (study / "shared/01_glossary/tables/terms.csv").write_text("changed\n")
    (study / "shared/01_glossary/log.txt").write_text("changed\n")
    (study / "c01" / "notes.txt").write_text("new\n")
    assert [str(change) for change in sealing.changes_since(study)] == ["changed  shared/01_glossary/log.txt"]


# ---------------------------------------------------------------- who reads a study

READ = ("judge-checklist/store/*", "report/*", "study/06_analysis/*", "shared/store/*", "votes/*")


@pytest.fixture
def written(tmp_path) -> Path:
    """A sealed study whose 06 has a manifest and exports a file, with a store, a key of votes and a report."""
    builder = Builder(tmp_path)
    run = builder.open("06_analysis", "study")
    run.artefact("results.csv").write_text("config\nc01\n")
    run.export("results.csv", run.artefact("results.csv"))
    builder.close(run, "analysed")
    for name in ("judge-checklist/store/verdicts.jsonl", "shared/store/batches.jsonl", "votes/a.jsonl"):
        (builder.root / name).parent.mkdir(parents=True)
        (builder.root / name).write_text('{"verdict": "A"}\n{"verdict": "B"}\n')
    (builder.root / "report").mkdir()
    (builder.root / "report" / "answers.html").write_text("<p>answers</p>")
    seal.seal_study(builder.root)
    return builder.root


@pytest.mark.parametrize(
    "name",
    [
        "judge-checklist/store/verdicts.jsonl", "shared/store/batches.jsonl", "votes/a.jsonl", "report/answers.html",
        "study/06_analysis/artefacts/results.csv", "study/06_analysis/manifest.json", "results.csv", "seal.json",
    ],
)  # fmt: skip
def test_who_reads_a_changed_file_is_refused_with_its_name_and_who_reads_others_is_not(written, name):
    seal.require_unchanged(written, *READ, needs_seal=True)
    flip(written / name)
    fix = r"Restore this from a copy\. .* and for seal\.json, run \./run_all\.py"
    with pytest.raises(record.RecordError, match=rf"{name} was .*{fix}"):
        seal.require_unchanged(written, *READ)
    if name != "seal.json":
        seal.require_unchanged(written, "judge-other/store/*", "c01/03_train/*")


@pytest.mark.parametrize("name", ["report/answers.html", "study/06_analysis/artefacts/results.csv", "results.csv"])
def test_who_reads_a_missing_file_is_refused_with_its_name(written, name):
    (written / name).unlink()
    with pytest.raises(record.RecordError, match=rf"{name} (is|was) missing"):
        seal.require_unchanged(written, *READ)


def lost_folder(study: Path) -> None:
    shutil.rmtree(study / "study/06_analysis")


def run_by_hand(study: Path) -> None:
    manifest = study / "study/06_analysis/manifest.json"
    record.write_manifest(manifest, json.loads(manifest.read_text()) | {"notebook_sha256": None})


@pytest.mark.parametrize("leave", [lost_folder, run_by_hand])
def test_an_executed_notebook_that_no_manifest_knows_is_compared_with_the_seal(written, leave):
    leave(written)
    seal.require_unchanged(written, "*/0*.ipynb", needs_seal=True)
    flip(written / "study/06_analysis.ipynb")
    with pytest.raises(record.RecordError, match=r"study/06_analysis\.ipynb was changed"):
        seal.require_unchanged(written, "*/06_analysis.ipynb")
    (written / "study/06_analysis.ipynb").unlink()
    with pytest.raises(record.RecordError, match=r"study/06_analysis\.ipynb is missing"):
        seal.require_unchanged(written, "*/0*.ipynb", needs_seal=True)


def killed_before_the_swap(study: Path) -> Path:
    """A run was killed between the new notebook and the swap of folders; returns the manifest in the work folder."""
    work = record.work_dir(study, "study", "06_analysis")
    shutil.copytree(study / "study/06_analysis", work)
    notebook = study / "study/06_analysis.ipynb"
    notebook.write_text(notebook.read_text() + " ")
    manifest = work / "manifest.json"
    known = {"notebook_sha256": record.sha256(notebook)}
    record.write_manifest(manifest, json.loads(manifest.read_text()) | known)
    return manifest


@pytest.mark.parametrize("leave", [lambda study: None, run_by_hand, lost_folder])
def test_a_run_that_was_killed_between_its_notebook_and_the_swap_of_folders_has_changed_nothing(written, leave):
    killed_before_the_swap(written)
    leave(written)
    seal.require_unchanged(written, "*/0*.ipynb", needs_seal=True)
    flip(written / "study/06_analysis.ipynb")
    with pytest.raises(record.RecordError, match=r"study/06_analysis\.ipynb was changed"):
        seal.require_unchanged(written, "*/0*.ipynb")


def test_a_damaged_manifest_in_a_work_folder_vouches_for_no_notebook(written):
    flip(killed_before_the_swap(written), place=30)
    with pytest.raises(record.RecordError, match=r"study/06_analysis\.ipynb was changed"):
        seal.require_unchanged(written, "*/0*.ipynb")


def test_a_step_without_its_manifest_proves_nothing(written):
    (written / "study/06_analysis/manifest.json").unlink()
    with pytest.raises(record.RecordError, match=r"study/06_analysis/manifest\.json was changed or is missing"):
        seal.require_unchanged(written, *READ)
    seal.require_unchanged(written, "judge-checklist/store/*")


def test_a_run_drops_a_seal_that_cannot_be_read_once_it_was_named(written):
    flip(written / "seal.json")
    assert list(map(str, sealing.changes_since(written))) == ["changed  seal.json"]
    seal.forget_deleted_stores(written)
    seal.require_unchanged(written, *READ)
    assert not (written / "seal.json").exists()


def test_the_log_of_calls_is_not_forgotten_and_a_changed_key_of_votes_ends_a_run(study):
    (study / "egress.jsonl").unlink()
    seal.forget_deleted_stores(study)
    assert told(study) == {"egress.jsonl": "missing"}
    (study / "votes").mkdir()
    (study / "votes" / "a.jsonl").write_text("{}\n{}\n")
    seal.seal_study(study)
    flip(study / "votes" / "a.jsonl")
    with pytest.raises(record.RecordError, match=r"votes/a\.jsonl changed .* never change"):
        sealing.changes_since(study)


def test_a_study_that_has_grown_since_it_was_sealed_is_read(written):
    """By imports of votes and batches, by new exports of pairs, and by a run that was killed before it could seal."""
    with (written / "judge-checklist/store/verdicts.jsonl").open("a") as stream:
        stream.write('{"verdict": "A"}\n{"torn": ')
    for name in ("judge-human-ann/store/verdicts.jsonl", "votes/b.jsonl"):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text("{}\n")
    builder = Builder(written.parent)
    run = builder.open("06_analysis", "study")
    run.artefact("results.csv").write_text("config\nc02\n")
    run.export("results.csv", run.artefact("results.csv"))
    builder.close(run, "analysed again")
    record.export_again(written, "study", "06_analysis")
    seal.require_unchanged(written, *READ, "judge-human-ann/store/*", needs_seal=True)


def test_without_a_seal_only_what_nothing_else_can_prove_is_refused(written):
    (written / "seal.json").unlink()
    seal.require_unchanged(written, *READ)
    with pytest.raises(seal.NoSeal, match="A run writes it at its end"):
        seal.require_unchanged(written, *READ, needs_seal=True)


def test_a_store_that_was_deleted_can_be_filled_again_whatever_ends_the_run(written):
    store = written / "judge-checklist/store/verdicts.jsonl"
    store.unlink()
    assert str(sealing.changes_since(written)[0]).startswith("missing")
    seal.forget_deleted_stores(written)
    store.write_text('{"verdict": "asked again"}\n')
    seal.require_unchanged(written, *READ)
    assert sealing.changes_since(written) == []
    flip(written / "votes/a.jsonl")
    assert told(written) == {"judge-checklist/store/verdicts.jsonl": "new", "votes/a.jsonl": "changed"}
