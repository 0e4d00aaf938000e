"""Renders the templates of the report's pages: escaped text, one style sheet, and one script that the page allows."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from telco_nb import DATA_DIR

TEMPLATES = Environment(
    loader=FileSystemLoader(DATA_DIR), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, script: str = "report.js", **values: Any) -> str:
    """A page as HTML.

    Args:
        template: a file of telco_nb/data.
        script: the only script that runs on the page, a file of telco_nb/data.
        **values: what the template shows; text is escaped.
    """
    source = (DATA_DIR / script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    css = (DATA_DIR / "report.css").read_text(encoding="utf-8")
    shared = {"css": Markup(css), "script": Markup(source), "script_hash": f"sha256-{digest}"}
    return TEMPLATES.get_template(template).render(**shared, **values)
