"""The ranking again, from the stored verdicts alone: nothing is asked, nothing is written.

`python -m telco_nb.commands.rerank outputs/laptop/judge-checklist [--draws 2000] [--seed 20260605]` reads
`store/verdicts.jsonl` and prints the gate, the coverage, the ranking and what forbids a headline. Draws and seed are by
default those of the step that ran last; then the ranking is equal to its table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.judge import bradley_terry, design, ranking
from telco_nb.judge.gate import gate_result
from telco_nb.judge.store import FIT_PURPOSES, VerdictStore, coverage_block, coverage_table, judged_rows

DRAWS, SEED = 2000, 20260605


@dataclass(frozen=True)
class Reranked:
    """What a store says. `ranking` has missing scores where the verdicts rank nothing; `blocks` says why there is no
    headline, empty if there may be one."""

    judge: str
    kind: str
    validity: dict[str, Any]
    coverage: pd.DataFrame
    ranking: pd.DataFrame
    blocks: list[str]


def rerank(store: VerdictStore, draws: int = DRAWS, seed: int = SEED) -> Reranked:
    """Rank from the store's lines alone, as 05_judge does. Raises RankingError for a store that holds no plan."""
    plan = store.planned("pairs")
    if plan.empty:
        raise bradley_terry.RankingError(f"{store.path} holds no plan of pairs: nothing has been asked yet")
    judged, gate_plan = judged_rows(plan, store), store.planned("controls")
    some = next(iter(store.ok.values()), {"judge": store.path.parent.parent.name, "judge_kind": "unknown"})
    judged_controls = pd.DataFrame(columns=["control"]) if gate_plan.empty else judged_rows(gate_plan, store)
    validity = gate_result(some["judge"], some["judge_kind"], judged_controls)
    in_fit = plan[plan["purpose"].isin(FIT_PURPOSES)]
    configs = sorted(set(in_fit["config_first"]) | set(in_fit["config_second"]))
    rows = judged[judged["purpose"].isin(FIT_PURPOSES)]
    unranked = bradley_terry.unrankable_reason(rows, configs)
    fitted = bradley_terry.missing_fit(configs) if unranked else bradley_terry.fit_bradley_terry(rows, configs)
    drawn = bradley_terry.bootstrap_fit(rows, fitted, draws=draws, seed=seed)
    table = pd.concat([ranking.ranking_table(rows, fitted, drawn), _anchors(plan, judged, fitted, drawn)])
    coverage = coverage_table(plan, judged)
    failed = [control["control"] for control in validity["controls"] if not control["passed"]]
    blocks = [f"it failed its gate ({', '.join(failed)})"] if failed else []
    blocks += [block for block in [coverage_block(coverage)] if block]
    blocks += [f"there is no ranking: {unranked}"] if unranked else []
    return Reranked(some["judge"], some["judge_kind"], validity, coverage, table.reset_index(drop=True), blocks)


def _anchors(
    plan: pd.DataFrame, judged: pd.DataFrame, fitted: bradley_terry.Fit, drawn: bradley_terry.Draws
) -> pd.DataFrame | None:
    rows = []
    for anchor in design.ANCHORS:
        met = (judged["purpose"] == "anchor") & (judged[["config_first", "config_second"]] == anchor).any(axis=1)
        if (plan[["config_first", "config_second"]] == anchor).to_numpy().any():
            rows.append(ranking.anchor_row(judged[met], anchor, fitted, drawn)[0])
    return pd.DataFrame(rows) if rows else None


def settings(folder: Path) -> tuple[int, int]:
    """Draws and seed of the last good run of 05_judge in this folder, else the defaults."""
    manifest = folder / "05_judge" / "manifest.json"
    if not manifest.is_file():
        return DRAWS, SEED
    parameters = json.loads(manifest.read_text(encoding="utf-8"))["parameters"]
    return parameters["bootstrap_draws"], parameters["seed"]


def report(found: Reranked, store: VerdictStore) -> str:
    """What the command prints."""
    gate = pd.DataFrame(found.validity["controls"])[["control", "value", "rule", "threshold", "n", "passed"]]
    asked = ", ".join(f"{n} {status}" for status, n in sorted(store.statuses.items()))
    judged = found.coverage[["planned", "judged"]].sum()
    return "\n".join(
        [
            f"judge {found.judge} ({found.kind}): attempts: {asked or 'none'}; {store.unreadable} unreadable lines",
            gate.round(3).to_string(index=False),
            f"judged {judged['judged']} of {judged['planned']} seats; lowest coverage of a configuration "
            f"{found.coverage['coverage'].min():.1%}",
            found.ranking.round(3).to_string(index=False),
            "no headline: " + "; ".join(found.blocks) if found.blocks else "gate passed, coverage complete",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m telco_nb.commands.rerank", description="Rank from the stored verdicts."
    )
    parser.add_argument("folder", type=Path, help="the folder of a judge, as outputs/laptop/judge-checklist")
    parser.add_argument("--draws", type=int, help="resamples behind the intervals")
    parser.add_argument("--seed", type=int, help="of the resampling")
    given = parser.parse_args(arguments)
    path = given.folder / "store" / "verdicts.jsonl"
    if not path.is_file():
        print(f"rerank: {path}: no such file. Give the folder of a judge that has been asked.", file=sys.stderr)
        return 1
    draws, seed = settings(given.folder)
    store = VerdictStore(path)
    try:
        found = rerank(store, given.draws or draws, seed if given.seed is None else given.seed)
    except bradley_terry.RankingError as error:
        print(f"rerank: {error}", file=sys.stderr)
        return 1
    print(report(found, store))
    return 0


if __name__ == "__main__":
    sys.exit(main())
