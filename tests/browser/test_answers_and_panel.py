"""The answer explorer and the blind panel in a real browser, from file://, on a judged study with hostile answers."""

from __future__ import annotations

import json
from pathlib import Path

import judge_study
import matplotlib
import pandas as pd
import pytest
from axe_check import SCHEMES, WIDTHS, violations
from judge_study import command

from telco_nb.judge.store import VerdictStore
from telco_nb.report import build

matplotlib.use("Agg")
CONFIGS = ["c01", "c07", "c10"]  # those of the profile smoke
HOSTILE = {name: judge_study.HOSTILE[name] for name in ("html", "delimiters", "control characters")}
N_PROMPTS, N_PAIRS = 12, 24


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study up to two judges; the last configuration gives hostile answers."""
    root = judge_study.build(tmp_path_factory.mktemp("outputs"), N_PROMPTS, CONFIGS, HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        judge_study.run_judge(root, patch, configs=CONFIGS, bootstrap_draws=20)
        named = {"scope": "judge-embedding", "judge": "embedding", "judge_kind": "embedding"}
        judge_study.run_judge(root, patch, configs=CONFIGS, bootstrap_draws=20, **named)
    return root


@pytest.fixture(scope="module")
def answers(study) -> Path:
    return build.build_report(study).parent / "answers.html"


@pytest.fixture(scope="module")
def panel(study, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("votes") / "pairs.jsonl"
    assert command("votes", "export", study, file, "--n", str(N_PAIRS)) == 0
    return file.with_suffix(".html")


def shown_rows(page) -> list[str]:
    return [row.inner_text() for row in page.locator("#matrix tbody tr:visible").all()]


def choose(page, **values: str) -> None:
    """Choose in the fields of the filter, by their names."""
    for name, value in values.items():
        page.locator(f"#filters [name={name}]").select_option(value)


# ---------------------------------------------------------------- the explorer


def test_every_question_and_every_answer_is_there(answers, open_page):
    page = open_page(answers)
    assert page.locator("#matrix tbody tr").count() == N_PROMPTS
    heads = page.locator("#matrix thead th").all_inner_texts()
    assert heads == ["question", "reference", *CONFIGS, "untuned", "template", "echo", "nearest"]
    assert page.locator("#detail article").count() == len(heads) - 1


def test_the_explorer_is_reached_from_report_and_index(answers, open_page):
    for name in ("index.html", "telco_report.html"):
        page = open_page(answers.with_name(name))
        page.get_by_role("link", name="All answers, side by side").click()
        assert page.locator("h1").inner_text() == "What does each configuration answer?"


def test_filters_leave_what_matches(answers, open_page, study):
    page = open_page(answers)
    prompts = pd.read_parquet(study / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    kind = prompts["kind"].iloc[0]
    choose(page, kind=kind)
    assert len(shown_rows(page)) == (prompts["kind"] == kind).sum() < N_PROMPTS
    assert f"of {N_PROMPTS} questions" in page.locator("#status").inner_text()
    page.get_by_role("button", name="Clear").click()
    assert len(shown_rows(page)) == N_PROMPTS
    page.get_by_role("searchbox").fill("no such words anywhere")
    assert shown_rows(page) == [] and "Nothing matches" in page.locator("#status").inner_text()


def test_a_flag_filters_by_the_answers_that_are_shown(answers, open_page):
    page = open_page(answers)
    choose(page, left="template", flag="unsafe")
    flagged = shown_rows(page)
    assert 0 < len(flagged) < N_PROMPTS and all("U" in row.split()[-1] for row in flagged)
    assert page.locator("#detail .tag.bad", has_text="unsafe").count() == 1


def test_two_configurations_stand_side_by_side_with_points_and_verdicts(answers, open_page):
    page = open_page(answers, width=1440)
    choose(page, left="c01", right="c10")
    heads = page.locator("#matrix thead th:visible").all_inner_texts()
    assert heads == ["question", "c01", "c10"]
    left, right = (page.locator("#detail article").filter(has=page.locator("h3", has_text=c)) for c in ("c01", "c10"))
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    assert left.locator(".points .made").count() > right.locator(".points .made").count()
    said = page.locator(".verdicts").inner_text()
    assert "checklist (offline proxy): c01 is clearly better than c10." in said and "embedding" in said


def test_the_points_shown_are_those_of_the_checklist(answers, open_page, study):
    page = open_page(answers)
    table = pd.read_parquet(study / "judge-checklist" / "05_judge" / "artefacts" / "points.parquet")
    first = page.evaluate("questions[0].id")
    mine = table[(table["prompt_id"] == first) & (table["config"] == "c01")]
    choose(page, left="c01")
    card = page.locator("#detail article").filter(has=page.locator("h3", has_text="c01"))
    marks = [mark.get_attribute("aria-label") for mark in card.locator(".points .mark").all()]
    assert len(marks) == len(mine) > 2
    assert [mark == "made" for mark in marks] == (mine["credit"].round(2) >= 0.75).tolist()


def test_the_explorer_is_used_by_keyboard_and_its_address_keeps_the_place(answers, open_page):
    page = open_page(answers)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.locator("#detail h2").inner_text().startswith("Question 2 of")
    page.keyboard.press("/")
    page.keyboard.type("j")
    assert page.get_by_role("searchbox").input_value() == "j"
    page.get_by_role("searchbox").fill("")
    page.locator("#matrix tbody button").nth(4).focus()
    page.keyboard.press("Enter")
    choose(page, left="c07")
    chosen = page.locator("#matrix [aria-current=true]").inner_text()
    page.reload()
    assert page.locator("#matrix [aria-current=true]").inner_text() == chosen
    assert page.locator("#filters [name=left]").input_value() == "c07"


def test_a_link_to_a_configuration_shows_it_beside_the_gold_answer(answers, open_page):
    page = open_page(answers.with_name("telco_report.html"))
    page.goto(f"{answers.as_uri()}#answers-c07")
    assert page.locator("#matrix thead th:visible").all_inner_texts() == ["question", "reference", "c07"]


def test_a_script_in_an_answer_is_text_in_the_explorer(answers, open_page):
    page = open_page(answers)
    page.get_by_role("searchbox").fill("onerror=alert")
    assert len(shown_rows(page)) == 1
    assert judge_study.SCRIPT in page.locator("#detail").inner_text()
    assert page.title() != "owned" and page.locator("#detail img, #detail script").count() == 0


# ---------------------------------------------------------------- the blind panel


def begin(page, rater: str) -> None:
    page.get_by_label("Your name").fill(rater)
    page.keyboard.press("Enter")


def test_the_panel_names_no_configuration_and_holds_the_pairs_in_their_order(panel, open_page):
    text, pairs = panel.read_text(encoding="utf-8"), panel.with_suffix(".jsonl").read_text(encoding="utf-8")
    assert not any(name in text for name in (*CONFIGS, "untuned", "config_first", "sha256_first", "planted"))
    ids = [json.loads(line)["pair_id"] for line in pairs.split("\n") if line]
    assert open_page(panel).evaluate("pairs.map(pair => pair.pair_id)") == ids


def test_votes_cast_by_keyboard_are_downloaded_and_imported(panel, open_page, study, tmp_path, capsys):
    page = open_page(panel)
    begin(page, "ann")
    keys = ["1", "2", "0", "x"] * (N_PAIRS // 4)
    page.get_by_label("Note").fill("it names the next step")
    page.keyboard.press("Escape")
    for key in [*keys[:5], "u", *keys[4:]]:
        page.keyboard.press(key)
    assert page.locator("#done").is_visible() and page.locator("#count").inner_text() == f"{N_PAIRS} of {N_PAIRS} done"
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download the votes").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert command("votes", "import", study, file) == 0
    decided = [key for key in keys if key != "x"]
    assert f"{len(decided)} new votes of human-ann" in capsys.readouterr().out
    lines = VerdictStore(study / "judge-human-ann" / "store" / "verdicts.jsonl").ok.values()
    stored = {line["pair_id"]: line["verdict"] for line in lines if line["source"] == "votes"}
    ids = page.evaluate("pairs.map(pair => pair.pair_id)")
    words = {"1": "A", "2": "B", "0": "tie"}
    assert stored == {i: words[key] for i, key in zip(ids, keys, strict=True) if key in words}
    assert next(line for line in lines if line.get("pair_id") == ids[0])["analysis"] == "it names the next step"


def test_the_panel_goes_on_where_a_rater_stopped_and_keeps_raters_apart(panel, open_page):
    page = open_page(panel)
    begin(page, "bea")
    for key in ("1", "0", "2"):
        page.keyboard.press(key)
    page.reload()
    assert page.get_by_label("Your name").input_value() == "bea"
    assert f"3 of {N_PAIRS} are done already" in page.locator("#known").inner_text()
    begin(page, "cem")
    assert page.locator("#count").inner_text() == f"0 of {N_PAIRS} done"
    page.reload()
    begin(page, "bea")
    assert page.locator("#count").inner_text() == f"3 of {N_PAIRS} done"
    page.keyboard.press("u")
    assert page.evaluate("votes.map(line => line.vote)") == ["a", "tie"]


def test_keys_typed_into_a_note_are_no_votes(panel, open_page):
    page = open_page(panel)
    begin(page, "dan")
    page.get_by_label("Note").focus()
    page.keyboard.type("1 0 2 x u")
    assert page.evaluate("votes.length") == 0
    page.get_by_role("button", name="Answer 2 is better").click()
    assert page.evaluate("votes.map(line => [line.vote, line.reason])") == [["b", "1 0 2 x u"]]


def test_a_rater_without_a_name_that_an_import_takes_cannot_begin(panel, open_page):
    page = open_page(panel)
    begin(page, "Ann Other")
    assert page.locator("#vote").is_hidden()


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_wrong_and_nothing_is_wider_than_the_window(answers, panel, open_page, width, scheme):
    for path in (answers, panel):
        page = open_page(path, width=width, scheme=scheme)
        if path == panel:
            begin(page, "eve")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page = open_page(answers, width=width, scheme=scheme)
    choose(page, left="c01", right="reference")
    assert violations(page) == []


def test_a_field_that_loses_its_label_is_found(answers, open_page):
    page = open_page(answers)
    page.evaluate(
        "{ const field = document.querySelector('#filters select'); field.closest('label').replaceWith(field); }"
    )
    assert any("select-name" in fault for fault in violations(page))
