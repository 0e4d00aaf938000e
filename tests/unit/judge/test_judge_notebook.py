"""05_judge itself, its cells run on a small study: what it writes, what it refuses to spend, what reaches a page."""

import json
import re
import shutil

import judge_study
import matplotlib
import pandas as pd
import pytest
from judge_study import CARDS, HOSTILE, command

from telco_nb.analysis import results
from telco_nb.commands import rerank
from telco_nb.judge import asking, checklist, gate, panel, people
from telco_nb.judge.cases import Verdict
from telco_nb.judge.store import VerdictStore, text_sha256
from telco_nb.report.files import Page
from telco_nb.report.pages import notebook_body
from telco_nb.study import params

matplotlib.use("Agg")
CONFIGS = ["c01", "c02", "c03"]
SMALL = {"configs": CONFIGS, "bootstrap_draws": 100}
SEED = params.load_study("smoke").base["seed"]


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
    monkeypatch.setitem(panel.OFFLINE_KINDS, "checklist", Paid)
    folder, notebook = judge_study.run_judge(root, monkeypatch, **SMALL, judge_after_failed_gate=goes_on)
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
        judge = results.read_judge("checklist", lambda name: folder / "05_judge" / name)
        assert judge.scores.empty and len(judge.blocks) == 3


# ---------------------------------------------------------------- people


@pytest.fixture(scope="module")
def lines(built):
    """What a careful person would do, by part: the checklist's own choice on everything that the protocol asks."""
    prompts = pd.read_parquet(built / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    tables = [built / c / "04_energy" / "artefacts" / "answers.parquet" for c in (*CONFIGS, "untuned")]
    given = pd.concat([pd.read_parquet(table) for table in tables])
    answers = {(row.config, row.prompt_id): row.answer for row in given.itertuples()}
    answers |= {("reference", row.prompt_id): row.reference for row in prompts.itertuples()}
    gate_plan, planted = gate.planted_controls(prompts, answers, CARDS, CONFIGS, seed=SEED)
    judge, found = checklist.ChecklistJudge("checklist"), {}
    for part, plan in (("controls", gate_plan), ("pairs", judge_study.pair_plan(prompts, CONFIGS))):
        asked = asking.build_cases(plan, prompts, answers | planted, CARDS)
        pairs = zip(plan.to_dict("records"), asked, strict=True)
        found[part] = [vote(row, case, asking.rule_verdict(case) or judge.judge(case)) for row, case in pairs]
    return found


def vote(row, case, verdict):
    sides = {name: row[name] for name in ("prompt_id", "config_first", "config_second", "repeat")}
    hashes = dict(zip(("sha256_first", "sha256_second"), map(text_sha256, case.answers), strict=True))
    choice = {"A": "first", "B": "second", "tie": "tie"}[verdict.verdict]
    told = {"rater": "ann", "time": "2026-11-22T10:00:00+00:00", "choice": choice} | sides | hashes
    return told | ({"control": row["control"]} if "control" in row else {})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def study(root, monkeypatch):
    """The profile's configurations, for the import command."""
    real = params.load_study
    monkeypatch.setattr(params, "load_study", lambda profile: real(profile, configs=CONFIGS))
    return root


@pytest.fixture
def store(study):
    """Reads the store of the person; call it after an import."""
    return lambda: VerdictStore(study / "judge-human-ann" / "store" / "verdicts.jsonl")


def human(root, monkeypatch):
    named = {"scope": "judge-human-ann", "judge": "human-ann", "judge_kind": "human"}
    return judge_study.run_judge(root, monkeypatch, **SMALL, **named)


def test_votes_become_a_judge_of_the_same_store_and_study(study, lines, store, monkeypatch, tmp_path, capsys):
    path = write(tmp_path / "ann.jsonl", lines["controls"] + lines["pairs"])
    assert command("votes", study, path) == 0
    first = capsys.readouterr().out
    assert command("votes", study, path) == 0
    assert ": 0 new votes" in capsys.readouterr().out and ": 0 new" not in first  # importing again changes nothing
    folder, _ = human(study, monkeypatch)
    assert {(line["judge"], line["source"]) for line in store().ok.values()} == {("human-ann", "human")}
    assert set(store().statuses) == {"ok"}  # nothing was asked of the person again
    ranked = read(folder, "ranking")
    assert ranked["config"].head(3).tolist() == CONFIGS
    assert json.loads((folder / "05_judge" / "metrics.json").read_text())["gate_passed"] is True
    assert command("rerank", folder) == 0 and "human-ann (human)" in capsys.readouterr().out


def test_without_planted_controls_a_persons_gate_is_not_passed_and_says_why(study, lines, store, tmp_path):
    assert command("votes", study, write(tmp_path / "ann.jsonl", lines["pairs"])) == 0
    found = rerank.rerank(store(), draws=50)
    assert found.validity["passed"] is False and "failed its validity gate" in found.blocks[0]
    assert all("no verdict" in c["detail"] and c["value"] is None for c in found.validity["controls"])
    assert found.ranking["score"].notna().all()  # shown, without a headline


def test_what_a_person_skipped_counts_as_not_judged(study, lines, store, tmp_path):
    rows = [row | {"choice": "skip"} for row in lines["pairs"][:20]] + lines["pairs"][20:]
    assert command("votes", study, write(tmp_path / "ann.jsonl", rows)) == 0
    found = rerank.rerank(store(), draws=50)
    assert found.coverage["coverage"].min() < 0.98 and any("coverage below" in block for block in found.blocks)


def test_undone_votes_do_not_count_and_both_bad_is_a_tie_with_a_flag(study, lines, store, tmp_path, capsys):
    first, *rest = lines["pairs"]
    taken_back = [first, first | {"choice": "undo"}, first | {"choice": "both_bad", "note": "a\u2028b </x> \x07"}]
    assert command("votes", study, write(tmp_path / "ann.jsonl", [*taken_back, *rest])) == 0
    (bad,) = [line for line in store().ok.values() if "A:bad" in line["flags"]]
    assert bad["verdict"] == "tie" and bad["prompt_id"] == first["prompt_id"]
    before = store().path.read_bytes()
    changed = [*taken_back[:2], first | {"choice": "second"}, *rest]
    assert command("votes", study, write(tmp_path / "ann.jsonl", changed)) == 2
    assert "differs from the vote imported earlier" in capsys.readouterr().err
    assert store().path.read_bytes() == before  # a stored vote is never changed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"choice": "left"}, ":3: choice: "),
        ({"choice": None}, ":3: choice: "),
        ({"prompt_id": "p-none"}, "prompt_id: 'p-none' is not a test prompt"),
        ({"config_first": "c99"}, "config_first: 'c99' is not in this study"),
        ({"sha256_first": "0" * 64}, "sha256_first: c"),
        ({"sha256_second": "abc"}, ":3: sha256_second: "),
        ({"rater": "bob"}, "rater: one file holds one person's votes"),
        ({"rater": "../x"}, ":3: rater: "),
        ({"repeat": 1}, "repeat: 1, but the question was not shown before"),
        ({"repeat": True}, ":3: repeat: "),
        ({"control": "charm"}, "control: no side is control:charm"),
        ({"winner": "c01"}, ":3: winner: "),
        ({"choice": "undo"}, ":3: choice: nothing to undo"),
        (None, ":3: the line: Invalid JSON"),
    ],
)
def test_one_bad_row_stops_the_import_and_is_named(study, lines, tmp_path, capsys, change, named):
    rows = lines["pairs"][:6]
    text = [json.dumps(row) for row in rows]
    text[2] = "{half a line" if change is None else json.dumps(rows[2] | change)
    path = tmp_path / "ann.jsonl"
    path.write_text("\n".join(text) + "\n")
    assert command("votes", study, path) == 2
    said = capsys.readouterr().err
    assert named in said and "Nothing was imported" in said
    assert not any(path.read_text() for path in study.glob("judge-human-*/store/verdicts.jsonl"))


def test_a_person_without_votes_cannot_be_run_and_the_fix_is_named(study, monkeypatch):
    with pytest.raises(people.VotesError, match=r"python -m telco_nb votes"):
        human(study, monkeypatch)


def test_a_person_needs_the_name_of_a_person():
    for name, model in (("ann", None), ("human-ann", "gpt")):
        with pytest.raises(ValueError, match="human-<rater>"):
            people.HumanJudge(name, model)
    assert checklist.ChecklistJudge("x").is_free and people.HumanJudge("human-x").is_free
    assert set(CARDS) and panel.judge_label(people.HumanJudge("human-x")) == "human-x"
