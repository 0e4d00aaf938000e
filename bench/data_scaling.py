"""Time and memory of generating, filtering, splitting, checking and writing conversations, from 15,600 to 312,000.

`python bench/data_scaling.py [conversations per scenario ...]`; default 10 20 40 100 200, on the 1,560 scenarios. Each
size runs in a process of its own; --twice runs it again and compares the bytes. The last line is the slope of log
seconds against log rows: 1 is linear.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from telco_nb import DATA_DIR
from telco_nb.corpus import dataset, gold, scenarios, variants
from telco_nb.corpus.cards import load_cards
from telco_nb.study import record
from telco_nb.study.params import load_study


def measure(seeds: int, folder: Path) -> dict:
    """Seconds of wall and processor time a stage, peak memory in MB, rows asked and kept, hash of the Parquet file."""
    marks = [(time.perf_counter(), time.process_time())]

    def lap() -> tuple[float, float]:
        marks.append((time.perf_counter(), time.process_time()))
        return tuple(round(b - a, 2) for a, b in zip(marks[-2], marks[-1], strict=True))

    cards, contexts = load_cards(DATA_DIR / "cards"), scenarios.load_contexts(DATA_DIR / "contexts.yaml")
    grid = scenarios.build_scenarios(cards, contexts, load_study("laptop").base["unseen_terms"])
    rows = gold.load_gold(DATA_DIR / "conversations", grid)
    rows += variants.write_variants(cards, grid, contexts, range(1, seeds))
    stages = {"generate": lap()}
    kept, _, refused = dataset.apply_filters(rows, cards)
    stages["filter"] = lap()
    passed = bool(dataset.leak_gates(kept, dataset.count_leaks(kept), grid)["passed"].all())
    stages["check"] = lap()
    dataset.write_parquet(kept, folder / "conversations.parquet")
    stages["write"] = lap()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)
    return {
        "rows": len(rows), "kept": len(kept), "near_duplicates": sum(n for k, n in refused.items() if "near" in k),
        "gates": passed, "stages": stages, "wall_s": marks[-1][0] - marks[0][0], "cpu_s": marks[-1][1] - marks[0][1],
        "peak_mb": peak, "sha256": record.sha256(folder / "conversations.parquet"),
    }  # fmt: skip


def in_a_process(seeds: int) -> dict:
    command = [sys.executable, __file__, "--measure", str(seeds)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def slope(results: list[dict], key: str) -> float:
    """Least-squares slope of log `key` against log rows."""
    x, y = ([math.log(result[name]) for result in results] for name in ("rows", key))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*", default=[10, 20, 40, 100, 200])
    parser.add_argument("--twice", action="store_true", help="run each size again and compare the bytes")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.measure, Path(folder))))
        return
    results = []
    for seeds in given.seeds:
        result = in_a_process(seeds)
        stages = ", ".join(f"{name} {wall:.1f}" for name, (wall, _) in result["stages"].items())
        print(
            f"{result['rows']:>8,} asked, {result['kept']:>8,} kept, {result['near_duplicates']:>7,} near-duplicates; "
            f"{result['wall_s']:6.1f} s wall ({stages}), {result['cpu_s']:6.1f} s processor, "
            f"{result['peak_mb']:6.0f} MB, gates {'passed' if result['gates'] else 'FAILED'}, {result['sha256'][:12]}",
            flush=True,
        )
        if given.twice:
            print(f"{'':>8} again: the same bytes: {in_a_process(seeds)['sha256'] == result['sha256']}", flush=True)
        results.append(result)
    if len(results) > 1:
        names = {"wall_s": "wall time", "cpu_s": "processor time", "peak_mb": "memory"}
        print("log-log slope: " + ", ".join(f"{label} {slope(results, key):.2f}" for key, label in names.items()))


if __name__ == "__main__":
    main()
