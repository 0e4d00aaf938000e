"""Executed notebooks as web pages: nbconvert with sanitised outputs, folded code, and links between the pages.

Model output is untrusted: whatever is not on the allow list is shown as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from telco_nb.report.files import Page

ALLOWED_TAGS = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub",
    "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
}  # fmt: skip


def notebook_body(page: Page, pages: Sequence[Page]) -> Markup:
    """The notebook as HTML, its links leading to the other pages; an unreadable one says so."""
    import nbformat

    try:
        notebook = nbformat.read(page.source, as_version=4)
        body, _ = _exporter().from_notebook_node(notebook)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        body = f"<p>This notebook could not be read: {html.escape(str(error)[:300])}</p>"
    return Markup(_relink(body, page, pages))


def _relink(body: str, page: Page, pages: Sequence[Page]) -> str:
    """Links between notebooks become links between pages; a relative link that leads nowhere loses its target."""

    def replace(match: re.Match[str]) -> str:
        target = html.unescape(match[1])
        if target.startswith("#") or re.match(r"(https?|mailto):", target):
            return match[0]
        step = re.search(r"(\d\d_\w+)(?:\.failed)?\.ipynb$", target)
        name = _page_of(step[1], page, pages) if step else None
        return f'href="{html.escape(name)}"' if name else ""

    return re.sub(r'href="([^"]*)"', replace, body)


def _page_of(step: str, page: Page, pages: Sequence[Page]) -> str | None:
    """The page of a step as seen from another: of the same scope, else the only one, else the index's table."""
    of_step = [p for p in pages if p.step == step]
    own = [p for p in of_step if p.scope == page.scope]
    good = sorted(own or of_step, key=lambda p: p.failed)
    if not good:
        return None
    return good[0].name if own or len({p.scope for p in of_step}) == 1 else "index.html#status"


@cache
def _exporter() -> Any:
    """One nbconvert exporter for all pages: template `basic`, folded code, sanitised outputs, no network."""
    from jinja2 import DictLoader
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import Config

    folding = (
        "{% extends 'basic/index.html.j2' %}{% block input_group %}"
        "<details class='code'><summary>code</summary>{{ super() }}</details>{% endblock %}"
    )
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/html", "text/markdown", "image/png", "image/jpeg", "text/plain"]
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input", "injected-parameters"}
    exporter = HTMLExporter(
        config=config,
        template_name="basic",
        extra_loaders=[DictLoader({"folded.html.j2": folding})],
        template_file="folded.html.j2",
        sanitize_html=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        require_js_url="",
        mathjax_url="",
        jquery_url="",
        mermaid_js_url="",
        filters={"highlight_code": _highlight, "clean_html": clean},
    )
    return exporter


class _Highlighted(str):
    """Code as Pygments marks it up: escaped already, so that cleaning it again would only take time."""


def _highlight(source: str, metadata: Any = None) -> _Highlighted:
    return _Highlighted(_highlighter()(source, language="python"))


@cache
def _highlighter() -> Any:
    from nbconvert.filters import Highlight2HTML

    return Highlight2HTML(pygments_lexer="python")


@cache
def _cleaner() -> Any:
    from bleach.sanitizer import Cleaner

    attributes = {
        "*": ["class", "id", "title"],
        "a": ["href"],
        "td": ["colspan", "rowspan"],
        "th": ["colspan", "rowspan", "scope"],
    }
    return Cleaner(tags=ALLOWED_TAGS, attributes=attributes, protocols={"http", "https", "mailto"}, strip=False)


def clean(markup: Any) -> Markup:
    """HTML with everything outside the allow list shown as text. pandas' own style blocks are dropped first."""
    if isinstance(markup, _Highlighted):
        return Markup(markup)
    text = re.sub(r'<style(?: scoped| type="text/css")>[^<]*</style>', "", str(markup))
    return Markup(_cleaner().clean(text))
