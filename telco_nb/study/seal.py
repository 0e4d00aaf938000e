"""The seal of a study: the hash of every file that it shows, sealed by its own hash.

A run writes `seal.json` as its last act, also after a failure or Ctrl-C; one that is killed writes none, and the next
run seals what both have done. `run_all.py verify` compares. Hidden files are working files and not shown.

Whoever changes files can write a new seal for them, so keep the hash that a run prints somewhere else.

The stores of judges and of the generator, and the log of calls, only ever grow, so one that is longer than it was
sealed is told apart from one whose sealed lines have changed.

A command that reads a study calls `require_unchanged` first: what a step wrote is compared with its manifest, all else
with the seal, as a run does it. An executed notebook is outside the folder of its step, and is compared with the seal
where no manifest knows its hash.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from telco_nb.study.input_files import MOST_RECORD_BYTES, InputFileError, read_json
from telco_nb.study.manifest import SCHEMA_VERSION, SEAL, is_sealed, load_manifest, sealed
from telco_nb.study.plan import STEPS
from telco_nb.study.record import (
    CHUNK_BYTES,
    RecordError,
    altered_exports,
    altered_outputs,
    export_again,
    find_manifest,
    json_bytes,
    sha256,
    step_dir,
    whole_lines_bytes,
    work_dir,
    write_json,
)

SEAL_NAME = "seal.json"
STORE_FOLDER = "store"  # its name in the folder of a scope
CALLS = "egress.jsonl"  # the study's log of calls that leave this machine
ANALYSIS = ("study", "06_analysis")  # scope and step that give a study its results


class NoSeal(RecordError):
    """A study has no seal; the message says how to get one."""


@dataclass(frozen=True)
class Difference:
    """A file that is not as it was sealed: `kind` is changed, missing, new or grown (a store with more lines)."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind:8} {self.path}"


def shown_files(root: Path) -> Iterator[str]:
    """Every file below a study's folder that is not hidden, by its path from there, in order, without the seal."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name).relative_to(root).as_posix()
            if not name.startswith(".") and path != SEAL_NAME:
                yield path


def seal_study(root: Path) -> str:
    """Write the seal of a study as it is now, unless the last one still holds; returns the seal's hash."""
    files = {path: _entry(root / path, is_store(path)) for path in shown_files(root)}
    last = _read_seal(root)
    if last and last["files"] == files:
        return last[SEAL]
    content = sealed({"schema_version": SCHEMA_VERSION, "files": files})
    write_json(root / SEAL_NAME, content)
    return content[SEAL]


def forget_deleted_stores(root: Path) -> None:
    """Take stores that somebody has deleted out of a seal: what is asked again is no change of their sealed lines.

    A seal that cannot be read goes as a whole: the caller has named it, and no reader could compare anything with it.
    """
    seal = _read_seal(root)
    if seal is None:
        (root / SEAL_NAME).unlink(missing_ok=True)
    stores = [path for path in (seal or {"files": {}})["files"] if is_store(path) and path != CALLS]
    deleted = [path for path in stores if not (root / path).exists()]
    if seal and deleted:
        kept = {path: entry for path, entry in seal["files"].items() if path not in deleted}
        write_json(root / SEAL_NAME, sealed(seal | {"files": kept}))


def seal_hash(root: Path) -> str | None:
    """The hash of a study's seal; None if it has no whole one."""
    seal = _read_seal(root)
    return None if seal is None else seal[SEAL]


def check_seal(root: Path, wanted: Callable[[str], bool] = lambda _: True, known: str = "") -> list[Difference]:
    """What is not as it was sealed.

    Args:
        root: the study's folder.
        wanted: chooses the paths to compare.
        known: the first characters of the seal's hash, where somebody has kept it.

    Returns:
        The differences in the order of their paths.

    Raises:
        NoSeal: there is no seal.
    """
    if not (root / SEAL_NAME).exists():
        raise NoSeal(f"{root} has no {SEAL_NAME}. A run writes it at its end: ./run_all.py --profile {root.name}")
    seal = _read_seal(root)
    if seal is None or not seal[SEAL].startswith(known):
        return [Difference("changed", SEAL_NAME)]
    found = {path: _difference(root, path, entry) for path, entry in seal["files"].items() if wanted(path)}
    found |= {path: "new" for path in shown_files(root) if path not in seal["files"] and wanted(path)}
    return [Difference(kind, path) for path, kind in sorted(found.items()) if kind]


def require_unchanged(root: Path, *patterns: str, needs_seal: bool = False) -> None:
    """Return if the files that a command is about to read are as the runs of the study have left them.

    A store may have grown since it was sealed, by an import or by a run that was killed, or be gone; files may be new.

    Args:
        root: the study's folder.
        patterns: paths from there, such as `<scope>/<step>/<file>`, as for `fnmatch`. With a step its exports count.
        needs_seal: refuse a study without a seal, which alone can prove the report; else nothing is compared with it.

    Raises:
        RecordError: a file was changed or is missing; the message names every one, and the fix.
    """
    _refuse(root, [*_altered_results(root, patterns, exports=True), *_unlike_the_seal(root, patterns, needs_seal)])


def require_finished(root: Path, *patterns: str, needs_seal: bool = False) -> list[str]:
    """`require_unchanged` for who shows a finished study as a whole; then its exports are written again.

    A study that is refused is left as it is. A step that 06 has read must be there, whatever the patterns name: without
    it the pages would show less than the results rest on.

    Args:
        root: the study's folder.
        patterns: as for `require_unchanged`.
        needs_seal: likewise.

    Returns:
        What was wrong with the exports, in words.

    Raises:
        RecordError: a file was changed or is missing, or a step is.
    """
    found = [*_altered_results(root, patterns, exports=False), *_unlike_the_seal(root, patterns, needs_seal)]
    _refuse(root, [*_missing_steps(root), *found])
    mended = export_again(root, *ANALYSIS)
    _refuse(root, _altered_results(root, ["/".join((*ANALYSIS, "*"))], exports=True))
    return mended


def _missing_steps(root: Path) -> list[str]:
    """The steps that the analysis has read and that are gone, in words; a killed swap of folders is no loss."""
    manifest = find_manifest(root, *ANALYSIS)[0]
    if manifest is None:
        return [f"{'/'.join(ANALYSIS)}/manifest.json was changed or is missing"]
    read = dict.fromkeys(tuple(file["path"].split("/")[:2]) for file in manifest["inputs"])
    return [f"{scope}/{step} is missing" for scope, step in read if not step_dir(root, scope, step).is_dir()]


def _refuse(root: Path, found: list[str]) -> None:
    """Raise RecordError with the fix if anything was found."""
    if found:
        raise RecordError(
            f"{root} is not as the runs of this study left it: {', '.join(found)}. Nothing was read. Restore this from "
            f"a copy. For what a step or the report holds, and for {SEAL_NAME}, "
            f"run ./run_all.py --profile {root.name}: that is made again. "
            "A store can also be deleted: then its questions are asked again."
        )


def _unlike_the_seal(root: Path, patterns: Sequence[str], needs_seal: bool) -> list[str]:
    """What the patterns name, no manifest proves, and is not as it was sealed, in words; a damaged seal itself too."""
    if not needs_seal and not (root / SEAL_NAME).exists():
        return []
    # What a step holds is proven by its manifest: a run that is under way, or was killed, has sealed nothing yet.
    changes = check_seal(root, lambda path: _matches(path, patterns) and not _is_proven(root, path))
    found = [f"{change.path} was changed" for change in changes if change.kind == "changed"]
    return [*found, *(f"{c.path} is missing" for c in changes if c.kind == "missing" and not is_store(c.path))]


def _altered_results(root: Path, patterns: Sequence[str], exports: bool) -> list[str]:
    """What is not as the manifests of the steps say that the patterns name, in words; with `exports` these too."""
    found = []
    for scope, step in _steps(root, patterns):
        manifest, folder = find_manifest(root, scope, step)[0], step_dir(root, scope, step)
        wanted = partial(_matches, patterns=patterns, folder=f"{scope}/{step}/")
        if manifest is None:
            held = any(wanted(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file())
            found += [f"{scope}/{step}/manifest.json was changed or is missing"] * held
            continue
        found += [f"{path.relative_to(root)} {fault}" for path, fault in altered_outputs(root, manifest, wanted)]
        found += [f"{name} {fault}" for name, fault in altered_exports(root, manifest).items()] if exports else []
        fault = _notebook_fault(root, scope, step) if _matches(f"{scope}/{step}.ipynb", patterns) else None
        found += [f"{scope}/{step}.ipynb {fault}"] if fault else []
    return found


def _notebook_fault(root: Path, scope: str, step: str) -> str | None:
    """What an executed notebook is or was, in words, by the hash in its manifest; "" if it is whole.

    A run writes a new notebook before it swaps the folders of the step. If it is killed in between, the manifest in the
    work folder is that of the notebook.

    Returns None if no manifest knows the notebook: that of a run by hand names none, and a step can have lost its own.
    """
    files = step_dir(root, scope, step) / "manifest.json", work_dir(root, scope, step) / "manifest.json"
    published, new = ((load_manifest(file, scope, step)[0] or {}).get("notebook_sha256") for file in files)
    notebook = root / scope / f"{step}.ipynb"
    digest = sha256(notebook) if notebook.is_file() else None
    if digest and digest in (published, new):
        return ""
    return None if published is None else "was changed" if digest else "is missing"


def _is_proven(root: Path, path: str) -> bool:
    """True for what a step that is there wrote, and for an executed notebook that a manifest knows by its hash."""
    scope, _, rest = path.partition("/")
    step, _, inside = rest.partition("/")
    if step.removesuffix(".ipynb") not in STEPS:
        return False
    if inside:
        return step_dir(root, scope, step).is_dir()
    return _notebook_fault(root, scope, step.removesuffix(".ipynb")) is not None


def _steps(root: Path, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(scope, step) of the steps in which the patterns name files, also where a swap of folders was interrupted."""
    found = set()
    for scope_pattern, _, rest in (pattern.partition("/") for pattern in patterns):
        steps = fnmatch.filter(STEPS, rest.partition("/")[0].removesuffix(".ipynb"))
        found |= {(scope.name, step) for scope in root.glob(scope_pattern) for step in steps}
    return sorted((scope, step) for scope, step in found if step_dir(root, scope, step).is_dir())


def _matches(path: str, patterns: Sequence[str], folder: str = "") -> bool:
    return any(fnmatch.fnmatchcase(folder + path, pattern) for pattern in patterns)


def is_store(path: str) -> bool:
    """True for a file that only ever grows by lines."""
    parts = path.split("/")
    return path == CALLS or (STORE_FOLDER in parts[:-1] and path.endswith(".jsonl"))


def _difference(root: Path, path: str, entry: dict[str, Any]) -> str | None:
    target = root / path
    if not target.is_file():
        return "missing"
    now = _entry(target, is_store(path))
    if now == entry:
        return None
    if is_store(path) and now["bytes"] > entry["bytes"] and _entry(target, True, entry["bytes"]) == entry:
        return "grown"
    return "changed"


def _entry(path: Path, whole_lines: bool, at_most: int | None = None) -> dict[str, Any]:
    """Hash and size of a file, of its whole lines only, or of its first bytes; an unreadable one has no hash."""
    try:
        with path.open("rb") as stream:
            size = whole_lines_bytes(stream) if whole_lines else path.stat().st_size
            size = size if at_most is None else at_most
            return {"sha256": _sha256_of_first(stream, size), "bytes": size}
    except OSError as error:
        return {"sha256": None, "bytes": None, "error": error.strerror}


def _sha256_of_first(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while size > 0 and (chunk := stream.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _read_seal(root: Path) -> dict[str, Any] | None:
    """The seal of a study; None if there is none or a byte of it differs from what was written."""
    try:
        seal = read_json(root / SEAL_NAME, control_characters=True, most_bytes=MOST_RECORD_BYTES)
        exact = json_bytes(seal) == (root / SEAL_NAME).read_bytes()
    except (OSError, InputFileError):
        return None
    files = seal.get("files") if exact and is_sealed(seal) else None
    whole = isinstance(files, dict) and all(isinstance(entry, dict) and "bytes" in entry for entry in files.values())
    return seal if whole else None
