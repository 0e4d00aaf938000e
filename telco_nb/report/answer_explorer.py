"""Builds the answer explorer, `report/answers.html`: every question with every answer, what it holds, and the verdicts.

The page is data and a script of ours. It shows what the steps have written; what a step has not written is missing.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from telco_nb.corpus.cards import Card, load_cards
from telco_nb.hosted.keys import printable
from telco_nb.judge import anchors
from telco_nb.judge.cases import degenerate_answer
from telco_nb.judge.protocol import judged_prompts
from telco_nb.judge.safety import CLAIMED, MISSING
from telco_nb.report import config_cards
from telco_nb.report.files import StudyFiles, read_json, read_or_none
from telco_nb.report.rendering import render
from telco_nb.study.plan import UNTUNED

PAGE = "answers.html"
REASON_CHARACTERS = 400
RETEST = "retest"
VERDICT_COLUMNS = ["prompt_id", "config_first", "config_second", "winner", "margin", "analysis"]
# One letter per pair and judge; the capital is the clear verdict. `x`: asked again, the judge decided otherwise.
NOT_ASKED, CHANGED = ".", "x"
LETTERS = "AatbB" + CHANGED + NOT_ASKED
PAIRS = (string.digits + string.ascii_letters)[: len(LETTERS) ** 2]
ANSWER_PARTS = ("text", "flags", "credits", "coverage", "content")
Answers = dict[tuple[str, str], str]  # text by (configuration or anchor, prompt_id)


class Judged(NamedTuple):
    """A judge and its verdicts, one row each (05's judgements.parquet)."""

    label: str
    is_proxy: bool
    verdicts: pd.DataFrame


class Known(NamedTuple):
    """What is known of the answers: texts, which were cut off, what the checklist found, and the points by prompt."""

    answers: Answers
    cut: set[tuple[str, str]]
    checks: Mapping[tuple[str, str], Mapping[str, Any]]
    points: Mapping[str, Mapping[str, list]]


def write_page(study: StudyFiles, folder: Path) -> bool:
    """Write the page into `folder`; False, and no page, if the study has no questions or no answers yet."""
    data = explorer_data(study)
    if data is None:
        return False
    counts = {"n_questions": len(data["questions"]), "n_columns": len(data["columns"])}
    title = f"Answers, profile {study.root.name}"
    page = render("report_answers.html.j2", "report_answers.js", title=title, data=packed(data), **counts)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return True


def packed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as the page holds them, which its script unpacks: of 200 configurations they are the larger part of it.

    An answer is the list of its ANSWER_PARTS, and a character of PAIRS stands for two letters of the verdicts.
    """
    questions = []
    for question in data["questions"]:
        answers = [answer and [answer[part] for part in ANSWER_PARTS] for answer in question["answers"]]
        questions.append(question | {"answers": answers, "verdicts": [_paired(v) for v in question["verdicts"]]})
    return {**data, "questions": questions, "parts": ANSWER_PARTS, "letters": LETTERS, "pairs": PAIRS}


def _paired(letters: str) -> str:
    places = [LETTERS.index(letter) for letter in letters + NOT_ASKED * (len(letters) % 2)]
    return "".join(PAIRS[len(LETTERS) * a + b] for a, b in zip(places[::2], places[1::2], strict=True))


def explorer_data(study: StudyFiles) -> dict[str, Any] | None:
    """All that the page shows, ready for JSON; None without questions or answers.

    Columns are the gold answer, the configurations and the other anchors. `answers` of a question has an entry per
    column, `verdicts` a string per judge with a letter per pair of columns, in the order of `combinations`.
    """
    shared = study.root / "shared" / "02_synth" / "artefacts"
    prompts = read_or_none(pd.read_parquet, shared / "test_prompts.parquet")
    answers, cut = _answers(study)
    if prompts is None or not answers:
        return None
    cards = _cards(study.root)
    answers |= _anchor_answers(study.root, prompts, cards)
    columns, judges = _columns(study, answers), _judges(study)
    known = Known(answers, cut, _checks(study), _points(study))
    about = {column: anchors.ANCHORS.get(column, "") for column in columns}
    about |= {config: role for config, (role, _) in config_cards.roles(study).items()}
    return {
        "columns": [{"name": column, "about": about[column]} for column in columns],
        "judges": [judge.label for judge in judges],
        "credits": {"made": CLAIMED, "partly": MISSING},  # from this credit on
        "questions": _questions(prompts, cards, columns, judges, known),
    }


def _questions(
    prompts: pd.DataFrame, cards: Mapping[str, Card], columns: Sequence[str], judges: Sequence[Judged], known: Known
) -> list[dict[str, Any]]:
    """Every question with its points, its answers by column, and the verdicts and reasons by judge."""
    by_prompt = [{key: rows for key, rows in judge.verdicts.groupby("prompt_id")} for judge in judges]
    terms = {card.id: card.term for card in cards.values()}
    questions = []
    for prompt in prompts.to_dict("records"):
        id = prompt["prompt_id"]
        asked = known.points.get(id, {}).get("", [])
        mine = [groups.get(id, pd.DataFrame()) for groups in by_prompt]
        told = {
            "points": asked,
            "origins": _origins(asked, prompt, cards),
            "answers": [_answer(column, id, known) for column in columns],
            "verdicts": [_verdict_letters(rows, columns) for rows in mine],
            "reasons": [{} if j.is_proxy else _reasons(r, columns) for j, r in zip(judges, mine, strict=True)],
        }
        questions.append(_question(prompt, terms) | told)
    return questions


# ---------------------------------------------------------------- what is read


def _answers(study: StudyFiles) -> tuple[Answers, set[tuple[str, str]]]:
    """The texts of the configurations and of the untuned model, and the keys of those cut at the token limit."""
    answers: Answers = {}
    cut = set()
    for config in (*study.configs, UNTUNED):
        path = study.root / config / "04_energy" / "artefacts" / "answers.parquet"
        table = read_or_none(pd.read_parquet, path)
        for row in () if table is None else table.itertuples():
            answers[config, row.prompt_id] = row.answer or ""
            if getattr(row, "finish_reason", None) == "length":
                cut.add((config, row.prompt_id))
    return answers, cut


def _anchor_answers(root: Path, prompts: pd.DataFrame, cards: Mapping[str, Card]) -> Answers:
    """The texts of the anchors; of the gold answer alone where the cards or the training conversations are missing."""
    prompts = judged_prompts(prompts)
    gold = {(anchors.GOLD, i): text for i, text in zip(prompts["prompt_id"], prompts["reference"], strict=True)}
    train = read_or_none(pd.read_parquet, root / "shared" / "02_synth" / "artefacts" / "train.parquet")
    return gold | (read_or_none(anchors.anchor_texts, prompts, cards, [] if train is None else train) or {})


def _cards(root: Path) -> dict[str, Card]:
    path = root / "shared" / "01_glossary" / "artefacts" / "glossary.json"
    return {card.id: card for card in read_or_none(load_cards, path) or []}


def _origins(points: Sequence[str], prompt: Mapping[str, Any], cards: Mapping[str, Card]) -> list[str]:
    """Where each point comes from, card or gold; empty where the problem is not on a card."""
    card = cards.get(prompt["term_id"])
    problem = card.by_problem.get(prompt.get("problem_id")) if card else None
    on_card = {printable(text) for _, text in problem.agent_texts()} if problem else set()
    return ["card" if point in on_card else "gold" for point in points] if problem else []


def _judge_folders(study: StudyFiles) -> list[tuple[str, Path]]:
    """(judge, folder of its 05), in the order of the results, then of the folders."""
    found = [scope.removeprefix("judge-") for scope, step in study.manifests if step == "05_judge"]
    names = dict.fromkeys([*(judge for judge in study.judges if judge in found), *found])
    return [(name, study.root / f"judge-{name}" / "05_judge") for name in names]


def _judges(study: StudyFiles) -> list[Judged]:
    judges = []
    for name, folder in _judge_folders(study):
        verdicts = read_or_none(pd.read_parquet, folder / "artefacts" / "judgements.parquet")
        if verdicts is None or verdicts.empty:
            continue
        passed = (read_or_none(read_json, folder / "artefacts" / "validity.json") or {}).get("passed")
        label = study.judge_name(name) + (", failed its gate" if passed is False else "")
        asked = verdicts[verdicts["purpose"] != RETEST].reindex(columns=VERDICT_COLUMNS)
        judges.append(Judged(label, study.is_proxy(name), asked))
    return judges


def _checks(study: StudyFiles) -> dict[tuple[str, str], dict[str, Any]]:
    """What the checklist found in an answer, by (column, prompt_id): coverage, content and flags."""
    tables = (
        read_or_none(pd.read_parquet, folder / "tables" / "checks.parquet") for _, folder in _judge_folders(study)
    )
    table = next((table for table in tables if table is not None and len(table)), None)
    rows = [] if table is None else table.to_dict("records")
    return {(row["config"], row["prompt_id"]): row for row in rows}


def _points(study: StudyFiles) -> dict[str, dict[str, list]]:
    """Per prompt_id the points of its problem under the name "", and per column the credit of each."""
    paths = (folder / "artefacts" / "points.parquet" for _, folder in _judge_folders(study))
    table = next((table for path in paths if (table := read_or_none(pd.read_parquet, path)) is not None), None)
    found: dict[str, dict[str, list]] = defaultdict(dict)
    for (prompt_id, config), rows in [] if table is None else table.groupby(["prompt_id", "config"], sort=False):
        found[prompt_id][config] = [round(credit, 2) for credit in rows["credit"]]
        found[prompt_id][""] = [printable(point) for point in rows["point"]]
    return found


# ---------------------------------------------------------------- what is shown


def _columns(study: StudyFiles, answers: Answers) -> list[str]:
    known = {anchors.GOLD, *(column for column, _ in answers)}
    return [c for c in dict.fromkeys([anchors.GOLD, *study.configs, *anchors.ANCHORS]) if c in known]


def _question(prompt: Mapping[str, Any], terms: Mapping[str, str]) -> dict[str, Any]:
    said = [[message["role"], printable(message["content"])] for message in prompt["messages"]]
    words = {"set": "test_set", "problem": "problem_id", "kind": "kind", "context": "context"}
    facts = {name: str(prompt.get(column) or "").replace("_", " ") for name, column in words.items()}
    return {"id": prompt["prompt_id"], "said": said, "term": terms.get(prompt["term_id"], prompt["term_id"])} | facts


def _answer(column: str, prompt_id: str, known: Known) -> dict[str, Any] | None:
    """An answer with its flags, coverage, content and credits; what nobody has checked is None. None: no answer."""
    key = (column, prompt_id)
    if key not in known.answers:
        return None
    checked = known.checks.get(key, {})
    flags = [flag.replace("_", " ") for flag in str(checked.get("flags") or "").split("; ") if flag]
    flags += [flag for flag in (degenerate_answer(known.answers[key]), "cut" if key in known.cut else None) if flag]
    numbers = {name: round(checked[name], 2) if name in checked else None for name in ("coverage", "content")}
    credits = known.points.get(prompt_id, {}).get(column)
    return {"text": printable(known.answers[key]), "flags": flags, "credits": credits} | numbers


def _verdict_letters(verdicts: pd.DataFrame, columns: Sequence[str]) -> str:
    """A letter per pair of columns: A or a (the first is better), B or b, t (tie), x (changed), or . (not asked)."""
    letters: dict[tuple[str, str], str] = {}
    for row in verdicts.to_dict("records"):
        first, second, winner = row["config_first"], row["config_second"], row["winner"]
        clear = row["margin"] == 2
        for pair, mine in (((first, second), first), ((second, first), second)):
            letter = "t" if winner == "tie" else "a" if winner == mine else "b"
            letter = letter.upper() if clear and letter != "t" else letter
            before = letters.get(pair, letter)
            letters[pair] = letter if before.lower() == letter.lower() else CHANGED
    return "".join(letters.get(pair, NOT_ASKED) for pair in combinations(columns, 2))


def _reasons(verdicts: pd.DataFrame, columns: Sequence[str]) -> dict[str, str]:
    """The first reason for each pair, by "i j", the places of its columns; A in it is the answer in the first seat."""
    places = {column: i for i, column in enumerate(columns)}
    reasons: dict[str, str] = {}
    for row in verdicts.to_dict("records"):
        first, second, text = row["config_first"], row["config_second"], row["analysis"]
        if first in places and second in places and isinstance(text, str) and text:
            low, high = sorted((places[first], places[second]))
            told = f"A is {first}, B is {second}: {printable(text)}"
            reasons.setdefault(f"{low} {high}", told[:REASON_CHARACTERS])
    return reasons
