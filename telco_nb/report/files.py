"""Reads a profile's folder for the report: executed notebooks, manifests, results, and which of them are missing.

The files decide which steps have succeeded; the runner's list of jobs only adds reasons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb import ROOT
from telco_nb.analysis.results import PROXY_KINDS
from telco_nb.study import record
from telco_nb.study.params import PUBLISHED, config_of, drift_name
from telco_nb.study.plan import STEPS

# What `read_study` and the readers of its results find in steps, as patterns.
READS = (
    "shared/0*/*", "*/0*/metrics.json", "*/04_energy/artefacts/answers.parquet", "judge-*/05_judge/*",
    "study/06_analysis/*",
)  # fmt: skip
# What the report is built from. Failed notebooks are left out: they come and go with attempts, and prove no result.
REPORT_READS = (
    *READS, "*/0*/manifest.json", "*/03_train/tables/loss_curve.parquet", *(f"*/{step}.ipynb" for step in STEPS),
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """An executed notebook and the page it becomes."""

    scope: str
    step: str
    failed: bool
    source: Path

    @property
    def name(self) -> str:
        return f"{self.scope}-{self.step}{'.failed' if self.failed else ''}.html"


@dataclass(frozen=True)
class Cell:
    """State of one step in one scope: ok, failed, blocked, noresult, missing, or empty where nothing belongs."""

    state: str
    text: str = ""
    reason: str = ""
    page: str | None = None
    failed_page: str | None = None


@dataclass
class StudyFiles:
    """The files of one profile."""

    root: Path
    pages: list[Page]
    manifests: dict[tuple[str, str], dict[str, Any]]
    cells: dict[tuple[str, str], Cell]
    results: pd.DataFrame  # indexed by config; empty if 06 has not finished
    findings: list[dict[str, Any]]
    metrics: dict[tuple[str, str], dict[str, Any]]

    @property
    def judges(self) -> list[str]:
        return [c.removesuffix("_gate") for c in self.results.columns if c.endswith("_gate")]

    @property
    def scopes(self) -> list[str]:
        return list(dict.fromkeys(scope for scope, _ in self.cells))

    @property
    def configs(self) -> list[str]:
        """Configurations with a result or a trace in the folder."""
        traces = [scope for scope in self.scopes if "03_train" in expected_steps(scope) and scope == config_of(scope)]
        return list(dict.fromkeys([*self.results.index, *traces]))

    def finding(self, id: str) -> dict[str, Any] | None:
        return next((f for f in self.findings if f["id"] == id), None)

    @property
    def front_runner(self) -> str | None:
        """The configuration that one would try next, fit or not; None without one. `deploy` says whether it is fit."""
        return (self.finding("front_runner") or {}).get("value")

    def judge_name(self, judge: str) -> str:
        """The judge's name, marked if it is an offline proxy."""
        return f"{judge} (offline proxy)" if self.is_proxy(judge) else judge

    def is_proxy(self, judge: str) -> bool:
        return self._kind(judge) in PROXY_KINDS

    def judges_by_sort(self) -> dict[str, list[str]]:
        """The judges that are offline rules, language models and people, without a sort that has none."""
        sorts: dict[str, list[str]] = {}
        for judge in self.judges:
            sort = "offline rules" if self.is_proxy(judge) else "language models"
            sorts.setdefault("people" if self._kind(judge) == "human" else sort, []).append(judge)
        return sorts

    def _kind(self, judge: str) -> str:
        kind = self.metrics.get((f"judge-{judge}", "05_judge"), {}).get("judge_kind")
        parameters = self.manifests.get((f"judge-{judge}", "05_judge"), {}).get("parameters", {})
        return str(kind or parameters.get("judge_kind") or judge)


def expected_steps(scope: str) -> tuple[str, ...]:
    """The steps that belong to a scope, by its name."""
    if scope.startswith("judge-"):
        return ("05_judge",)
    fixed = {"shared": ("01_glossary", "02_synth"), "untuned": ("04_energy",), "study": ("06_analysis",)}
    trained = ("03_train",) if scope == drift_name(config_of(scope)) else ("03_train", "04_energy")
    return fixed.get(scope, trained)


def read_study(root: Path, jobs: Sequence[Mapping[str, Any]]) -> StudyFiles:
    """Reads the profile's folder `root`; `jobs` are the jobs of the last run (`build_report`)."""
    job_of = {(str(job.get("scope")), str(job.get("step"))): job for job in jobs}
    results = read_or_none(_read_results, root / "results.csv")
    results = pd.DataFrame() if results is None else results
    manifests, metrics, cells, pages = {}, {}, {}, []
    for scope in _scopes(root, job_of, results):
        for step in STEPS:
            key = (scope, step)
            if manifest := record.read_manifest(root, scope, step):
                manifests[key] = manifest
                metrics[key] = read_or_none(read_json, root / scope / step / "metrics.json") or {}
            step_pages = _find_pages(root, scope, step)
            pages += step_pages
            if step in expected_steps(scope) or key in manifests or step_pages or key in job_of:
                cells[key] = _cell(root, key, manifests.get(key), step_pages, job_of.get(key, {}))
    # Findings name configurations of results.csv: without it they would point nowhere.
    findings = [] if results.empty else read_or_none(read_json, root / "findings.json") or []
    return StudyFiles(root, pages, manifests, cells, results, findings, metrics)


def read_published(profile: str, root: Path = ROOT / "outputs" / PUBLISHED) -> StudyFiles | None:
    """Results and findings of the run that comes with the project, as a study without pages; its root has its profile.

    None if there is none, or one of the same profile: a study is not set beside its own predecessor.
    """
    results = read_or_none(_read_results, root / "results.csv")
    findings, about = (read_or_none(read_json, root / name) for name in ("findings.json", "about.json"))
    if results is None or not isinstance(findings, list) or not isinstance(about, dict) or about["profile"] == profile:
        return None
    return StudyFiles(Path(about["profile"]), [], {}, {}, results, findings, {})


def _read_results(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype={"config": str}).set_index("config")
    return frame.astype({c: "Int64" for c in ("rank", "lora_alpha", "epochs", "seed") if c in frame})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_or_none(read: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `read(*arguments)`, or None if the file is missing or unreadable."""
    try:
        return read(*arguments)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _scopes(root: Path, jobs: Iterable[tuple[str, str]], results: pd.DataFrame) -> list[str]:
    """Every scope with a trace of a step, in the order of the study."""
    traced = {
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(_trace(path, step) for step in STEPS)
    }

    def place(scope: str) -> tuple[int, str]:
        if scope != config_of(scope):
            return 2, scope
        return {"shared": 0, "untuned": 3, "study": 5}.get(scope, 4 if scope.startswith("judge-") else 1), scope

    return sorted(traced | {scope for scope, _ in jobs} | set(results.index) | {"shared", "study"}, key=place)


def _trace(folder: Path, step: str) -> bool:
    return any((folder / name).exists() for name in (step, f"{step}.ipynb", f"{step}.failed.ipynb"))


def _find_pages(root: Path, scope: str, step: str) -> list[Page]:
    pages = [Page(scope, step, failed, root / scope / f"{step}{'.failed' * failed}.ipynb") for failed in (False, True)]
    return [page for page in pages if page.source.is_file()]


def _cell(
    root: Path, key: tuple[str, str], manifest: Mapping[str, Any] | None, pages: list[Page], job: Mapping[str, Any]
) -> Cell:
    """The state of a step. A failed attempt counts as failed even if an older good result exists."""
    good = next((p.name for p in pages if not p.failed), None)
    bad = next((p.name for p in pages if p.failed), None)
    reason = str(job.get("reason") or "")
    seconds = f" {duration(manifest['seconds'])}" if manifest else ""
    if bad or job.get("status") == "failed":
        text = f"failed; older result ok{seconds}" if manifest else "failed"
        return Cell("failed", text, reason or _failure(pages), good if manifest else None, bad)
    if manifest and manifest.get("status") == "ok":
        return Cell("ok", f"ok{seconds}", "", good)
    if job.get("status") in ("blocked", "interrupted"):
        return Cell("blocked", str(job["status"]), reason)
    if good or (root / key[0] / key[1]).exists():
        return Cell("noresult", "no result", "the record is not complete", good)
    return Cell("missing", "not run")


def _failure(pages: list[Page]) -> str:
    """Kind and reason of the failure, from the metadata of the failed notebook."""
    for page in pages:
        failure = (read_or_none(read_json, page.source) or {}).get("metadata", {}).get("telco_nb_failure")
        if failure:
            return f"{failure.get('kind', '')}: {failure.get('reason', '')}"[:200]
    return ""


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if whole else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
