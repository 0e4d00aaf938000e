"""Exports a finished study's results in forms that others read: `python -m telco_nb results export FOLDER`.

The folder is an RO-Crate 1.1 (https://w3id.org/ro/crate/1.1): `ro-crate-metadata.json` says what was run, when, with
which code, and what every file is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from telco_nb import ROOT
from telco_nb.commands.common import (
    CommandError,
    ExportAction,
    NewFolder,
    Profile,
    Replace,
    errors_as_exit_codes,
    locked,
)  # fmt: skip
from telco_nb.commands.export_folder import SUMS, refuse_folder, whole_folder
from telco_nb.commands.inspect_log import ended_at, inspect_logs
from telco_nb.report.files import READS, read_study
from telco_nb.report.publish import publish_study
from telco_nb.study import params
from telco_nb.study.record import complete_swaps, profile_root, read_manifest, sha256, write_json
from telco_nb.study.seal import require_unchanged

CRATE = "ro-crate-metadata.json"
CRATE_FORM = "https://w3id.org/ro/crate/1.1"
MEDIA_TYPES = {
    ".csv": "text/csv", ".html": "text/html", ".ipynb": "application/x-ipynb+json", ".json": "application/json",
    ".png": "image/png", ".xz": "application/x-xz",
}  # fmt: skip
ABOUT_FOLDERS = {
    "inspect": "Answers and scores of one configuration or anchor, as a log of Inspect.",
    "notebooks": "An executed notebook: one of each step, for the configurations that the findings name.",
    "tables": "A table of the analysis, or a judge's ranking of all runs and anchors.",
    "verdicts": "Every question to a judge with its verdict and reason, as JSON lines; `rerank` reads them.",
}
ABOUT = {
    "results.csv": "One row per configuration: factors, losses, energy, scores and places.",
    "findings.json": "The findings, each with value, interval, verdict and what blocks it.",
    "telco_report.html": "The report, one page that needs no network.",
    "answers.html": "Every question with every answer and verdict.",
    "loss_vs_quality.png": "Validation loss against judged quality.",
    "about.json": "Date, machine, environment and commits of the run.",
}


def export(profile: str, folder: Path, replace: bool = False) -> list[str]:
    """Write the results of a finished study into a folder, whole or not at all.

    Args:
        profile: the study.
        folder: the folder; it must not exist, or be empty.
        replace: replace an earlier export.

    Returns:
        The files, in order, without the checksums.

    Raises:
        ParameterError: there is no such profile.
        CommandError: the folder is in use, or the study is not finished.
    """
    folder = params.given_path(folder, "FOLDER")
    refuse_folder(folder, CRATE, replace)  # before the work
    root = profile_root(profile)
    if read_manifest(root, "study", "06_analysis") is None:
        params.load_study(profile)  # a misspelt profile is named as such
        raise CommandError(f"{root} holds no finished study. Run: ./run_all.py --profile {profile}")
    with whole_folder(folder, CRATE, replace) as temporary:
        with locked(root):
            complete_swaps(root)
            publish_study(root, temporary)
        require_unchanged(root, *READS)
        for name, log in inspect_logs(read_study(root, [])).items():
            write_json(temporary / "inspect" / name, log)
        write_json(temporary / CRATE, crate(root, temporary))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def crate(root: Path, folder: Path) -> dict[str, Any]:
    """The RO-Crate metadata of an export.

    Args:
        root: the study's folder.
        folder: the export's folder, with all of its files.

    Returns:
        The flattened JSON-LD document: the crate, its files, the software, its authors and the run.
    """
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    analysis = read_manifest(root, "study", "06_analysis")
    assert analysis is not None  # `export` has refused an unfinished study
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    files = [_file(folder / name, name) for name in names]
    authors = [_organization(author["name"]) for author in citation["authors"]]
    graph = [
        {"@id": CRATE, "@type": "CreativeWork", "about": {"@id": "./"}, "conformsTo": {"@id": CRATE_FORM}},
        _dataset(root, citation, analysis, files, authors),
        *files,
        *authors,
        _licence(citation["license"]),
        _software(citation, analysis),
        _run(analysis, files),
    ]
    return {"@context": f"{CRATE_FORM}/context", "@graph": graph}


def _references(entities: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"@id": entity["@id"]} for entity in entities]


def _one_or_all(entities: Iterable[Mapping[str, Any]]) -> Any:
    """RO-Crate wants a single value by itself, without a list around it."""
    found = _references(entities)
    return found[0] if len(found) == 1 else found


def _organization(name: str) -> dict[str, str]:
    return {"@id": f"#{name.replace(' ', '-')}", "@type": "Organization", "name": name}


def _licence(name: str) -> dict[str, str]:
    return {"@id": f"https://spdx.org/licenses/{name}", "@type": "CreativeWork", "name": name}


def _file(path: Path, name: str) -> dict[str, Any]:
    about = ABOUT_FOLDERS[name.partition("/")[0]] if "/" in name else ABOUT[name]
    facts = {"contentSize": str(path.stat().st_size), "sha256": sha256(path)}
    facts |= {"encodingFormat": MEDIA_TYPES[path.suffix]}
    return {"@id": name, "@type": "File", "name": name, "description": about} | facts


def _dataset(
    root: Path,
    citation: Mapping[str, Any],
    analysis: Mapping[str, Any],
    files: Iterable[Mapping[str, Any]],
    authors: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{citation['title']} Results of the {root.name} study",
        "description": citation["abstract"],
        "datePublished": ended_at(analysis),
        "license": {"@id": f"https://spdx.org/licenses/{citation['license']}"},
        "author": _one_or_all(authors),
        "publisher": _one_or_all(authors),
        "hasPart": _references(files),
        "mentions": {"@id": "#run"},
    }


def _software(citation: Mapping[str, Any], analysis: Mapping[str, Any]) -> dict[str, Any]:
    commit = analysis["environment"].get("git_commit") or "no git"
    return {
        "@id": "#telco-nb",
        "@type": "SoftwareApplication",
        "name": "telco-nb",
        "softwareVersion": f"{citation['version']}, {commit}",
    }


def _run(analysis: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "@id": "#run",
        "@type": "CreateAction",
        "name": "Training, answering, judging and analysis",
        "instrument": {"@id": "#telco-nb"},
        "result": _references(files),
        "endTime": ended_at(analysis),
    }


EPILOG = """
**Example**

- `python -m telco_nb results export telco-results`: the laptop study as an RO-Crate with logs for `inspect view`
"""


def main(
    action: ExportAction,
    folder: NewFolder,
    profile: Profile = "laptop",
    replace: Replace = False,
) -> None:
    """Export a study's results in forms that others read: an RO-Crate, with Inspect logs of all answers."""
    with errors_as_exit_codes("results"):
        files = export(profile, folder, replace)
        print(f"{folder}: {len(files)} files, described by {CRATE}. Answers: inspect view --log-dir {folder}/inspect")
