"""The report: one self-contained file for readers, and one page per executed notebook behind an index.

Everything is computed from the files of the profile's folder, so it works when steps failed or are missing, and the
same files give the same bytes. Model output is untrusted: templates escape it, notebook outputs go through an allow
list, and a content security policy lets nothing run but our own script.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from telco_nb import DATA_DIR
from telco_nb.analysis.findings import PAPER
from telco_nb.analysis.recommendation import describe_config, name_list, percent
from telco_nb.report import config_cards
from telco_nb.report.config_cards import GUESSED, ordinal
from telco_nb.report.files import Cell, Page, StudyFiles, duration, read_or_none, read_study
from telco_nb.report.pages import notebook_body
from telco_nb.study.plan import STEPS

DATA = DATA_DIR
QUESTION = (
    "Which LoRA configuration should answer telecom customers, at what energy, and can validation loss alone pick it?"
)
JUDGE_PARTS = ("score", "low", "high", "rank", "rank_low", "rank_high", "gate")
TAU_WORDS = {
    "better than chance": "A lower loss tends to go with better answers, with exceptions.",
    "no, the opposite": "A lower loss goes with worse answers.",
    "not shown": "With {n} configurations no relation of loss to the judges' ranking can be shown.",
    "too few to tell": "With {n} configurations no ranking could prove anything.",
}
TONES = {"supported": "good", "blocked": "bad"}


def build_report(profile_root: Path, status: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None) -> Path:
    """Write `report/` below the profile's folder; returns the path of the one-file report.

    `status` is what the last run said about its jobs: dicts with scope, step, status and reason (a mapping that holds
    them as `jobs` will do). It adds reasons; what has succeeded is read from the files alone.
    """
    root = Path(profile_root)
    work = root / ".report.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    jobs = status.get("jobs", []) if isinstance(status, Mapping) else status or []
    study = read_study(root, jobs)
    for page in study.pages:
        (work / page.name).write_text(_page(page, study.pages), encoding="utf-8")
    content = _content(study)
    (work / "index.html").write_text(
        _render("report.html.j2", **content, contents=_contents(content), single=False), encoding="utf-8"
    )
    figures, cards = config_cards.figures(root), config_cards.config_cards(study)
    whole = content | {"figures": figures, "cards": cards}
    one_file = _render("report.html.j2", **whole, contents=_contents(whole), single=True)
    (work / "telco_report.html").write_text(one_file, encoding="utf-8")
    for name in ("results.csv", "findings.json"):
        if (root / name).is_file():
            shutil.copyfile(root / name, work / name)
    return _put_in_place(work, root / "report") / "telco_report.html"


def _put_in_place(work: Path, final: Path) -> Path:
    """Replace the old report by the new one; a reader never sees a half-written folder."""
    old = final.with_name(".report.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    work.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


# ---------------------------------------------------------------- the first screen


def _content(study: StudyFiles) -> dict[str, Any]:
    """Everything that the index and the one-file report share."""
    deploy = study.finding("deploy")
    chosen = deploy["value"] if deploy else None
    shown = [f | {"tone": TONES.get(f["verdict"], "")} for f in study.findings]
    return {
        "title": f"Telco LoRA study, profile {study.root.name}",
        "question": QUESTION,
        "tags": _tags(study),
        "alarms": _alarms(study),
        "lead": deploy["statement"] if deploy else "There is no result yet: 06_analysis has not finished.",
        "tiles": _tiles(study, chosen) if deploy else [],
        "results": _results(study, chosen),
        "legend": _legend(study),
        "csv": base64.b64encode(read_or_none((study.root / "results.csv").read_bytes) or b"").decode(),
        "findings": shown,
        "effects": [f for f in shown if f["id"].startswith("effect.")],
        "figures": [],
        "cards": [],
        "status": _status(study),
        "provenance": _provenance(study),
    }


def _tags(study: StudyFiles) -> list[tuple[str, str]]:
    """Labels under the question: what kind of study this is, and what its numbers are worth."""
    tags = [(f"profile {study.root.name}", ""), (f"{len(study.results)} configurations", "")]
    models = {m["base_model"] for m in study.metrics.values() if m.get("base_model")}
    models |= {m["parameters"]["base_model"] for m in study.manifests.values() if m["parameters"].get("base_model")}
    tags += [(str(model), "") for model in sorted(models)[:1]]
    kinds = _energy_kinds(study)
    tags += [(f"energy {kind}", "note" if kind in GUESSED else "") for kind in kinds]
    proxies = [judge for judge in study.judges if study.is_proxy(judge)]
    if proxies:
        tags.append(
            (f"offline proxy judge{'s' if len(proxies) > 1 else ''}, no language model: {name_list(proxies)}", "note")
        )
    others = [judge for judge in study.judges if judge not in proxies]
    return tags + ([(f"judges: {name_list(others)}", "")] if others else [])


def _energy_kinds(study: StudyFiles) -> list[str]:
    if "energy_kind" not in study.results:
        return []
    return sorted(study.results["energy_kind"].dropna().unique())


def _alarms(study: StudyFiles) -> list[str]:
    """What the reader must know before the numbers."""
    alarms = []
    bad = [f"{s}/{t}" for (s, t), c in study.cells.items() if c.state in ("failed", "blocked", "noresult")]
    if bad:
        alarms.append(f"{_steps(len(bad))} of {len(study.cells)} failed or could not run: {_some(bad)}.")
    missing = [f"{s}/{t}" for (s, t), c in study.cells.items() if c.state == "missing"]
    if missing:
        alarms.append(f"{_steps(len(missing))} not run yet: {_some(missing)}.")
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
    silent = [judge for judge in failed if judge not in ranked]
    for judges, so in ((ranked, "the ranking is shown but carries no headline"), (silent, "it ranks nothing")):
        if judges:
            who = f"The judge{'s' if len(judges) > 1 else ''} {name_list(judges)}"
            alarms.append(f"{who} failed the validity gate: {so}.")
    return alarms


def _steps(n: int) -> str:
    return f"{n} step{'s' if n > 1 else ''}"


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors of the parts that are there."""
    parts = ("results", "figures", "findings", "cards", "status", "provenance")
    names = {"cards": ("configurations", "Configurations"), "status": ("status", "What ran")}
    return [names.get(part, (part, part.capitalize())) for part in parts if content[part]]


@dataclass(frozen=True)
class Tile:
    """A box of the first screen: title, the answer in large type, a warning label, lines, or a small table."""

    title: str
    big: str = ""
    lines: list[str] = field(default_factory=list)
    tag: str | None = None
    rows: list[tuple[str, str, str]] = field(default_factory=list)


def _tiles(study: StudyFiles, chosen: str | None) -> list[Tile]:
    pick = (study.finding("loss_choice") or {}).get("value")
    energy = [_energy_tile(study, chosen, pick)] if chosen else []
    rest = [_sure_tile(study), _loss_tile(study, chosen, pick), _tau_tile(study), _paper_tile(study)]
    return [_deploy_tile(study, chosen), *energy, *rest]


def _deploy_tile(study: StudyFiles, chosen: str | None) -> Tile:
    if not chosen:
        reasons = (study.finding("deploy") or {}).get("blocked_by", [])
        return Tile("Deploy", "none of them", [f"{reason[:1].upper()}{reason[1:]}." for reason in reasons])
    lines = [f"{describe_config(study.results.loc[chosen])}."]
    gains = [f["value"] for f in study.findings if f["id"].startswith("gain.") and f["verdict"] != "blocked"]
    shares = list(dict.fromkeys(f"{1 / (1 + math.exp(-gain)):.0%}" for gain in sorted(gains)))
    if shares:
        told = " to ".join([shares[0], *shares[1:][-1:]])
        lines.append(f"Wins {told} of decided comparisons with the untuned model.")
    return Tile("Deploy", chosen, lines)


def _energy_tile(study: StudyFiles, chosen: str, pick: str | None) -> Tile:
    row, title = study.results.loc[chosen], "Training energy"
    if pd.isna(row["train_energy_wh"]):
        return Tile(title, "not known", ["There is neither a measurement nor an estimate for this configuration."])
    bounds, lines = row[["train_energy_low_wh", "train_energy_high_wh"]], []
    if not bounds.isna().any():
        lines.append(f"Between {bounds.iloc[0]:.3g} and {bounds.iloc[1]:.3g} Wh.")
    other = study.results["train_energy_wh"].get(pick)
    if pick != chosen and other is not None and not pd.isna(other):
        lines.append(f"{row['train_energy_wh'] / other:.0%} of what loss's choice, {pick}, takes.")
    answering = study.metrics.get((chosen, "04_energy"), {})
    if (per_answer := answering.get("answer_energy_per_answer_wh")) is not None:
        lines.append(f"Each answer: {per_answer * 1000:.2g} mWh, {answering.get('energy_kind')}.")
    tag = row["energy_kind"] if row["energy_kind"] in GUESSED else None
    return Tile(title, f"{row['train_energy_wh']:.3g} Wh", lines, tag)


def _sure_tile(study: StudyFiles) -> Tile:
    sure, title = study.finding("confidence"), "How sure: better answers than loss's choice?"
    if sure is None or sure["blocked_by"]:
        return Tile(title, "not known", ["No valid judge has ranked the answers."])
    if sure["value"] is None:
        return Tile(title, "nothing to decide", [sure["statement"]])
    share = percent(sure["value"])
    big = f"yes, {share}" if sure["verdict"] == "supported" else f"not certain, {share}"
    return Tile(title, big if sure["value"] >= 0.5 else "no, but it costs less", [sure["statement"]])


def _loss_tile(study: StudyFiles, chosen: str | None, pick: str | None) -> Tile:
    title = "Loss alone would have chosen"
    if not pick:
        return Tile(title, "nothing", ["There is no validation loss."])
    lines = [f"The lowest validation loss, {study.results.loc[pick, 'val_loss']:.4f}."]
    if ranks := _ranks(study, "best_loss_rank"):
        lines.append(f"The judges rank it {ranks}.")
    return Tile(title, pick, [*lines, "It is the same configuration."] if pick == chosen else lines)


def _ranks(study: StudyFiles, prefix: str) -> str:
    """`14th (checklist) and 13th (reference) of 16` from the rank findings; blocked judges are marked."""
    told = []
    for judge in study.judges:
        finding = study.finding(f"{prefix}.{judge}")
        if finding and finding["value"] is not None:
            mark = ", not valid" if finding["verdict"] == "blocked" else ""
            told.append(f"{ordinal(finding['value'])} ({judge}{mark})")
    return f"{name_list(told)} of {len(study.results)}" if told else ""


def _tau_tile(study: StudyFiles) -> Tile:
    """Whether loss predicts quality, over the judges that may speak."""
    taus = {judge: tau for judge in study.judges if (tau := study.finding(f"tau.{judge}"))}
    verdict = _tau_verdict(list(taus.values()))
    lines = [TAU_WORDS[verdict].format(n=len(study.results))] if verdict in TAU_WORDS else []
    for judge, tau in taus.items():
        if tau["value"] is not None:
            mark = ", not valid" if tau["verdict"] == "blocked" else ""
            lines.append(f"Kendall tau {tau['value']:+.2f} [{tau['low']:+.2f}, {tau['high']:+.2f}] ({judge}{mark}).")
    if any(tau["value"] is not None for tau in taus.values()):
        lines.append("-1: a lower loss always means better answers; 0: no relation.")
    return Tile("Can loss pick it?", verdict, lines)


def _tau_verdict(taus: Sequence[Mapping[str, Any]]) -> str:
    spoken = [tau for tau in taus if tau["verdict"] not in ("blocked", "not estimable")]
    if not spoken:
        few = any(tau["verdict"] == "not estimable" for tau in taus)
        return "too few to tell" if few else "no valid judge"
    words = {
        "not shown"
        if tau["verdict"] != "supported"
        else "better than chance"
        if tau["value"] < 0
        else "no, the opposite"
        for tau in spoken
    }
    return words.pop() if len(words) == 1 else "the judges differ"


def _paper_tile(study: StudyFiles) -> Tile:
    low, high = PAPER["energy_wh"]
    ratio = study.finding("energy_ratio") or {}
    here = f"x {ratio['value']:.1f}" if ratio.get("value") is not None else "-"
    word = "".join(f", {kind}" for kind in _energy_kinds(study) if kind in GUESSED)
    rows = [
        ("lowest loss ranks", f"{PAPER['best_loss_rank']} of {PAPER['n']}", _ranks(study, "best_loss_rank") or "-"),
        ("highest loss ranks", PAPER["worst_loss_rank"], _ranks(study, "worst_loss_rank") or "-"),
        ("energy, most to least", f"x {high / low:.1f}", f"{here}{word}"),
    ]
    return Tile("Beside the paper (other model, data and judges)", rows=rows)


# ---------------------------------------------------------------- results table


def _legend(study: StudyFiles) -> str:
    kinds = _energy_kinds(study)
    word = f"Training energy is {name_list(kinds)}. " if kinds else ""
    return f"{word}Scores are log-odds; ranks count from 1, the best."


def _results(study: StudyFiles, chosen: str | None) -> dict[str, Any] | None:
    if study.results.empty:
        return None
    kinds = _energy_kinds(study)
    energy = f"training energy, {kinds[0]} (Wh)" if len(kinds) == 1 else "training energy (Wh)"
    titles = [("config", False), ("target modules", False), ("rank", True), ("epochs", True), ("learning rate", True)]
    titles += [("validation loss", True), (energy, True)]
    for judge in study.judges:
        titles += [(f"{study.judge_name(judge)} score", True), (f"{judge} rank", True)]
        if set(study.results[f"{judge}_gate"].dropna()) - {"passed"}:
            titles.append((f"{judge} gate", False))
    columns = [{"title": title, "numeric": numeric} for title, numeric in titles]
    rows = [
        {"chosen": config == chosen, "cells": _row(study, str(config), row, len(kinds) > 1)}
        for config, row in study.results.iterrows()
    ]
    return {"columns": columns, "rows": rows}


def _row(study: StudyFiles, config: str, row: pd.Series, mixed: bool) -> list[dict[str, Any]]:
    cells = [_text(config), _text(row["target_modules"])]
    cells += [_value(row[c], "g") for c in ("rank", "epochs", "learning_rate")]
    cells.append(_value(row["val_loss"], ".4f", row["val_loss_low"], row["val_loss_high"]))
    energy = _value(row["train_energy_wh"], ".3g", row["train_energy_low_wh"], row["train_energy_high_wh"])
    cells.append(energy | {"interval": f"{energy['interval']} {row['energy_kind']}"} if mixed else energy)
    for judge in study.judges:
        score, low, high, rank, rank_low, rank_high, gate = (row[f"{judge}_{part}"] for part in JUDGE_PARTS)
        cells += [_value(score, "+.2f", low, high), _value(rank, "g", rank_low, rank_high)]
        if set(study.results[f"{judge}_gate"].dropna()) - {"passed"}:
            cells.append(_text(gate))
    return cells


def _text(value: Any) -> dict[str, Any]:
    known = None if pd.isna(value) else str(value)
    return {"value": known, "text": known or "", "interval": "", "numeric": False}


def _value(value: Any, digits: str, low: Any = None, high: Any = None) -> dict[str, Any]:
    """A table cell: the bare number to sort by, its text, its interval. Missing stays empty."""
    if pd.isna(value):
        return {"value": None, "text": "", "interval": "", "numeric": True}
    interval = "" if low is None or pd.isna(low) or pd.isna(high) else f"[{low:{digits}}, {high:{digits}}]"
    return {"value": float(value), "text": f"{value:{digits}}", "interval": interval, "numeric": True}


# ---------------------------------------------------------------- status and provenance


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
    """Where the numbers come from, from the manifests. Disagreement between steps is shown, not hidden."""
    manifests = list(study.manifests.values())
    if not manifests:
        return [("records", "none")]
    environment = [m.get("environment", {}) for m in manifests]
    devices = [f"{d.get('cpu')}, {d.get('cores')} cores, {d.get('system')}" for d in (m["device"] for m in manifests)]
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


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(DATA), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _page(page: Page, pages: Sequence[Page]) -> str:
    """The page of one executed notebook, with links to its neighbours in the same scope."""
    neighbours = [(p.step + " (failed)" * p.failed, p.name) for p in pages if p.scope == page.scope and p != page]
    return _render(
        "report_page.html.j2",
        title=f"{page.scope} {page.step}",
        notebook=notebook_body(page, pages),
        neighbours=neighbours,
        failed=page.failed,
    )


def _render(template: str, **values: Any) -> str:
    script = (DATA / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    css = (DATA / "report.css").read_text(encoding="utf-8")
    shared = {"css": Markup(css), "script": Markup(script), "script_hash": f"sha256-{digest}"}
    return _environment().get_template(template).render(**shared, **values)
