"""Ranks again from the stored verdicts alone; asks nothing and writes nothing.

`python -m telco_nb rerank outputs/laptop/judge-checklist` reads `store/verdicts.jsonl` and prints the gate, the
coverage, the ranking and the reasons against a headline. By default draws and seed are those of the last run of
05_judge; then the ranking equals the one in its table.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer

from telco_nb.commands.common import CommandError, errors_as_exit_codes
from telco_nb.judge import bradley_terry, ranking
from telco_nb.judge.gate import gate_result, outcome
from telco_nb.judge.protocol import headline_blocks
from telco_nb.judge.store import FIT_PURPOSES, VerdictStore, coverage_table, judged_rows
from telco_nb.study import record, seal
from telco_nb.study.plan import STORES

DRAWS, SEED = 2000, 20260605


class Reranked(NamedTuple):
    """A new ranking; its scores are missing if the verdicts allow none. `blocks` are the reasons against a headline."""

    judge: str
    kind: str
    validity: dict[str, Any]
    coverage: pd.DataFrame
    ranking: pd.DataFrame
    blocks: list[str]


def rerank(store: VerdictStore, draws: int = DRAWS, seed: int = SEED) -> Reranked:
    """Ranks from the store's lines as 05_judge does.

    Args:
        store: the judge's store.
        draws: number of bootstrap draws behind the intervals.
        seed: seed of the bootstrap.

    Raises:
        RankingError: the store holds no plan.
    """
    plan, gate_plan = store.planned("pairs"), store.planned("controls")
    if plan.empty:
        raise bradley_terry.RankingError(f"{store.path} holds no plan of pairs: nothing has been asked yet")
    judged = judged_rows(plan, store)
    line = next(iter(store.ok.values()), {"judge": store.path.parent.parent.name, "judge_kind": "unknown"})
    judge, kind = line["judge"], line["judge_kind"]
    controls = pd.DataFrame(columns=["control"]) if gate_plan.empty else judged_rows(gate_plan, store)
    validity = gate_result(judge, kind, controls, () if gate_plan.empty else set(gate_plan["control"]))
    planned = plan[plan["purpose"].isin(FIT_PURPOSES)]
    configs = sorted(set(planned["config_first"]) | set(planned["config_second"]))
    rows = judged[judged["purpose"].isin(FIT_PURPOSES)]
    unrankable = bradley_terry.unrankable_reason(rows, configs)
    fitted = bradley_terry.missing_fit(configs) if unrankable else bradley_terry.fit_bradley_terry(rows, configs)
    drawn = bradley_terry.bootstrap_fit(rows, fitted, draws=draws, seed=seed)
    table, _ = ranking.with_anchors(ranking.ranking_table(rows, fitted, drawn), plan, judged, fitted, drawn)
    coverage = coverage_table(plan, judged)
    few = ranking.few_terms(rows["term_id"].nunique())
    return Reranked(judge, kind, validity, coverage, table, headline_blocks(validity, coverage, unrankable or few))


def reads(folder: str) -> list[str]:
    """What the command reads of a judge's folder, as patterns."""
    return [f"{glob.escape(folder)}/{seal.STORE_FOLDER}/*", f"{glob.escape(folder)}/05_judge/manifest.json"]


def settings(folder: Path) -> tuple[int, int]:
    """Draws and seed of the last finished run of 05_judge in this folder, else the defaults."""
    manifest = record.read_manifest(folder.parent, folder.name, "05_judge")
    return (manifest["parameters"]["bootstrap_draws"], manifest["parameters"]["seed"]) if manifest else (DRAWS, SEED)


def report(result: Reranked, store: VerdictStore) -> str:
    """The text that the command prints."""
    gate = pd.DataFrame(result.validity["controls"])[["control", "value", "rule", "threshold", "n"]]
    gate["result"] = [outcome(control) for control in result.validity["controls"]]
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(store.statuses.items())) or "none"
    seats = result.coverage[["planned", "judged"]].sum()
    return "\n".join(
        [
            f"judge {result.judge} ({result.kind}): attempts: {statuses}; {store.unreadable} unreadable lines",
            gate.round(3).to_string(index=False),
            f"judged {seats['judged']} of {seats['planned']} seats; lowest coverage of a configuration "
            f"{result.coverage['coverage'].min():.1%}",
            result.ranking.round(3).to_string(index=False),
            "no headline: " + "; ".join(result.blocks) if result.blocks else "gate passed, coverage complete",
        ]
    )


EPILOG = """
**Examples**

- `python -m telco_nb rerank outputs/laptop/judge-checklist`: as 05_judge ranked it
- `python -m telco_nb rerank outputs/laptop/judge-checklist --draws 10000 --seed 1`: with more, and other, resamples
"""


def main(
    folder: Annotated[
        Path, typer.Argument(metavar="JUDGE", help="A judge's folder, such as outputs/laptop/judge-checklist.")
    ],
    draws: Annotated[int | None, typer.Option(min=1, help="Resamples behind the intervals.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the resampling.")] = None,
) -> None:
    """Rank again from a judge's stored verdicts: nothing is asked, nothing is written."""
    with errors_as_exit_codes("rerank"):
        path = folder / STORES["05_judge"]
        if not path.is_file():
            raise CommandError(f"{path}: no such file. Give the folder of a judge with stored verdicts.")
        seal.require_unchanged(folder.resolve().parent, *reads(folder.resolve().name))
        last_draws, last_seed = settings(folder)
        store = VerdictStore(path)
        print(report(rerank(store, draws or last_draws, last_seed if seed is None else seed), store))
