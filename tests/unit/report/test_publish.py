"""The published run is small, consistent, and what the README says."""

import csv
import json
import lzma
import re

import fake_study
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import fitness
from telco_nb.analysis.statements import WORDS
from telco_nb.commands.rerank import rerank
from telco_nb.judge.store import VerdictStore
from telco_nb.report import publish

published = pytest.mark.skipif(not (publish.REFERENCE / "results.csv").is_file(), reason="nothing is published yet")


@published
def test_the_readme_says_what_the_published_run_found():
    assert publish.rewrite_readme() == publish.README.read_text(encoding="utf-8")


@published
def test_the_published_run_is_small_and_tells_no_machine_paths():
    files = [p for p in publish.REFERENCE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 15_000_000
    for path in files:
        if path.suffix != ".png":
            data = path.read_bytes()
            text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
            assert "/home/" not in text and "/tmp/" not in text and "/root/" not in text, path


def test_what_was_published_before_there_were_folders_names_none(tmp_path):
    assert publish._beside(tmp_path) == []
    (tmp_path / "verdicts").mkdir()
    assert publish._beside(tmp_path) == ["Beside it: [verdicts](outputs/reference/verdicts)."]


@published
@pytest.mark.skipif(not (publish.REFERENCE / "verdicts").is_dir(), reason="this run was published without verdicts")
def test_the_published_verdicts_give_the_published_rankings(tmp_path):
    stores = sorted((publish.REFERENCE / "verdicts").glob("*.jsonl.xz"))
    assert stores
    for packed in stores:
        judge = packed.name.removesuffix(".jsonl.xz")
        path = tmp_path / f"judge-{judge}" / "store" / "verdicts.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        again = rerank(VerdictStore(path), draws=20)
        shown = pd.read_csv(publish.REFERENCE / "tables" / f"ranking_{judge}.csv", index_col="config")
        found = again.ranking.set_index("config")["score"].reindex(shown.index)
        np.testing.assert_allclose(found, shown["score"], atol=1e-6)
        assert not again.blocks, judge


@published
def test_every_published_configuration_has_a_loss_with_its_interval_and_a_kind_of_energy():
    with (publish.REFERENCE / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 16
    assert all(row["energy_kind"] in ("measured", "estimated") for row in rows)
    assert all(float(row["val_loss_low"]) < float(row["val_loss"]) < float(row["val_loss_high"]) for row in rows)
    findings = json.loads((publish.REFERENCE / "findings.json").read_text())
    assert {"deploy", "loss_choice", "energy_ratio", "noise_floor"} <= {f["id"] for f in findings}


@published
def test_the_readme_explains_its_words_before_it_uses_them():
    words, statements = publish.readme_block().split("\n- ", 1)
    for word, (pattern, meaning) in WORDS.items():
        if re.search(rf"\b(?:{pattern})", statements):
            assert f"*{word}*: {meaning}." in words, word


@published
def test_no_statement_of_the_readme_stands_twice_and_the_decision_is_short():
    block = publish.readme_block()
    said = [line for line in block.splitlines() if line.startswith("- ")]
    assert len(said) == len(set(said)) and block.count("of a full answer's points") == 1
    findings = {f["id"]: f for f in json.loads((publish.REFERENCE / "findings.json").read_text())}
    assert len(findings["deploy"]["statement"].split()) <= 50 and "front_runner" in findings


@published
def test_what_the_readme_says_in_the_open_is_short_and_answers_what_a_newcomer_asks():
    block = publish.readme_block()
    shown = re.sub(r"<details>.*?</details>", "", block, flags=re.DOTALL)
    assert block.count("<details>") == 3 and len(shown.split()) < 500
    assert all(word in shown for word in ("No configuration is fit", "Loss alone would choose", "Effects on", "kWh"))


def test_plans_and_verdicts_of_a_judges_earlier_rules_are_not_published():
    def plan(*ids: str) -> bytes:
        return json.dumps({"plan": "pairs", "questions": {"judgement_id": ids}}).encode()

    def verdict(id: str, rules: str) -> bytes:
        return json.dumps({"judgement_id": id, "parameters": {"rules_sha256": rules}}).encode()

    a, b, reader = verdict("1", "aa"), verdict("2", "bb"), b'{"judgement_id": "3"}'
    once = b"\n".join([plan("1"), a, reader, plan("2"), b]) + b"\n"
    assert publish.verdicts_in_force(once).splitlines() == [reader, plan("2"), b]
    again = once + plan("1") + b"\n"  # back to the first rules, whose verdicts are found in the store
    assert publish.verdicts_in_force(again).splitlines() == [a, reader, plan("1")]
    hosted = b"\n".join([plan("1"), b'{"judgement_id": "1"}', plan("2"), b'{"judgement_id": "2"}'])
    assert publish.verdicts_in_force(hosted) == hosted and publish.verdicts_in_force(b"") == b""


def test_missing_markers_are_an_error(tmp_path):
    (tmp_path / "README.md").write_text("# nothing")
    with pytest.raises(ValueError, match="markers"):
        publish.rewrite_readme(tmp_path / "README.md")


def test_of_the_effects_of_factors_the_readme_tells_those_on_scores_that_are_shown():
    def effect(response: str, verdict: str) -> dict:
        found = {"id": f"effect.{response}.epochs.1->4", "value": 0.5, "low": 0.1, "high": 0.9}
        return found | {"statement": f"{response} {verdict}", "verdict": verdict, "blocked_by": []}

    found = [effect(r, v) for r in ("val_loss", "checklistscore") for v in ("supported", "not distinguishable")]
    blocked = {"id": "tau.x", "statement": "tau", "verdict": "blocked", "blocked_by": ["its gate failed"]}
    assert publish._shown_statements([*found, blocked], (*publish.IN_THE_OPEN, *publish.FOLDED)) == [
        "Effects on the score of checklist (log-odds): epochs 1 to 4 +0.50 [+0.10, +0.90]."
    ]


def test_effects_on_one_judges_score_stand_beside_how_many_of_them_the_other_judges_find():
    def effect(judge: str, verdict: str, value: float | None, factor: str = "epochs.1->4") -> dict:
        said = {"statement": f"Effect of {factor}", "verdict": verdict, "blocked_by": []}
        return said | {"id": f"effect.{judge}score.{factor}", "value": value, "low": -0.1, "high": 2.0}

    mine = [
        effect("checklist", "supported", -0.2),
        effect("checklist", "supported", 0.5, "target_modules.qv->all"),
        effect("checklist", "supported", 0.7, "target_modules.qv->mlp"),
    ]
    theirs = [effect("panel", "not distinguishable", 1.4), effect("panel", "not distinguishable", 9.0, "epochs.1->9")]
    theirs += [effect("panel", "not distinguishable", 0.1, "target_modules.qv->all"), effect("third", "blocked", 0.4)]
    (told,) = publish._shown_statements([*mine, *theirs], ["effect."])
    assert told == (
        "Effects on the score of checklist (log-odds): target modules qv to mlp +0.70 [-0.10, +2.00], to all +0.50 "
        "[-0.10, +2.00]; epochs 1 to 4 -0.20 [-0.10, +2.00]. With panel none of 2 effects is shown; 1 of the same sign."
    )


def test_the_heading_names_the_machine_that_trained_where_it_is_another(tmp_path):
    about = {"date": "2026-11-27", "profile": "card", "seconds": 2340, "device": {"cpu": "Xeon", "cores": 2}}
    rows, here = [{"energy_kind": "measured", "checklist_gate": "passed"}], "2 cores (Xeon)"
    trained = {"cpu": "Xeon", "cores": 16, "gpus": [{"name": "NVIDIA H100 80GB HBM3"}] * 8}
    for scope, used, device in (("c01", "cuda", trained), ("c02", "cpu", about["device"] | {"gpus": trained["gpus"]})):
        folder = tmp_path / used / scope / "03_train"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"device": device}))
        (folder / "metrics.json").write_text(json.dumps({"device": used}))
    on = {used: publish._trained_on(tmp_path / used) for used in ("cuda", "cpu")}
    said = publish._heading(about | {"trained_on": on["cuda"]}, rows, ["checklist"])
    assert f"trained on NVIDIA H100 80GB HBM3, analysed on {here}, 39 min" in said and "**measured**" in said
    assert on["cpu"] == [here], "a card beside the processor that trained is not named"
    assert "trained on" not in publish._heading(about | {"trained_on": on["cpu"]}, rows, ["checklist"])


def test_beside_the_table_stand_the_scores_of_what_needs_no_training(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "ranking_panel.csv").write_text(
        "config,score\nc01,-0.5\nc02,0.25\nuntuned,-2.1\ntemplate,-1\necho,\nc02-seed1,0.91\n"
    )
    rows = [{"config": "c01", "panel_rank": "2"}, {"config": "c02", "panel_rank": "1"}]
    assert publish._floor_lines(tmp_path, rows, ["panel", "checklist"]) == [
        "Scores with panel (log-odds; 0 is the mean of all runs): the highest configuration, c02, +0.58, "
        "the untuned model -2.10, one sentence for everything -1.00.<br>"
    ]
    (unplaced,) = publish._floor_lines(tmp_path, [{"config": "c01", "panel_rank": ""}], ["panel"])
    assert "highest" not in unplaced and "the untuned model -2.10" in unplaced, "a judge that failed its gate"


EFFECT = {"verdict": "supported", "low": 3.92, "high": 4.04}


def test_where_no_factor_moves_a_score_the_readme_says_so_and_what_moves_the_energy():
    score = {"id": "effect.panelscore.rank.8->64", "verdict": "not distinguishable", "value": 0.4}
    energy = [
        EFFECT | {"id": "effect.trainingenergy(estimated).epochs.1->4", "value": 3.98},
        EFFECT | {"id": "effect.trainingenergy(estimated).target_modules.qv->all", "value": 1.41},
    ]
    assert publish._no_effect([score, *energy]) == [
        "Effect of factors on scores: none shown. Training energy (estimated), epochs 1 to 4: 3.98 times [3.92, 4.04]."
    ]
    assert publish._no_effect([score]) == ["Effect of factors on scores: none shown."]
    assert publish._no_effect([]) == [], "without a design nothing is said of effects"


def test_the_places_of_one_configuration_are_one_sentence_and_of_two_they_are_two():
    said = ["The lowest, c11, ranks 12 of 16 with a [6, 16].", "The lowest, c11, ranks 7 of 16 with b [1, 9]."]
    assert publish._places(said) == ["The lowest, c11, ranks 12 of 16 with a [6, 16] and 7 of 16 with b [1, 9]."]
    other = "The lowest, c02, ranks 1 of 16 with b [1, 2]."
    assert publish._places([said[0], other]) == [said[0], other] and publish._places([]) == []


def test_a_study_whose_last_analysis_failed_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "read_manifest", lambda *scope: {"started_at": "2026-01-01"})
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "06_analysis.failed.ipynb").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"the last run of study/06_analysis failed\. Run: "):
        publish.publish_study(tmp_path, tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_what_needs_no_training_is_one_sentence_with_how_many_configurations_it_beats():
    ranked = pd.Series({"c01": 0.6, "c02": 0.1, "c03": -0.2})
    judges = [fake_study.make_judge(ranked), fake_study.make_judge(ranked, name="panel", kind="language_model_panel")]
    best_texts = [pd.Series({"nearest": -0.1}), pd.Series({"template": 0.2})]
    said = [fitness._none_above_text(judge, best, "c01", 3) for judge, best in zip(judges, best_texts, strict=True)]
    assert publish._untrained_texts(said) == [
        "With checklist and with panel the best configuration scores higher than every text without training; "
        "with checklist a look-up scores higher than 1 of 3; with panel one sentence for everything scores higher than "
        "2 of 3."
    ]
    alone = [fitness._none_above_text(judges[0], pd.Series({"template": -0.5}), "c01", 3)]
    assert publish._untrained_texts(alone) == alone
    above = "With panel, without any training, one sentence for everything (+0.90) scores higher than c01."
    assert publish._untrained_texts([said[0], above]) == [said[0], above]
