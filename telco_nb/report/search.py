"""Builds the search page of a report folder, `report/search.html`: words lead to the parts of the notebooks with them.

The page is data and a script of ours, as the answer explorer: nothing is asked, not even of this machine.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb.report.files import Page, StudyFiles
from telco_nb.report.rendering import render

PAGE = "search.html"
CODE = re.compile(r"<details class=['\"]code['\"]>.*?</details>", re.DOTALL)
PART = re.compile(r'<h2 id="([\w-]+)">')


def parts_of(page: Page, body: str) -> list[dict[str, str]]:
    """The parts of a notebook's page, for the search.

    Args:
        page: the page.
        body: its HTML, with an anchor at each part (`pages.with_contents`).

    Returns:
        One dict a part: page and anchor that the result links to, step and scope, title, and the text without code.
        The text before the first heading is a part without an anchor. Parts without text are left out.
    """
    before, *rest = PART.split(CODE.sub(" ", str(body)))
    parts = [("", "", before)]
    for anchor, text in zip(rest[::2], rest[1::2], strict=True):
        title, _, text = text.partition("</h2>")
        parts.append((anchor, _plain(title), text))
    common = {"page": page.name, "step": page.step + " (failed)" * page.failed, "scope": page.scope}
    found = [common | {"anchor": anchor, "title": title, "text": _plain(text)} for anchor, title, text in parts]
    return [part for part in found if part["text"]]


def _plain(markup: str) -> str:
    """The text of sanitised HTML, in one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", markup)).split())


def findings_of(findings: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The findings of the study as parts of the report."""
    common = {"page": "telco_report.html", "step": "findings", "scope": "", "anchor": "findings"}
    return [common | {"title": f"Finding: {f['verdict']}", "text": str(f["statement"])} for f in findings]


def write_page(study: StudyFiles, parts: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Write the search page of these parts and of the study's findings into `folder`."""
    data = [*findings_of(study.findings), *parts]
    title = f"Search, profile {study.root.name}"
    steps = list(dict.fromkeys(part["step"] for part in data))
    text = render("report_search.html.j2", "report_search.js", title=title, data=data, steps=steps)
    (folder / PAGE).write_text(text, encoding="utf-8")
