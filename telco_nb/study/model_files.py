"""The files of a base model on this machine: where unpacked ones are kept, and the hash of each file.

Weights have gigabytes, and every plan asks for their hashes. So a file is read again only if its size, times or inode
are not those of the last time; the cache of the user notes them. Who forges all of these is not noticed here, but by
04_energy, which compares the weights themselves with those of the training.
"""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path

from telco_nb import ROOT
from telco_nb.study.input_files import InputFileError, read_json
from telco_nb.study.machine import home_folder
from telco_nb.study.params import ParameterError
from telco_nb.study.record import sha256, write_json

HASHES = "hashes.json"  # in the cache: path -> [size, mtime, ctime, inode, sha256]
MOST_FILES = 1_000  # of a base model
_read_here: dict[str, list] = {}  # by this process: the cache may not be writable


def cache_dir() -> Path:
    """User cache for unpacked models: TELCO_NB_CACHE, else XDG_CACHE_HOME, else ~/.cache.

    Raises ParameterError if none of them is known.
    """
    if folder := os.environ.get("TELCO_NB_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "telco_nb"
    if home := home_folder():
        return home / ".cache" / "telco_nb"
    raise ParameterError("this user has no home folder for unpacked models. Name one in TELCO_NB_CACHE.")


def model_hashes(base_model: str) -> dict[str, str]:
    """sha256 of the files of a base model by name; empty for the packaged model and for a hub id.

    Args:
        base_model: the packaged model's name, a folder, a .gguf file or a hub id.

    Raises ParameterError for a folder that holds too many files to be a model.
    """
    if not base_model:
        return {}
    try:
        path = ROOT / Path(base_model).expanduser()
    except RuntimeError:  # an unknown user
        return {}
    if path.is_file():
        return _hashes({path.name: path})
    shown = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path).as_posix()}")  # not of git
    found = list(islice(shown, MOST_FILES + 1)) if path.is_dir() else []
    if len(found) > MOST_FILES:
        raise ParameterError(f"base_model: {path} holds more than {MOST_FILES:,} files. Name the model's folder alone.")
    return _hashes({file.relative_to(path).as_posix(): file for file in sorted(found) if file.is_file()})


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    """The hashes of files by name, with those that were read just now noted in the cache."""
    if not files:
        return {}
    place = cache_dir() / HASHES
    try:
        known = read_json(place, control_characters=True)
    except InputFileError:
        known = {}
    known = (known if isinstance(known, dict) else {}) | _read_here
    hashes, read = {}, {}
    for name, file in files.items():
        state, path = file.stat(), str(file.resolve())
        stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        noted = known.get(path)
        if not (isinstance(noted, list) and noted[:-1] == stamp and isinstance(noted[-1], str)):
            noted = read[path] = [*stamp, sha256(file)]
        hashes[name] = noted[-1]
    _read_here.update(read)
    if read:
        with contextlib.suppress(OSError):  # a cache that may not be written is done without
            write_json(place, {path: kept for path, kept in (known | read).items() if os.path.exists(path)})  # noqa: PTH110
    return hashes
