"""Tests that a crash at any change of a file loses nothing: the next run ends as one that was never disturbed.

A finished study with a failed record beside it runs again with another parameter, so that every step, store, export,
report and seal is replaced. The process that makes a change stops before it, in its midst (half of the bytes) or after
it; in a second series the runner is killed at the same moment, so that nobody tidies up. Kills at random moments, of
the runner alone or of all its processes, need no list of points.
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from crash_points import HOW
from loopback import python_path
from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine import sealing
from telco_nb.engine.runner import lock
from telco_nb.study import record, seal
from telco_nb.study.plan import STEPS

HERE = Path(__file__).parent
SAMPLE = 30
KEPT_HIDDEN = {".lock", ".publish.lock", "report/.key"}
VARYING = ("time", "latency_s")  # fields of a stored line that differ from run to run


@dataclass(frozen=True)
class Fault:
    """A point with how and where to stop: a writing process alone, or the whole run."""

    point: str
    how: str
    whole: bool

    @property
    def kind(self) -> str:
        return self.point.split()[0]


@dataclass(frozen=True)
class Kill:
    """A moment at which the runner is killed by SIGKILL: alone, or with all its processes."""

    after_s: float
    whole: bool
    kind = how = "kill"


class Crashes:
    """The studies of these tests, in a folder, run by one server process."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "outputs" / "faults"
        self.server = _start_server(folder)
        self.runs = 0
        self._prepare()
        self.undisturbed, self.points = self._undisturbed()

    def _prepare(self) -> None:
        """Make the study that all tests start from: finished, and then failed in its third step."""
        for value, notebooks, expected in ((1, "notebooks", 0), (1, "broken", 1)):
            code, output, _ = self.run(value, notebooks=notebooks)
            assert code == expected, output
        self.root.rename(self.folder / "before")

    def _undisturbed(self) -> tuple[dict, list[str]]:
        found = []
        for _ in range(2):
            self.restore()
            start = time.monotonic()
            code, output, points = self.run(2)
            self.seconds = time.monotonic() - start
            assert code == 0, output
            found.append((snapshot(self.root), points))
        assert found[0] == found[1], "the same run makes the same changes and has the same result"
        return found[0]

    def restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.root)

    def run(
        self, value: int, fault: Fault | None = None, notebooks: str = "notebooks", kill: Kill | None = None
    ) -> tuple[int, str, list[str]]:
        """Run the study once; returns exit code, output, and the points that it passed."""
        self.runs += 1
        log, output = self.folder / f"{self.runs}.log", self.folder / f"{self.runs}.txt"
        plan = {"folder": str(self.root), "log": str(log)}
        if fault:
            plan |= {"point": fault.point, "how": fault.how, "whole": fault.whole}
        request = {"notebooks": str(self.folder / notebooks), "outputs": str(self.folder / "outputs")}
        request |= {"value": value, "output": str(output), "watch": plan, "kill": asdict(kill) if kill else None}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline()), output.read_text(), log.read_text().splitlines()

    def faults(self) -> list[Fault]:
        """Every fault; of the dozen times that papermill saves the same notebook, the first two."""
        points = [p for p in self.points if not p.partition(".running.ipynb ")[2] or int(p.split()[-1]) <= 2]
        return [Fault(p, how, whole) for p in points for how in HOW[p.split()[0]] for whole in (False, True)]

    def problem(self, fault: Fault | Kill) -> str | None:
        """What is wrong after a fault and the run after it; None if nothing is."""
        self.restore()
        if isinstance(fault, Kill):
            self.run(2, kill=fault)
        elif fault.point not in self.run(2, fault)[2]:
            return "the fault was not reached"
        if refused := self.refusal():
            return refused
        code, output, _ = self.run(2)
        if code != 0:
            return f"the next run ended with {code}: {output[-300:]}"
        return difference(self.undisturbed, snapshot(self.root)) or verify(self.folder / "outputs")

    def refusal(self) -> str | None:
        """What a reader of all steps and notebooks is told of what a killed run has left; of a copy, since it mends."""
        copy = self.folder / "read"
        shutil.rmtree(copy, ignore_errors=True)
        with lock(self.root):  # as a reader does: it waits for the last processes of the killed run
            shutil.copytree(self.root, copy)
        try:
            seal.require_finished(copy, *(f"*/{step}{rest}" for step in STEPS for rest in ("/*", ".ipynb")))
        except record.RecordError as error:
            return f"who reads the study before the next run is refused: {error}"
        return None


def _start_server(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": python_path(ROOT, ROOT / "tests" / "support", HERE)}
    command = [sys.executable, str(HERE / "crash_study.py"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    assert server.stdout.readline() == "ready\n"
    return server


def snapshot(root: Path) -> dict[str, object]:
    """All that a study shows and keeps, without times: by path, a text, the lines of a store or facts of a manifest."""
    found: dict[str, object] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() or p.name.startswith(".")):
        name = path.relative_to(root).as_posix()
        if name in KEPT_HIDDEN or (path.is_dir() and not path.name.startswith(".")):
            continue
        if any(part.startswith(".") for part in path.relative_to(root).parts) and path.name != ".key":
            found[name] = "left over"
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[name] = {key: manifest[key] for key in ("key", "inputs", "outputs", "exports", "status")}
        elif seal.is_store(name):
            lines = [record.parse_line(line) for line in path.read_bytes().splitlines()]
            found[name] = [line and {k: v for k, v in line.items() if k not in VARYING} for line in lines]
            if name == seal.CALLS:  # a call whose answer was lost is made again, and half a line was never a line
                found[name] = sorted({json.dumps(line) for line in found[name] if line})
        elif path.suffix == ".ipynb":
            found[name] = [cell["source"] for cell in json.loads(path.read_text())["cells"]]
        elif path.name not in ("seal.json", "log.txt"):
            found[name] = path.read_text()
    return found


def difference(wanted: dict, found: dict) -> str | None:
    names = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    words = [f"{n} {'is missing' if n not in found else 'is left' if n not in wanted else 'differs'}" for n in names]
    return "; ".join(words) or None


def verify(outputs: Path) -> str | None:
    console = Console(file=io.StringIO())
    whole = sealing.verify(outputs / "faults", None, console)
    return None if whole else f"verify finds: {console.file.getvalue()[-300:]}"


@pytest.fixture(scope="module")
def crashes(tmp_path_factory):
    study = Crashes(tmp_path_factory.mktemp("crashes"))
    yield study
    study.server.stdin.close()
    study.server.wait(timeout=10)


def check(crashes: Crashes, faults: list[Fault] | list[Kill]) -> None:
    """Try the faults, print how many were survived by kind, and fail with all that were not."""
    start, problems = time.monotonic(), {}
    for fault in faults:
        if found := crashes.problem(fault):
            problems[fault] = found
    tried = Counter((fault.kind, fault.how) for fault in faults)
    lost = Counter((fault.kind, fault.how) for fault in problems)
    for kind, number in sorted(tried.items()):
        print(f"{' '.join(kind)}: {number - lost[kind]} of {number}")
    print(f"{len(faults) - len(problems)} of {len(faults)} in {time.monotonic() - start:.0f} s")
    assert not problems, "\n".join(f"{fault}: {text}" for fault, text in problems.items())


def test_the_study_passes_every_kind_of_point(crashes):
    assert {point.split()[0] for point in crashes.points} == set(HOW)
    paths = {point.split()[1] for point in crashes.points}
    expected = {
        "results.csv", "findings.json", "seal.json", "report", "judge-x/store/verdicts.jsonl", "c01/03_train",
        "shared/store/conversations.jsonl", "judge-x/.05_judge.old", "judge-x/05_judge.failed.ipynb",
        "egress.jsonl", "shared/store/batches.jsonl",
    }  # fmt: skip
    assert expected <= paths


def test_after_a_crash_at_a_sample_of_points_the_next_run_ends_as_if_undisturbed(crashes):
    faults = crashes.faults()
    check(crashes, faults[:: len(faults) // SAMPLE][:SAMPLE])


@pytest.mark.nightly
def test_after_a_crash_at_any_point_the_next_run_ends_as_if_undisturbed(crashes):
    check(crashes, crashes.faults())


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.nightly)])
def test_after_kills_at_random_moments_the_next_run_ends_as_if_undisturbed(crashes, kills):
    moments = random.Random(kills)
    check(crashes, [Kill(moments.uniform(0, crashes.seconds), n % 2 == 0) for n in range(kills)])
