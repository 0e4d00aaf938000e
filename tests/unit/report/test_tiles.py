"""Every sentence of the report's first screen is true of the data that it is computed from."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import findings
from telco_nb.analysis.claims import primary_finding
from telco_nb.analysis.statements import words_of
from telco_nb.report import build, config_cards, publish
from telco_nb.report import tiles as first_screen
from telco_nb.report.files import StudyFiles, read_published

SCORE = pd.Series({"c01": 0.0, "c02": 0.1, "c03": 0.2, "c04": 2.0, "c05": -0.1, "c06": -0.3})


BLOCKED = {"deploy": {"verdict": "blocked", "value": None, "blocked_by": ["so"]}, "front_runner": {"value": None}}


def files(study=None, changes=None, **columns) -> StudyFiles:
    """The first screen's files of a study in memory; `changes` replace fields of findings by id."""
    study = study or make_study(6, [make_judge(SCORE, 0.1)])
    rows = [dataclasses.asdict(f) for f in [primary_finding(study), *findings.all_findings(study)]]
    rows = [row | (changes or {}).get(row["id"], {}) for row in rows]
    rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    results = study.results.assign(**columns)
    for judge in study.judges:
        for part in ("score", "low", "high", "rank", "rank_low", "rank_high"):
            results[f"{judge.name}_{part}"] = judge.ranking[part].reindex(results.index)
        results[f"{judge.name}_gate"] = "passed" if judge.gate_passed else "failed"
    return StudyFiles(Path("laptop"), [], {}, {}, results, rows, {})


def tiles(study: StudyFiles) -> dict[str, first_screen.Tile]:
    return {tile.title: tile for tile in first_screen.first_tiles(study)}


def text(tile: first_screen.Tile) -> str:
    return " ".join([tile.title, tile.big, tile.tag or "", *tile.lines, *(cell for row in tile.rows for cell in row)])


@pytest.mark.parametrize(
    ("verdict", "title", "big", "tag"),
    [
        ("cannot tell", "Deploy", "No clear best; best guess is c04", "cannot tell"),
        ("not fit", "Deploy", "none: not shown to be fit for customers", None),
        ("supported", "Deploy", "c04", None),
    ],
)
def test_the_first_tile_says_how_far_the_choice_is_shown(verdict, title, big, tag):
    study = files(changes={"deploy": {"verdict": verdict}})
    tile = tiles(study)[title]
    assert (tile.big, tile.tag, tile.good) == (big, tag, verdict == "supported")
    (card,) = [card for card in config_cards.config_cards(study) if card["config"] == "c04"]
    assert (card["tone"] == "good") == (verdict == "supported")
    assert config_cards.roles(study)["c04"][0] == {"cannot tell": "best guess", "not fit": "front-runner, not fit"}.get(
        verdict, "deploy"
    )


def test_the_tile_of_a_study_without_a_choice_is_not_marked_as_good():
    tile = tiles(files(changes=BLOCKED))["Deploy"]
    assert tile.big == "none of them" and not tile.good


@pytest.mark.parametrize(
    ("verdict", "word"),
    [("supported", "yes"), ("refuted", "no"), ("cannot tell", "cannot tell"), ("blocked", "no answer")],
)
def test_the_primary_claim_is_a_tile_of_its_own(verdict, word):
    study = files(changes={"primary": {"verdict": verdict, "statement": "Primary claim: so.", "value": 0.0}})
    tile = tiles(study)["Can loss pick it?"]
    assert tile.big == word
    assert list(tile.lines) == [
        "Primary claim: so.",
        "A lead of 0.00 means: the best of the others wins 50% of the decided comparisons with it.",
    ]


def test_a_relation_that_is_not_shown_is_not_told():
    tile = tiles(files())["Does a lower loss go with better answers?"]
    assert tile.big == "not shown" and "A lower loss goes with" not in " ".join(tile.lines)
    assert "With 6 configurations no relation" in tile.lines[0]


def test_a_tau_that_cannot_be_told_gives_its_own_reason():
    study = make_study(6, [make_judge(SCORE * 0, 0.1)])
    tile = tiles(files(study))["Does a lower loss go with better answers?"]
    assert "all 6 scores are equal" in text(tile) and "too few" not in text(tile)


def test_with_one_judge_nothing_is_said_of_judges():
    shown = tiles(files())
    assert not any("judges" in text(tile).lower() for title, tile in shown.items() if "paper" not in title)


def test_a_rank_is_out_of_those_that_the_judge_has_ranked():
    study = make_study(6, [make_judge(SCORE.drop("c06"), 0.1)])
    assert "of 5 (checklist)" in text(tiles(files(study))["Loss alone would have chosen"])


def test_energies_of_two_kinds_are_not_set_into_a_ratio():
    mixed = files(energy_kind=["estimated"] * 3 + ["measured"] + ["estimated"] * 2)  # the choice is c04
    pick = mixed.finding("loss_choice")["value"]
    assert mixed.results.loc[pick, "energy_kind"] != mixed.results.loc["c04", "energy_kind"]
    assert "times what loss's choice" not in text(tiles(mixed)["What it costs"])
    assert "times what loss's choice" in text(tiles(files())["What it costs"])


def test_an_energy_is_called_estimated_or_measured_as_it_is():
    assert tiles(files())["What it costs"].tag == "estimated"
    measured = tiles(files(energy_kind="measured"))["What it costs"]
    assert measured.tag is None and "It is measured." in measured.lines
    assert tiles(files(energy_kind=None))["What it costs"].tag == "of unknown kind"


def test_a_blocked_energy_ratio_is_marked_beside_the_paper():
    study = dataclasses.replace(make_study(6, [make_judge(SCORE, 0.1)]), invalid_energy=("c02",))
    assert "no claim" in tiles(files(study))["Beside the paper (other model, data and judges)"].rows[2][2]


def test_the_published_run_stands_beside_a_run_of_ones_own(tmp_path):
    """`make study` learns from little: what the run with all conversations found is beside it, in the same words."""
    title, mine = "Does a lower loss go with better answers?", files()
    mine.results.to_csv(tmp_path / "results.csv", index_label="config")
    (tmp_path / "findings.json").write_text(json.dumps(mine.findings))
    (tmp_path / "about.json").write_text(json.dumps({"profile": "card"}))
    published = read_published("laptop", tmp_path)
    alone, beside = ({t.title: t for t in first_screen.first_tiles(mine, other)}[title] for other in (None, published))
    assert [*beside.lines][:-1] == [*alone.lines]
    lowest, highest, energy = (row[2] for row in tiles(mine)["Beside the paper (other model, data and judges)"].rows)
    assert beside.lines[-1] == f"Published run (card): lowest loss {lowest}, highest {highest}; energy {energy}."
    assert read_published("card", tmp_path) is None, "a study does not stand beside its own predecessor"


@pytest.mark.parametrize("missing", ["results.csv", "findings.json", "about.json"])
def test_half_a_published_run_is_none(tmp_path, missing):
    (tmp_path / "results.csv").write_text("config,val_loss\nc01,1.0\n")
    (tmp_path / "findings.json").write_text("[]")
    (tmp_path / "about.json").write_text('{"profile": "card"}')
    assert read_published("laptop", tmp_path) is not None
    (tmp_path / missing).write_text("{")
    assert read_published("laptop", tmp_path) is None
    (tmp_path / missing).unlink()
    assert read_published("laptop", tmp_path) is None


def test_a_shared_lowest_loss_is_not_called_a_missing_one():
    study = make_study(6, [make_judge(SCORE, 0.1)], val_loss=[0.5, 0.5, 0.6, 0.6, 0.7, 0.7])
    shown = tiles(files(study))
    assert "share the lowest loss" in text(shown["Loss alone would have chosen"])
    assert "share the lowest loss" in text(shown["Is the front-runner better than loss's?"])
    assert "no valid judge" not in text(shown["Is the front-runner better than loss's?"]).lower()


def test_a_choice_of_loss_that_answers_better_is_not_explained_by_its_cost():
    study = files(changes={"confidence": {"verdict": "refuted", "value": 0.1, "statement": "x", "blocked_by": []}})
    assert tiles(study)["Is the front-runner better than loss's?"].big == "no, 10%"


def test_no_tile_prints_a_number_that_is_missing():
    gone = {"value": None, "low": None, "high": None}
    whole = files(train_energy_low_wh=math.nan, train_energy_high_wh=math.nan)
    ids = [row["id"] for row in whole.findings if row["id"] not in ("deploy", "front_runner", "loss_choice")]
    for id, change in [(id, change) for id in ids for change in (gone, gone | {"value": 0.5})]:
        changed = [row | (change if row["id"] == id else {}) for row in whole.findings]
        for tile in tiles(dataclasses.replace(whole, findings=changed)).values():
            assert not re.search(r"\b(nan|inf|None)\b", text(tile)), (id, tile)


# ---------------------------------------------------------------- what no judge has to say

BELOW = {"low": None, "high": None, "n": 1, "blocked_by": []}
COVERAGE = BELOW | {"id": "fitness.coverage", "value": 0.01, "verdict": "not fit"}
COVERAGE["statement"] = "c04 makes 1% of a full answer's points; good answers make 90%."
SERVING = BELOW | {"id": "serving", "statement": "A million answers of c01 take 20 kWh.", "value": 20.0}


def with_findings(study: StudyFiles, *more: dict) -> StudyFiles:
    return dataclasses.replace(study, findings=[*study.findings, *(BELOW | {"verdict": "described"} | f for f in more)])


def test_a_study_without_a_fit_configuration_says_none_and_by_how_much_the_best_fails():
    tile = tiles(with_findings(files(changes={"deploy": {"verdict": "not fit"}}), COVERAGE))["Deploy"]
    assert tile.big == "none: not fit for customers" and not tile.good
    assert tile.lines[0] == COVERAGE["statement"]
    assert tile.lines[1].startswith("Front-runner for a next try: c04 (LoRA on") and len(tile.lines) == 2


@pytest.mark.parametrize("above", [0, 2])
def test_where_none_is_fit_the_first_tile_names_texts_without_training_that_a_judge_ranks_above_all(above):
    ranked = {"id": "floor.ranked.panel", "statement": "With panel one sentence scores higher.", "value": above}
    tile = tiles(with_findings(files(changes={"deploy": {"verdict": "not fit"}}), COVERAGE, ranked))["Deploy"]
    assert tile.lines[1:-1] == [ranked["statement"]] * bool(above)


def test_what_fails_without_any_judge_stands_before_what_blocks_a_ranking():
    why = "only 6 terms were judged; a ranking needs 8"
    change = {"verdict": "not fit", "value": None, "blocked_by": [why]}
    changes = {"deploy": change, "front_runner": {"value": None}}
    tile = tiles(with_findings(files(changes=changes), COVERAGE))["Deploy"]
    assert tile.big == "none: not fit for customers"
    assert list(tile.lines) == [COVERAGE["statement"], "Only 6 terms were judged; a ranking needs 8."]


@pytest.mark.parametrize("changes", [{}, BLOCKED])
def test_what_it_costs_is_told_with_and_without_a_choice(changes):
    shown = text(tiles(with_findings(files(changes=changes), SERVING))["What it costs"])
    assert (
        re.search(r"Training, each of the 6: [\d.]+ to [\d.]+ Wh, estimated\.", shown) and SERVING["statement"] in shown
    )


def test_what_the_study_cannot_say_comes_from_its_own_files(tmp_path):
    known = text(tiles(files())["What this cannot say"])
    assert "The answers were judged by offline rules (checklist), not people." in known
    assert (
        "Energy is estimated" in known
        and "6 of 6 configurations were trained once" in known
        and "questions" not in known
    )
    folder = tmp_path / "shared" / "02_synth" / "artefacts"
    folder.mkdir(parents=True)
    asked = pd.DataFrame({"term_id": ["a", "a", "b", ""], "reference": ["x", "x", "x", "x"]})
    asked.to_parquet(folder / "test_prompts.parquet")
    metrics = {("c01", "03_train"): {"base_model": "tiny"}}
    more = dataclasses.replace(files(energy_kind="measured"), root=tmp_path, metrics=metrics)
    told = text(tiles(more)["What this cannot say"])
    assert "3 questions on 2 terms" in told and "Only tiny was trained" in told and "Energy" not in told


def test_who_judged_is_told_by_sort_and_people_are_not_denied():
    kinds = {"panel": "language_model_panel", "human-ann": "human"}
    study = make_study(6, [make_judge(SCORE, 0.1, name=name) for name in ("checklist", *kinds)])
    metrics = {(f"judge-{name}", "05_judge"): {"judge_kind": kind} for name, kind in kinds.items()}
    told = text(tiles(dataclasses.replace(files(study), metrics=metrics))["What this cannot say"])
    assert "by offline rules (checklist) and language models (panel) beside people (human-ann)." in told


# ---------------------------------------------------------------- the factor that moves scores most

EFFECT = BELOW | {"low": 1.0, "high": 2.0, "verdict": "supported", "statement": "x"}
SCORE_EFFECTS = [
    EFFECT | {"id": "effect.checklistscore.learning_rate.0.0005->0.002", "value": 1.1},
    EFFECT | {"id": "effect.checklistscore.epochs.1->4", "value": 1.6},
    EFFECT | {"id": "effect.checklistscore.rank.8->64", "value": 9.0, "verdict": "not distinguishable"},
]


def loss_tile(effects: list[dict], verdict: str) -> str:
    on_loss = EFFECT | {"id": "effect.val_loss.epochs.1->4", "value": -0.02, "verdict": verdict}
    study = files()
    others = [f for f in study.findings if not f["id"].startswith("effect.")]
    study = dataclasses.replace(study, findings=[*others, *effects, on_loss])
    return text(tiles(study)["Loss alone would have chosen"])


@pytest.mark.parametrize(
    ("verdict", "word"), [("supported", "shows this"), ("not distinguishable", "does not clearly show this")]
)
def test_the_strongest_shown_effect_on_scores_stands_beside_what_loss_shows_of_it(verdict, word):
    told = loss_tile(SCORE_EFFECTS, verdict)
    assert "What moves scores most: epochs from 1 to 4, by +1.60 [+1.00, +2.00] (checklist) log-odds." in told
    assert f"The validation loss {word} effect" in told and "(-0.020 nats per token)." in told


def test_without_a_shown_effect_on_scores_the_first_screen_tells_none():
    blocked = [effect | {"verdict": "blocked"} for effect in SCORE_EFFECTS]
    assert "moves scores" not in loss_tile(blocked, "supported")


# ---------------------------------------------------------------- findings and table


def test_every_finding_has_a_group_of_its_kind_and_none_is_lost():
    published = json.loads((publish.REFERENCE / "findings.json").read_text())
    simulated = files(make_study(8, [make_judge(SCORE.reindex([f"c{i:02}" for i in range(1, 9)], fill_value=0), 0.1)]))
    for findings_of in (published, simulated.findings):
        groups = build._grouped(findings_of)
        told = [f["id"] for g in groups for f in [*g["open"], *(f for _, folded in g["folded"] for f in folded)]]
        assert sorted(told) == sorted(f["id"] for f in findings_of)
        assert [group["title"] for group in groups if group["title"] == "More"] == []
        assert groups[0]["title"] == "The decision"


@pytest.mark.parametrize("verdict", ["supported", "not fit"])
def test_what_the_report_puts_to_work_are_lines_of_the_readme_which_a_test_runs(verdict):
    study = dataclasses.replace(files(changes={"deploy": {"verdict": verdict}}), root=Path("outputs/smoke"))
    work = build._put_to_work(study)
    readme = publish.README.read_text().split("## Put it to work\n")[1].split("\n## ")[0]
    known = {line.split("  #")[0].strip() for line in readme.splitlines()}
    assert len(work["lines"]) == 3 and work["fit"] == (verdict == "supported")
    assert {line.replace(work["config"], "c04").removesuffix(" --profile smoke") for line in work["lines"]} <= known
    assert build._put_to_work(files(changes=BLOCKED)) is None


def test_one_open_bound_does_not_hide_the_other():
    low, high = pd.Series([0.38, math.nan, math.nan]), pd.Series([math.nan, math.nan, 1.0])
    shown = [cell["interval"] for cell in build._numbers(pd.Series([0.8, 0.5, 0.7]), ".2f", low, high)]
    assert shown == ["[0.38, open]", "", "[open, 1.00]"]


def test_findings_that_one_reason_blocks_are_folded_under_it_and_the_decision_is_not():
    blocked = {"verdict": "blocked", "blocked_by": ["few terms"]}
    found = [{"id": id, "statement": f"{id} is not known: few terms."} | blocked for id in ("deploy", "tau", "gain")]
    ((reason, group),) = build._folded([*found, {"id": "alone", "verdict": "blocked", "blocked_by": ["other"]}])
    assert reason == "few terms" and [f["id"] for f in group] == ["tau", "gain"]


def test_a_reason_that_the_statement_gives_is_not_printed_again():
    finding = {"statement": "No answer: few terms.", "blocked_by": ["few terms", "no gate", "no gate"]}
    assert build._new_reasons(finding) == ["no gate"]


def test_words_that_a_page_uses_are_explained_on_it_and_no_others():
    words = dict(words_of(["c01 wins 60% of decided comparisons; the gold answers make 9%.", "tau +0.1"]))
    assert list(words) == ["gold answers", "decided comparisons", "tau-b"]
    shown = dict(build._words(files(), list(tiles(files()).values())))
    assert {"LoRA", "validation loss", "log-odds", "tau-b"} <= set(shown)


def test_front_runner_loss_choice_and_cards_name_one_configuration_also_where_none_is_fit():
    study = files(changes={"deploy": {"verdict": "not fit", "value": None}})
    assert study.front_runner == "c04" and config_cards.roles(study)["c04"] == ("front-runner, not fit", "bad")
    (card,) = [card for card in config_cards.config_cards(study) if card["chosen"]]
    assert card["config"] == "c04" and card["tone"] == "bad"


def test_the_lead_is_the_first_sentence():
    assert first_screen.first_sentence("Deploy c04 (learning rate 0.002): x 1.5. Then more.") == (
        "Deploy c04 (learning rate 0.002): x 1.5."
    )


@pytest.mark.parametrize(
    ("taus", "big"),
    [
        ([(-0.5, "supported"), (-0.3, "not distinguishable")], "shown by 1 of 2 judges"),
        ([(-0.5, "supported"), (0.3, "not distinguishable")], "the judges differ"),
        ([(-0.5, "supported"), (0.3, "supported")], "the judges differ"),
        ([(-0.5, "supported"), (-0.3, "supported")], "yes, it tends to"),
        ([(-0.5, "not distinguishable"), (0.3, "not distinguishable")], "not shown"),
    ],
)
def test_judges_differ_only_where_they_point_to_different_sides(taus, big):
    assert first_screen._tau_verdict([{"value": value, "verdict": verdict} for value, verdict in taus]) == big


def test_a_claim_that_one_judge_alone_would_refute_says_so():
    sharp, blunt = make_judge(SCORE, 0.1), make_judge(SCORE.rename("b"), 1.5)
    study = make_study(6, [sharp, dataclasses.replace(blunt, name="blunt")], val_loss=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    found = primary_finding(study)
    assert found.verdict == "cannot tell"
    assert f"By {sharp.label} alone it would be refuted; the rule, written before the run" in found.statement
    alone = primary_finding(make_study(6, [sharp], val_loss=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
    assert alone.verdict == "refuted" and "alone" not in alone.statement
