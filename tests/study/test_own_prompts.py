"""Questions of one's own go through the whole chain: asked, answered, judged, analysed, shown."""

import json
import os
import shutil
import sys

import pandas as pd
import pytest
from told import run_told

from telco_nb import ROOT
from telco_nb.study import params

pytestmark = [pytest.mark.study, pytest.mark.nightly]  # a study of its own, two minutes

# As Excel writes it in many countries: semicolons and a BOM. The second has no term and no reference.
OWN_CSV = """\ufeffprompt;reference;term;problem
My phone was stolen an hour ago and I am afraid somebody is calling on my account. What now?;\
Block the SIM first, in your account or by a call to us. Then report the theft to the police.;imei;stolen_or_lost
do you have shops in Lyon;;;
Why is my bill twice as high as last month?;;bill;
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(params.PARAMS_DIR, folder / "params")
    (folder / "own.csv").write_text(OWN_CSV, encoding="utf-8")
    profile = folder / "params" / "profiles" / "smoke.yaml"
    profile.write_text(f"{profile.read_text()}prompts_path: {folder / 'own.csv'}\n")
    command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke", "--configs", "c07,c10"]
    command += ["--outputs", str(folder / "outputs"), "--params", str(folder / "params")]
    done = run_told(command, dict(os.environ), logs=folder / "outputs")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "outputs" / "smoke"


def test_every_configuration_answers_each_question_of_ones_own(root):
    prompts = pd.read_parquet(root / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    own = prompts[prompts["test_set"] == "own"]
    assert [list(m)[-1]["content"] for m in own["messages"]] == [
        line.split(";")[0] for line in OWN_CSV.removeprefix("\ufeff").splitlines()[1:]
    ]
    for scope in ("untuned", "c07", "c10"):
        answers = pd.read_parquet(next((root / scope / "04_energy").rglob("answers.parquet")))
        assert set(own["prompt_id"]) <= set(answers["prompt_id"])
        assert answers.set_index("prompt_id").loc[own["prompt_id"], "answer"].notna().all()


def test_the_judge_compares_the_answers_that_have_a_reference_and_the_page_shows_all(root):
    lines = (root / "judge-checklist" / "store" / "verdicts.jsonl").read_text().splitlines()
    pairs = [line for line in map(json.loads, lines) if line.get("purpose") == "ranking"]
    prompts = pd.read_parquet(root / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    own = prompts[prompts["test_set"] == "own"].set_index("prompt_id")["reference"]
    with_reference = set(own[own != ""].index)
    assert {line["prompt_id"] for line in pairs} & set(own.index) == with_reference and len(with_reference) == 1
    assert all(line["status"] == "ok" for line in pairs)
    assert "for want of a term or a reference: 2." in (root / "judge-checklist" / "05_judge.ipynb").read_text()
    page = (root / "report" / "answers.html").read_text()
    assert "do you have shops in Lyon" in page and "twice as high as last month" in page
