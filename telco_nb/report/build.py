"""Builds the report: one self-contained file for readers, and one page per executed notebook with an index.

Everything is computed from the files of the profile's folder, so the report works when steps failed or are missing, and
the same files give the same bytes. The output of models is untrusted: the templates escape it, notebook outputs pass an
allow list, and a content security policy lets only the report's own script run.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from telco_nb.analysis.statements import name_list, words_of
from telco_nb.judge.ranking import interval_text
from telco_nb.report import answer_explorer, config_cards, search
from telco_nb.report.config_cards import GUESSED
from telco_nb.report.files import Cell, Page, StudyFiles, duration, read_or_none, read_published, read_study
from telco_nb.report.pages import first_heading, neighbours, notebook_body, with_contents
from telco_nb.report.rendering import render
from telco_nb.report.tiles import Tile, base_models, energy_kinds, first_sentence, first_tiles
from telco_nb.study.machine import device_text
from telco_nb.study.plan import STEPS

QUESTION = (
    "Which LoRA configuration should answer telecom customers, at what energy, and can validation loss alone pick it?"
)
NO_RESULT = "There is no result yet: 06_analysis has not finished."
MANY = 40  # configurations from which on cards without a role and links to further scopes are folded
JUDGE_PARTS = ("score", "low", "high", "rank", "rank_low", "rank_high", "gate")
# The findings that a reader looks up together; in this order, the first group is open.
GROUPS = {
    "The decision": (
        "primary", "deploy", "fitness.", "floor.", "taught", "front_runner", "loss_choice", "confidence", "gain.",
    ),
    "Loss against judged quality": (
        "tau.", "divergence.", "regret.", "top3.", "best_loss_rank.", "worst_loss_rank.", "misplaced.",
    ),
    "Why loss and quality part": ("parting.", "strength."),
    "Which parameter moves what": ("effect.",),
    "Energy and cost": ("energy_ratio", "pareto.", "drift", "serving"),
    "Do the judges agree?": ("judges.", "kappa.", "rules.", "effective_judges", "alpha.", "self_preference."),
    "Chance, and what a study of this size can tell": ("noise_floor", "luck.", "power", "equivalence."),
}  # fmt: skip
TONES = {"supported": "good", "blocked": "bad", "not fit": "bad", "refuted": "bad", "cannot tell": "note"}


def build_report(profile_root: Path, jobs: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write `report/` in the profile's folder; returns the path of the one-file report.

    `jobs` are the jobs of the last run, with scope, step, status and reason. They add reasons; only the files decide
    which steps have succeeded.
    """
    root = Path(profile_root)
    work = root / ".report.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    study = read_study(root, jobs)
    found: list[dict[str, str]] = []
    for page in study.pages:
        body, contents = with_contents(notebook_body(page, study.pages))
        (work / page.name).write_text(_page(page, study.pages, body, contents), encoding="utf-8")
        found += search.parts_of(page, body)
    search.write_page(study, found, work)
    content: dict[str, Any] = _content(study) | {"explorer": answer_explorer.write_page(study, work)}
    cards = config_cards.config_cards(study)
    shown = [card for card in cards if len(cards) <= MANY or card["role"] or card["failed"]]
    whole: dict[str, Any] = content | {"figures": config_cards.figures(root), "cards": shown}
    whole["folded_cards"] = [card for card in cards if card not in shown]
    content["notebooks"] = _notebooks(study)
    for name, values, single in (("index.html", content, False), ("telco_report.html", whole, True)):
        text = render("report.html.j2", **values, contents=_contents(values), single=single)
        (work / name).write_text(text, encoding="utf-8")
    for name in ("results.csv", "findings.json"):
        if (root / name).is_file():
            shutil.copyfile(root / name, work / name)
    return _put_in_place(work, root / "report") / "telco_report.html"


def _put_in_place(work: Path, final: Path) -> Path:
    """Replace the old report by the new one, so that a reader never sees a half-written folder."""
    old = final.with_name(".report.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    work.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


# ---------------------------------------------------------------- the first screen


def _content(study: StudyFiles) -> dict[str, Any]:
    """The values that the index and the one-file report share."""
    deploy, kinds = study.finding("deploy"), name_list(energy_kinds(study))
    energy = f"Training energy is {kinds}. " if kinds else ""
    tiles = first_tiles(study, read_published(study.root.name)) if deploy else []
    shown: list[dict[str, Any]] = [
        f | {"tone": TONES.get(f["verdict"], ""), "reasons": _new_reasons(f)} for f in study.findings
    ]
    return {
        "title": f"Telco LoRA study, profile {study.root.name}",
        "question": QUESTION,
        "tags": _tags(study),
        "alarms": _alarms(study),
        "lead": first_sentence(deploy["statement"] if deploy else NO_RESULT),
        "words": _words(study, tiles),
        "tiles": tiles,
        "results": _results(study),
        "legend": f"{energy}Places count from 1, the best.",
        "csv": base64.b64encode(read_or_none((study.root / "results.csv").read_bytes) or b"").decode(),
        "findings": _grouped(shown),
        "figures": [],
        "cards": [],
        "folded_cards": [],
        "many": MANY,
        "notebooks": [],
        "work": _put_to_work(study),
        "status": _status(study),
        "provenance": _provenance(study),
    }


def _words(study: StudyFiles, tiles: Sequence[Tile]) -> list[tuple[str, str]]:
    """(word, meaning) of the words on the page that a reader may not know; none before there is a result."""
    if study.results.empty:
        return []
    shown = [line for tile in tiles for line in (tile.big, *tile.lines)]
    return words_of([*shown, *(f["statement"] for f in study.findings), "LoRA", "validation loss", "log-odds"])


def _new_reasons(finding: Mapping[str, Any]) -> list[str]:
    """The reasons that block a finding and that its statement does not already give."""
    return [reason for reason in dict.fromkeys(finding["blocked_by"]) if reason not in finding["statement"]]


def _grouped(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of the findings: title, what is shown in the open, and what is folded (`_folded`)."""
    group_of = {
        f["id"]: next((t for t, starts in GROUPS.items() if f["id"].startswith(starts)), "More") for f in findings
    }
    groups = []
    for title in [*GROUPS, "More"]:
        members = [f for f in findings if group_of[f["id"]] == title]
        folded = _folded(members)
        hidden = [f for _, group in folded for f in group]
        shown = sum(f["verdict"] == "supported" for f in members)
        count = f"{len(members)}{f', {shown} supported' if shown else ''}"
        groups.append(
            {"title": title, "count": count, "open": [f for f in members if f not in hidden], "folded": folded}
        )
    return [group for group in groups if group["open"] or group["folded"]]


def _folded(findings: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(reason, findings) of the findings that one reason blocks alike; the decision and the claim stay in the open."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        if finding["verdict"] in ("blocked", "not estimable") and finding["id"] not in ("deploy", "primary"):
            groups.setdefault("; ".join(dict.fromkeys(finding["blocked_by"])), []).append(finding)
    return [(reason, group) for reason, group in groups.items() if reason and len(group) > 1]


def _tags(study: StudyFiles) -> list[tuple[str, str]]:
    """Labels under the question: (text, style)."""
    tags = [(f"profile {study.root.name}", ""), (f"{len(study.results)} configurations", "")]
    tags += [(model, "") for model in base_models(study)[:1]]
    kinds = energy_kinds(study)
    tags += [(f"energy {kind}", "note" if kind in GUESSED else "") for kind in kinds]
    for sort, judges in study.judges_by_sort().items():
        tags.append((f"judged by {sort}: {name_list(judges)}", "note" if sort == "offline rules" else ""))
    return tags


def _alarms(study: StudyFiles) -> list[str]:
    """Warnings above the numbers."""
    alarms = []
    bad = [f"{s}/{t}" for (s, t), c in study.cells.items() if c.state in ("failed", "blocked", "noresult")]
    if bad:
        alarms.append(f"{_steps(bad)} of {len(study.cells)} failed or could not run: {_first_names(bad)}.")
    missing = [f"{s}/{t}" for (s, t), c in study.cells.items() if c.state == "missing"]
    if missing:
        alarms.append(f"{_steps(missing)} not run yet: {_first_names(missing)}.")
    for name, known in (("results.csv", len(study.results)), ("findings.json", len(study.findings))):
        if not known and (study.root / name).is_file():
            alarms.append(f"{name} is there but cannot be used. Run 06_analysis again.")
    if len(study.results) and ("study", "06_analysis") not in study.manifests:
        alarms.append("The analysis has no record: the numbers below are of an earlier run.")
    energy = (study.finding("energy_ratio") or {}).get("blocked_by")
    if energy:
        alarms.append(f"Energy carries no headline: {'; '.join(energy)}.")
    failed = [judge for judge in study.judges if "failed" in set(study.results[f"{judge}_gate"])]
    ranked = [judge for judge in failed if study.results[f"{judge}_rank"].notna().any()]
    unranked = [judge for judge in failed if judge not in ranked]
    for judges, effect in ((ranked, "the ranking is shown but carries no headline"), (unranked, "it ranks nothing")):
        if judges:
            subject = f"The judge{'s' if len(judges) > 1 else ''} {name_list(judges)}"
            alarms.append(f"{subject} failed the validity gate: {effect}.")
    return alarms


def _steps(names: Sequence[str]) -> str:
    return f"{len(names)} step{'s' if len(names) > 1 else ''}"


def _first_names(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(anchor, title) of the parts that the report has."""
    parts = ("notebooks", "results", "figures", "findings", "cards", "work", "status", "provenance")
    names = {"cards": ("configurations", "Configurations"), "status": ("status", "What ran")}
    names |= {"work": ("work", "Put it to work")}
    return [names.get(part, (part, part.capitalize())) for part in parts if content[part]]


# ---------------------------------------------------------------- results table


def _results(study: StudyFiles) -> dict[str, Any] | None:
    """The results table, in the order of the places where a judge has ranked; None without results."""
    if study.results.empty:
        return None
    ranked = [judge for judge in study.judges if study.results[f"{judge}_rank"].notna().any()]
    ranked.sort(key=lambda judge: set(study.results[f"{judge}_gate"].dropna()) != {"passed"})
    place = f"{ranked[0]}_rank" if ranked else None
    frame = study.results.sort_values(place, kind="stable", na_position="last") if place else study.results
    table = _columns(study, frame)
    sorted_by = f"place ({ranked[0]})" if ranked else None
    columns = [
        {"title": title, "numeric": cells[0]["numeric"], "sorted": title == sorted_by} for title, cells in table.items()
    ]
    cells = zip(*table.values(), strict=True)
    rows = [
        {"chosen": config == study.front_runner, "cells": row} for config, row in zip(frame.index, cells, strict=True)
    ]
    return {"columns": columns, "rows": rows}


def _columns(study: StudyFiles, frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """The cells of the results table by the title of their column: what is compared first, the parameters last."""
    kinds, table = energy_kinds(study), {"config": _texts(frame.index)}
    for judge in study.judges:
        score, low, high, *ranks, gate = (frame[f"{judge}_{part}"] for part in JUDGE_PARTS)
        table |= {f"place ({judge})": _numbers(ranks[0], "g", *ranks[1:])}
        table |= {f"{study.judge_name(judge)} score": _numbers(score, "+.2f", low, high)}
        if set(gate.dropna()) - {"passed"}:
            table[f"{judge} gate"] = _texts(gate)
    energy = _numbers(frame["train_energy_wh"], ".3g", frame["train_energy_low_wh"], frame["train_energy_high_wh"])
    if len(kinds) > 1:
        for cell, kind in zip(energy, frame["energy_kind"], strict=True):
            cell["interval"] += f" {kind}"
    table[f"training energy, {kinds[0]} (Wh)" if len(kinds) == 1 else "training energy (Wh)"] = energy
    table["validation loss"] = _numbers(frame["val_loss"], ".4f", frame["val_loss_low"], frame["val_loss_high"])
    table |= {"target modules": _texts(frame["target_modules"]), "LoRA rank": _numbers(frame["rank"], "g")}
    return table | {name: _numbers(frame[name.replace(" ", "_")], "g") for name in ("epochs", "learning rate")}


def _texts(values: Iterable[Any]) -> list[dict[str, Any]]:
    texts = [None if pd.isna(value) else str(value) for value in values]
    return [{"value": text, "text": text or "", "interval": "", "numeric": False} for text in texts]


def _numbers(values: pd.Series, digits: str, *bounds: pd.Series) -> list[dict[str, Any]]:
    """Table cells: the number to sort by, its text and its interval. A missing number stays empty."""
    cells = []
    for value, *interval in zip(values, *bounds, strict=True):
        cell: dict[str, Any] = {"value": None, "text": "", "interval": "", "numeric": True}
        if not pd.isna(value):
            cell |= {"value": float(value), "text": f"{value:{digits}}"}
            if not all(pd.isna(bound) for bound in interval):  # one bound that is open is shown as open
                cell["interval"] = interval_text(*interval, digits)
        cells.append(cell)
    return cells


# ---------------------------------------------------------------- status and provenance


def _notebooks(study: StudyFiles) -> list[dict[str, Any]]:
    """Per step that has run: its question, the page of its first scope, and the pages of the other scopes."""
    found = []
    for step in STEPS:
        pages = [page for page in study.pages if page.step == step and not page.failed]
        if pages:
            others = [(page.scope, page.name) for page in pages[1:]]
            question = read_or_none(first_heading, pages[0]) or step
            first = {"step": step, "question": question, "scope": pages[0].scope, "href": pages[0].name}
            found.append(first | {"others": others})
    return found


def _put_to_work(study: StudyFiles) -> dict[str, Any] | None:
    """The commands that put the front-runner to work, as in README.md, and whether it is fit; None without a choice."""
    config, profile = study.front_runner, study.root.name
    if config is None:
        return None
    option = "" if profile == "laptop" else f" --profile {profile}"
    commands = (f"chat {config} --beside", f"export {config} {config}-peft --to hf", f"serve {config} --port 8000")
    lines = [f"python -m telco_nb {command}{option}" for command in commands]
    return {"config": config, "lines": lines, "fit": (study.finding("deploy") or {}).get("verdict") != "not fit"}


def _status(study: StudyFiles) -> dict[str, Any]:
    states = [cell.state for cell in study.cells.values()]
    words = {"ok": "ok", "failed": "failed", "blocked": "blocked", "noresult": "without result", "missing": "not run"}
    counts = [f"{states.count(state)} {word}" for state, word in words.items() if state in states]
    rows = [
        {"scope": scope, "cells": [study.cells.get((scope, step), Cell("")) for step in STEPS]}
        for scope in study.scopes
    ]
    return {"summary": f"{len(states)} steps: {', '.join(counts)}.", "steps": STEPS, "rows": rows}


def _provenance(study: StudyFiles) -> list[tuple[str, str]]:
    """The origin of the numbers, from the manifests. Where steps differ, all values are shown."""
    manifests = list(study.manifests.values())
    if not manifests:
        return [("records", "none")]
    environment = [m.get("environment", {}) for m in manifests]
    devices = [f"{device_text(d)}, {d.get('system')}" for d in (m["device"] for m in manifests)]
    commits = [
        f"{(e.get('git_commit') or 'no git')[:12]}{', uncommitted changes' if e.get('git_dirty') else ''}"
        for e in environment
    ]
    packages = ("python", "torch", "transformers", "peft")
    versions = [", ".join(f"{p} {e[p]}" for p in packages if e.get(p)) for e in environment]
    started = sorted(m["started_at"] for m in manifests)
    analysis = study.manifests.get(("study", "06_analysis"), {})
    return [
        ("profile", study.root.name),
        ("code", _distinct(commits)),
        ("versions", _distinct(versions)),
        ("device", _distinct(devices)),
        ("started", f"{started[0]} to {started[-1]}"),
        ("execution time", duration(sum(m["seconds"] for m in manifests))),
        ("seeds", _distinct(str(m["parameters"]["seed"]) for m in manifests if "seed" in m["parameters"])),
        ("content key of the analysis", str(analysis.get("key") or "-")),
        ("records", f"{len(manifests)} manifests, schema {_distinct(str(m['schema_version']) for m in manifests)}"),
    ]


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values)) or "-"


# ---------------------------------------------------------------- rendering


def _page(page: Page, pages: Sequence[Page], body: Markup, contents: list[tuple[str, Markup]]) -> str:
    """The page of one executed notebook, with links to the other steps and to its own parts."""
    return render(
        "report_page.html.j2",
        title=f"{page.scope} {page.step}",
        notebook=body,
        contents=contents,
        neighbours=neighbours(page, pages),
        failed=page.failed,
    )
