"""`run_all.py report`: builds the report again, runs nothing, and hides no change of the study."""

import io
import json
import subprocess
import sys
from pathlib import Path

import fake_study
import pytest
from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine.rerender import rerender
from telco_nb.report import pdf
from telco_nb.study import record, seal


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A sealed study with a finished 06 and a report."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    builder = fake_study.Builder(tmp_path, "smoke")
    builder.close(builder.open("06_analysis", "study"), "analysed")
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


@pytest.mark.parametrize("name", ["study/06_analysis.ipynb", "study/06_analysis/metrics.json"])
def test_of_a_study_that_something_has_changed_no_report_is_built(study, name, capsys):
    changed = study / name
    changed.write_text(changed.read_text() + " ")
    sealed = (study / seal.SEAL_NAME).read_bytes()
    code, _ = report(study, build=lambda root: pytest.fail("built"))
    told = " ".join(capsys.readouterr().err.split())
    assert code == 3 and f"{name} was changed" in told and "./run_all.py --profile smoke" in told
    assert (study / seal.SEAL_NAME).read_bytes() == sealed


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
