"""`run_all.py clean` removes what nothing needs any more, and never what a record names or what was paid for."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fake_study
import pytest
from rich.console import Console

from telco_nb.engine import archive, clean, schedule
from telco_nb.engine.archive import Failure
from telco_nb.engine.schedule import Options
from telco_nb.study import params, record, seal
from telco_nb.study.plan import Job

JOBS = [Job("03_train", scope, {}, ()) for scope in ("c01", "c02", "c03")]
DEAD = 2**22 - 1  # no process has this id


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """c01 has finished, c02 has failed and would go on from its checkpoint, c03 never ran; the seal holds."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(schedule, "load_study", lambda options: SimpleNamespace(profile="smoke"))
    monkeypatch.setattr(clean, "plan_jobs", lambda study: JOBS)
    monkeypatch.setattr(schedule, "is_current", lambda job, root: (job.scope == "c01", "x"))
    builder = fake_study.Builder(tmp_path, "smoke")
    run = builder.open("03_train", "c01")
    run.artefact("weights").write_bytes(b"x" * 500)
    builder.close(run, "trained")
    (builder.root / "c02").mkdir()
    archive.keep_failed(builder.root, "c02", "03_train", Failure("error", "ValueError: no", 7))
    for path in kept(builder.root) | junk(builder.root):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    seal.seal_study(builder.root)
    return builder.root


def kept(root: Path) -> set[Path]:
    """What the study goes on with, or what was paid for."""
    unfinished = root / "c02" / ".03_train.work" / ".checkpoints" / "step-3"
    return {unfinished, root / "judge-x" / "store" / "verdicts.jsonl", root / "egress.jsonl"}


def junk(root: Path) -> set[Path]:
    return {
        root / "c01" / "03_train" / ".checkpoints" / "step-9",
        root / "c01" / ".03_train.work" / "half",
        root / "c02" / "03_train.failed.ipynb",
        root / "c02" / ".03_train.running.log",
        root / f".results.csv.{DEAD}.tmp",
        root.parent / params.BY_HAND / "smoke" / "c01" / "03_train" / "manifest.json",
    }


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


def run(everything: bool = False, dry_run: bool = False) -> tuple[int, str]:
    said = io.StringIO()
    code = clean.clean(Options(profile="smoke", dry_run=dry_run), everything, Console(file=said, width=200))
    return code, said.getvalue()


def test_a_dry_run_names_all_with_bytes_and_removes_nothing(study):
    (study / "c01" / "03_train" / ".checkpoints" / "step-9").write_bytes(b"x" * 1234)
    before = tree(study.parent)
    code, said = run(dry_run=True)
    assert code == 0 and tree(study.parent) == before
    for word in ("1,234  smoke/c01/03_train/.checkpoints\n", "smoke/c02/03_train.failed.ipynb", "by-hand/smoke"):
        assert word in said
    assert "step-3" not in said and "verdicts" not in said


def test_only_what_nothing_needs_goes_and_the_seal_holds_afterwards(study):
    before = tree(study.parent)
    assert run()[0] == 0
    gone = before - tree(study.parent)
    assert gone == junk(study)
    assert list(seal.check_seal(study)) == [] and record.read_manifest(study, "c01", "03_train")
    assert "nothing to remove" in run()[1]


def test_a_seal_that_does_not_hold_is_not_renewed(study):
    (study / "c01" / "03_train.ipynb").write_text("changed")
    assert "not sealed again" in run()[1]
    assert "c01/03_train.ipynb" in {difference.path for difference in seal.check_seal(study)}


def test_with_all_only_what_was_paid_for_stays_and_the_need_is_told(study):
    code, said = run(everything=True)
    assert code == 0 and "all 3 steps again" in said
    left = {path.relative_to(study).as_posix() for path in tree(study)}
    assert left == {"judge-x/store/verdicts.jsonl", "egress.jsonl"}


def test_a_notebook_that_is_open_by_hand_keeps_its_files(study):
    shutil.rmtree(study.parent / params.BY_HAND)
    (study.parent / params.BY_HAND / "smoke" / "c01" / f".03_train.{os.getpid()}.work").mkdir(parents=True)
    before = tree(study.parent)
    code = run()[0]
    assert code == 3 and tree(study.parent) == before


def test_a_link_goes_and_what_it_leads_to_stays(study, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model").touch()
    shutil.rmtree(study / "c01" / "03_train" / ".checkpoints")
    (study / "c01" / "03_train" / ".checkpoints").symlink_to(tmp_path / "elsewhere")
    assert run()[0] == 0
    assert (tmp_path / "elsewhere" / "model").is_file() and not (study / "c01/03_train/.checkpoints").is_symlink()
