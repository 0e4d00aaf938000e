"""How a run uses the seal of its study: what it refuses, what it says, and the check `run_all.py verify`."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path

from rich.console import Console

from telco_nb.engine.progress import warn
from telco_nb.engine.schedule import UsageError
from telco_nb.study import record, seal
from telco_nb.study.plan import STEPS, Job

SHOWN = 20  # differences that a run names
HASH_CHARACTERS = 16
KEYS = "votes/"  # the folder of the keys of `votes export`


def changes_since(root: Path) -> list[seal.Difference]:
    """What changed in a study after it was last sealed; an unsealed study tells nothing.

    Raises RecordError for a store whose sealed lines have changed, and for the key of an export: verdicts that somebody
    has edited would be ranked.
    """
    try:
        changes = [change for change in seal.check_seal(root, _is_no_output) if change.kind != "new"]
    except seal.NoSeal:
        return []
    edited = [c.path for c in changes if c.kind == "changed" and (seal.is_store(c.path) or c.path.startswith(KEYS))]
    if edited:
        raise record.RecordError(
            f"{', '.join(str(root / path) for path in edited)} changed since a run last sealed it, and the lines of a "
            "store, or of a key of votes, never change. Restore it from a copy, or delete it: then a store's questions "
            "are asked again, and votes on a key's pairs cannot be imported."
        )
    return changes


def _is_no_output(path: str) -> bool:
    """False for what the manifest of a step names by its hash: the plan of a run compares that."""
    scope, step, name = [*path.split("/", 2), "", ""][:3]
    return step not in STEPS or not scope or name in ("log.txt", "manifest.json")


def show_changes(console: Console, changes: list[seal.Difference]) -> None:
    """Name the files that a run which was killed, or something other than a run, has changed or removed."""
    told = [change for change in changes if change.kind != "grown"]
    if told:
        text = "warning: these files are not as last sealed; a killed run or something else changed them:"
        warn(console, text)
    for change in told[:SHOWN]:
        warn(console, f"  {change}")
    if len(told) > SHOWN:
        warn(console, f"  and {len(told) - SHOWN} more: ./run_all.py verify names all")


@contextlib.contextmanager
def sealed_again(root: Path, console: Console) -> Generator[None]:
    """Seal a sealed study again after a change by a command, unless something else has changed it: that stays visible.

    Pages of the report may differ, and stores may have grown.
    """
    try:
        found = seal.check_seal(root)
    except seal.NoSeal:
        found = []
    changes = [change for change in found if change.kind != "grown" and not change.path.startswith("report/")]
    show_changes(console, changes)
    try:
        yield
    finally:
        if (root / seal.SEAL_NAME).exists() and not changes:
            seal.seal_study(root)
    if changes:
        console.print("The study is not sealed again, because something else has changed it.", markup=False)


def restore_exports(root: Path, jobs: list[Job]) -> list[str]:
    """Write again every export that is not the one of its finished step; returns what was wrong, in words."""
    found = [(job, text) for job in jobs for text in record.export_again(root, job.scope, job.step)]
    return [f"{text}: exported again from {job.id}" for job, text in found]


def short(digest: str) -> str:
    """The part of a seal's hash that people note down."""
    return digest[:HASH_CHARACTERS]


def verify(root: Path, known: str | None, console: Console) -> bool:
    """Compare a study with its seal, and name every file that differs.

    Args:
        root: Outputs folder of the profile.
        known: The seal's hash as somebody has kept it, or its beginning.
        console: Where to print.

    Returns:
        True if all is as it was sealed.

    Raises:
        NoSeal: There is no seal.
        UsageError: `known` is too short, or no hash.
    """
    if known is not None and not re.fullmatch(rf"[0-9a-f]{{{HASH_CHARACTERS},64}}", known):
        raise UsageError(f"--seal {known}: give the {HASH_CHARACTERS} characters that the run printed, or all 64.")
    differences = seal.check_seal(root, known=known or "")
    for difference in differences:
        console.print(str(difference), markup=False, soft_wrap=True)
    digest = seal.seal_hash(root)
    sealed = f"Its seal is {short(digest)}." if digest else f"Its {seal.SEAL_NAME} is damaged."
    if not differences:
        console.print(f"{root}: every file is as it was last sealed. {sealed}", markup=False, soft_wrap=True)
        return True
    counts = Counter(difference.kind for difference in differences)
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    console.print(f"{root} is not as it was last sealed: {told}. {sealed}", markup=False, soft_wrap=True)
    if counts["grown"]:
        console.print("Stores have grown, as imports of votes and batches do: the next run seals them.", markup=False)
    return False
