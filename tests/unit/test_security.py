"""Every claim of SECURITY.md names the modules and tests that hold it, and they exist."""

import re

from telco_nb import ROOT

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?|test_[a-z_]+\.py)`", TEXT)


def test_every_module_and_test_that_it_names_exists():
    assert len(NAMES) > 40
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for name in NAMES:
        places = (ROOT / name, ROOT / "telco_nb" / name, ROOT / "telco_nb" / f"{name}.py")
        assert name in tests or any(place.exists() for place in places), name


def test_every_row_of_its_table_names_a_module_and_a_test():
    rows = [row for row in TEXT.splitlines() if row.startswith("| ")][2:]  # without the head and its line
    assert len(rows) >= 10
    for row in rows:
        held = row.strip("|").split("|")[-1]
        assert "tests/" in held and re.search(r"`(?!tests)[a-z_]+/", held), row
