"""Builds the blind panel: one offline page with the pairs of an export, which writes the votes that an import reads.

It is made by `votes export`, beside the pairs, and not with the report: a page must show the very pairs whose key was
kept, the report is built again and again, and a rater should not get a folder in which configurations have names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from telco_nb.report.rendering import render


def panel_page(name: str, pairs: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML.

    Args:
        name: of the export; the browser keeps the votes of each export apart by it.
        pairs: what a rater gets, in order (`judge.blind_pairs.Export.pairs`).
    """
    data = {"name": name, "pairs": list(pairs)}
    return render("report_panel.html.j2", "report_panel.js", title="Which answer is better?", data=data)
