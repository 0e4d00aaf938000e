"""Stores executed notebooks: `<step>.ipynb` after a success, `<step>.failed.ipynb` after a failure.

A failure never changes the last good record. Notebooks are plain JSON here, so that the runner can import this module
without a heavy library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from telco_nb import ROOT
from telco_nb.study import record
from telco_nb.study.machine import home_folder

LONG_LINES, HEAD_LINES, TAIL_LINES = 100, 40, 20
LONG_CHARACTERS = 20_000
KINDS = {  # title and advice
    "error": ("Error in a cell", "The last cell with an output shows the exception."),
    "died": (
        "The kernel died",
        "If memory was short: lower `batch_tokens` or `answer_batch_size`, or close other programs.",
    ),
    "timeout": ("Timeout", "Raise `--timeout`, or find out what the cell waits for."),
    "interrupted": ("Interrupted", "Nothing is wrong with the step. The same command continues it."),
    "no result": (
        "No result",
        "A step is done when its last cell, `run.finish(...)`, has written `manifest.json`.",
    ),
    "not started": ("Could not run", "The log says more."),
    "not kept": ("The result could not be kept", "Make room on the disk, or choose another place with `--outputs`."),
}
# The last line of a traceback (a class, perhaps with its module, and a text), or the first one of a crash of Python.
EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt|Exit|Stop|Refused)(: .*)?|Fatal Python error: .*")
LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class Failure:
    """A failed execution: one of KINDS, the reason as a sentence, and the number of the cell (`In [n]`) if known."""

    kind: str
    reason: str
    cell: int | None = None

    def __str__(self) -> str:
        return f"{KINDS[self.kind][0].lower()}{f' In [{self.cell}]' if self.cell else ''}: {self.reason}"


def describe(error: BaseException) -> str:
    """The class and the text of an exception on one line, as failures give them."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}".removesuffix(": ")


def last_exception(log: Path) -> str | None:
    """The last exception in a log, as class and text; None if there is none."""
    try:
        lines = log.read_bytes()[-LONG_CHARACTERS:].decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line[:LONGEST_REASON] for line in reversed(lines) if EXCEPTION.fullmatch(line)), None)


def running_notebook(root: Path, scope: str, step: str) -> Path:
    """Return the path of the notebook while it runs; papermill saves it after every cell."""
    return root / scope / f".{step}.running.ipynb"


def running_log(root: Path, scope: str, step: str) -> Path:
    """Return the path of the output of all cells while they run; follow it with `tail -f`."""
    return root / scope / f".{step}.running.log"


def job_file(root: Path, scope: str, step: str) -> Path:
    """Return the path of the job as its process and its kernel read it; it is there while the job runs."""
    return root / scope / f".{step}.job.json"


def failed_notebook(root: Path, scope: str, step: str) -> Path:
    return root / scope / f"{step}.failed.ipynb"


def failed_log(root: Path, scope: str, step: str) -> Path:
    return root / scope / f"{step}.failed.log"


def keep_record(root: Path, scope: str, step: str) -> None:
    """Publish the executed notebook, then the step's folder, whose manifest names the notebook by its hash."""
    notebook = _to_bytes(_cleaned(read_running(root, scope, step), root, scope, step))
    path = record.work_dir(root, scope, step) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    record.write_manifest(path, manifest | {"notebook_sha256": hashlib.sha256(notebook).hexdigest()})
    record.write_bytes(root / scope / f"{step}.ipynb", notebook)
    record.publish_step(root, scope, step)
    sweep_attempt(root, scope, step)
    forget_failure(root, scope, step)


def sweep_attempt(root: Path, scope: str, step: str) -> None:
    """Delete what an attempt at a step leaves beside it, however it ended. Nothing may be running the step."""
    for leftover in (running_notebook, running_log, job_file):
        leftover(root, scope, step).unlink(missing_ok=True)
    record.sweep_replaced(root, scope, step)


def read_failure(path: Path) -> str:
    """The failure that a failed notebook records, as text; says so if it cannot be read."""
    try:
        return str(Failure(**json.loads(path.read_text(encoding="utf-8"))["metadata"]["telco_nb_failure"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "the reason cannot be read"


def forget_failure(root: Path, scope: str, step: str) -> None:
    """Delete the failed record of a step that is up to date."""
    for leftover in (failed_notebook, failed_log):
        leftover(root, scope, step).unlink(missing_ok=True)


def keep_failed(root: Path, scope: str, step: str, failure: Failure) -> None:
    """Write `<step>.failed.ipynb`, with a banner that names the failure, and `<step>.failed.log`."""
    notebook = _cleaned(read_running(root, scope, step), root, scope, step)
    _correct_status(notebook, failure)
    notebook["metadata"]["telco_nb_failure"] = asdict(failure)
    notebook["cells"].insert(0, _banner(failure, step))
    record.write_bytes(failed_notebook(root, scope, step), _to_bytes(notebook))
    running_notebook(root, scope, step).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log = running_log(root, scope, step)
        text = log.read_text(encoding="utf-8", errors="replace")
        record.write_bytes(failed_log(root, scope, step), without_machine_paths(text, root).encode())
        log.unlink()


def read_running(root: Path, scope: str, step: str) -> dict[str, Any]:
    """Return the notebook as papermill last saved it; an empty one if the file is missing or incomplete."""
    try:
        return json.loads(running_notebook(root, scope, step).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def is_executed(cell: Any) -> bool:
    """True if a kernel executes this cell; such cells get a number."""
    return cell["cell_type"] == "code" and bool("".join(cell["source"]).strip())


def _to_bytes(notebook: dict[str, Any]) -> bytes:
    return (json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _cleaned(notebook: dict[str, Any], root: Path, scope: str, step: str) -> dict[str, Any]:
    """Remove machine paths, the middle of long output, and papermill's error headline, which our banner replaces."""
    notebook["cells"] = [c for c in notebook["cells"] if not _is_papermill_headline(c)]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [_map_text(_shortened(o), root) for o in cell.get("outputs", [])]
    metadata = notebook["metadata"].get("papermill")
    if metadata:
        metadata |= {"input_path": f"notebooks/{step}.ipynb", "output_path": f"{scope}/{step}.ipynb"}
    return notebook


def _is_papermill_headline(cell: dict[str, Any]) -> bool:
    tagged = "papermill-error-cell-tag" in cell["metadata"].get("tags", [])
    return tagged and "An Exception was encountered" in "".join(cell["source"])


def _map_text(value: Any, root: Path) -> Any:
    if isinstance(value, str):
        return without_machine_paths(value, root)
    if isinstance(value, list):
        return [_map_text(item, root) for item in value]
    if isinstance(value, dict):
        return {k: v if str(k).startswith("image/") else _map_text(v, root) for k, v in value.items()}
    return value


def without_machine_paths(text: str, root: Path) -> str:
    """Replace the folders of this machine in a text by neutral names; files of the project get their relative path."""
    places = {  # folders inside others come first
        str(root): f"outputs/{root.name}",
        sysconfig.get_paths()["purelib"]: "site-packages",
        sysconfig.get_paths()["stdlib"]: "python",
        str(ROOT): "",
        str(home_folder() or "/"): "~",
    }
    for place, name in places.items():
        if place != "/":
            text = text.replace(f"{place}/", f"{name}/" if name else "")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/ipykernel_\d+/\d+\.py", "cell", text)


def _shortened(output: dict[str, Any]) -> dict[str, Any]:
    """Cut the middle out of a long stream output: first by lines, then by characters."""
    if output.get("output_type") != "stream":
        return output
    text = "".join(output["text"])
    lines = text.splitlines(keepends=True)
    if len(lines) > LONG_LINES:
        note = f"... {len(lines) - HEAD_LINES - TAIL_LINES:,} lines left out ...\n"
        text = "".join([*lines[:HEAD_LINES], note, *lines[-TAIL_LINES:]])
    if len(text) > LONG_CHARACTERS:
        half = LONG_CHARACTERS // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
    return output | {"text": text.splitlines(keepends=True)}


def _correct_status(notebook: dict[str, Any], failure: Failure) -> None:
    """Mark the failed cell and the cells that never ran: after a kernel's death papermill marks them as completed."""
    metadata = notebook["metadata"].get("papermill")
    if metadata:
        metadata["exception"] = True
    cells = notebook["cells"]
    executed = [place for place, cell in enumerate(cells) if is_executed(cell)]
    if failure.cell is None or failure.cell > len(executed):
        return
    failed = executed[failure.cell - 1]
    _change_state(cells[failed], status="failed", exception=True)
    for cell in cells[failed + 1 :]:
        _change_state(cell, status="pending")


def _change_state(cell: dict[str, Any], **values: Any) -> None:
    """Change what papermill has noted about a cell, if it has."""
    if state := cell["metadata"].get("papermill"):
        state.update(values)


def _banner(failure: Failure, step: str) -> dict[str, Any]:
    where = f", In [{failure.cell}]" if failure.cell else ""
    reason, (title, advice) = failure.reason.replace("`", "'"), KINDS[failure.kind]
    source = (
        "> **This execution failed; its results were not kept.**\n>\n"
        f"> {title}{where}: `{reason}`\n>\n"
        f"> {advice} Log: `{step}.failed.log`. "
        f"The last good record, if there is one, is `{step}.ipynb`."
    )
    cell = {"cell_type": "markdown", "id": "failure", "metadata": {"tags": ["failure"]}}
    return cell | {"source": source.splitlines(keepends=True)}
