"""Kill -9 the smoke study at random moments, go on, and compare its results with those of an undisturbed one.

`python bench/study_kills.py [kills [kills of one study [options of run_all.py]]]`, such as `100 20 --steps 01-03`: two
undisturbed studies say which files and columns do not depend on the clock; studies that are killed again and again on
their way must end with the same ones.
"""

import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from telco_nb import ROOT

OPTIONS = sys.argv[3:]


def start(outputs: Path) -> subprocess.Popen:
    """A run of the smoke study, or the rest of it."""
    command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke", "--outputs", str(outputs), *OPTIONS]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def results(outputs: Path) -> dict[str, object]:
    """The hash of every output by its path, and every column of results.csv, if there is one, by its name."""
    root = outputs / "smoke"
    found: dict[str, object] = {}
    for path in root.glob("*/*/manifest.json"):
        folder = path.parent.relative_to(root)
        found |= {str(folder / o["path"]): o["sha256"] for o in json.loads(path.read_text())["outputs"]}
    table = root / "results.csv"
    rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    return found | {f"results.csv: {name}": [row[name] for row in rows] for row in rows[:1] for name in row}


def undisturbed(outputs: Path) -> tuple[dict[str, object], float]:
    """The results of a study that nobody disturbs, and its seconds."""
    began = time.monotonic()
    if start(outputs).wait():
        raise SystemExit("the undisturbed study failed")
    return results(outputs), time.monotonic() - began


def killed(outputs: Path, kills: int, seconds: float) -> tuple[int, dict[str, object]]:
    """(kills, results) of a study whose runner is killed up to so many times on its way."""
    done = 0
    while done < kills:
        run = start(outputs)
        try:
            if run.wait(random.uniform(0, 2 * seconds / kills)):
                raise SystemExit(f"after {done} kills the study failed")
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            done += 1
    if start(outputs).wait():
        raise SystemExit(f"after {done} kills the study failed")
    return done, results(outputs)


def main(kills: int = 20, at_once: int = 10, seed: int = 0) -> None:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as name:
        first, seconds = undisturbed(Path(name) / "first")
        second, _ = undisturbed(Path(name) / "second")
        wanted = {path: value for path, value in first.items() if second.get(path) == value}
        adapters = sum(path.endswith("adapter_model.safetensors") for path in wanted)
        print(
            f"{len(wanted)} of {len(first)} files and columns are the same twice, {adapters} adapters; {seconds:.0f} s"
        )
        done = studies = same = 0
        while done < kills:
            more, found = killed(Path(name) / str(studies), min(at_once, kills - done), seconds)
            differing = [path for path in wanted if found.get(path) != wanted[path]]
            done, studies, same = done + more, studies + 1, same + (not differing)
            print(f"  {more} kills: {', '.join(differing[:5]) or 'the same results'}", flush=True)
    print(f"{done} kills in {studies} studies: {same} of {studies} ended with the results of an undisturbed one")
    sys.exit(same != studies)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
