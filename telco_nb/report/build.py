"""Builds the report: one self-contained file for readers, and one page per executed notebook with an index.

Everything is computed from the files of the profile's folder, so the report works when steps failed or are missing, and
the same files give the same bytes. The output of models is untrusted: the templates escape it, notebook outputs pass an
allow list, and a content security policy lets only the report's own script run.
"""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import expit

from telco_nb.analysis.findings import PAPER
from telco_nb.analysis.recommendation import describe_config, name_list, percent
from telco_nb.judge.ranking import interval_text
from telco_nb.report import answer_explorer, config_cards
from telco_nb.report.config_cards import GUESSED, ordinal
from telco_nb.report.files import Cell, Page, StudyFiles, duration, read_or_none, read_study
from telco_nb.report.pages import notebook_body
from telco_nb.report.rendering import render
from telco_nb.study.machine import device_text
from telco_nb.study.plan import STEPS

QUESTION = (
    "Which LoRA configuration should answer telecom customers, at what energy, and can validation loss alone pick it?"
)
JUDGE_PARTS = ("score", "low", "high", "rank", "rank_low", "rank_high", "gate")
TAU_WORDS = {
    "yes, it tends to": "A lower loss goes with better answers more often than chance and the factors explain.",
    "no, the opposite": "A lower loss goes with worse answers.",
    "not shown": "With {n} configurations no relation of loss to the quality of answers can be shown.",
}
CLAIM_WORDS = {"supported": "yes", "refuted": "no", "blocked": "no answer"}
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
    for page in study.pages:
        (work / page.name).write_text(_page(page, study.pages), encoding="utf-8")
    content: dict[str, Any] = _content(study) | {"explorer": answer_explorer.write_page(study, work)}
    whole: dict[str, Any] = content | {"figures": config_cards.figures(root), "cards": config_cards.config_cards(study)}
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
    deploy = study.finding("deploy")
    chosen = deploy["value"] if deploy else None
    kinds = name_list(_energy_kinds(study))
    energy = f"Training energy is {kinds}. " if kinds else ""
    shown = [f | {"tone": TONES.get(f["verdict"], "")} for f in study.findings]
    return {
        "title": f"Telco LoRA study, profile {study.root.name}",
        "question": QUESTION,
        "tags": _tags(study),
        "alarms": _alarms(study),
        "lead": deploy["statement"] if deploy else "There is no result yet: 06_analysis has not finished.",
        "tiles": _tiles(study, chosen) if deploy else [],
        "results": _results(study, chosen),
        "legend": f"{energy}Scores are log-odds; ranks count from 1, the best.",
        "csv": base64.b64encode(read_or_none((study.root / "results.csv").read_bytes) or b"").decode(),
        "findings": shown,
        "effects": [f for f in shown if f["id"].startswith("effect.")],
        "figures": [],
        "cards": [],
        "status": _status(study),
        "provenance": _provenance(study),
    }


def _tags(study: StudyFiles) -> list[tuple[str, str]]:
    """Labels under the question: (text, style)."""
    tags = [(f"profile {study.root.name}", ""), (f"{len(study.results)} configurations", "")]
    models = {m["base_model"] for m in study.metrics.values() if m.get("base_model")}
    models |= {m["parameters"]["base_model"] for m in study.manifests.values() if m["parameters"].get("base_model")}
    tags += [(str(model), "") for model in sorted(models)[:1]]
    kinds = _energy_kinds(study)
    tags += [(f"energy {kind}", "note" if kind in GUESSED else "") for kind in kinds]
    proxies = [judge for judge in study.judges if study.is_proxy(judge)]
    if proxies:
        noun = "judges" if len(proxies) > 1 else "judge"
        tags.append((f"offline proxy {noun}, no language model: {name_list(proxies)}", "note"))
    others = [judge for judge in study.judges if judge not in proxies]
    return tags + ([(f"judges: {name_list(others)}", "")] if others else [])


def _energy_kinds(study: StudyFiles) -> list[str]:
    if "energy_kind" not in study.results:
        return []
    return sorted(study.results["energy_kind"].dropna().unique())


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
    parts = ("results", "figures", "findings", "cards", "status", "provenance")
    names = {"cards": ("configurations", "Configurations"), "status": ("status", "What ran")}
    return [names.get(part, (part, part.capitalize())) for part in parts if content[part]]


class Tile(NamedTuple):
    """A box of the first screen: title, the answer in large type, lines, a warning label, and a small table.

    `good` marks the one that recommends a deployment: it alone has a green frame.
    """

    title: str
    big: str = ""
    lines: Sequence[str] = ()
    tag: str | None = None
    rows: Sequence[tuple[str, str, str]] = ()
    good: bool = False


def _tiles(study: StudyFiles, chosen: str | None) -> list[Tile]:
    pick = (study.finding("loss_choice") or {}).get("value")
    energy = [_energy_tile(study, chosen, pick)] if chosen else []
    claim = [_claim_tile(finding)] if (finding := study.finding("primary")) else []
    loss = [*claim, _loss_tile(study, chosen, pick), _confidence_tile(study), _tau_tile(study)]
    return [_deploy_tile(study, chosen), *energy, *loss, _paper_tile(study)]


def _deploy_tile(study: StudyFiles, chosen: str | None) -> Tile:
    if not chosen:
        reasons = (study.finding("deploy") or {}).get("blocked_by", [])
        return Tile("Deploy", "none of them", [f"{reason[:1].upper()}{reason[1:]}." for reason in reasons])
    lines = [f"{describe_config(study.results.loc[chosen])}."]
    gains = [f["value"] for f in study.findings if f["id"].startswith("gain.") and f["verdict"] != "blocked"]
    known = sorted(gain for gain in gains if gain is not None)
    shares = list(dict.fromkeys(percent(float(expit(gain))) for gain in known))
    if shares:
        span = " to ".join([shares[0], *shares[1:][-1:]])
        lines.append(f"Wins {span} of decided comparisons with the untuned model.")
    verdict = (study.finding("deploy") or {}).get("verdict")
    if verdict == "not fit":
        lines.append("What is missing stands above.")
        return Tile("First choice, not shown to be fit for customers", chosen, lines, "not fit")
    if verdict == "cannot tell":
        return Tile("Deploy", f"No clear best; best guess is {chosen}", lines, "cannot tell")
    return Tile("Deploy", chosen, lines, good=True)


def _claim_tile(primary: Mapping[str, Any]) -> Tile:
    """The claim that was written down before the run, with its verdict."""
    lines = [primary["statement"]]
    if primary["value"] is not None:
        share = percent(float(expit(primary["value"])))
        lines.append(f"In other words: the best of the others wins {share} of the decided comparisons with it.")
    return Tile("Can loss pick it?", CLAIM_WORDS.get(primary["verdict"], "cannot tell"), lines)


def _energy_tile(study: StudyFiles, chosen: str, pick: str | None) -> Tile:
    row, title = study.results.loc[chosen], "Training energy"
    if pd.isna(row["train_energy_wh"]):
        return Tile(title, "not known", ["There is neither a measurement nor an estimate for this configuration."])
    bounds, lines = row[["train_energy_low_wh", "train_energy_high_wh"]], []
    if not bounds.isna().any():
        lines.append(f"Between {bounds.iloc[0]:.3g} and {bounds.iloc[1]:.3g} Wh.")
    if pick in study.results.index and pick != chosen:
        other = study.results.loc[pick]
        if other["train_energy_wh"] > 0 and other["energy_kind"] == row["energy_kind"]:
            share = row["train_energy_wh"] / other["train_energy_wh"]
            lines.append(f"{share:.0%} of what loss's choice, {pick}, takes.")
    lines += [found["statement"] for found in [study.finding("serving")] if found and found["value"] is not None]
    kind = "of unknown kind" if pd.isna(row["energy_kind"]) else row["energy_kind"]
    tag = kind if kind in (*GUESSED, "of unknown kind") else None
    lines += [] if tag else [f"It is {kind}."]
    return Tile(title, f"{row['train_energy_wh']:.3g} Wh", lines, tag)


def _confidence_tile(study: StudyFiles) -> Tile:
    confidence, title = study.finding("confidence"), "How sure: better answers than loss's choice?"
    if confidence is None:
        return Tile(title, "not known", ["The analysis does not say."])
    value, lines = confidence["value"], [confidence["statement"]]
    if confidence["blocked_by"]:
        return Tile(title, "not known", lines)
    if value is None:
        return Tile(title, "nothing to decide", lines)
    word = {"supported": "yes", "refuted": "no"}.get(confidence["verdict"], "not certain")
    return Tile(title, f"{word}, {percent(value)}", lines)


def _loss_tile(study: StudyFiles, chosen: str | None, pick: str | None) -> Tile:
    title = "Loss alone would have chosen"
    if not pick:
        return Tile(title, "nothing", [(study.finding("loss_choice") or {}).get("statement", "There is no loss.")])
    lines = [f"The lowest validation loss, {study.results.loc[pick, 'val_loss']:.4f}."]
    if ranks := _ranks(study, "best_loss_rank"):
        lines.append(f"Its rank: {ranks}.")
    return Tile(title, pick, [*lines, "It is the same configuration."] if pick == chosen else lines)


def _ranks(study: StudyFiles, prefix: str) -> str:
    """`14th of 16 (checklist) and 13th of 16 (embedding)` from the rank findings; invalid judges are marked."""
    findings = {judge: finding for judge in study.judges if (finding := study.finding(f"{prefix}.{judge}"))}
    ranks = [
        f"{ordinal(finding['value'])} of {finding['n']} ({_marked(judge, finding)})"
        for judge, finding in findings.items()
        if finding["value"] is not None
    ]
    return name_list(ranks)


def _marked(judge: str, finding: Mapping[str, Any]) -> str:
    return f"{judge}, not valid" if finding["verdict"] == "blocked" else judge


def _tau_tile(study: StudyFiles) -> Tile:
    """The relation of loss to the rankings of the judges."""
    taus = {judge: tau for judge in study.judges if (tau := study.finding(f"tau.{judge}"))}
    known = {judge: tau for judge, tau in taus.items() if tau["value"] is not None}
    verdict = _tau_verdict(list(taus.values()))
    valid = [tau["n"] for tau in known.values() if tau["verdict"] != "blocked"]
    lines = [TAU_WORDS[verdict].format(n=min(valid))] if verdict in TAU_WORDS else []
    for judge, tau in known.items():
        interval = interval_text(_number(tau["low"]), _number(tau["high"]))
        lines.append(f"Rank correlation {tau['value']:+.2f} {interval} ({_marked(judge, tau)}).")
    if known:
        lines.append("-1: a lower loss always goes with better answers; 0: no relation; +1: with worse ones.")
    else:
        lines += [tau["statement"] for tau in taus.values()]
    return Tile("Does a lower loss go with better answers?", verdict, lines)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tau_verdict(taus: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on which all valid judges agree."""
    valid = [tau for tau in taus if tau["verdict"] not in ("blocked", "not estimable") and tau["value"] is not None]
    if not valid:
        return "cannot be told" if any(tau["verdict"] != "blocked" for tau in taus) else "no valid judge"
    signs = {0 if tau["verdict"] != "supported" else -1 if tau["value"] < 0 else 1 for tau in valid}
    words = {-1: "yes, it tends to", 0: "not shown", 1: "no, the opposite"}
    return words[signs.pop()] if len(signs) == 1 else "the judges differ"


def _paper_tile(study: StudyFiles) -> Tile:
    low, high = PAPER["energy_wh"]
    ratio = study.finding("energy_ratio") or {}
    here = (
        f"x {ratio['value']:.1f}{', not valid' * bool(ratio['blocked_by'])}" if ratio.get("value") is not None else "-"
    )
    kinds = "".join(f", {kind}" for kind in _energy_kinds(study) if kind in GUESSED)
    rows = [
        ("lowest loss ranks", f"{PAPER['best_loss_rank']} of {PAPER['n']}", _ranks(study, "best_loss_rank") or "-"),
        ("highest loss ranks", PAPER["worst_loss_rank"], _ranks(study, "worst_loss_rank") or "-"),
        ("energy, most to least", f"x {high / low:.1f}", f"{here}{kinds}"),
    ]
    return Tile("Beside the paper (other model, data and judges)", rows=rows)


# ---------------------------------------------------------------- results table


def _results(study: StudyFiles, chosen: str | None) -> dict[str, Any] | None:
    """The results table, built column by column; None without results."""
    frame, kinds = study.results, _energy_kinds(study)
    if frame.empty:
        return None
    table = {"config": _texts(frame.index), "target modules": _texts(frame["target_modules"])}
    table |= {name: _numbers(frame[name.replace(" ", "_")], "g") for name in ("rank", "epochs", "learning rate")}
    table["validation loss"] = _numbers(frame["val_loss"], ".4f", frame["val_loss_low"], frame["val_loss_high"])
    bounds = frame["train_energy_low_wh"], frame["train_energy_high_wh"]
    energy = _numbers(frame["train_energy_wh"], ".3g", *bounds)
    if len(kinds) > 1:
        for cell, kind in zip(energy, frame["energy_kind"], strict=True):
            cell["interval"] += f" {kind}"
    table[f"training energy, {kinds[0]} (Wh)" if len(kinds) == 1 else "training energy (Wh)"] = energy
    for judge in study.judges:
        score, low, high, *ranks, gate = (frame[f"{judge}_{part}"] for part in JUDGE_PARTS)
        table |= {f"{study.judge_name(judge)} score": _numbers(score, "+.2f", low, high)}
        table |= {f"{judge} rank": _numbers(ranks[0], "g", *ranks[1:])}
        if set(gate.dropna()) - {"passed"}:
            table[f"{judge} gate"] = _texts(gate)
    columns = [{"title": title, "numeric": cells[0]["numeric"]} for title, cells in table.items()]
    cells = zip(*table.values(), strict=True)
    rows = [{"chosen": config == chosen, "cells": row} for config, row in zip(frame.index, cells, strict=True)]
    return {"columns": columns, "rows": rows}


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
            if interval and not pd.isna(interval).any():
                cell["interval"] = interval_text(*interval, digits)
        cells.append(cell)
    return cells


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


def _page(page: Page, pages: Sequence[Page]) -> str:
    """The page of one executed notebook, with links to its neighbours in the same scope."""
    neighbours = [(p.step + " (failed)" * p.failed, p.name) for p in pages if p.scope == page.scope and p != page]
    return render(
        "report_page.html.j2",
        title=f"{page.scope} {page.step}",
        notebook=notebook_body(page, pages),
        neighbours=neighbours,
        failed=page.failed,
    )
