"""Every sentence of the report's first screen is true of the data that it is computed from."""

import dataclasses
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from fake_study import make_judge, make_study

from telco_nb.analysis import findings
from telco_nb.analysis.claims import primary_finding
from telco_nb.report import build, config_cards
from telco_nb.report.files import StudyFiles

SCORE = pd.Series({"c01": 0.0, "c02": 0.1, "c03": 0.2, "c04": 2.0, "c05": -0.1, "c06": -0.3})


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


def tiles(study: StudyFiles) -> dict[str, build.Tile]:
    return {tile.title: tile for tile in build._tiles(study, study.finding("deploy")["value"])}


def text(tile: build.Tile) -> str:
    return " ".join([tile.title, tile.big, tile.tag or "", *tile.lines, *(cell for row in tile.rows for cell in row)])


@pytest.mark.parametrize(
    ("verdict", "title", "big", "tag"),
    [
        ("cannot tell", "Deploy", "No clear best; best guess is c04", "cannot tell"),
        ("not fit", "First choice, not shown to be fit for customers", "c04", "not fit"),
        ("supported", "Deploy", "c04", None),
    ],
)
def test_the_first_tile_says_how_far_the_choice_is_shown(verdict, title, big, tag):
    study = files(changes={"deploy": {"verdict": verdict}})
    tile = tiles(study)[title]
    assert (tile.big, tile.tag, tile.good) == (big, tag, verdict == "supported")
    (card,) = [card for card in config_cards.config_cards(study) if card["config"] == "c04"]
    assert (card["tone"] == "good") == (verdict == "supported")


def test_the_tile_of_a_study_without_a_choice_is_not_marked_as_good():
    tile = tiles(files(changes={"deploy": {"verdict": "blocked", "value": None, "blocked_by": ["so"]}}))["Deploy"]
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
        "In other words: the best of the others wins 50% of the decided comparisons with it.",
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
    assert "of what loss's choice" not in text(tiles(mixed)["Training energy"])
    assert "of what loss's choice" in text(tiles(files())["Training energy"])


def test_an_energy_is_called_estimated_or_measured_as_it_is():
    assert tiles(files())["Training energy"].tag == "estimated"
    measured = tiles(files(energy_kind="measured"))["Training energy"]
    assert measured.tag is None and "It is measured." in measured.lines
    assert tiles(files(energy_kind=None))["Training energy"].tag == "of unknown kind"


def test_a_blocked_energy_ratio_is_marked_beside_the_paper():
    study = dataclasses.replace(make_study(6, [make_judge(SCORE, 0.1)]), invalid_energy=("c02",))
    assert "not valid" in tiles(files(study))["Beside the paper (other model, data and judges)"].rows[2][2]


def test_a_shared_lowest_loss_is_not_called_a_missing_one():
    study = make_study(6, [make_judge(SCORE, 0.1)], val_loss=[0.5, 0.5, 0.6, 0.6, 0.7, 0.7])
    shown = tiles(files(study))
    assert "share the lowest loss" in text(shown["Loss alone would have chosen"])
    assert "share the lowest loss" in text(shown["How sure: better answers than loss's choice?"])
    assert "no valid judge" not in text(shown["How sure: better answers than loss's choice?"]).lower()


def test_a_choice_of_loss_that_answers_better_is_not_explained_by_its_cost():
    study = files(changes={"confidence": {"verdict": "refuted", "value": 0.1, "statement": "x", "blocked_by": []}})
    assert tiles(study)["How sure: better answers than loss's choice?"].big == "no, 10%"


def test_no_tile_prints_a_number_that_is_missing():
    gone = {"value": None, "low": None, "high": None}
    whole = files(train_energy_low_wh=math.nan, train_energy_high_wh=math.nan)
    ids = [row["id"] for row in whole.findings if row["id"] not in ("deploy", "loss_choice")]
    for id, change in [(id, change) for id in ids for change in (gone, gone | {"value": 0.5})]:
        changed = [row | (change if row["id"] == id else {}) for row in whole.findings]
        for tile in tiles(dataclasses.replace(whole, findings=changed)).values():
            assert not re.search(r"\b(nan|inf|None)\b", text(tile)), (id, tile)
