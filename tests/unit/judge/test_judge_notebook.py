"""05_judge itself, its cells run on a small study: what it writes, what it refuses to spend, what reaches a page."""

import json
import re
import shutil

import judge_study
import matplotlib
import pandas as pd
import pytest
from fake_study import flip
from judge_study import HOSTILE

from telco_nb.analysis import results
from telco_nb.commands import rerank
from telco_nb.judge import anchors, panel
from telco_nb.judge.cases import Verdict
from telco_nb.judge.store import VerdictStore
from telco_nb.report.files import Page
from telco_nb.report.pages import notebook_body
from telco_nb.study import record, seal

matplotlib.use("Agg")
CONFIGS = ["c01", "c02", "c03"]
SMALL = {"configs": CONFIGS, "bootstrap_draws": 100}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    texts = HOSTILE | {"lone surrogate": "Restart and check the plan"}  # Parquet, and so 04, cannot hold one
    return judge_study.build(tmp_path_factory.mktemp("study"), len(HOSTILE), CONFIGS, texts)


@pytest.fixture
def root(built, tmp_path):
    return shutil.copytree(built, tmp_path / "smoke")


def read(folder, name):
    return pd.read_parquet(folder / "05_judge" / "tables" / f"{name}.parquet")


def test_05_ranks_with_hostile_answers_and_nothing_of_them_runs_on_its_page(root, monkeypatch, tmp_path):
    folder, notebook = judge_study.run_judge(root, monkeypatch, **SMALL, rubric_share=1.0)
    ranked = read(folder, "ranking")
    assert ranked["config"].head(3).tolist() == CONFIGS and ranked["score"].notna().all()
    found = rerank.rerank(VerdictStore(folder / "store" / "verdicts.jsonl"), *rerank.settings(folder))
    pd.testing.assert_frame_equal(found.ranking, ranked.drop(columns="mean_words"), check_dtype=False)
    metrics = json.loads((folder / "05_judge" / "metrics.json").read_text())
    assert (metrics["headline_blocked_by"] or None) == ("; ".join(found.blocks) or None)
    assert metrics["n_ratings"] == 3 * len(HOSTILE)
    raw = json.dumps(notebook)
    assert "<script>document" not in raw and "<img src=x" not in raw  # shown as text: escaped before any page is made
    path = tmp_path / "05_judge.ipynb"
    path.write_text(raw)
    page = str(notebook_body(Page("judge-checklist", "05_judge", False, path), []))
    assert "answer_a" in page and "Gate" in page  # the page is read, with what the judge sees
    assert "<script" not in page and "onerror=" not in re.sub(r"&lt;.*?&gt;", "", page)


class Paid:
    """A judge that costs money and always takes the first seat: it fails its gate."""

    kind, model, is_proxy, is_free, description, store_every = "paid", "m", False, False, "a paid judge", 1
    forms = ("pair", "rubric")
    asked = 0

    def __init__(self, name, model=None, endpoint=None):
        self.name, self.parameters = name, {}

    def prepare(self, cases):
        pass

    def judge(self, case):
        Paid.asked += 1
        return Verdict("A", 1)


@pytest.mark.parametrize("goes_on", [False, True])
def test_after_a_failed_gate_a_paid_judge_is_asked_nothing_more_unless_told_to(root, monkeypatch, goes_on):
    monkeypatch.setattr(Paid, "asked", 0)
    monkeypatch.setattr(Paid, "forms", ("pair",))
    monkeypatch.setitem(panel.OFFLINE_JUDGES, "paid", Paid)
    named = {"scope": "judge-paid", "judge": "paid", "judge_kind": "paid"}
    folder, notebook = judge_study.run_judge(root, monkeypatch, **SMALL, **named, judge_after_failed_gate=goes_on)
    store = VerdictStore(folder / "store" / "verdicts.jsonl")
    purposes = {line["purpose"] for line in store.ok.values()}
    assert Paid.asked > 0 and (purposes == {"control"}) == (not goes_on)
    metrics = json.loads((folder / "05_judge" / "metrics.json").read_text())
    assert metrics["gate_passed"] is False and "failed its validity gate" in metrics["headline_blocked_by"]
    ranked = read(folder, "ranking")
    assert ranked["score"].isna().all() == (not goes_on)  # missing, not 0
    if not goes_on:
        assert metrics["best_config"] is None and metrics["coverage"] == 0
        assert "No ranking" in json.dumps(notebook) and "nan" not in metrics["headline_blocked_by"]
        judge = results.read_judge("paid", lambda name: folder / "05_judge" / name)
        assert judge.scores.empty and len(judge.blocks) == 3


def test_05_by_hand_with_other_configurations_leaves_the_store_of_the_record_as_it_is(root, monkeypatch, tmp_path):
    folder, _ = judge_study.run_judge(root, monkeypatch, **SMALL)
    store = folder / "store" / "verdicts.jsonl"
    seal.seal_study(root)
    before, target = store.read_bytes(), tmp_path / "by-hand" / "smoke"
    judge_study.run_judge(root, monkeypatch, target=target, **SMALL | {"configs": CONFIGS[:2]})
    copy = target / folder.name / "store" / "verdicts.jsonl"
    assert store.read_bytes() == before and copy.read_bytes().startswith(before)
    planned = VerdictStore(copy).planned("pairs")
    assert set(planned["config_first"]) <= {*CONFIGS[:2], *anchors.ANCHORS} and len(copy.read_bytes()) > len(before)
    judge_study.run_judge(root, monkeypatch, target=target, **SMALL)
    assert copy.read_bytes().count(before.splitlines()[0]) == 1, "what the copy holds is not copied twice"
    flip(store)
    with pytest.raises(record.RecordError, match=r"verdicts\.jsonl was changed"):
        judge_study.run_judge(root, monkeypatch, target=target, **SMALL)
