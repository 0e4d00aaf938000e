"""The folder of an export: it appears whole or not at all, and takes the place of nothing but an earlier export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from telco_nb.commands.common import CommandError
from telco_nb.study.record import readable_by_all, sha256

SUMS = "SHA256SUMS"  # names every other file of an export with its hash, as sha256sum does


@contextmanager
def whole_folder(folder: Path, always: str, replace: bool) -> Generator[Path]:
    """A temporary folder that takes the place of `folder` if nothing fails, and is removed otherwise.

    Its checksums are added at the end, and its files can then be read by all.

    Args:
        folder: it must not exist, be empty or, with `replace`, hold an earlier export.
        always: a file that every export of this kind holds.
        replace: delete an earlier export.

    Raises:
        CommandError: the folder is in use; nothing in it is touched.
    """
    refuse_folder(folder, always, replace)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _write_sums(temporary)
        refuse_folder(folder, always, replace)  # again: writing a model takes minutes
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_folder(folder: Path, always: str, replace: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CommandError(f"{folder} is a file. Name a folder.")
    found = _files(folder)
    if found and not replace:
        raise CommandError(f"{folder} is not empty. Name another folder, or add --replace.")
    recorded = _read_sums(folder / SUMS)
    if found and always not in recorded:
        raise CommandError(f"{folder} is no export of this kind: no {SUMS} names {always}. Name another folder.")
    for name in sorted(found - {SUMS}):
        if name not in recorded:
            raise CommandError(f"{folder} holds {name!r}, which is not from an export. Name another folder.")
        if (folder / name).is_symlink() or sha256(folder / name) != recorded[name]:
            raise CommandError(f"{folder / name} was changed after its export. Name another folder.")


def _files(folder: Path) -> set[str]:
    """All files and links at any depth, by their path from the folder."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found}


def _read_sums(path: Path) -> dict[str, str]:
    """Hash by file; empty if there is no such file, or it is no text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_sums(folder: Path) -> None:
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(_files(folder))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    readable_by_all(folder)
