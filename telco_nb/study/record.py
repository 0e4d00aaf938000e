"""The record of a step: its folders, its manifest, and how a finished step replaces the one before.

A step writes into a work folder; `manifest.json` is written last, and only then does the work folder replace the
step's folder. So a folder with a manifest is a finished step, whatever died in the meantime.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from telco_nb import ROOT
from telco_nb.study.input_files import MOST_RECORD_BYTES, read_json
from telco_nb.study.manifest import load_manifest, sealed
from telco_nb.study.params import check_profile_name, given_path
from telco_nb.study.plan import Job

if TYPE_CHECKING:
    from pandas import DataFrame

JOB_VARIABLE = "TELCO_NB_JOB"
CHUNK_BYTES = 1 << 20  # that are read at once
OUTPUTS_VARIABLE = "TELCO_NB_OUTPUTS"
PUBLISH_LOCK = ".publish.lock"
BASE_FILE = "base_model.json"  # in the folder of an adapter: the base model on which it rests
CHECKPOINTS = ".checkpoints"  # in the folder of a training; of no use when it has finished
OWNED = re.compile(r"\..+\.(\d+)\.(tmp|work|old)")  # files and folders of one process: .<name>.<pid>.<kind>


class RecordError(RuntimeError):
    """A step's input or output is not what the record says; the message names the file and the fix."""


def outputs_root() -> Path:
    """The folder of all studies: `outputs`, or what the environment variable TELCO_NB_OUTPUTS names.

    Raises ParameterError if its name cannot be used.
    """
    return given_path(os.environ.get(OUTPUTS_VARIABLE) or ROOT / "outputs", "the outputs folder")


def profile_root(profile: str) -> Path:
    """The study's folder, `outputs/<profile>`. Raises ParameterError for a profile's name that leads elsewhere."""
    check_profile_name(profile)
    return outputs_root() / profile


def use_outputs(folder: Path | None) -> None:
    """Let the results of this process and its children go to a folder, if one is given.

    Raises ParameterError if its name cannot be used.
    """
    if folder:
        os.environ[OUTPUTS_VARIABLE] = str(given_path(folder, "--outputs"))


def step_dir(root: Path, scope: str, step: str) -> Path:
    """The folder of a finished step; while `publish_step` has died between its two renames, that of the one before.

    Readers rename nothing: `sweep_replaced`, which needs the study's lock, completes the swap.
    """
    final, old = root / scope / step, root / scope / f".{step}.old"
    if not final.exists() and old.exists():
        with contextlib.suppress(OSError), (root / PUBLISH_LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)  # a process may be between the two renames now
        if not final.exists() and old.exists():
            return old
    return final


def work_dir(root: Path, scope: str, step: str, owner: int | None = None) -> Path:
    """The folder in which a step is made: the runner's, or that of the process `owner` which runs it by hand."""
    return root / scope / (f".{step}.work" if owner is None else f".{step}.{owner}.work")


def prepare_work_dir(job: Job, root: Path, key: str, owner: int | None = None) -> Path:
    """The work folder of a job: emptied if it belongs to another content key, kept (for resuming) if to this one."""
    work = work_dir(root, job.scope, job.step, owner)
    key_file = work / ".key"
    if work.exists() and (not key_file.is_file() or key_file.read_text(errors="replace") != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "manifest.json").unlink(missing_ok=True)
    key_file.write_text(key)
    return work


@contextlib.contextmanager
def _publishing(root: Path) -> Generator[None]:
    """Only one process at a time replaces steps of a study; the next one waits for the moment that it takes."""
    with (root / PUBLISH_LOCK).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def publish_step(root: Path, scope: str, step: str, owner: int | None = None) -> None:
    """Put the finished work folder in the place of the step's folder, and its exports into the profile's folder."""
    work, final = work_dir(root, scope, step, owner), root / scope / step
    old = final.with_name(f".{step}.old")
    with _publishing(root):
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(work, final)
        shutil.rmtree(old, ignore_errors=True)
    export_again(root, scope, step)


def sweep_replaced(root: Path, scope: str, step: str) -> None:
    """Complete the swap of a step's folder, if the process that made it died before it could: needs the study's lock.

    The folder that was replaced goes, or comes back if no other has taken its place.
    """
    final, old = root / scope / step, root / scope / f".{step}.old"
    if not old.exists():
        return
    with _publishing(root):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, final)


def complete_swaps(root: Path) -> None:
    """`sweep_replaced` for every step of a study: readers that look for a step in its own place find it there."""
    for old in sorted(root.glob("*/.*.old")):
        sweep_replaced(root, old.parent.name, old.name.removeprefix(".").removesuffix(".old"))


def export_again(root: Path, scope: str, step: str) -> list[str]:
    """Write the exports of a finished step that are missing, old or changed; returns what was wrong with them."""
    manifest, done = finished(root, scope, step), []
    if manifest is None:
        return []
    for name, fault in altered_exports(root, manifest).items():
        source = manifest["exports"][name]
        data = _bytes_or_none(step_dir(root, scope, step) / source)
        if data is not None and hashlib.sha256(data).hexdigest() == _sha256_of_output(manifest, source):
            write_bytes(root / name, data)
            done.append(f"{name} {fault}")
    return done


def altered_exports(root: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The exports of a finished step that are not its files, by name: "was missing", or what it was not."""
    found = {}
    for name, source in manifest["exports"].items():
        data = _bytes_or_none(root / name)
        if data is None:
            found[name] = "was missing"
        elif hashlib.sha256(data).hexdigest() != _sha256_of_output(manifest, source):
            found[name] = "was not that of the last analysis"
    return found


def _sha256_of_output(manifest: dict[str, Any], path: str) -> str | None:
    return next((output["sha256"] for output in manifest["outputs"] if output["path"] == path), None)


def _bytes_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def owned(root: Path) -> Iterator[tuple[Path, bool]]:
    """Temporary files and work folders of single processes, each with whether its process lives."""
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            if match := OWNED.fullmatch(name):
                yield Path(folder, name), _is_alive(int(match.group(1)))
        folders[:] = [name for name in folders if not OWNED.fullmatch(name)]


def sweep(root: Path) -> list[Path]:
    """Delete what processes that are gone have left behind; returns it. Needs the study's lock."""
    swept = [path for path, is_alive in owned(root) if not is_alive]
    for path in swept:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return swept


def _is_alive(pid: int) -> bool:
    """True for a process that can still write; one that is dead and not yet collected by its parent cannot."""
    import psutil  # only a run that finds such files pays for it

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: at any moment it is absent, the old one, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), atomically."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the seal over its content, atomically."""
    write_json(path, sealed(manifest))


def read_manifest(root: Path, scope: str, step: str) -> dict[str, Any] | None:
    """The manifest of a finished step; None if there is none, or one that is damaged (see `find_manifest`)."""
    return find_manifest(root, scope, step)[0]


def find_manifest(root: Path, scope: str, step: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a finished step, or None with the reason in words."""
    return load_manifest(_manifest_file(root, scope, step), scope, step)


def finished(root: Path, scope: str, step: str) -> dict[str, Any] | None:
    """The manifest of a finished step without its inputs and key parts, which are most of it; None if there is none.

    It is kept in memory, and read again only if the file has changed: steps that read from all others ask for it.
    """
    path = _manifest_file(root, scope, step)
    try:
        state = path.stat()
    except OSError:
        return None
    return _kept_manifest(path, scope, step, (state.st_ino, state.st_mtime_ns, state.st_size))


@cache
def _kept_manifest(path: Path, scope: str, step: str, state: tuple[int, int, int]) -> dict[str, Any] | None:
    manifest = load_manifest(path, scope, step)[0]
    return manifest and {name: value for name, value in manifest.items() if name not in ("inputs", "key_parts")}


def _manifest_file(root: Path, scope: str, step: str) -> Path:
    return step_dir(root, scope, step) / "manifest.json"


def altered_outputs(
    root: Path, manifest: dict[str, Any], wanted: Callable[[str], bool] = lambda path: True
) -> Iterator[tuple[Path, str]]:
    """The outputs of a finished step that are not as it wrote them, each with "is missing" or "was changed".

    Args:
        root: the study's folder.
        manifest: of the step.
        wanted: chooses outputs by their path in the step's folder.
    """
    folder = step_dir(root, manifest["scope"], manifest["step"])
    for output in manifest["outputs"]:
        path = folder / output["path"]
        if not wanted(output["path"]):
            continue
        if not path.is_file():
            yield path, "is missing"
        elif path.stat().st_size != output["bytes"] or sha256(path) != output["sha256"]:
            yield path, "was changed"


@contextlib.contextmanager
def _naming_damage(path: Path) -> Generator[None]:
    """Turns whatever a reader raises about a damaged output of a step into a RecordError that names the file.

    A missing file stays a FileNotFoundError, one that may not be read a PermissionError.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:  # pyarrow's are among these
        reason = " ".join(str(error).split())
        raise RecordError(
            f"{path} is damaged ({type(error).__name__}: {reason.replace(str(path), 'it'):.200}). "
            "Run ./run_all.py with the profile of this study: it makes the step again."
        ) from None


def read_table(path: Path, columns: list[str] | None = None) -> DataFrame:
    """A table that a step wrote. Raises RecordError if it is damaged, FileNotFoundError if there is none."""
    import pandas as pd  # the runner does without

    with _naming_damage(path):
        return pd.read_parquet(path, columns=columns)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that a step wrote. Raises RecordError if it is damaged, FileNotFoundError if there is none."""
    path.stat()
    with _naming_damage(path):
        value = read_json(path, control_characters=True, most_bytes=MOST_RECORD_BYTES)
        if not isinstance(value, dict):
            raise TypeError("a JSON object is expected")
    return value


def whole_lines_bytes(stream: BinaryIO) -> int:
    """The size of a file of lines without what follows its last line feed: a writer died there, or still writes."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - CHUNK_BYTES)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is none, cannot be read, or gives a name twice: which amount would count?"""
    try:
        attempt = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    return attempt if isinstance(attempt, dict) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice")
    return values


def readable_by_all(folder: Path) -> None:
    """Give files the mode 0644 and folders 0755: safetensors writes weights that only their owner may read."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
