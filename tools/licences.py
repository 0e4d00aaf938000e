"""Writes LICENCES.md: the licence of every package of the locks, as its own metadata states it.

`python tools/licences.py`, or `make licences`. Packages of other machines are not installed here; theirs were read
from the published files and stand in ELSEWHERE.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LICENCES = ROOT / "LICENCES.md"
RUN = ("requirements.txt", "requirements-torch.txt", "requirements-model.txt")
TESTS = ("requirements-dev.txt",)
RAY = ("requirements-ray.txt",)
COPYLEFT = re.compile(r"\bA?GPL\b|\bA?GPL-|(?<!Lesser )General Public", re.IGNORECASE)  # the LGPL allows linking
ELSEWHERE = {  # needed on a Mac only or by one version of Python only, or without a licence in the metadata
    "aiohappyeyeballs": "PSF-2.0", "aiohttp": "Apache-2.0 AND MIT", "aiosignal": "Apache-2.0",
    "appnope": "BSD-2-Clause", "frozenlist": "Apache-2.0", "multidict": "Apache-2.0", "overrides": "Apache-2.0",
    "propcache": "Apache-2.0", "yarl": "Apache-2.0",
    "axe-playwright-python": "MIT AND MPL-2.0",  # stated in its files only; MPL-2.0 is that of axe.min.js
    "msgpack": "Apache-2.0", "protobuf": "BSD-3-Clause", "ray": "Apache-2.0",  # the extra is not installed here
}  # fmt: skip
HEAD = """# Licences of the packages

Written by `make licences` from the metadata of the locked packages. A test compares it with what is installed, and
fails for a package under the GPL or AGPL at run time. Nothing of these packages is copied into this repository.
"""


def locked(*files: str) -> dict[str, str]:
    """Name and version of every package that lock files pin, whatever machine it is for."""
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    return dict(sorted(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)))


def licence_of(name: str) -> str:
    """The licence that an installed package states: expression, else classifiers, else its licence field."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    facts = metadata.metadata(name)
    classifiers = [text.split(" :: ")[-1] for text in facts.get_all("Classifier") or [] if "License ::" in text]
    plain = "; ".join(text for text in classifiers if text != "OSI Approved")
    return facts.get("License-Expression") or plain or (facts.get("License") or "").strip().splitlines()[0]


def table(files: tuple[str, ...]) -> str:
    rows = [f"| {name} | {version} | {licence_of(name)} |" for name, version in locked(*files).items()]
    return "\n".join(["| package | version | licence |", "| --- | --- | --- |", *rows, ""])


def render() -> str:
    """The whole text of LICENCES.md; raises PackageNotFoundError for a package that is unknown here."""
    return (
        f"{HEAD}\n## At run time\n\n{table(RUN)}\n## With --engine ray only\n\n{table(RAY)}\n"
        f"## Tests and tools only\n\nNot needed to run a study, and not imported by it.\n\n{table(TESTS)}"
    )


if __name__ == "__main__":
    LICENCES.write_text(render(), encoding="utf-8")
