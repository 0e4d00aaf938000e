"""The report in a real browser, from file://: it loads nothing, breaks nothing, and works narrow, dark and on paper."""

from __future__ import annotations

import base64
import copy
import json
import os
from pathlib import Path

import fake_study
import nbformat
import pytest
from axe_check import SCHEMES, WIDTHS, violations
from bs4 import BeautifulSoup
from nbclient import NotebookClient

from telco_nb import ROOT
from telco_nb.report import build, pdf
from telco_nb.study import record

N, JUDGES, REPEATS = 16, ("checklist", "embedding"), 2


def execute_06(root: Path) -> None:
    """Run the real notebook 06 in a real kernel on the tree, as the runner would."""
    job = fake_study.analysis_job(root, N, JUDGES, REPEATS)
    job_file = root / "job.json"
    job_file.write_text(json.dumps(job))
    notebook = nbformat.read(ROOT / "notebooks" / "06_analysis.ipynb", as_version=4)
    place = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    source = "\n".join(f"{name} = {value!r}" for name, value in job["parameters"].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**os.environ, record.JOB_VARIABLE: str(job_file)})
    record.publish_step(root, "study", "06_analysis")
    nbformat.write(notebook, root / "study" / "06_analysis.ipynb")


@pytest.fixture(scope="module")
def built(browser, tmp_path_factory) -> Path:
    """The report of a study with one failed step, behind a real execution of 06."""
    outputs = tmp_path_factory.mktemp("outputs")
    root = fake_study.build_study(outputs, N, JUDGES, REPEATS)
    execute_06(root)
    fake_study.Builder(outputs).fail("03_train", "c03")
    return build.build_report(root).parent


def test_the_answer_is_on_the_first_screen(built, open_page, tmp_path):
    page = open_page(built / "telco_report.html")
    page.screenshot(path=tmp_path / "first_screen.png")
    for tile in page.locator(".tile").all():
        box = tile.bounding_box()
        assert box["y"] + box["height"] <= 900
    first = page.locator("#answer").inner_text()
    assert "Deploy" in first and "estimated" in first and "Loss alone would have chosen" in first
    assert page.locator("[role=alert]").is_visible()


def test_every_figure_is_drawn(built, open_page):
    page = open_page(built / "telco_report.html")
    drawn = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 100 && i.alt.length > 10)")
    assert len(drawn) >= 7
    assert all(drawn)


def test_columns_sort_both_ways_as_numbers(built, open_page):
    page = open_page(built / "telco_report.html")
    head = page.locator("table.sortable thead th", has_text="validation loss")
    place = head.evaluate("e => e.cellIndex")
    read = f"[...document.querySelectorAll('table.sortable tbody tr')].map(r => Number(r.cells[{place}].dataset.value))"
    head.locator("button").click()
    rising = page.evaluate(read)
    assert rising == sorted(rising) and len(rising) == N
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert page.evaluate(read) == rising[::-1]


def test_code_is_folded_and_one_button_shows_it(built, open_page):
    page = open_page(built / "study-06_analysis.html")
    code = page.locator("details.code")
    assert code.count() > 10
    assert page.locator("details.code[open]").count() == 0
    assert not page.locator("details.code .highlight").first.is_visible()
    page.get_by_role("button", name="Show code").click()
    assert page.locator("details.code[open]").count() == code.count()
    code.first.locator("summary").click()
    assert page.locator("details.code[open]").count() == code.count() - 1


def test_sample_answers_unfold_and_a_script_in_them_is_text(built, open_page):
    page = open_page(built / "telco_report.html")
    page.get_by_role("button", name="Show all sample answers").click()
    answer = page.locator("#config-c01 blockquote").first
    assert answer.is_visible()
    assert fake_study.SCRIPT in answer.inner_text()
    assert page.title() != "owned"


def test_a_script_in_a_notebooks_output_is_text(built, open_page):
    page = open_page(built / "c01-03_train.html")
    assert page.locator(".output_html table td", has_text="<script>document.title").count() == 1
    assert "The loss is 0.5. <script>" in page.locator(".output_markdown").inner_text()
    assert page.title() == "c01 03_train"


def test_a_foreign_script_or_image_is_refused_even_if_markup_got_through(built, browser, tmp_path):
    spoil = "<script>document.title='owned'</script><img src='https://example.com/x.png'>"
    spoiled = tmp_path / "index.html"
    text = (built / "index.html").read_text(encoding="utf-8")
    spoiled.write_text(text.replace("</main>", f"{spoil}</main>"), encoding="utf-8")
    page, refusals, asked = browser.new_page(), [], []
    page.on("console", lambda message: refusals.append(message.text))
    page.on("response", lambda response: asked.append(response.url) if response.url.startswith("http") else None)
    page.goto(spoiled.as_uri())
    title = page.title()
    page.close()
    assert title != "owned"
    assert sum("Content Security Policy" in text for text in refusals) == 2
    assert asked == []


@pytest.mark.parametrize(
    "name",
    ["telco_report.html", "index.html", "study-06_analysis.html", "c03-03_train.failed.html", "search.html#q=loss"],
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_pixels_are_enough(built, open_page, name, scheme):
    name, _, fragment = name.partition("#")
    page = open_page(built / name, width=400, height=800, scheme=scheme, fragment=fragment)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_decision_stands_open_and_one_button_shows_all_findings(built, open_page):
    page = open_page(built / "telco_report.html", width=400, height=800)
    groups = page.locator("#findings > details")
    opened = [group.get_attribute("open") is not None for group in groups.all()]
    assert opened == [True] + [False] * (len(opened) - 1) and len(opened) > 3
    assert groups.first.locator("li").first.is_visible() and not groups.nth(1).locator("li").first.is_visible()
    page.get_by_role("button", name="Show all findings").click()
    assert all(item.is_visible() for item in page.locator("#findings li").all())


def test_links_of_the_index_open_pages(built, open_page):
    page = open_page(built / "index.html")
    page.locator("#status td.failed a").first.click()
    assert "This attempt failed" in page.locator(".alarm").inner_text()
    page.get_by_role("link", name="Report").click()
    assert page.locator("#results").is_visible()
    page.locator("#status").get_by_role("link", name="ok").last.click()
    assert page.locator("main.notebook h1").is_visible()


def test_it_prints_with_answers_unfolded(built, open_page, tmp_path):
    page = open_page(built / "telco_report.html")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 100_000
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 between its margins, at 96 dots per inch
    assert all(tile.bounding_box()["y"] + tile.bounding_box()["height"] <= 1000 for tile in page.locator(".tile").all())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#configurations details:not([open])").count() == 0


def test_chromium_prints_the_one_file_report(built, browser):
    printed = pdf.print_pdf(built / "telco_report.html", pdf.require_chromium())
    assert printed == built / "telco_report.pdf"
    data = printed.read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 100_000


def test_the_csv_can_be_taken_out_of_the_one_file(built, open_page):
    page = open_page(built / "telco_report.html")
    href = page.get_by_role("link", name="Download as CSV").get_attribute("href")
    assert base64.b64decode(href.partition("base64,")[2]) == (built / "results.csv").read_bytes()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_wrong_with_the_report_and_a_notebooks_page(built, open_page, width, scheme):
    for name in ("telco_report.html", "study-06_analysis.html"):
        assert violations(open_page(built / name, width=width, scheme=scheme)) == []
    assert violations(open_page(built / "search.html", width=width, scheme=scheme, fragment="q=loss")) == []


def search(page, words: str) -> list[str]:
    """Type words into the search page by keyboard; the hits that it shows."""
    page.get_by_role("searchbox").fill("")
    page.keyboard.type(words)
    return [hit.inner_text() for hit in page.locator("#hits li").all()]


def test_words_lead_to_the_part_of_the_notebook_that_holds_them(built, open_page):
    page = open_page(built / "index.html")
    page.get_by_role("link", name="Search all notebooks").click()
    assert page.evaluate("document.activeElement.id") == "words"
    page.get_by_label("In").select_option("06_analysis")
    hits = search(page, "lack of fit holm")
    assert hits and all("06_analysis study" in hit for hit in hits) and page.locator("#hits mark").count()
    assert f"{len(hits)} of " in page.locator("#status").inner_text()
    page.locator("#hits a").first.click()
    heading = page.locator(f"h2#{page.url.partition('#')[2].partition(':')[0]}")
    assert "06_analysis" in page.url and heading.inner_text() == hits[0].partition(" 06_analysis")[0]
    assert page.evaluate("scrollY") > 0
    page.go_back()
    assert page.get_by_role("searchbox").input_value() == "lack of fit holm"  # the address keeps the question


def test_the_search_finds_findings_and_conversations_by_step_and_says_when_there_is_nothing(built, open_page):
    page = open_page(built / "search.html")
    statement = json.loads((built / "findings.json").read_text())[0]["statement"]
    assert any("Finding" in hit for hit in search(page, " ".join(statement.split()[:6]).rstrip(".,:")))
    everywhere = len(search(page, "loss"))
    page.get_by_label("In").select_option("findings")
    assert 0 < page.locator("#hits li").count() < everywhere
    page.get_by_label("In").select_option("")
    assert search(page, "rossword") == [] and search(page, "oss") == []  # words are found from their beginning
    assert search(page, "loss zzzz") == [] and "Nothing holds all" in page.locator("#status").inner_text()


def test_a_script_in_a_notebook_is_text_on_the_search_page_too(built, open_page):
    page = open_page(built / "search.html")
    hits = search(page, "<script>document.title")
    assert hits and all("<script>" in hit for hit in hits) and page.title().startswith("Search, profile")


def test_a_long_table_scrolls_below_its_head_and_can_be_reached_by_keyboard(built, open_page):
    page = open_page(built / "telco_report.html", height=400)
    part, head = page.locator("#results .scroll"), page.locator("#results thead th").first
    part.evaluate("e => { e.scrollIntoView(); e.scrollTop = e.scrollHeight }")
    assert part.evaluate("e => e.scrollTop") > 0 and part.get_attribute("tabindex") == "0"
    top, last = part.bounding_box()["y"], page.locator("#results tbody tr").last.bounding_box()
    assert abs(head.bounding_box()["y"] - top) < 2 and last["y"] < top + part.bounding_box()["height"]


@pytest.fixture
def long_table(built, tmp_path) -> Path:
    """The report with 60 rows in its table of results, whose validation losses are 1 to 60."""
    page = BeautifulSoup((built / "telco_report.html").read_text(encoding="utf-8"), "html.parser")
    body = page.select_one("table.sortable tbody")
    place = [head.get_text() for head in page.select("table.sortable thead th")].index("validation loss")
    row = body.find("tr").extract()
    body.clear()
    for i in range(60):
        row.find_all(["th", "td"])[place]["data-value"] = str(i + 1)
        body.append(copy.copy(row))
    path = tmp_path / "long.html"
    path.write_text(str(page), encoding="utf-8")
    return path


LOSSES = """[...document.querySelectorAll('table.sortable tbody tr')].filter(row => row.checkVisibility())
  .map(row => Number(row.cells[[...document.querySelectorAll('table.sortable thead th')]
    .findIndex(head => head.textContent === 'validation loss')].dataset.value))"""


def test_a_long_table_shows_its_first_rows_and_a_key_shows_all(long_table, open_page):
    page = open_page(long_table)
    assert page.evaluate(LOSSES) == [*range(1, 51)]
    button = page.get_by_role("button", name="Show all 60 rows")
    assert button.get_attribute("aria-expanded") == "false"
    assert page.locator(f"#{button.get_attribute('aria-controls')}").evaluate("e => e.matches('table.sortable')")
    assert "Rows 1 to 50 of 60" in page.locator(".more-rows [role=status]").inner_text()
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate(LOSSES) == [*range(1, 61)]
    less = page.get_by_role("button", name="Show the first 50 rows")
    assert less.get_attribute("aria-expanded") == "true" and less.evaluate("e => e === document.activeElement")
    page.keyboard.press("Space")
    assert len(page.evaluate(LOSSES)) == 50
    assert page.locator(".more-rows").count() == 1, "short tables have no such button"


def test_a_long_table_is_sorted_over_all_its_rows_before_it_is_folded(long_table, open_page):
    page = open_page(long_table)
    head = page.locator("table.sortable thead th", has_text="validation loss").locator("button")
    head.click()
    head.click()
    assert page.evaluate(LOSSES) == [*range(60, 10, -1)]


def test_paper_has_every_row_of_a_long_table(long_table, open_page):
    page = open_page(long_table)
    page.emulate_media(media="print")
    assert len(page.evaluate(LOSSES)) == 60 and not page.locator(".more-rows").is_visible()
