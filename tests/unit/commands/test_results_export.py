"""The exported results: others' tools read the logs, the crate describes every file, and nothing is made up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fake_study
import numpy as np
import pandas as pd
import pytest
from fake_study import Builder, flip, write_again
from typer.testing import CliRunner

from telco_nb.__main__ import app
from telco_nb.commands import results
from telco_nb.report import publish
from telco_nb.report.publish import FILES
from telco_nb.study import seal
from telco_nb.study.record import sha256

JUDGE = Path("judge-checklist", "05_judge", "artefacts", "judgements.parquet")
SCORES = {"points", "without_flag", "wins, checklist (offline proxy)"}


def finish(outputs: Path) -> Path:
    """A study whose 06 and report are there; what they say is made up."""
    root = fake_study.build_study(outputs, 3, ("checklist",), 0)
    builder = Builder(outputs, root.name)
    reads = (("03_train", "c01", "metrics.json"),)
    run = builder.open("06_analysis", "study", {"judges": ["checklist"], "seed": 1}, reads)
    run.input("03_train", "metrics.json", "c01")
    builder.close(run, "analysed")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("made up")
    pd.DataFrame({"config": ["c01", "c02", "c03"], "checklist_gate": "passed"}).to_csv(
        root / "results.csv", index=False
    )
    (root / "findings.json").write_text("[]")
    seal.seal_study(root)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finish(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def study(finished, tmp_path, monkeypatch) -> Path:
    """A copy to spoil."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "outputs"))
    return Path(shutil.copytree(finished, tmp_path / "outputs" / "laptop"))


def logs_of(folder: Path) -> dict[str, dict]:
    """The logs by what answered."""
    logs = [json.loads(path.read_text()) for path in sorted((folder / "inspect").iterdir())]
    return {log["eval"]["model"].removeprefix("telco_nb/"): log for log in logs}


def test_the_crate_names_every_file_with_its_size_and_hash(study, tmp_path):
    named = results.export("laptop", tmp_path / "out")
    graph = {entity["@id"]: entity for entity in json.loads((tmp_path / "out" / results.CRATE).read_text())["@graph"]}
    files = {name: entity for name, entity in graph.items() if entity["@type"] == "File"}
    assert files.keys() == set(named) - {results.CRATE, "SHA256SUMS"}
    for name, entity in files.items():
        path = tmp_path / "out" / name
        assert (entity["sha256"], int(entity["contentSize"])) == (sha256(path), path.stat().st_size)
    assert {part["@id"] for part in graph["./"]["hasPart"]} == files.keys()
    loose = [
        (name, value["@id"])
        for name, entity in graph.items()
        for value in entity.values()
        if isinstance(value, dict) and not value["@id"].startswith("https://w3id.org/") and value["@id"] not in graph
    ]
    assert loose == []


def test_a_log_holds_each_question_once_with_answer_gold_answer_and_scores(study, tmp_path):
    results.export("laptop", tmp_path / "out")
    logs = logs_of(tmp_path / "out")
    assert {"c01", "c02", "c03", "untuned", "reference"} <= logs.keys()
    answers = pd.read_parquet(study / "c02/04_energy/artefacts/answers.parquet").set_index("prompt_id")["answer"]
    for sample in logs["c02"]["samples"]:
        assert sample["output"]["completion"] == answers[sample["id"]]
        assert sample["target"] and sample["input"][-1]["role"] == "user"
    assert sorted(sample["id"] for sample in logs["c02"]["samples"]) == sorted(answers.index)
    means = {score["name"]: score["metrics"]["mean"]["value"] for score in logs["c02"]["results"]["scores"]}
    checks = pd.read_parquet(study / "judge-checklist/05_judge/tables/checks.parquet").query("config == 'c02'")
    assert set(means) == SCORES and means["points"] == pytest.approx(checks["coverage"].mean(), abs=0.01)


def test_what_nobody_has_measured_has_no_score(study, tmp_path):
    (study / "judge-checklist/05_judge/tables/checks.parquet").unlink()
    (study / JUDGE).unlink()
    write_again(study, "judge-checklist", "05_judge")
    results.export("laptop", tmp_path / "out")
    log = logs_of(tmp_path / "out")["c01"]
    assert log["results"]["scores"] == [] and all(sample["scores"] == {} for sample in log["samples"])


@pytest.mark.parametrize(
    ("winners", "wins"),
    [(("c01", "c01"), 1.0), (("c02", "c03"), 0.0), (("c01", "tie"), 0.75), (("tie", "tie"), 0.5)],
)
def test_wins_are_those_of_the_verdicts(study, tmp_path, winners, wins):
    pairs = [("c01", "c02"), ("c03", "c01")]
    rows = [("main", *pair, winner, 1, "p000", "x") for pair, winner in zip(pairs, winners, strict=True)]
    names = ["purpose", "config_first", "config_second", "winner", "margin", "prompt_id", "analysis"]
    pd.DataFrame(rows, columns=names).to_parquet(study / JUDGE)
    write_again(study, "judge-checklist", "05_judge")
    results.export("laptop", tmp_path / "out")
    samples = {sample["id"]: sample for sample in logs_of(tmp_path / "out")["c01"]["samples"]}
    assert samples["p000"]["scores"]["wins, checklist (offline proxy)"]["value"] == wins
    assert "wins, checklist (offline proxy)" not in samples["p001"]["scores"]


def test_an_unfinished_study_a_wrong_profile_and_a_used_folder_are_refused_and_nothing_is_left(study, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    for words, message in (
        ((str(used),), "is not empty"),
        ((str(tmp_path / "new"), "--profile", "smoke"), "holds no finished study. Run: ./run_all.py --profile smoke"),
        ((str(tmp_path / "new"), "--profile", "lapttop"), "lapttop"),
    ):
        done = CliRunner().invoke(app, ["results", "export", *words])
        assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "new").exists() and [path.name for path in used.iterdir()] == ["mine.txt"]


@pytest.mark.nightly
def test_inspect_itself_reads_every_log(study, tmp_path):
    """Inspect wants an older fsspec than the study, so it has an environment of its own, made here from PyPI."""
    results.export("laptop", tmp_path / "out")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "inspect_ai==0.3.285"], check=True)
    code = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log
logs = [read_eval_log(info) for info in list_eval_logs(sys.argv[1])]
print(json.dumps({log.eval.model: {s.name: s.metrics["mean"].value for s in log.results.scores} for log in logs}))
"""
    read = subprocess.run(
        [python, "-c", code, tmp_path / "out" / "inspect"], check=True, capture_output=True, text=True
    )
    expected = {log["eval"]["model"]: log["results"]["scores"] for log in logs_of(tmp_path / "out").values()}
    found = json.loads(read.stdout)
    assert (
        found.keys() == expected.keys() and np.isfinite([v for scores in found.values() for v in scores.values()]).all()
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("report/telco_report.html", True), ("report/answers.html", True), ("study/06_analysis/manifest.json", True),
        ("seal.json", True), ("c02/04_energy/artefacts/answers.parquet", False), (str(JUDGE), False),
        ("c01/03_train/metrics.json", True), ("shared/02_synth/artefacts/test_prompts.parquet", False),
    ],
)  # fmt: skip
def test_a_study_of_which_a_byte_was_changed_is_neither_exported_nor_published(
    study, tmp_path, monkeypatch, name, published
):
    flip(study / name)
    monkeypatch.setattr(publish, "REFERENCE", tmp_path / "reference")
    if "06" not in name:  # without its manifest no study is finished
        done = CliRunner().invoke(app, ["results", "export", str(tmp_path / "out")])
        assert done.exit_code == 3, done.output
        assert f"{name} was changed" in done.output and not (tmp_path / "out").exists()
    if published:
        done = CliRunner().invoke(app, ["publish", "--profile", "laptop"])
        assert done.exit_code == 3 and not list(tmp_path.glob("reference/*")), done.output
        assert "holds no finished study" in done.output or f"{name} was changed" in done.output


def test_a_study_of_which_a_step_is_gone_is_not_published_and_its_edited_notebook_is_named(
    study, tmp_path, monkeypatch
):
    monkeypatch.setattr(publish, "REFERENCE", tmp_path / "reference")
    shutil.rmtree(study / "c01" / "03_train")
    flip(study / "c01" / "03_train.ipynb")
    done = CliRunner().invoke(app, ["publish", "--profile", "laptop"])
    assert done.exit_code == 3 and not list(tmp_path.glob("reference/*"))
    assert all(said in done.output for said in ("c01/03_train is missing", "c01/03_train.ipynb was changed"))
