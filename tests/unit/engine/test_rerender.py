"""`run_all.py report`: builds the report again, runs nothing, and hides no change of the study."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_study
import pandas as pd
import pytest
from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine.rerender import rerender
from telco_nb.report import pdf
from telco_nb.study import record, seal


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A sealed study with a training, a finished 06 that has read it and exports results, and a report."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    builder = fake_study.Builder(tmp_path, "smoke")
    run = builder.open("03_train", "c01")
    run.metric(val_loss=0.5)
    run.table("loss_curve", pd.DataFrame({"step": [1], "train_loss": [2.0]}))
    run.artefact("adapter/adapter_model.safetensors").write_bytes(b"weights")
    builder.close(run, "trained")
    run = builder.open("06_analysis", "study", inputs=(("03_train", "c01", "metrics.json"),))
    run.input("03_train", "metrics.json", "c01")
    run.artefact("results.csv").write_text("config,val_loss\nc01,0.5\n")
    run.export("results.csv", run.artefact("results.csv"))
    builder.close(run, "analysed")
    build_report(builder.root)
    seal.seal_study(builder.root)
    return builder.root


def build_report(root: Path) -> Path:
    """Stands in for report.build, which has tests of its own."""
    page = root / "report" / "telco_report.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"<p>report {len(list(root.rglob('*')))}</p>")
    return page


def report(study: Path, as_pdf: bool = False, build=build_report) -> tuple[int, str]:
    said = io.StringIO()
    return rerender(study.name, None, as_pdf, build, Console(file=said)), said.getvalue()


def test_a_spoiled_report_is_built_again_and_sealed(study):
    page = study / "report" / "telco_report.html"
    page.write_text("spoiled")
    code, said = report(study)
    assert code == 0 and str(page) in said.replace("\n", "") and page.read_text() != "spoiled"
    assert seal.check_seal(study) == []


@pytest.mark.parametrize(
    "name",
    [
        "study/06_analysis.ipynb", "study/06_analysis/metrics.json", "c01/03_train.ipynb", "c01/03_train/metrics.json",
        "c01/03_train/tables/loss_curve.parquet", "c01/03_train/manifest.json", "seal.json",
    ],
)  # fmt: skip
def test_of_a_study_that_something_has_changed_no_report_is_built_and_nothing_is_written(study, name, capsys):
    fake_study.flip(study / name)
    (study / "results.csv").write_text("edited")
    sealed = (study / seal.SEAL_NAME).read_bytes()
    code, _ = report(study, build=lambda root: pytest.fail("built"))
    told = " ".join(capsys.readouterr().err.split())
    assert code == 3 and f"{name} was changed" in told and "./run_all.py --profile smoke" in told
    assert (study / seal.SEAL_NAME).read_bytes() == sealed
    assert (study / "results.csv").read_text() == "edited"


@pytest.mark.parametrize("name", ["study/06_analysis.ipynb", "c01/03_train.ipynb", "c01/03_train"])
def test_a_missing_notebook_or_step_that_06_has_read_is_named_and_no_report_is_built(study, name, capsys):
    shutil.rmtree(study / name) if (study / name).is_dir() else (study / name).unlink()
    code, _ = report(study, build=lambda root: pytest.fail("built"))
    told = " ".join(capsys.readouterr().err.split())
    assert code == 3 and f"{name} is missing" in told and "./run_all.py --profile smoke" in told


def test_a_sealed_step_that_06_has_not_read_is_missed_as_well(study, capsys):
    """As 01 is, whose record the report shows."""
    builder = fake_study.Builder(study.parent, "smoke")
    run = builder.open("01_glossary", "shared")
    run.metric(n_cards=52)
    builder.close(run, "read")
    seal.seal_study(study)
    assert report(study)[0] == 0
    shutil.rmtree(study / "shared" / "01_glossary")
    assert report(study, build=lambda root: pytest.fail("built"))[0] == 3
    assert "shared/01_glossary/" in " ".join(capsys.readouterr().err.split())


def test_a_swap_of_folders_that_a_kill_cut_off_is_completed_before_the_report_is_built(study):
    step = study / "c01" / "03_train"
    step.rename(study / "c01" / ".03_train.old")

    def build(root):
        assert step.is_dir()
        return root / "report.html"

    assert report(study, build=build)[0] == 0 and not (study / "c01" / ".03_train.old").exists()


def test_a_notebook_that_was_edited_after_its_step_was_removed_is_named(study, capsys):
    shutil.rmtree(study / "c01" / "03_train")
    fake_study.flip(study / "c01" / "03_train.ipynb")
    assert report(study, build=lambda root: pytest.fail("built"))[0] == 3
    assert "c01/03_train.ipynb was changed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("edited"), Path.unlink])
def test_an_edited_or_missing_export_is_written_again_and_told(study, spoil):
    results = study / "results.csv"
    whole = results.read_bytes()
    spoil(results)
    code, said = report(study)
    assert code == 0 and re.search(r"results\.csv was .*: exported again", said) and results.read_bytes() == whole
    assert seal.check_seal(study) == []


def test_what_the_report_does_not_read_is_named_and_does_not_refuse_it(study):
    fake_study.flip(study / "c01/03_train/artefacts/adapter/adapter_model.safetensors")
    code, said = report(study)
    assert code == 0 and "adapter_model.safetensors" in said and "not sealed again" in said


def test_a_run_that_was_killed_before_it_sealed_its_new_notebook_does_not_refuse_the_report(study):
    notebook, manifest = study / "study" / "06_analysis.ipynb", study / "study" / "06_analysis" / "manifest.json"
    notebook.write_text(notebook.read_text() + " ")
    values = json.loads(manifest.read_text()) | {"notebook_sha256": record.sha256(notebook)}
    record.write_manifest(manifest, values)
    assert report(study)[0] == 0


def test_a_changed_file_that_no_step_wrote_is_named_and_not_sealed(study):
    kept = study / "votes" / "key.jsonl"
    kept.parent.mkdir()
    kept.write_text("{}\n")
    seal.seal_study(study)
    kept.write_text("{} \n")
    code, said = report(study)
    assert code == 0 and "votes/key.jsonl" in said and "not sealed again" in said
    assert ("changed", "votes/key.jsonl") in {(c.kind, c.path) for c in seal.check_seal(study)}


def test_a_study_that_no_run_sealed_gets_no_seal(study):
    (study / seal.SEAL_NAME).unlink()
    assert report(study)[0] == 0 and not (study / seal.SEAL_NAME).exists()


def test_an_unfinished_study_is_refused_with_the_command_that_finishes_it(study, capsys):
    (study / "study" / "06_analysis" / "manifest.json").unlink()
    assert report(study)[0] == 3
    assert "./run_all.py --profile smoke" in capsys.readouterr().err


def test_a_report_that_cannot_be_built_exits_1_with_the_reason(study, capsys):
    def broken(root: Path) -> Path:
        raise KeyError("val_loss")

    assert report(study, build=broken)[0] == 1
    assert "KeyError: 'val_loss'" in capsys.readouterr().err


def test_without_chromium_a_pdf_is_refused_by_name_and_nothing_is_touched(study, monkeypatch, capsys):
    monkeypatch.setenv("CHROMIUM", "/no/such/chromium")
    before = (study / "report" / "telco_report.html").read_text()
    assert report(study, as_pdf=True, build=lambda root: pytest.fail("built"))[0] == 3
    assert "/no/such/chromium" in capsys.readouterr().err
    assert (study / "report" / "telco_report.html").read_text() == before


def test_a_chromium_that_prints_nothing_is_named_with_what_it_said(tmp_path):
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 7\n")
    broken.chmod(0o755)
    with pytest.raises(pdf.PrintError, match=r"printed nothing \(exit code 7\): no display"):
        pdf.print_pdf(tmp_path / "page.html", str(broken))


def test_the_command_has_help_with_an_example_and_refuses_wrong_names():
    command = [sys.executable, ROOT / "run_all.py", "report"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "./run_all.py report --profile smoke --pdf" in told and "Exit codes" in told
    done = subprocess.run([*command, "--profile", "../x"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--profile '../x'" in done.stderr
