"""The functions that every notebook calls: `open_run`, the open `Run`, generated prose, and one style for figures."""

from __future__ import annotations

import fnmatch
import html
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from telco_nb import ROOT
from telco_nb.hosted import egress
from telco_nb.study import params
from telco_nb.study.content_key import content_key, path_hashes, versions
from telco_nb.study.machine import device_facts, device_text, die_with_parent, git_state, peak_memory_bytes
from telco_nb.study.manifest import SCHEMA_VERSION
from telco_nb.study.once import made_once
from telco_nb.study.opened import Opened, open_study
from telco_nb.study.params import ParameterError
from telco_nb.study.plan import UNTUNED, Job, inputs_of
from telco_nb.study.record import (
    CHECKPOINTS,
    JOB_VARIABLE,
    RecordError,
    altered_outputs,
    finished,
    prepare_work_dir,
    publish_step,
    read_manifest,
    sha256,
    step_dir,
    write_json,
    write_manifest,
)

if TYPE_CHECKING:
    from pandas import DataFrame


SAVED_DPI = 110  # resolution of saved figures, dots per inch


class Run:
    """One execution of one notebook. Made by `open_run`; notebooks read and write through it."""

    def __init__(
        self, job: Job, root: Path, work: Path, key: str | None, key_parts: dict[str, Any], batch: bool,
        claims_path: str | None = None,
    ):  # fmt: skip
        self.max_usd: float | None = None  # set for a batch: what the whole study may spend on hosted models
        self.job, self.root, self.work, self.key, self.key_parts = job, root, work, key, key_parts
        self.batch = batch
        self.owner = None if batch else os.getpid()  # by hand, the work folder belongs to this process
        self.target = root  # the folder in which the finished step is put; by hand it may be another
        self.params = SimpleNamespace(**job.parameters)
        self.started = time.time()
        claims = claims_path or job.parameters.get("claims_path")
        claims = claims or params.claims_path_of(job.parameters.get("profile", ""))
        self.claims = path_hashes(claims)  # as it is before the step runs: noted, and no step but 06 depends on it
        self._inputs: dict[str, dict[str, Any]] = {}
        self._declared: dict[str, dict[str, set[str]]] = {}  # scopes by step and pattern: 06 reads thousands of files
        for step, scope, pattern in job.inputs:
            self._declared.setdefault(step, {}).setdefault(pattern, set()).add(scope)
        self._metrics: dict[str, Any] = {}
        self._exports: dict[str, str] = {}

    def input(self, step: str, name: str, scope: str | None = None) -> Path:
        """The path of an input, after its hash was compared with its producer's manifest; the record notes it.

        Args:
            step: the step that wrote it, as "02_synth".
            name: a file or folder below that step's folder, as "artefacts/train.parquet".
            scope: the producer's scope; by default this notebook's own configuration, else "shared".

        Raises:
            RecordError: the read is not declared in telco_nb/study/plan.py, or the file is missing or altered.
        """
        covering = [scopes for pattern, scopes in self._declared.get(step, {}).items() if _covers(pattern, name)]
        scope = scope or (self.job.scope if any(self.job.scope in scopes for scopes in covering) else "shared")
        if not any(scope in scopes for scopes in covering):
            undeclared = f"{self.job.id} reads {scope}/{step}/{name}, which telco_nb/study/plan.py does not declare."
            raise RecordError(undeclared)

        def is_asked(path: str) -> bool:
            return path == name or path.startswith(f"{name}/")

        manifest = self._manifest_of(step, scope)
        outputs = [output for output in manifest["outputs"] if is_asked(output["path"])]
        if not outputs:
            raise RecordError(f"{scope}/{step} did not write {name}. Run it again: {_command(self.job, step, scope)}")
        for path, fault in altered_outputs(self.root, manifest, is_asked):
            raise RecordError(f"{path} {fault} after {step}. Run {_command(self.job, step, scope)}")
        for output in outputs:
            relative = f"{scope}/{step}/{output['path']}"
            self._inputs[relative] = {"path": relative, "sha256": output["sha256"], "bytes": output["bytes"]}
        return step_dir(self.root, scope, step) / name

    def parameters_of(self, step: str, scope: str) -> dict[str, Any]:
        """The parameters with which another step of this study ran. Raises RecordError if it has not finished."""
        return self._manifest_of(step, scope)["parameters"]

    def with_other_claims(self, jobs: Iterable[tuple[str, str]]) -> list[str]:
        """The jobs, as `scope/step`, that ran when the file of claims was another one; `jobs` are (step, scope).

        A record that does not say so, such as an older one, is not among them.
        """
        found = []
        for step, scope in jobs:
            noted = self._manifest_of(step, scope)["environment"].get("claims")
            if noted and sorted(noted.values()) != sorted(self.claims.values()):  # whatever the file is called
                found.append(f"{scope}/{step}")
        return found

    def _manifest_of(self, step: str, scope: str) -> dict[str, Any]:
        manifest = finished(self.root, scope, step)
        if manifest is None:
            raise RecordError(f"{scope}/{step} has not finished. Run it first: {_command(self.job, step, scope)}")
        return manifest

    def artefact(self, name: str) -> Path:
        """Path to write to, below the step's `artefacts` folder."""
        path = self.work / "artefacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(self, name: str, frame: Any) -> Any:
        """Save a DataFrame as Parquet and CSV below `tables`; returns it."""
        folder = self.work / "tables"
        folder.mkdir(exist_ok=True)
        frame.to_parquet(folder / f"{name}.parquet", index=False)
        frame.to_csv(folder / f"{name}.csv", index=False)
        return frame

    def figure(self, name: str, fig: Any, data: Any = None, alt: str = "") -> Any:
        """Save a matplotlib figure below `figures` and close it.

        Args:
            name: the file's name without its ending.
            fig: the matplotlib figure.
            data: the DataFrame that it shows, saved as CSV beside it.
            alt: a sentence for readers who do not see the picture.

        Returns:
            An image to display.
        """
        import matplotlib.pyplot as plt
        from IPython.display import Image

        folder = self.work / "figures"
        folder.mkdir(exist_ok=True)
        fig.set_dpi(SAVED_DPI)  # text is hinted: its size in inches, and so the box, depends on the resolution
        # "tight" would draw the figure once more to find the same box, unless a layout moves its parts while drawing.
        box = "tight" if fig.get_layout_engine() else fig.get_tightbbox().padded(0.1)
        fig.savefig(folder / f"{name}.png", dpi=SAVED_DPI, bbox_inches=box, metadata={"Software": None})
        plt.close(fig)
        if data is not None:
            data.to_csv(folder / f"{name}.csv", index=False)
        return Image(filename=str(folder / f"{name}.png"), alt=alt or name.replace("_", " "))

    def once(self, name: str, make: Callable[[], DataFrame], **decides: Any) -> DataFrame:
        """A table that all configurations compute alike: computed by the first one, read by the others.

        Args:
            name: of the table.
            make: computes it.
            decides: everything that decides about it, beside this step's code, inputs, libraries and machine.

        Returns:
            The table. Its `attrs["made_by"]` is the job that computed it, and becomes the metric `<name>_made_by`.
        """
        common = [self.key_parts[part] for part in ("notebook", "modules", "inputs", "versions")]
        table = made_once(self.target, name, common, [decides, device_facts()], self.job.id, make)
        self.metric(**{f"{name}_made_by": table.attrs["made_by"]})
        return table

    def metric(self, **values: float | int | str | bool | None) -> None:
        """Add flat metrics; numpy scalars become Python numbers, NaN becomes null."""
        for name, value in values.items():
            number: Any = value.item() if hasattr(value, "item") else value  # ty: ignore[not-callable]
            self._metrics[name] = None if number != number else number

    def log(self, text: str) -> None:
        """Append to the step's log.txt: the place for what is too long for the notebook."""
        with (self.work / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")

    def progress(self, what: str, every_seconds: float = 30.0) -> Callable[[int, int], None]:
        """A callback `(done, total)` that reports progress and the time to go, every `every_seconds` and at the end.

        By hand it prints; in a batch it writes to log.txt. `what` names what is counted, as "pairs".
        """
        started = last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < every_seconds and done < total:
                return
            last, minutes = now, (now - started) * (total - done) / done / 60
            text = f"{done:,} of {total:,} {what}, about {minutes:.0f} min to go"
            self.log(text) if self.batch else print(text, flush=True)

        return report

    def export(self, name: str, path: Path) -> None:
        """Also publish an output file of this step as `outputs/<profile>/<name>`."""
        self._exports[name] = path.relative_to(self.work).as_posix()

    def finish(self, headline: str) -> Any:
        """Write metrics and, last, the manifest; returns the headline as a box to display."""
        from IPython.display import HTML

        write_json(self.work / "metrics.json", self._metrics)
        write_manifest(self.work / "manifest.json", self._manifest(headline))
        # Checkpoints are of no use any more, large, and pickled: they are not part of the record.
        shutil.rmtree(self.work / CHECKPOINTS, ignore_errors=True)
        if not self.batch:
            publish_step(self.target, self.job.scope, self.job.step, self.owner)
        return HTML(
            '<div class="headline" style="border-left:4px solid #0072b2;padding:.6em 1em;font-size:1.1em">'
            f"{html.escape(headline)}</div>"
        )

    def _manifest(self, headline: str) -> dict[str, Any]:
        outputs = [
            {"path": p.relative_to(self.work).as_posix(), "sha256": sha256(p), "bytes": p.stat().st_size}
            for p in sorted(self.work.rglob("*"))
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(self.work).parts)
            and p.name not in ("manifest.json", "log.txt", "job.json")
        ]  # fmt: skip
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.job.step,
            "scope": self.job.scope,
            "key": self.key,
            "key_parts": self.key_parts,
            "executor": "papermill" if self.batch else "jupyter",
            "status": "ok",
            "error": None,
            "headline": headline,
            "parameters": self.job.parameters,
            "inputs": list(self._inputs.values()),
            "outputs": outputs,
            "exports": self._exports,
            "environment": versions() | git_state() | {"claims": self.claims},
            "device": device_facts(),
            "started_at": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def open_run(step: str, namespace: dict[str, Any]) -> Run:
    """Start the record of a notebook: check its parameters, seed, prepare the work folder, show the provenance.

    In a batch the runner has made the job. By hand, in JupyterLab, the newest finished study is opened (see
    `telco_nb.study.opened`), and its values replace those in the parameters cell that were not changed.

    Args:
        step: the notebook's name without its ending, as "03_train".
        namespace: the notebook's `globals()`.

    Returns:
        The open run, through which the notebook reads, writes and finishes.

    Raises:
        ParameterError: a parameter is missing or has a wrong value.
        RecordError: an input is not there yet; the message gives the command that makes it.
    """
    names = params.declared(step)
    missing = [name for name in names if name not in namespace]
    if missing:
        raise ParameterError(f"{step}: run the parameters cell first; not set: {', '.join(missing)}")
    given = {name: namespace[name] for name in names}
    job_file = os.environ.get(JOB_VARIABLE)
    if job_file:
        run = _batch_run(step, given, json.loads(Path(job_file).read_text(encoding="utf-8")))
    else:
        run = _hand_run(step, open_study(step, given))
        namespace.update(run.job.parameters)
    random.seed(run.params.__dict__.get("seed", 0))
    set_figure_style()
    _read_tables_as_text()
    if "base_model" in names:
        egress.log_hub(run.root)
    _show_provenance(run, names)
    return run


def _read_tables_as_text() -> None:
    """Keep JupyterLab from reading what stands between two dollar signs of a table as mathematics."""
    import pandas as pd

    pd.set_option("display.html.use_mathjax", False)


def _batch_run(step: str, given: dict[str, Any], job: dict[str, Any]) -> Run:
    if job["step"] != step or job["parameters"] != given:
        raise RecordError(f"{step}: papermill's parameters are not those of the job {job['scope']}/{job['step']}.")
    die_with_parent()
    inputs = tuple(tuple(item) for item in job["inputs"])
    made = Job(step, job["scope"], given, inputs)
    run = Run(made, Path(job["root"]), Path(job["work"]), job["key"], job["key_parts"], True, job.get("claims_path"))
    run.max_usd = job.get("max_usd")
    return run


def _hand_run(step: str, opened: Opened) -> Run:
    egress.agree([])  # nobody was shown hosts and prices
    given, root = opened.parameters, opened.root
    study = params.load_study(given["profile"])
    params.validate(study.values("shared") | given, f"notebooks/{step}.ipynb, parameters cell")
    job = Job(step, given["scope"], given, inputs_of(step, given))
    key, parts = content_key(job, root)
    if key is None:
        waiting = [d for d in job.depends if read_manifest(root, *d.split("/")) is None]
        todo = "; ".join(_command(job, *d.split("/")[::-1]) for d in waiting[:1])
        raise RecordError(f"{job.id} needs {', '.join(waiting)} first. Run: {todo}")
    markdown(opened.note)
    run = Run(job, root, prepare_work_dir(job, opened.target, key, os.getpid()), key, parts, batch=False)
    run.target = opened.target
    return run


def _covers(pattern: str, name: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or pattern.startswith(f"{name}/")


def _command(job: Job, step: str, scope: str) -> str:
    configs = f" --configs {scope}" if step[:2] in ("03", "04") and scope != UNTUNED else ""
    return f"./run_all.py --profile {job.parameters['profile']}{configs} --steps {step[:2]}"


def _show_provenance(run: Run, defaults: dict[str, Any]) -> None:
    from IPython.display import HTML, display

    rows = "".join(
        f"<tr><td>{name}</td><td>{_bold(value, value != defaults[name])}</td></tr>"
        for name, value in run.job.parameters.items()
    )
    git = git_state()
    facts = {
        "scope": run.job.scope,
        "content key": (run.key or "")[:12],
        "code": f"{(git['git_commit'] or 'no git')[:10]}{' + uncommitted changes' if git['git_dirty'] else ''}",
        "device": device_text(device_facts()),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("python", "torch", "transformers")),
    }
    rows += "".join(f"<tr><td><i>{k}</i></td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    display(HTML(f'<table class="provenance">{rows}</table>'))


def _bold(value: Any, changed: bool) -> str:
    text = html.escape(str(value))
    return f"<b>{text}</b>" if changed else text


def data_path(value: str | None) -> Path | None:
    """The file or folder that a parameter such as `gold_path` names, relative to the repository; None for None."""
    return None if value is None else ROOT / value


def markdown(text: str) -> None:
    """Display generated prose (Markdown) in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(text))


def readable(frame: DataFrame, digits: int = 3) -> DataFrame:
    """A table for people: every cell as text.

    Args:
        frame: any table; headers carry the units.
        digits: significant digits of numbers that are not whole.

    Returns:
        A DataFrame of strings: thousands separators, yes and no for booleans, "-" where a value is missing.
    """
    return frame.map(lambda value: _readable(value, digits)).astype("str")


def _readable(value: Any, digits: int) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_readable(item, digits) for item in value) or "-"
    if value is None or str(value) in ("nan", "<NA>", "NaT"):
        return "-"
    if str(value) in ("True", "False"):
        return "yes" if value else "no"
    if not isinstance(value, Real):
        return str(value)
    is_whole = float(value).is_integer() or abs(value) >= 10**digits
    return f"{value:,.0f}" if is_whole else f"{value:,.{digits}g}"


def set_figure_style() -> None:
    """One look for all figures: white grid, colours safe for colour-blind readers."""
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", rc={"figure.figsize": (7, 4), "figure.dpi": 100})
