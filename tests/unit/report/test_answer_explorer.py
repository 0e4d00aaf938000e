"""The answer explorer shows what the steps have written, says what is missing, and holds nothing that can run."""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import fake_study
import numpy as np
import pandas as pd
import pytest
from shipped import cards as shipped_cards

from telco_nb.report import answer_explorer
from telco_nb.report.files import read_study

JUDGES = ("checklist", "embedding")
VERDICTS = Path("judge-checklist", "05_judge", "artefacts", "judgements.parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return fake_study.build_study(tmp_path_factory.mktemp("outputs"), 4, JUDGES, 0)


@pytest.fixture
def root(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "laptop"))


def data_of(root: Path) -> dict:
    data = answer_explorer.explorer_data(read_study(root, []))
    assert data is not None
    return data


def letter(data: dict, question: int, judge: int, first: str, second: str) -> str:
    names = [column["name"] for column in data["columns"]]
    return data["questions"][question]["verdicts"][judge][list(combinations(names, 2)).index((first, second))]


def put_verdicts(root: Path, *rows: tuple[str, str, str, str, int]) -> None:
    """Replace the checklist's verdicts: (purpose, first, second, winner, margin) on the prompt p000."""
    names = ["purpose", "config_first", "config_second", "winner", "margin"]
    pd.DataFrame(rows, columns=names).assign(prompt_id="p000", analysis="because").to_parquet(root / VERDICTS)


def test_the_gold_answer_comes_first_then_the_configurations_then_the_anchors(root):
    data = data_of(root)
    assert [column["name"] for column in data["columns"]] == ["reference", "c01", "c02", "c03", "c04", "untuned"]
    assert len(data["questions"]) == 40 and all(len(q["answers"]) == 6 for q in data["questions"])


def test_an_answer_carries_its_flags_and_what_was_not_checked_is_null(root):
    answers = dict(zip(["reference", "c01", "c02"], data_of(root)["questions"][0]["answers"], strict=False))
    assert {"looping", "cut"} <= set(answers["c02"]["flags"])
    assert answers["c01"]["coverage"] is not None and len(answers["c01"]["credits"]) == 3
    unchecked = data_of(root)["questions"][39]["answers"][1]  # the fake checks end at p019
    assert unchecked["coverage"] is None and unchecked["credits"] is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("ranking", "c02", "c01", "c01", 2)], "A"),
        ([("ranking", "c01", "c02", "c02", 1)], "b"),
        ([("ranking", "c01", "c02", "tie", 0)], "t"),
        ([("ranking", "c01", "c02", "c01", 1), ("swap", "c02", "c01", "c02", 1)], "x"),
        ([("ranking", "c01", "c02", "c01", 1), ("swap", "c02", "c01", "c01", 2)], "A"),
        ([("ranking", "c01", "c02", "c01", 1), ("retest", "c01", "c02", "c02", 1)], "a"),
        ([("ranking", "c01", "c03", "c01", 1)], "."),
    ],
)
def test_a_verdict_is_told_from_the_side_of_the_earlier_column(root, rows, expected):
    put_verdicts(root, *rows)
    assert letter(data_of(root), 0, 0, "c01", "c02") == expected
    assert letter(data_of(root), 1, 0, "c01", "c02") == "."


def test_reasons_are_those_of_judges_that_give_some(root):
    put_verdicts(root, ("ranking", "c02", "c01", "c01", 2))
    assert data_of(root)["questions"][0]["reasons"] == [{}, {}]  # an offline judge repeats its numbers
    metrics = root / "judge-checklist" / "05_judge" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"judge_kind": "human"}))
    assert data_of(root)["questions"][0]["reasons"][0] == {"1 2": "A is c02, B is c01: because"}


def test_without_answers_or_questions_there_is_no_page_and_no_link(root, tmp_path):
    shutil.rmtree(root / "shared" / "02_synth")
    assert not answer_explorer.write_page(read_study(root, []), tmp_path)
    assert not (tmp_path / answer_explorer.PAGE).exists()


def test_without_judges_the_answers_are_shown_all_the_same(root):
    for judge in JUDGES:
        shutil.rmtree(root / f"judge-{judge}")
    data = data_of(root)
    assert data["judges"] == [] and data["questions"][0]["answers"][1]["text"]


def test_no_answer_ends_the_data_block_and_the_page_allows_one_script(root, tmp_path):
    assert answer_explorer.write_page(read_study(root, []), tmp_path)
    page = (tmp_path / answer_explorer.PAGE).read_text(encoding="utf-8")
    block = re.search(r'<template id="data">(.*?)</template>', page, re.S)[1]
    assert not set("<>&") & set(block) and fake_study.SCRIPT in json.loads(block)["questions"][0]["said"][0][1]
    assert page.count("<script") == 1 and "http" not in page.replace(block, "").replace("http-equiv", "")
    assert "default-src 'none'" in page and len(page) < 2_000_000


def test_a_point_comes_from_the_card_or_else_from_the_gold_answer():
    cards = {card.id: card for card in shipped_cards()}
    card = next(iter(cards.values()))
    problem = card.problems[0]
    prompt = {"term_id": card.id, "problem_id": problem.id}
    points = [problem.steps[0].say[0], "A sentence of the gold answer."]
    assert answer_explorer._origins(points, prompt, cards) == ["card", "gold"]
    assert answer_explorer._origins(points, prompt | {"problem_id": ""}, cards) == []


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_what_the_page_holds_packed_is_the_data(n):
    """Unpacked here as the page's script does it; tests/browser reads the verdicts off the page."""
    letters = "".join(np.random.default_rng(n).choice(list(answer_explorer.LETTERS), n))
    answer = {"content": 0.5, "coverage": 0.25, "credits": [1.0], "flags": ["unsafe"], "text": "Restart it."}
    question = {"id": "p1", "answers": [answer, None], "verdicts": [letters]}
    held = json.loads(json.dumps(answer_explorer.packed({"questions": [question], "judges": ["a"]})))
    (kept,) = held["questions"]
    assert [part and dict(zip(held["parts"], part, strict=True)) for part in kept["answers"]] == [answer, None]
    size = len(held["letters"])
    places = [held["pairs"].index(pair) for pair in kept["verdicts"][0]]
    unpacked = "".join(held["letters"][place // size] + held["letters"][place % size] for place in places)
    assert unpacked[:n] == letters and len(unpacked) <= n + 1
    assert (kept["id"], held["judges"], question["verdicts"]) == ("p1", ["a"], [letters])
    assert len(set(held["pairs"])) == size**2 and held["pairs"].isalnum()
