"""Turns executed notebooks into web pages: nbconvert with sanitised outputs, folded code, and links between the pages.

The output of models is untrusted: markup that is not on the allow list is shown as text.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import nbformat
from bleach.sanitizer import Cleaner
from jinja2 import DictLoader
from markupsafe import Markup
from nbconvert.exporters import HTMLExporter
from nbconvert.filters import Highlight2HTML
from traitlets.config import Config

from telco_nb.report.files import Page

ALLOWED_TAGS = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub",
    "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
}  # fmt: skip
ALLOWED_ATTRIBUTES = {
    "*": ["class", "id", "title"],
    "a": ["href"],
    "details": ["open"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan", "scope"],
}
CLEANER = Cleaner(ALLOWED_TAGS, ALLOWED_ATTRIBUTES, protocols={"http", "https", "mailto"}, strip=False)
HIGHLIGHTER = Highlight2HTML(pygments_lexer="python")
IMAGES = ("image/png", "image/jpeg")
IMAGE_FACTS = {"alt": str, "width": int, "height": int}
FOLDED_CODE = (
    "{% extends 'basic/index.html.j2' %}{% block input_group %}"
    "<details class='code'><summary>code</summary>{{ super() }}</details>{% endblock %}"
)


def notebook_body(page: Page, pages: Sequence[Page]) -> Markup:
    """The notebook as HTML, with links to the other pages; for an unreadable notebook, its error."""
    try:
        body, _ = _exporter().from_notebook_node(_plain(nbformat.read(page.source, as_version=4)))
    except Exception as error:  # a record that somebody else has written can hold anything
        body = f"<p>This notebook could not be read: {html.escape(str(error)[:300])}</p>"
    # The corner of a table of pandas is no heading.
    return Markup(_answer_first(_relink(body, page, pages)).replace("<th></th>", "<td></td>"))


def _plain(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook of whose metadata only tags and the text and size of images are left.

    nbconvert writes others into the page as well, sizes even without quotes.
    """
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.get("tags", [])})
        for output in cell.get("outputs", []):
            kept = {}
            for mime in IMAGES:
                facts = output.get("metadata", {}).get(mime, {})
                kept[mime] = {
                    name: facts[name] for name, kind in IMAGE_FACTS.items() if isinstance(facts.get(name), kind)
                }
            output.metadata = nbformat.from_dict(kept)
    return notebook


def first_heading(page: Page) -> str | None:
    """The title of a notebook, which is its question. Raises OSError or ValueError if it cannot be read."""
    cells = json.loads(page.source.read_text(encoding="utf-8"))["cells"]
    lines = ("".join(cell["source"]).splitlines() for cell in cells if cell["cell_type"] == "markdown")
    return next((line.removeprefix("# ") for part in lines for line in part if line.startswith("# ")), None)


def _answer_first(body: str) -> str:
    """The headline of a notebook repeated below its title, and its table of parameters folded."""
    body = re.sub(r'<table class="provenance">.*?</table>', _folded, body, count=1, flags=re.DOTALL)
    boxes = re.findall(r'<div class="headline">[^<]*</div>', body)
    return re.sub("</h1>", lambda end: f"{end[0]}{boxes[-1]}", body, count=1) if boxes else body


def with_contents(page: Markup) -> tuple[Markup, list[tuple[str, Markup]]]:
    """The body of a page with an anchor at each part, and (anchor, title) of the parts."""
    body = str(page)  # methods of Markup would escape what they put in
    titles = [Markup(re.sub("<[^>]*>", "", title)) for title in re.findall(r"<h2>(.*?)</h2>", body)]
    contents = [(f"part-{number}", title) for number, title in enumerate(titles, 1)]
    for anchor, _ in contents:
        body = body.replace("<h2>", f'<h2 id="{anchor}">', 1)
    return Markup(body), contents


def neighbours(page: Page, pages: Sequence[Page]) -> list[tuple[str, str]]:
    """(step, page) of the other steps, in order: of the same scope where there is one, else of the first scope."""
    own = [p for p in pages if p.scope == page.scope and p != page]
    steps = {p.step for p in [*own, page]}
    firsts = {p.step: p for p in reversed(pages) if p.step not in steps and not p.failed}
    return [(p.step + " (failed)" * p.failed, p.name) for p in sorted([*own, *firsts.values()], key=lambda p: p.step)]


def _folded(table: re.Match[str]) -> str:
    return f'<details class="parameters"><summary>Parameters, code and device</summary>{table[0]}</details>'


def _relink(body: str, page: Page, pages: Sequence[Page]) -> str:
    """Turn links between notebooks into links between pages, and remove the target of any other relative link."""

    def replace(match: re.Match[str]) -> str:
        target = html.unescape(match[1])
        if target.startswith("#") or re.match(r"(https?|mailto):", target):
            return match[0]
        step = re.search(r"(\d\d_\w+)(?:\.failed)?\.ipynb$", target)
        name = _page_of(step[1], page, pages) if step else None
        return f'href="{html.escape(name)}"' if name else ""

    return re.sub(r'href="([^"]*)"', replace, body)


def _page_of(step: str, page: Page, pages: Sequence[Page]) -> str | None:
    """The target of a link to a step: its page of the same scope, else its only page, else the table of the index."""
    of_step = [p for p in pages if p.step == step]
    own = [p for p in of_step if p.scope == page.scope]
    good = sorted(own or of_step, key=lambda p: p.failed)
    if not good:
        return None
    return good[0].name if own or len({p.scope for p in of_step}) == 1 else "index.html#status"


class _Highlighted(str):
    """Code with the markup of Pygments. It is escaped already, and cleaning it again would take time."""


def _highlight(source: str, metadata: Any = None) -> _Highlighted:
    return _Highlighted(HIGHLIGHTER(source, language="python"))


def clean(markup: Any) -> Markup:
    """HTML in which everything outside the allow list is shown as text. The style blocks of pandas are removed."""
    if isinstance(markup, _Highlighted):
        return Markup(markup)
    text = re.sub(r'<style(?: scoped| type="text/css")>[^<]*</style>', "", str(markup))
    return Markup(CLEANER.clean(text))


@cache
def _exporter() -> HTMLExporter:
    """The nbconvert exporter of all pages: template `basic`, folded code, sanitised outputs, no network."""
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/html", "text/markdown", *IMAGES, "text/plain"]
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input", "injected-parameters"}
    return HTMLExporter(
        config=config,
        template_name="basic",
        extra_loaders=[DictLoader({"folded.html.j2": FOLDED_CODE})],
        template_file="folded.html.j2",
        sanitize_html=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        **dict.fromkeys(("require_js_url", "mathjax_url", "jquery_url", "mermaid_js_url"), ""),
        filters={"highlight_code": _highlight, "clean_html": clean},
    )
