"""The real chain, end to end: the smoke study on the real model, through the real runner, without a network."""

import base64
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import by_hand
import pandas as pd
import pytest
import torch
from lab import choose_another, jupyter_lab, run_all, vote_in_the_panel
from provider_server import Server
from told import run_told

from telco_nb import ROOT
from telco_nb.commands.votes import import_votes
from telco_nb.judge.store import VerdictStore
from telco_nb.study import params
from telco_nb.study.plan import STEPS
from telco_nb.study.seal import check_seal

pytestmark = pytest.mark.study
CANARY = "sk-CaNaRy-7f3Kq9Zw2LxT8vRb5NmJ4hGd"


class Study:
    def __init__(self, folder: Path):
        self.outputs, self.params = folder / "outputs", folder / "params"
        self.root, self.environment = self.outputs / "smoke", dict(os.environ)
        shutil.copytree(params.PARAMS_DIR, self.params)

    def run(self, *options: str, prefix: tuple[str, ...] = ()) -> dict:
        summary = self.outputs.parent / "summary.json"
        command = [*prefix, sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke", "--json", str(summary)]
        command += ["--outputs", str(self.outputs), "--params", str(self.params), *options]
        done = run_told(command, self.environment, logs=self.outputs)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(summary.read_text())

    def statuses(self, summary: dict) -> dict[str, str]:
        return {f"{job['scope']}/{job['step']}": job["status"] for job in summary["jobs"]}


def no_network() -> tuple[str, ...]:
    """Command prefix for an empty network namespace (not even loopback is up); empty where that is not allowed."""
    prefix = ("unshare", "--map-root-user", "--net")
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else ()
    except FileNotFoundError:
        return ()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    made = Study(tmp_path_factory.mktemp("study"))
    made.first = made.run(prefix=no_network())
    return made


def rows(study: Study) -> list[dict[str, str]]:
    with (study.root / "results.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_step_ran_and_left_its_record_and_manifest(study):
    assert set(study.statuses(study.first).values()) == {"done"} and len(study.first["jobs"]) == 11
    for job in study.first["jobs"]:
        folder = study.root / job["scope"]
        assert (folder / f"{job['step']}.ipynb").is_file()
        assert json.loads((folder / job["step"] / "manifest.json").read_text())["status"] == "ok"


@pytest.mark.skipif(not no_network(), reason="needs the right to make a network namespace; attempts fail all the same")
def test_it_ran_without_even_loopback(study):
    assert set(study.statuses(study.first).values()) == {"done"}


def test_every_configuration_beats_the_untuned_models_validation_loss(study):
    assert [row["config"] for row in rows(study)] == ["c01", "c07", "c10"]
    for row in rows(study):
        metrics = json.loads((study.root / row["config"] / "03_train" / "metrics.json").read_text())
        assert float(row["val_loss"]) < metrics["val_loss_before"]


def test_one_configuration_encodes_and_computes_the_untuned_loss_for_all_of_them(study):
    folders = [study.root / row["config"] / "03_train" for row in rows(study)]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    for name in ("train_encoded_made_by", "val_encoded_made_by", "val_before_made_by"):
        makers = {found[name] for found in metrics}
        assert len(makers) == 1 and makers < {"c01/03_train", "c07/03_train", "c10/03_train"}
    tables = [pd.read_parquet(folder / "tables" / "val_losses.parquet") for folder in folders]
    assert all(table["loss_sum_before"].equals(tables[0]["loss_sum_before"]) for table in tables)


@pytest.mark.parametrize("step", ["03_train", "04_energy"])
def test_the_metered_window_and_the_overhead_by_phase_are_the_notebook_s_seconds(study, step):
    for row in rows(study):
        folder = study.root / row["config"] / step
        metrics, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "manifest"))
        window = {"03_train": "train_seconds", "04_energy": "answer_seconds"}[step]
        phases = [v for n, v in metrics.items() if re.fullmatch("overhead_[a-z]+_seconds", n)]
        assert len(phases) >= 3 and sum(phases) == pytest.approx(metrics["overhead_seconds"])
        told = metrics["overhead_seconds"] + metrics[window] * metrics.get("answer_passes", 1)
        # What is before the first phase and after the last takes a tenth of a second on a quiet machine.
        assert told == pytest.approx(manifest["seconds"], abs=1.5)


def test_estimated_energy_is_an_interval_and_says_so(study):
    for row in rows(study):
        low, mid, high = (float(row[f"train_energy{end}_wh"]) for end in ("_low", "", "_high"))
        assert 0 < low <= mid <= high
        assert row["energy_kind"] in ("measured", "estimated")


def test_the_adapters_are_safetensors_and_no_pickle_is_handed_over(study):
    suffixes = {p.suffix for p in study.root.rglob("*") if p.is_file()}
    assert ".safetensors" in suffixes
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl", ".pickle"}


def test_the_conversations_load_with_the_datasets_library(study, tmp_path):
    from datasets import Dataset

    folder = study.root / "shared" / "02_synth" / "artefacts"
    train = Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(tmp_path))
    assert len(train) == 12 and {len(row["messages"]) for row in train} == {2}  # max_exchanges is 1
    assert set(train[0]["messages"][0]) == {"role", "content"}


def test_training_has_the_problem_of_every_question_of_test_and_the_checklist_reads_that(study):
    checks = pd.read_parquet(study.root / "judge-checklist" / "05_judge" / "tables" / "checks.parquet")
    taught = checks.groupby("test_set")["taught"].agg(["all", "any"]).T.to_dict("list")
    assert taught == {"test": [True, True], "noisy": [True, True], "unseen": [False, False]}
    findings = {f["id"]: f for f in json.loads((study.root / "findings.json").read_text())}
    assert findings["taught"]["verdict"] == "not estimable"  # two unseen questions are too few
    assert "terms only" in findings["taught"]["statement"]


def test_every_figure_that_a_notebook_saves_is_shown_in_it(study):
    for path in study.root.glob("*/*/figures/*.png"):
        notebook = json.loads(path.parents[2].joinpath(f"{path.parents[1].name}.ipynb").read_text())
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        shown = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        assert path.read_bytes() in [base64.b64decode(image) for image in shown], path


def test_no_file_of_a_study_tells_a_path_of_this_machine_or_its_name(study):
    places = {f"{Path.home()}/", str(study.outputs), str(ROOT), sys.prefix, tempfile.gettempdir() + "/"}
    host = socket.gethostname()
    names = {host} if len(host) > 6 else set()  # a shorter one stands in other words, and by chance in packed files
    files = [path for path in study.root.rglob("*") if path.is_file()]
    told = {path.relative_to(study.root).as_posix(): word for path in files for word in places | names
            if word.encode() in path.read_bytes()}  # fmt: skip
    assert len(files) > 100 and told == {}


def test_the_records_hold_no_noise(study):
    for notebook in study.root.glob("*/*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            streams = [o for o in cell.get("outputs", []) if o["output_type"] == "stream"]
            assert sum(len(o["text"]) for o in streams) < 3000, notebook


def test_the_judge_passed_its_gate_and_the_report_is_there(study):
    validity = json.loads((study.root / "judge-checklist" / "05_judge" / "artefacts" / "validity.json").read_text())
    assert len(validity["controls"]) >= 19 and validity["passed"] is True
    assert (study.root / "report" / "telco_report.html").stat().st_size < 5_000_000
    assert (study.root / "report" / "index.html").is_file()


def test_a_second_run_skips_everything(study):
    again = study.run()
    assert set(study.statuses(again).values()) == {"skipped"}


def test_a_changed_parameter_runs_again_exactly_what_depends_on_it(study):
    changed = study.params / "lora" / "c01.yaml"
    changed.write_text(changed.read_text().replace("learning_rate: 2.0e-3", "learning_rate: 1.0e-3"))
    summary = study.run()
    ran = {job for job, status in study.statuses(summary).items() if status == "done"}
    assert ran == {
        "c01/03_train",
        "c01/04_energy",
        "judge-checklist/05_judge",
        "study/06_analysis",
    }
    reasons = {f"{job['scope']}/{job['step']}": job["reason"] for job in summary["jobs"]}
    assert "learning_rate 0.002 -> 0.001" in reasons["c01/03_train"]


SLOW_BY_HAND = ("03_train", "04_energy")  # a minute or two each


@pytest.mark.parametrize("step", [pytest.param(s, marks=[pytest.mark.nightly] * (s in SLOW_BY_HAND)) for s in STEPS])
def test_every_notebook_runs_by_hand_with_its_default_values(study, step, tmp_path_factory):
    """As "Run All" does in JupyterLab: no job, no injected parameters. The record stays as the batch made it."""
    place = study.outputs.parent / "by-hand"
    if not place.exists():
        shutil.copytree(study.outputs, place)
    target = tmp_path_factory.mktemp("hand") / f"{step}.ipynb"
    command = [sys.executable, by_hand.__file__, f"{step}.ipynb", str(target)]
    environment = {**os.environ, "TELCO_NB_OUTPUTS": str(place), "JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_OFFLINE": "1"}
    done = run_told(command, environment, params.NOTEBOOKS_DIR)
    assert done.returncode == 0, done.stderr[-3000:]
    scope = params.declared(step)["scope"]
    manifest = json.loads((place / "by-hand" / "smoke" / scope / step / "manifest.json").read_text())
    assert manifest["executor"] == "jupyter" and manifest["status"] == "ok"
    assert "Opened the finished study smoke" in target.read_text()
    assert check_seal(place / "smoke") == []


@pytest.mark.nightly  # tests/unit/lora/test_data_parallel.py takes the same steps with two processes in every run
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU cannot serve two processes")
def test_a_configuration_that_two_processes_train_learns_what_one_does(study, tmp_path):
    both = Study(tmp_path)
    shutil.copytree(study.outputs, both.outputs)
    profile = both.params / "profiles" / "smoke.yaml"
    profile.write_text(f"{profile.read_text()}processes: 2\n")
    summary = both.run("--configs", "c07", "--steps", "03", "--explain")
    assert both.statuses(summary) == {"c07/03_train": "done"}
    one, two = (json.loads((s.root / "c07" / "03_train" / "metrics.json").read_text()) for s in (study, both))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["optimizer_steps"] == two["optimizer_steps"] and one["train_tokens"] == two["train_tokens"]
    assert one["val_loss_before"] == two["val_loss_before"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-2) and two["val_loss"] < one["val_loss_before"]
    assert two["train_energy_wh"] > 0
    assert not [p for p in both.root.rglob(".process-*.log")]


def test_a_hosted_judge_that_fails_its_gate_is_asked_nothing_more_and_gives_no_headline(study):
    """A server in place of the model (`test_served` has a real one): it takes the first seat, and tells the key."""
    said = json.dumps({"analysis": f"Your key is {CANARY}.", "verdict": "A", "margin": 1, "flags": []})
    study.environment["OPENAI_COMPATIBLE_API_KEY"] = CANARY
    with Server("openai-compatible", lambda body, number: said) as server:
        profile, judge = study.params / "profiles" / "smoke.yaml", study.params / "judges" / "own-server.yaml"
        profile.write_text(f"{profile.read_text()}judges: [checklist, own-server]\n")
        judge.write_text(judge.read_text().replace("http://127.0.0.1:8000/v1", server.url))
        summary = study.run()  # exit code 0: a failed gate is a result
        ran = {job for job, status in study.statuses(summary).items() if status == "done"}
        assert ran == {"judge-own-server/05_judge", "study/06_analysis"}
        folder = study.root / "judge-own-server"
        lines = [json.loads(line) for line in (folder / "store" / "verdicts.jsonl").read_text().splitlines()]
        assert {line["purpose"] for line in lines if "plan" not in line} == {"control"}
        assert len(server.requests) == sum("plan" not in line for line in lines)
        assert all(f"Bearer {CANARY}" in request["headers"].values() for request in server.requests)
    calls = [json.loads(line) for line in (study.root / "egress.jsonl").read_text().splitlines()]
    assert len(calls) == len(server.requests) and {call["status"] for call in calls} == {200}
    assert {(call["purpose"], call["reach"]) for call in calls} == {("judge", "machine")}
    assert {call["host"] for call in calls} == {server.url.split("/")[2]}
    metrics = json.loads((folder / "05_judge" / "metrics.json").read_text())
    assert not metrics["gate_passed"] and "failed its validity gate" in metrics["headline_blocked_by"]
    assert {(row["own-server_gate"], row["own-server_rank"]) for row in rows(study)} == {("failed", "")}
    findings = json.loads((study.root / "findings.json").read_text())
    assert not [f for f in findings if "own-server" in f["id"] and f["verdict"] == "supported"]
    page = (study.root / "report" / "telco_report.html").read_text()
    assert "own-server failed the validity gate: it ranks nothing" in page


def test_no_file_of_a_study_holds_a_piece_of_the_key_with_which_its_judge_was_asked(study):
    pieces = [CANARY[i : i + 8].lower() for i in range(len(CANARY) - 7)]
    files = [path for path in study.outputs.parent.rglob("*") if path.is_file()]
    assert {"verdicts.jsonl", "05_judge.ipynb", "egress.jsonl", "telco_report.html", "answers.html"} <= {
        path.name for path in files
    }
    any_piece = re.compile("|".join(map(re.escape, pieces)))
    held = [path for path in files if any_piece.search(text_of(path))]
    assert held == [] and "[key]" in (study.root / "judge-own-server" / "store" / "verdicts.jsonl").read_text()


def text_of(path: Path) -> str:
    """The content of a file in lower case; tables are compressed, so they are read."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_csv().lower()
    return path.read_bytes().decode("latin-1").lower()


@pytest.mark.parametrize(
    "step", [step if step == "06_analysis" else pytest.param(step, marks=pytest.mark.nightly) for step in STEPS]
)
def test_run_all_in_jupyterlab_needs_no_edit_and_its_panels_answer(study, step, browser, tmp_path):
    place = tmp_path / "outputs"
    shutil.copytree(study.outputs, place)
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    with jupyter_lab(tmp_path, place) as address:
        notebook = run_all(page, address, step)
        assert notebook.get_by_text("Opened the finished study smoke").count() == 1
        if step != "03_train":  # it has no panel
            choose_another(notebook)
        page.screenshot(path=tmp_path / f"{step}.png")
        assert check_seal(place / "smoke") == []
        if step == "05_judge":
            votes = vote_in_the_panel(page, notebook, tmp_path)
            import_votes(place / "smoke", votes, params_dir=study.params)
            stored = VerdictStore(place / "smoke" / "judge-human-ann" / "store" / "verdicts.jsonl").ok.values()
            cast = [json.loads(line)["vote"] for line in votes.read_text().splitlines()]
            by_vote = sum(line["source"] == "votes" for line in stored)
            assert by_vote == sum(vote != "skip" for vote in cast) > 10
