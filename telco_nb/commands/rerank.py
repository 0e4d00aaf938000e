"""Ranks again from the stored verdicts alone: nothing is asked, nothing is written.

`python -m telco_nb rerank outputs/laptop/judge-checklist` reads `store/verdicts.jsonl` and prints the gate, the coverage,
the ranking and what forbids a headline. Draws and seed are by default those of the step that ran last; then the ranking
is equal to its table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from telco_nb.commands.common import CommandError, errors_as_exit_codes
from telco_nb.judge import bradley_terry, ranking
from telco_nb.judge.gate import gate_result
from telco_nb.judge.protocol import headline_blocks
from telco_nb.judge.store import FIT_PURPOSES, VerdictStore, coverage_table, judged_rows

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
    unrankable = bradley_terry.unrankable_reason(rows, configs)
    fitted = bradley_terry.missing_fit(configs) if unrankable else bradley_terry.fit_bradley_terry(rows, configs)
    drawn = bradley_terry.bootstrap_fit(rows, fitted, draws=draws, seed=seed)
    table, _ = ranking.with_anchors(ranking.ranking_table(rows, fitted, drawn), plan, judged, fitted, drawn)
    coverage = coverage_table(plan, judged)
    blocks = headline_blocks(validity, coverage, unrankable)
    return Reranked(some["judge"], some["judge_kind"], validity, coverage, table, blocks)


def settings(folder: Path) -> tuple[int, int]:
    """Draws and seed of the last good run of 05_judge in this folder, else the defaults."""
    manifest = folder / "05_judge" / "manifest.json"
    if not manifest.is_file():
        return DRAWS, SEED
    parameters = json.loads(manifest.read_text(encoding="utf-8"))["parameters"]
    return parameters["bootstrap_draws"], parameters["seed"]


def report(found: Reranked, store: VerdictStore) -> str:
    """The text that the command prints."""
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


EPILOG = """
**Examples**

- `python -m telco_nb rerank outputs/laptop/judge-checklist`: as 05_judge ranked it
- `python -m telco_nb rerank outputs/laptop/judge-checklist --draws 10000 --seed 1`: with more, and other, resamples
"""


def main(
    folder: Annotated[
        Path, typer.Argument(metavar="JUDGE", help="A judge's folder, as outputs/laptop/judge-checklist.")
    ],
    draws: Annotated[int | None, typer.Option(min=1, help="Resamples behind the intervals.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the resampling.")] = None,
) -> None:
    """Rank again from a judge's stored verdicts: nothing is asked, nothing is written."""
    with errors_as_exit_codes("rerank"):
        path = folder / "store" / "verdicts.jsonl"
        if not path.is_file():
            raise CommandError(f"{path}: no such file. Give the folder of a judge that has been asked.")
        last_draws, last_seed = settings(folder)
        store = VerdictStore(path)
        print(report(rerank(store, draws or last_draws, last_seed if seed is None else seed), store))
