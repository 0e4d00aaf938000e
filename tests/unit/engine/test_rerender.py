"""`run_all.py report`: builds the report again, runs nothing, and hides no change of the study."""

import io
import subprocess
import sys
from pathlib import Path

import fake_study
import pytest
from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine.rerender import rerender
from telco_nb.report import pdf
from telco_nb.study import seal


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


def test_a_change_of_the_study_itself_is_named_and_not_sealed(study):
    manifest = study / "study" / "06_analysis.ipynb"
    manifest.write_text(manifest.read_text() + " ")
    code, said = report(study)
    assert code == 0 and "study/06_analysis.ipynb" in said and "not sealed again" in said
    assert ("changed", "study/06_analysis.ipynb") in {(c.kind, c.path) for c in seal.check_seal(study)}


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
