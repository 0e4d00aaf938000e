"""The report shows what is there, says what is not, loads nothing, and treats model output as text."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import shutil
from pathlib import Path

import fake_study
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from markupsafe import Markup

from telco_nb.report import build, config_cards, pages
from telco_nb.report.files import REPORT_READS, Page, duration
from telco_nb.study.plan import STEPS

matplotlib.use("Agg")
N, JUDGES, REPEATS = 4, ("checklist", "embedding"), 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A profile's folder in which everything has run."""
    root = fake_study.build_study(tmp_path_factory.mktemp("outputs"), N, JUDGES, REPEATS)
    with pytest.MonkeyPatch.context() as patch:
        fake_study.run_analysis(root, N, JUDGES, REPEATS, patch)
    return root


@pytest.fixture
def root(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "laptop"))


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def built(finished) -> Path:
    return build.build_report(finished).parent


def test_a_report_is_built_from_what_report_reads_names_and_from_the_exports_alone(built, root):
    written = {path.relative_to(root).as_posix(): path for path in root.glob("*/0*/**/*") if path.is_file()}
    unread = {name for name in written if not any(fnmatch.fnmatchcase(name, reads) for reads in REPORT_READS)}
    assert {"c01/03_train/tables/energy.parquet", "c01/04_energy/tables/choices.parquet"} <= unread
    for name in unread:
        written[name].unlink()
    again = build.build_report(root).parent
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in built.iterdir()}


# ---------------------------------------------------------------- what a reader finds


def test_the_first_screen_answers_a_manager(built, finished):
    results = {f["id"]: f for f in json.loads((finished / "findings.json").read_text())}
    answer = soup(built / "telco_report.html").find(id="answer").get_text(" ")
    assert results["deploy"]["verdict"] == "cannot tell"  # the widths of few repeats leave two configurations
    assert f"best guess is {results['deploy']['value']}" in answer
    for told in (
        "Loss alone would have chosen",
        results["loss_choice"]["value"],
        "Is the front-runner better",
        "Wh",
        "estimated",
        "paper",
    ):
        assert told in answer
    tags = soup(built / "telco_report.html").find("header").get_text(" ")
    assert "judged by offline rules: checklist and embedding" in tags
    assert "energy estimated" in tags


def test_one_file_holds_figures_cards_answers_and_the_table_as_csv(built, finished):
    page = soup(built / "telco_report.html")
    figures = page.find(id="figures").find_all("img")
    assert len(figures) >= 6
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in figures)
    cards = page.select("article.card")
    assert [card["id"] for card in cards] == [f"config-c0{i}" for i in range(1, N + 1)]
    assert all(card.find("polyline") and len(card.find_all("blockquote")) == 2 for card in cards)
    csv = page.find("a", download="results.csv")["href"].partition("base64,")[2]
    assert base64.b64decode(csv) == (finished / "results.csv").read_bytes()
    assert (built / "telco_report.html").stat().st_size < 5_000_000


def test_every_executed_notebook_has_a_page_and_every_relative_link_leads_somewhere(built, finished):
    notebooks = {f"{p.parent.name}-{p.stem}.html" for p in finished.glob("*/*.ipynb")}
    assert notebooks <= {p.name for p in built.iterdir()}
    for page in built.glob("*.html"):
        html = soup(page)
        for link in html.find_all("a", href=True):
            target, _, anchor = link["href"].partition("#")
            if re.match(r"(https?|mailto|data):", link["href"]):
                continue
            assert not target or (built / target).is_file(), f"{page.name}: {link['href']}"
            if anchor:
                assert soup(built / (target or page.name)).find(id=anchor), f"{page.name}: {link['href']}"


def test_links_between_notebooks_lead_to_the_page_of_the_right_scope(built):
    page = soup(built / "c01-04_energy.html")
    assert page.find("a", string="02_synth")["href"] == "shared-02_synth.html"
    assert page.find("nav").find("a", string="03_train")["href"] == "c01-03_train.html"


def test_a_page_leads_to_every_other_step_in_order(built):
    known = [step for step in STEPS if list(built.glob(f"*-{step}.html"))]
    assert len(known) > 3
    for name in ("c02-03_train.html", "study-06_analysis.html"):
        links = soup(built / name).find("nav", attrs={"aria-label": "Pages"}).find_all("a")
        assert [link.get_text() for link in links] == [
            "Report",
            "Search",
            *(step for step in known if step not in name),
        ]


def test_a_page_of_several_parts_lists_them_and_each_entry_leads_to_its_part():
    body, contents = pages.with_contents(Markup("<h1>t</h1><h2>What <code>a</code> &lt; b</h2><p>x</p><h2>Result</h2>"))
    assert [title for _, title in contents] == ["What a &lt; b", "Result"]
    page = BeautifulSoup(body, "html.parser")
    assert [page.find(id=anchor).get_text() for anchor, _ in contents] == ["What a < b", "Result"]


def test_numbers_sort_as_numbers_and_missing_cells_stay_empty(root):
    frame = pd.read_csv(root / "results.csv")
    frame.loc[1, ["train_energy_wh", "train_energy_low_wh", "train_energy_high_wh", "energy_kind"]] = None
    frame.to_csv(root / "results.csv", index=False)
    table = soup(build.build_report(root)).select_one("table.sortable")
    heads = [head.get_text() for head in table.thead.find_all("th")]
    column = heads.index("training energy, estimated (Wh)") - 1
    energy = {row.th.get_text(): row.find_all("td")[column] for row in table.tbody.find_all("tr")}
    assert energy["c02"]["data-value"] == "" and energy["c02"].get_text(strip=True) == ""
    assert float(energy["c01"]["data-value"]) == pytest.approx(frame["train_energy_wh"][0])


def test_the_table_is_in_the_order_of_the_places_and_each_name_leads_to_its_card(built, finished):
    for name in ("index.html", "telco_report.html"):
        table = soup(built / name).select_one("table.sortable")
        heads = [head.get_text() for head in table.thead.find_all("th")]
        assert heads[:2] == ["config", "place (checklist)"] and "rank" not in heads and "LoRA rank" in heads
        assert table.thead.find("th", attrs={"aria-sort": "ascending"}).get_text() == "place (checklist)"
        places = [float(row.td["data-value"]) for row in table.tbody.find_all("tr")]
        assert places == sorted(places) and len(places) == N
        for row in table.tbody.find_all("tr"):
            target, _, anchor = row.th.a["href"].partition("#")
            assert soup(built / (target or name)).find(id=anchor).h3.get_text().startswith(row.th.get_text())


def test_the_index_begins_with_the_question_of_each_notebook(built):
    index = soup(built / "index.html")
    assert index.main.find("section")["id"] == "notebooks"
    links = {link.get_text(): link["href"] for link in index.select("#notebooks li > a")}
    assert "study-06_analysis.html" in links.values() and len(links) == len(index.select("#notebooks li"))
    for question, page in links.items():
        assert soup(built / page).h1.get_text().startswith(question)
    assert not soup(built / "telco_report.html").find(id="notebooks")


def test_a_notebooks_page_gives_its_answer_first_and_folds_its_parameters(tmp_path):
    headline = '<div class="headline" style="x">The loss is 0.5.</div>'
    table = '<table class="provenance"><tr><td>seed</td></tr></table>'
    shown = [nbformat.v4.new_output("display_data", {"text/html": text}) for text in (table, headline)]
    cells = [nbformat.v4.new_markdown_cell("# Why?"), nbformat.v4.new_code_cell("1", outputs=shown)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "03_train.ipynb")
    page = Page("c01", "03_train", False, tmp_path / "03_train.ipynb")
    html = BeautifulSoup(pages.notebook_body(page, [page]), "html.parser")
    assert html.h1.find_next_sibling().get_text() == "The loss is 0.5." and len(html.select(".headline")) == 2
    assert html.select_one("details.parameters table.provenance td").get_text() == "seed"


# ---------------------------------------------------------------- safety


def test_nothing_outside_is_loaded(built):
    for page in built.glob("*.html"):
        html = soup(page)
        for tag, name in (("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")):
            assert all(found[name].startswith("data:") for found in html.find_all(tag, attrs={name: True})), page.name
        styles = " ".join(style.get_text() for style in html.find_all("style"))
        assert not re.search(r"url\(|@import", styles)
        assert not html.find_all(["object", "embed", "base", "form"])


def test_only_our_script_may_run_and_its_hash_is_in_the_policy(built):
    for page in built.glob("*.html"):
        html = soup(page)
        (script,) = html.find_all("script")
        policy = html.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
        assert not [tag for tag in html.find_all(True) if any(name.startswith("on") for name in tag.attrs)]


def test_model_text_with_markup_is_shown_as_text(built):
    for name in ("telco_report.html", "c01-03_train.html"):
        text = (built / name).read_text(encoding="utf-8")
        assert "<script>document.title" not in text
        assert "<img src=x" not in text
        assert "<script>document.title='owned'" in BeautifulSoup(text, "html.parser").get_text()


@pytest.mark.parametrize(
    "markup",
    [
        "<iframe src=https://example.com></iframe>",
        "<a href='javascript:alert(1)'>x</a>",
        "<svg onload=alert(1)></svg>",
        "<style>*{display:none}</style>",
        "<p onclick=alert(1)>x</p>",
        "<style scoped>.dataframe{}</style><script>x</script>",
    ],
)
def test_outputs_pass_an_allow_list(markup):
    cleaned = BeautifulSoup(pages.clean(markup), "html.parser")
    assert not cleaned.find(["iframe", "style", "svg", "script"])
    assert not [tag for tag in cleaned.find_all(True) if any(n.startswith("on") for n in tag.attrs)]
    assert "javascript" not in "".join(str(tag.attrs) for tag in cleaned.find_all(True))


HOSTILE = "x\" ' onerror=a() ></div></pre><script>b()</script><img src=x onerror=c()><iframe src=x></iframe>"
SHOWN = ("text/html", "text/markdown", "image/png", "image/jpeg", "image/svg+xml", "text/latex", "text/plain")


def record_of(value) -> dict:
    """A notebook in which every place that takes a text holds a value."""
    facts = dict.fromkeys(("alt", "width", "height", "unconfined", "needs_background", "isolated"), value)
    outputs = [
        {"output_type": "display_data", "data": {mime: value, "text/plain": value}, "metadata": metadata}
        for mime in SHOWN
        for metadata in ({mime: facts}, facts, {"filenames": {mime: value}})
    ]
    outputs += [{"output_type": "stream", "name": "stderr", "text": value}]
    outputs += [{"output_type": "error", "ename": value, "evalue": value, "traceback": [value]}]
    code = {"cell_type": "code", "id": "c", "execution_count": 1, "source": value, "outputs": outputs}
    text = {"cell_type": "markdown", "id": "m", "source": f"{value}\n\n![x](attachment:a.png)"}
    text["attachments"] = {"a.png": {"image/png": value}}
    raw = {"cell_type": "raw", "id": "r", "source": value}
    cells = [
        cell | {"metadata": {"tags": [value], "alt": value, "raw_mimetype": "text/html"}} for cell in (code, text, raw)
    ]
    languages = {"kernelspec": dict.fromkeys(("name", "display_name", "language"), value)}
    languages |= {"language_info": dict.fromkeys(("name", "pygments_lexer", "codemirror_mode"), value)}
    return {"cells": cells, "metadata": languages | {"title": value}, "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("value", [HOSTILE, 7, True, None, [HOSTILE], {"alt": HOSTILE}], ids=lambda v: type(v).__name__)
def test_nothing_that_a_record_may_hold_becomes_a_handler_a_frame_or_a_script(value, tmp_path):
    (tmp_path / "03_train.ipynb").write_text(json.dumps(record_of(value)))
    page = Page("c01", "03_train", False, tmp_path / "03_train.ipynb")
    html = BeautifulSoup(pages.notebook_body(page, [page]), "html.parser")
    assert html.get_text().strip(), "it is shown, or said to be unreadable"
    assert not html.find_all(["script", "iframe", "svg", "object"])
    assert not [tag for tag in html.find_all(True) if any(name.startswith("on") for name in tag.attrs)]
    assert all(image["src"].startswith("data:image/") for image in html.find_all("img"))
    assert value != HOSTILE or len(html.find_all("img")) == 6, "images are shown, not left out"


def test_details_of_a_notebook_fold_on_its_page_and_everything_else_in_them_is_sanitised(tmp_path):
    folded = "<details open onclick='x()' style='x'><summary class='s' onmouseover=x()>more</summary>{}</details>"
    inside = folded.format("<b>text</b><script>x()</script><img src=x onerror=x()>")
    output = nbformat.v4.new_output("display_data", {"text/html": inside})
    cells = [nbformat.v4.new_markdown_cell(inside), nbformat.v4.new_code_cell("1", outputs=[output])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "03_train.ipynb")
    page = Page("c01", "03_train", False, tmp_path / "03_train.ipynb")
    html = BeautifulSoup(pages.notebook_body(page, [page]), "html.parser")
    shown = [tag for tag in html.find_all("details") if tag.get("class") != ["code"]]
    assert [tag.summary.get_text() for tag in shown] == ["more", "more"]
    for tag in shown:
        assert list(tag.attrs) == ["open"] and set(tag.summary.attrs) <= {"class"} and tag.b.get_text() == "text"
        assert not tag.find(["script", "img"]) and "<script>x()</script>" in tag.get_text()


def test_details_that_an_output_leaves_open_end_with_the_output():
    assert str(pages.clean("<details><summary>more")) == "<details><summary>more</summary></details>"
    assert "<details" not in str(pages.clean("</details></details>"))


def test_a_styled_table_shows_its_cells_and_no_style_text():
    table = pd.DataFrame({"config": ["c01"], "value": [0.5]})
    for markup in (table.style.hide(axis="index").format(precision=1).to_html(), table._repr_html_()):
        text = BeautifulSoup(pages.clean(markup), "html.parser").get_text(" ", strip=True)
        assert "c01" in text and "0.5" in text and "style" not in text


# ---------------------------------------------------------------- failures are shown


def cell(page: BeautifulSoup, scope: str, step: str):
    table = page.find(id="status").table
    column = [head.get_text() for head in table.thead.find_all("th")].index(step) - 1
    row = next(row for row in table.tbody.find_all("tr") if row.th.get_text() == scope)
    return row.find_all("td")[column]


def test_a_failed_step_is_red_named_at_the_top_and_linked(root):
    fake_study.Builder(root.parent).fail("03_train", "c02")
    index = soup(build.build_report(root).with_name("index.html"))
    state = cell(index, "c02", "03_train")
    assert state["class"] == ["failed"]
    assert state.find("a")["href"] == "c02-03_train.failed.html"
    assert "c02/03_train" in index.find(role="alert").get_text()
    assert "c02" in [row.th.get_text() for row in index.select_one("table.sortable").tbody.find_all("tr")]


def test_a_failed_attempt_shows_beside_the_older_good_result(root):
    shutil.copyfile(root / "c01" / "03_train.ipynb", root / "c01" / "03_train.failed.ipynb")
    state = cell(soup(build.build_report(root).with_name("index.html")), "c01", "03_train")
    assert state["class"] == ["failed"]
    assert "older result ok" in state.get_text()


def test_what_the_runner_says_adds_reasons_but_cannot_make_a_step_succeed(root):
    shutil.rmtree(root / "c01" / "04_energy")
    (root / "c01" / "04_energy.ipynb").unlink()
    shutil.rmtree(root / "c02" / "04_energy")
    (root / "c02" / "04_energy.ipynb").unlink()
    jobs = [
        {"scope": "c01", "step": "04_energy", "status": "blocked", "reason": "blocked by c01/03_train"},
        {"scope": "c02", "step": "04_energy", "status": "done", "reason": ""},
        {"scope": "c09", "step": "03_train", "status": "failed", "reason": "the kernel died"},
    ]
    index = soup(build.build_report(root, jobs).with_name("index.html"))
    assert "blocked by c01/03_train" in cell(index, "c01", "04_energy").get_text()
    assert cell(index, "c02", "04_energy")["class"] == ["missing"]
    assert "the kernel died" in cell(index, "c09", "03_train").get_text()


def test_a_record_without_a_manifest_is_no_success(root):
    (root / "c01" / "03_train" / "manifest.json").unlink()
    state = cell(soup(build.build_report(root)), "c01", "03_train")
    assert state["class"] == ["noresult"]


def test_a_judge_that_failed_its_gate_is_shown_and_marked(tmp_path, monkeypatch):
    root = fake_study.build_study(tmp_path, 4, ("checklist",), 0)
    planted = fake_study.truth(fake_study.design(4))["quality"]
    builder = fake_study.Builder(tmp_path)
    fake_study.add_judge(builder, np.random.default_rng(0), "embedding", planted, passed=False)
    fake_study.run_analysis(root, 4, ("checklist", "embedding"), 0, monkeypatch)
    page = soup(build.build_report(root))
    assert "The judge embedding failed the validity gate" in page.find(role="alert").get_text()
    assert "embedding, no claim" in page.find(id="answer").get_text()
    assert "failed" in page.select_one("table.sortable").get_text()


def test_without_any_valid_judge_nothing_is_recommended(tmp_path, monkeypatch):
    root = fake_study.build_study(tmp_path, 4, (), 0)
    planted = fake_study.truth(fake_study.design(4))["quality"]
    fake_study.add_judge(fake_study.Builder(tmp_path), np.random.default_rng(0), "checklist", planted, passed=False)
    fake_study.run_analysis(root, 4, ("checklist",), 0, monkeypatch)
    answer = soup(build.build_report(root)).find(id="answer").get_text()
    assert "none of them" in answer
    assert "Loss alone would have chosen" in answer


# ---------------------------------------------------------------- whatever is there


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    page = soup(build.build_report(tmp_path))
    assert "There is no result yet" in page.get_text()
    assert cell(page, "study", "06_analysis").get_text() == "not run"


def test_a_study_without_analysis_shows_its_configurations(tmp_path):
    root = fake_study.build_study(tmp_path, 3, ("checklist",), 0)
    page = soup(build.build_report(root))
    assert len(page.select("article.card")) == 3
    assert not page.find(id="results")


@pytest.mark.parametrize(
    "name",
    ["results.csv", "findings.json", "c01/03_train/tables/loss_curve.parquet", "c01/03_train/metrics.json",
     "c01/04_energy/artefacts/answers.parquet",
     "shared/02_synth/artefacts/test_prompts.parquet", "c01/03_train.ipynb", "study/06_analysis.ipynb",
     "study/06_analysis/figures/energy.png"],
)  # fmt: skip
def test_a_broken_file_does_not_break_the_report(root, name):
    (root / name).write_bytes(b"\x00broken{")
    assert soup(build.build_report(root)).find(id="status")


def test_the_same_files_give_the_same_bytes(root):
    def hashes() -> dict[str, str]:
        folder = build.build_report(root).parent
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    assert hashes() == hashes()


def test_a_rebuild_replaces_the_old_pages(root):
    old = build.build_report(root).parent / "c09-03_train.html"
    old.write_text("left over")
    build.build_report(root)
    assert not old.exists()
    assert not list(root.glob(".report*"))


def test_figures_over_the_budget_are_linked_not_dropped(root, monkeypatch):
    monkeypatch.setattr(config_cards, "FIGURE_BYTES", 100_000)
    figures = soup(build.build_report(root)).find(id="figures").find_all("figure")
    assert len(figures) >= 6
    left_out = [figure for figure in figures if not figure.find("img")]
    assert left_out
    assert all(figure.find("a")["href"] == "study-06_analysis.html" for figure in left_out)


def test_alt_texts_come_from_the_executed_notebook(built):
    alts = [image["alt"] for image in soup(built / "telco_report.html").find(id="figures").find_all("img")]
    assert "alt of loss_vs_quality" in alts


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (112, "112th"), (6.5, "6.5")]
)
def test_ordinals(value, text):
    assert config_cards.ordinal(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.03, "0.0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7384, "2 h 03 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_many_configurations_fold_those_without_a_role_and_lose_none(root, monkeypatch):
    monkeypatch.setattr(build, "MANY", 1)
    page = soup(build.build_report(root))
    shown = [card for card in page.select("article.card") if not card.find_parent("details")]
    assert [card["id"] for card in page.select("details#more-configurations article.card")]
    assert all(card.h3.find(class_="tag") for card in shown) and len(page.select("article.card")) == N
    links = soup(root / "report" / "index.html").select("#notebooks li details a")
    assert {link.get_text() for link in links} >= {"c02", "c03", "c04"}


@pytest.mark.nightly
def test_the_report_of_200_configurations_stays_within_5_mb_a_page(tmp_path, monkeypatch):
    """75 words for each of 40 questions, as many as the laptop profile asks; its answers have about 60."""
    root = fake_study.build_study(tmp_path, 200, JUDGES, REPEATS, n_words=75)
    fake_study.run_analysis(root, 200, JUDGES, REPEATS, monkeypatch)
    report = build.build_report(root).parent
    sizes = {name: (report / name).stat().st_size for name in ("telco_report.html", "answers.html", "search.html")}
    assert max(sizes.values()) < 5_000_000, sizes
    page = soup(report / "telco_report.html")
    assert len(page.select("table.sortable tbody tr")) == 200, "every row is in the page, and its script folds them"
