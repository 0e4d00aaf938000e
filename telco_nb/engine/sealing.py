"""How a run uses the seal of its study: what it refuses, what it says, and the check `run_all.py verify`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from telco_nb.study import params, record, seal
from telco_nb.study.plan import STEPS, Job

AS_SEALED, DIFFERS, USAGE, UNFIT = 0, 1, 2, 3  # exit codes of verify
SHOWN = 20  # differences that a run names


def changes_since(root: Path) -> list[seal.Difference]:
    """What changed in a study after its last run; an unsealed study tells nothing.

    Raises RecordError for a store whose sealed lines have changed: verdicts that somebody has edited would be ranked.
    """
    try:
        changes = [change for change in seal.check_seal(root, _is_no_output) if change.kind != "new"]
    except seal.NoSeal:
        return []
    edited = [change.path for change in changes if change.kind == "changed" and seal.is_store(change.path)]
    if edited:
        raise record.RecordError(
            f"{', '.join(str(root / path) for path in edited)} changed since the last run sealed it, and lines of a "
            "store never change. Restore it from a copy, or delete it: then its questions are asked again."
        )
    return changes


def _is_no_output(path: str) -> bool:
    """False for what the manifest of a step names by its hash: the plan of a run compares that."""
    scope, step, name = [*path.split("/", 2), "", ""][:3]
    return step not in STEPS or not scope or name in ("log.txt", "manifest.json")


def show_changes(console: Console, changes: list[seal.Difference]) -> None:
    """Name the files that something other than a run of this study has changed or removed."""
    told = [change for change in changes if change.kind != "grown"]
    if told:
        console.print("warning: not as the last run sealed it, and not through a run:", markup=False)
    for change in told[:SHOWN]:
        console.print(f"  {change}", markup=False, soft_wrap=True)
    if len(told) > SHOWN:
        console.print(f"  and {len(told) - SHOWN} more: ./run_all.py verify names all", markup=False)


def restore_exports(root: Path, jobs: list[Job]) -> list[str]:
    """Write again every export that is not the one of its finished step; returns what was wrong, in words."""
    found = [(job, text) for job in jobs for text in record.export_again(root, job.scope, job.step)]
    return [f"{text}: exported again from {job.id}" for job, text in found]


def verify(profile: str, outputs: Path | None, console: Console) -> int:
    """Compare a study with its seal, and name every file that differs; returns the exit code."""
    try:
        record.use_outputs(outputs)
        root = record.profile_root(profile)
        differences = seal.check_seal(root)
    except params.ParameterError as error:
        return _refuse(str(error), USAGE)
    except (seal.NoSeal, OSError) as error:
        return _refuse(str(error), UNFIT)
    for difference in differences:
        console.print(str(difference), markup=False, soft_wrap=True)
    counts = Counter(difference.kind for difference in differences)
    if not differences:
        console.print(f"{root}: every file is as the last run sealed it.", markup=False, soft_wrap=True)
        return AS_SEALED
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    console.print(f"{root} is not as the last run sealed it: {told}.", markup=False, soft_wrap=True)
    if counts["grown"]:
        console.print("Stores have grown, as imports of votes and batches do: the next run seals them.", markup=False)
    return DIFFERS


def _refuse(text: str, code: int) -> int:
    Console(stderr=True, highlight=False).print(f"verify: {text}", markup=False, soft_wrap=True)
    return code
