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
    """Import a votes file into a study.

    Args:
        root: the study's folder, `outputs/<profile>`.
        path: the votes of one rater, one JSON object a line (`people.Vote`).

    Returns:
        The judge's name, `human-<rater>`, and how many votes are new.

    Raises:
        VotesError: the file holds no vote, or a bad one; every bad row is named and nothing is imported.
    """
    votes = latest_votes(read_votes(path), path)
    if not votes:
        raise VotesError(f"{path}: no vote stands in this file. Nothing was imported.")
    study = params.load_study(root.name)
    answered = [c for c in study.configs if (root / c / "04_energy" / "artefacts" / "answers.parquet").is_file()]
    prompts, answers, cards = read_answers(root, answered)
    _, planted = planted_controls(prompts, answers, cards, answered, seed=study.base["seed"])
    name = f"human-{votes[0].rater}"
    store = VerdictStore(store_path(root, name))
    return name, add_votes(votes, prompts, answers | planted, cards, answered, store, path)


EPILOG = """
**Example**

- `python -m telco_nb votes outputs/laptop votes/ann.jsonl votes/ben.jsonl`
"""


def main(
    root: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder, as outputs/laptop.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Votes files, one per rater.")],
) -> None:
    """Import the votes of a blind panel as another judge. Either all of a file is good, or nothing is imported."""
    with errors_as_exit_codes("votes"):
        for path in files:
            name, new = import_votes(root, path)
            ranking = f"python -m telco_nb rerank {root}/judge-{name}"
            print(f"{path}: {new} new votes of {name}. Rank them: {ranking}")
