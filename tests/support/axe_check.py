"""axe-core on an open page: what it finds wrong, in words. Every folded part is opened first."""

from __future__ import annotations

from typing import Any

from axe_playwright_python.sync_playwright import Axe

WIDTHS = (1440, 768, 400)
SCHEMES = ("light", "dark")


def violations(page: Any) -> list[str]:
    """The violations on a page, one line each: rule, element, message."""
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['target']}: {node['failureSummary']}" for rule in found for node in rule["nodes"]]
