"""Writes blind pairs for people or another judge outside, and takes their votes back: `python -m telco_nb votes`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import typer

from telco_nb.commands.common import CommandError, ParamsDir, errors_as_exit_codes, locked
from telco_nb.judge import blind_pairs
from telco_nb.judge.blind_pairs import Export, Material
from telco_nb.judge.panel import open_judge
from telco_nb.judge.people import HumanJudge, Import, OutsideJudge, check_votes
from telco_nb.judge.protocol import open_store, read_answers
from telco_nb.judge.votes_file import Line, VotesError, one_vote_each, read_votes, refuse
from telco_nb.report.blind_panel import panel_page
from telco_nb.study import params, record, seal
from telco_nb.study.params import PARAMS_DIR, ParameterError, StudyParams
from telco_nb.study.record import write_bytes

PAIRS = 200
KINDS = "human or language_model_panel"


def open_study(root: Path, params_dir: Path) -> StudyParams:
    """The parameters of the study in the folder `outputs/<profile>`. Raises CommandError if there is no such folder."""
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder. Name that of a study, such as outputs/laptop.")
    return params.load_study(root.resolve().name, params_dir)


def open_material(root: Path, study: StudyParams) -> Material:
    """The answers of a study's folder, with what the gate plants.

    Raises:
        CommandError: fewer than two configurations have answers, or an earlier step has not run.
    """
    configs = [c for c in study.configs if (root / c / "04_energy" / "artefacts" / "answers.parquet").is_file()]
    make = f"Run: ./run_all.py --profile {study.profile} --steps 01-04"
    if len(configs) < 2:
        raise CommandError(f"{root} holds answers of {len(configs)} configurations, and a pair needs two. {make}")
    try:
        prompts, answers, cards = read_answers(root, configs)
    except FileNotFoundError as error:
        raise CommandError(f"{error.filename} is missing. {make}") from None
    return blind_pairs.make_material(prompts, answers, cards, configs, study.base["seed"])


# ---------------------------------------------------------------- export


def export_pairs(
    root: Path, file: Path, n: int = PAIRS, seed: int | None = None, params_dir: Path = PARAMS_DIR
) -> tuple[Export, Material]:
    """Write blind pairs into `file`, a page to vote on them beside it, and their key into the study's folder.

    Args:
        root: the study's folder `outputs/<profile>`.
        file: where to; neither it nor the page (`panel_path`) may exist.
        n: the number of pairs, those with anchors, controls and repeats among them.
        seed: of all random choices; None for the study's.
        params_dir: the folder of the parameter files.

    Returns:
        What was written, and what it was chosen from.

    Raises:
        CommandError: the file exists or would be taken for a key, or the study has no answers to show.
    """
    study = open_study(root, params_dir)
    given = params.given_path(file, "FILE")
    if given.is_dir():
        raise CommandError(f"{file} is a folder. Name a file .jsonl.")
    if panel_path(file) == file:
        raise CommandError(f"{file}: the pairs are JSON lines, and the page gets this name. Name a file .jsonl.")
    for path in (file, panel_path(file)):
        if path.exists():
            raise CommandError(f"{path} exists, and it may hold votes. Name another file.")
    if given.parent == (root / blind_pairs.KEY_FOLDER).resolve():
        raise CommandError(f"{file}: the keys are in this folder. Name a file outside it.")
    material = open_material(root, study)
    seed = study.base["seed"] if seed is None else seed
    export = blind_pairs.make_export(material, n, seed, score_draws(root))
    if not export.count("ranking"):
        raise CommandError(f"{root}: of every pair one answer is empty or loops, so there is nothing to vote on.")
    write_bytes(blind_pairs.key_path(root, export), blind_pairs.json_lines(export.key))
    write_bytes(file, blind_pairs.json_lines(export.pairs))
    write_bytes(panel_path(file), panel_page(export.name, export.pairs).encode())
    return export, material


def panel_path(file: Path) -> Path:
    """The page on which a rater votes on the pairs of `file`: beside it, with the same stem."""
    return file.with_suffix(".html")


def score_draws(root: Path) -> list[pd.DataFrame]:
    """The draws of all rankings that a study has so far, (draws, configurations) each."""
    seal.require_unchanged(root, "judge-*/05_judge/tables/score_draws.parquet")
    tables = map(record.read_table, sorted(root.glob("judge-*/05_judge/tables/score_draws.parquet")))
    return [table.pivot(index="draw", columns="config", values="score") for table in tables]


def export_report(root: Path, file: Path, export: Export, material: Material, n: int = PAIRS) -> str:
    """What the command prints after an export of `n` pairs, or of fewer where the study has no more."""
    counts = f"{export.count('ranking')} comparisons, {export.count('anchor')} with texts that need no training, "
    counts += f"{export.count('control')} planted controls"
    lines = [
        f"{file}: {len(export.pairs)} pairs: {counts}, {export.count('swap')} repeats with exchanged seats",
        f"{panel_path(file)}: the same for people; a browser shows them offline and saves the votes as a file",
        f"{blind_pairs.key_path(root, export)}: the key; it stays here, a rater must not see it",
        f"Take the votes back with: python -m telco_nb votes import {root} FILE",
    ]
    if len(export.pairs) < n:
        lines.insert(1, f"{n} were asked for: the study has no more that are not decided by rule")
    planted = {row["control"] for row in export.key} - {None}
    if missing := set(material.controls["control"]) - planted:
        lines.insert(1, f"{len(missing)} kinds of controls found no place, so no gate can be passed: export more pairs")
    return "\n".join(lines)


# ---------------------------------------------------------------- import


def import_votes(root: Path, file: Path, judge: str | None = None, params_dir: Path = PARAMS_DIR) -> list[Import]:
    """Import a votes file into a study: the whole file, or nothing of it.

    Args:
        root: the study's folder `outputs/<profile>`.
        file: JSONL, or CSV; see `votes_file.Vote`.
        judge: the judge whose votes they are; None for one judge human-<rater> per rater.
        params_dir: the folder of the parameter files.

    Returns:
        What was added, one entry per judge.

    Raises:
        VotesError: a vote is bad; every bad one is named by file, line and field.
        ParameterError: there is no such judge, or it takes no votes.
        UnfitError: a run or another import is using the study.
    """
    lines = read_votes(file)
    by_judge = {name: one_vote_each(votes) for name, votes in _by_judge(lines, judge).items()}
    study = open_study(root, params_dir)
    with locked(root):  # a run, or another import, would add lines that the new files do not hold
        judges = {name: open_outside(name, study, root, params_dir) for name in by_judge}
        seal.require_unchanged(root, f"{blind_pairs.KEY_FOLDER}/*")
        try:
            keys = blind_pairs.read_keys(root)
        except ValueError as error:
            raise VotesError(str(error)) from None
        material = open_material(root, study)
        imports = [
            check_votes(judges[name], votes, keys, material, open_store(root, name)) for name, votes in by_judge.items()
        ]
        seal.forget_deleted_stores(root)  # of a deleted one the new lines are no change
        replace_all({found.store.path: found.stored() for found in imports if found.lines})
        return imports


def _by_judge(lines: Sequence[Line], judge: str | None) -> dict[str, list[Line]]:
    if judge is not None:
        return {judge: list(lines)}
    refuse(
        [f"{w}: rater: who voted? Add this field, or name the judge: --judge" for w, vote in lines if not vote.rater]
    )
    by_judge: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_judge[f"human-{line.vote.rater}"].append(line)
    return by_judge


def open_outside(name: str, study: StudyParams, root: Path, params_dir: Path = PARAMS_DIR) -> OutsideJudge:
    """The judge outside of that name: by its file in params/judges, or a person human-<rater> without one.

    Raises ParameterError if there is no such judge, or if it takes no votes.
    """
    file = params_dir / "judges" / f"{name}.yaml"
    if name not in study.judge_files:
        if not name.startswith("human-") or Path(name).name != name:
            raise ParameterError(f"{file}: no such file. Write one with judge_kind: {KINDS}, or name a human-<rater>.")
        return HumanJudge(name)
    values = study.values(f"judge-{name}")
    params.validate(values, str(file))
    judge = open_judge(values, root)
    if not isinstance(judge, OutsideJudge) or judge.name != name:
        raise ParameterError(f"{file}: only a judge of this name whose judge_kind is {KINDS} takes votes.")
    return judge


def replace_all(files: Mapping[Path, bytes]) -> None:
    """Write all files or, if one of them cannot be written, none."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, data in files.items():
            write_bytes(temporary[path], data)
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def import_report(root: Path, file: Path, found: Import) -> str:
    """What the command prints after an import."""
    name = found.judge.name
    known = f"; {found.n_known} pairs were judged in an earlier export, whose votes count" if found.n_known else ""
    return f"{file}: {found.n_new} new votes of {name}{known}. Rank them: python -m telco_nb rerank {root}/judge-{name}"


# ---------------------------------------------------------------- the command

EPILOG = """
**Examples**

- `python -m telco_nb votes export outputs/laptop pairs.jsonl`: 200 blind pairs, and pairs.html to vote on them in any
  browser, offline; their key stays in outputs/laptop/votes
- `python -m telco_nb votes export outputs/laptop more.jsonl --n 480 --seed 2`: more of them, and other ones
- `python -m telco_nb votes import outputs/laptop votes.csv`: each rater becomes a judge, human-RATER
- `python -m telco_nb votes import outputs/laptop votes.jsonl --judge panel`: a judge of params/judges

**A votes file** has one JSON object a line, or is a CSV table. Its fields: `pair_id`; `vote`, which is `a`, `b`,
`tie` or `skip`; and if you like `margin` (1 somewhat, 2 clearly better), `seconds`, `reason`, `rater`, `time`. Write
the votes into the lines of the exported file, or into a table of your own:

    pair_id;vote;margin;rater;reason
    3f0c9a1b2d4e;a;2;ann;it names the next step
"""


def main(
    action: Annotated[Literal["export", "import"], typer.Argument(help="What to do.")],
    root: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder, such as outputs/laptop.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, or the votes.")],
    n: Annotated[int | None, typer.Option(min=10, max=100_000, help="export: pairs to write; else 200.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="export: of the choice; else the study's.")] = None,
    judge: Annotated[str | None, typer.Option(metavar="NAME", help="import: whose votes they are.")] = None,
    params_dir: ParamsDir = PARAMS_DIR,
) -> None:
    """Export blind pairs, with planted controls and no names, or import the votes on them as another judge.

    The pairs whose vote is worth most come first. Either all of a votes file is good, or nothing of it is imported.
    """
    foreign = {"export": {"--judge": judge}, "import": {"--n": n, "--seed": seed}}[action]
    if given := [name for name, value in foreign.items() if value is not None]:
        raise typer.BadParameter(f"votes {action} has no such option", param_hint=given)
    with errors_as_exit_codes("votes"):
        if action == "export":
            n = n or PAIRS
            print(export_report(root, file, *export_pairs(root, file, n, seed, params_dir), n))
            return
        for found in import_votes(root, file, judge, params_dir):
            print(import_report(root, file, found))
