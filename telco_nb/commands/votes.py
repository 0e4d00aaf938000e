"""Imports human votes into a study as another judge: `python -m telco_nb votes outputs/laptop votes/ann.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telco_nb.commands.common import errors_as_exit_codes
from telco_nb.judge.gate import planted_controls
from telco_nb.judge.people import VotesError, add_votes, latest_votes, read_votes
from telco_nb.judge.protocol import read_answers, store_path
from telco_nb.judge.store import VerdictStore
from telco_nb.study import params


def import_votes(root: Path, path: Path) -> tuple[str, int]:
    """Imports a votes file into a study: (name of the judge `human-<rater>`, number of new votes).

    `root` is the study's folder `outputs/<profile>`; `path` holds the votes of one rater, one JSON object per line.
    Raises VotesError if the file holds no vote or a bad one; the message names every bad row, and nothing is imported.
    """
    votes = latest_votes(read_votes(path), path)
    if not votes:
        raise VotesError(f"{path}: this file holds no valid vote. Nothing was imported.")
    study = params.load_study(root.name)
    configs = [c for c in study.configs if (root / c / "04_energy" / "artefacts" / "answers.parquet").is_file()]
    prompts, answers, cards = read_answers(root, configs)
    _, planted = planted_controls(prompts, answers, cards, configs, seed=study.base["seed"])
    name = f"human-{votes[0].rater}"
    store = VerdictStore(store_path(root, name))
    return name, add_votes(votes, prompts, answers | planted, cards, configs, store, path)


EPILOG = """
**Example**

- `python -m telco_nb votes outputs/laptop votes/ann.jsonl votes/ben.jsonl`
"""


def main(
    root: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder, such as outputs/laptop.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Votes files, one per rater.")],
) -> None:
    """Import the votes of a blind panel as another judge. Either all of a file is good, or nothing is imported."""
    with errors_as_exit_codes("votes"):
        for path in files:
            name, n_new = import_votes(root, path)
            ranking = f"python -m telco_nb rerank {root}/judge-{name}"
            print(f"{path}: {n_new} new votes of {name}. Rank them: {ranking}")
