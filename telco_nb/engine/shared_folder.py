"""The outputs folder as the place where the runner and the nodes of a cluster meet.

A step is finished by a rename that is atomic, and processes that replace a step exclude each other by a lock. Network
file systems have both if they are mounted with locks; object stores behind a mount have neither. A claim says which
task a job belongs to: a task whose claim is gone, or is another's, stops. So a runner that was killed can be started
again while tasks of the earlier one still run somewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

from telco_nb.study import record

CLAIM_SECONDS = 1.0  # how often a task looks whether its job is still its own, and whether it should stop
FENCE_SECONDS = 3.0  # after which no task of an earlier claim runs any more

FIX = (
    "Choose a folder with --outputs that all nodes mount at the same path, with locks: NFS 4, Lustre with -o flock, "
    "CephFS or BeeGFS. An object store behind a mount will not do: copy finished studies there."
)


@contextlib.contextmanager
def probe(root: Path) -> Generator[dict[str, Any]]:
    """A folder below `root` with a file that this process has locked, for `find_problems` on other nodes."""
    folder, token = root / f".shared.{os.getpid()}.tmp", uuid.uuid4().hex  # swept if this process dies
    folder.mkdir(parents=True)
    try:
        with (folder / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(token)
            stream.flush()
            os.fsync(stream.fileno())
            yield {"root": str(root), "folder": str(folder), "token": token}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_problems(probe: dict[str, Any]) -> list[str]:
    """What another node's folder of a `probe` lacks here: the folder itself, atomic renames, locks."""
    folder = Path(probe["folder"])
    try:
        seen = (folder / "lock").read_text(encoding="utf-8")
    except OSError:
        seen = None
    if seen != probe["token"]:
        return [f"the outputs folder {probe['root']} is not the driver's. {FIX}"]
    faults = []
    for name, check in (("a rename fails", _rename_fault), ("locks fail", _lock_fault)):
        try:
            fault = check(folder)
        except OSError as error:
            fault = f"{name}: {error.strerror or error}"
        faults += [f"{probe['root']}: {fault}. {FIX}"] if fault else []
    return faults


def _rename_fault(folder: Path) -> str | None:
    """A folder must replace a name at once, and a file another, as `record.publish_step` and `write_bytes` do."""
    mine = folder / f"{socket.gethostname()}-{os.getpid()}"
    for part in ("new", "old"):
        (mine / part).mkdir(parents=True)
        (mine / part / "file").write_text(part)
    os.replace(mine / "old", mine / "away")
    os.replace(mine / "new", mine / "old")
    os.replace(mine / "away" / "file", mine / "old" / "file")
    return None if (mine / "old" / "file").read_text() == "old" else "a rename does not replace a file"


def _lock_fault(folder: Path) -> str | None:
    """The lock that the driver holds must hold here, too."""
    with (folder / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return "a lock of the driver does not hold on this node"


# ---------------------------------------------------------------- claims


class TakenError(RuntimeError):
    """A job is no longer this task's."""


def claim_file(root: Path, scope: str, step: str) -> Path:
    return root / scope / f".{step}.claim.json"


def sweep_claims(root: Path) -> None:
    """End what tasks of an earlier run may still be doing on other nodes. Needs the study's lock."""
    found = [path.unlink(missing_ok=True) for path in root.glob("*/.*.claim.json")]
    if found:
        time.sleep(FENCE_SECONDS)


class Claim:
    """The runner's side of a claim, which also carries the number of requests to stop."""

    def __init__(self, root: Path, scope: str, step: str):
        self.path, self.token, self.stops = claim_file(root, scope, step), uuid.uuid4().hex, 0
        self.tell(0)

    def tell(self, stops: int) -> None:
        self.stops = stops
        record.write_json(self.path, {"token": self.token, "stops": stops})

    def give_up(self) -> None:
        self.path.unlink(missing_ok=True)


class Orders:
    """A task's side of a claim: how often it was asked to stop, read again every CLAIM_SECONDS."""

    def __init__(self, root: Path, scope: str, step: str, token: str):
        self.path, self.token, self.stops, self.next = claim_file(root, scope, step), token, 0, 0.0

    def __call__(self) -> int:
        """Returns the number of requests. Raises TakenError if the job is no longer this task's."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + CLAIM_SECONDS
            try:
                claim = json.loads(self.path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                claim = {}
            if claim.get("token") != self.token:
                raise TakenError("the job has been taken from this task")
            self.stops = claim["stops"]
        return self.stops
