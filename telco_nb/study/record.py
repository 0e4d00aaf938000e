"""The record of a step: its folders, its manifest, and how a finished step replaces the one before.

A step writes into a work folder; `manifest.json` is written last, and only then does the work folder replace the
step's folder. So a folder with a manifest is a finished step, whatever died in the meantime.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from telco_nb import ROOT
from telco_nb.study.plan import Job

SCHEMA_VERSION = 1
JOB_VARIABLE = "TELCO_NB_JOB"


class RecordError(RuntimeError):
    """A step's input or output is not what the record says; the message names the file and the fix."""


def profile_root(profile: str) -> Path:
    """The study's folder, `outputs/<profile>`; the environment variable TELCO_NB_OUTPUTS replaces `outputs`."""
    return Path(os.environ.get("TELCO_NB_OUTPUTS") or ROOT / "outputs").resolve() / profile


def step_dir(root: Path, scope: str, step: str) -> Path:
    return root / scope / step


def work_dir(root: Path, scope: str, step: str) -> Path:
    return root / scope / f".{step}.work"


def prepare_work_dir(job: Job, root: Path, key: str) -> Path:
    """The work folder of a job: emptied if it belongs to another content key, kept (for resuming) if to this one."""
    work = work_dir(root, job.scope, job.step)
    key_file = work / ".key"
    if work.exists() and (not key_file.is_file() or key_file.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "manifest.json").unlink(missing_ok=True)
    key_file.write_text(key)
    return work


def publish_step(root: Path, scope: str, step: str) -> None:
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
    """Write a file atomically: at any moment it is absent, the old one, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_manifest(root: Path, scope: str, step: str) -> dict[str, Any] | None:
    """The manifest of a finished step, or None. An interrupted swap is completed first."""
    final = step_dir(root, scope, step)
    old = final.with_name(f".{step}.old")
    if old.exists() and not final.exists():  # died between the two renames of publish_step
        os.replace(old, final)
    try:
        manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("schema_version") == SCHEMA_VERSION else None


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
