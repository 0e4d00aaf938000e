"""Exports a study's data set as a public one: `python -m telco_nb dataset export FOLDER`.

The folder holds Parquet files, their checksums and a README.md whose head tells `datasets.load_dataset` which files
belong together.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from telco_nb import DATA_DIR, ROOT
from telco_nb.commands.common import CommandError, ExportAction, NewFolder, Profile, Replace, errors_as_exit_codes
from telco_nb.commands.export_folder import refuse_folder, whole_folder
from telco_nb.corpus.cards import Card, load_cards
from telco_nb.corpus.dataset import BLIND_READING
from telco_nb.corpus.gold import POINTS, load_noisy, load_reviews
from telco_nb.corpus.scenarios import Scenario
from telco_nb.notebook import data_path
from telco_nb.study import params
from telco_nb.study.content_key import path_hashes
from telco_nb.study.record import profile_root, read_manifest, read_object, step_dir
from telco_nb.study.seal import require_unchanged

Tables = dict[str, dict[str, pa.Table]]  # by config and split

SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test", "unseen": "unseen"}
SHIPPED = {"glossary_path": "cards", "gold_path": "conversations", "reviews_path": "reviews"}  # folders of the data
LEGAL_FILES = ("LICENSE", "CITATION.cff")  # copied where the texts are the project's own
TEMPLATES = Environment(
    loader=FileSystemLoader(DATA_DIR),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)  # no escaping: the template is Markdown


def _list_of(*names: str, **others: pa.DataType) -> pa.ListType:
    return pa.list_(pa.struct({name: pa.string() for name in names} | others))


_TEXTS = pa.list_(pa.string())
SCORES = pa.struct({name: pa.int64() for name in POINTS})
PROBLEM_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("term_id", "term", "category"), pa.string()),
        "aliases": _TEXTS,
        "definition": pa.string(),
        "term_facts": _list_of("text", "applies_in", "valid_until"),
        "figures": _list_of("text", "meaning", "applies_in", "valid_until"),
        "wrong_beliefs": _list_of("belief", "correction"),
        **dict.fromkeys(("source", "problem_id", "kind"), pa.string()),
        "weight": pa.float64(),
        "cause": pa.string(),
        "says": _TEXTS,
        "tells": pa.string(),
        "ask": pa.struct({"what": pa.string(), "say": _TEXTS}),
        "first": pa.struct({"who": pa.string(), "do": pa.string(), "when": pa.string(), "say": _TEXTS}),
        "steps": _list_of("who", "do", say=_TEXTS, needs_identity=pa.bool_()),
        "never": _TEXTS,
        **dict.fromkeys(("done", "escalate_when"), pa.string()),
        "contexts": _list_of("context", "changes"),
        **dict.fromkeys(("applies_in", "valid_until"), pa.string()),
        "facts": _TEXTS,
    }
)


# ---------------------------------------------------------------- what the study made


class Study(NamedTuple):
    """What a study recorded about its data set."""

    manifest: dict[str, Any]  # of 02_synth
    conversations: Path
    scenarios: list[Scenario]
    cards: list[Card]
    dataset_card: dict[str, Any]
    is_shipped: bool  # cards, gold conversations and their scores are those of the project

    def path(self, parameter: str) -> Path | None:
        """The file or folder that a parameter of 02_synth names."""
        return data_path(self.manifest["parameters"][parameter])


def open_study(profile: str) -> Study:
    """Read the data set of a profile's study.

    Raises:
        ParameterError: there is no such profile.
        CommandError: the study has not made its data set yet, or its files have changed since; the message says which
            command makes it.
        RecordError: a file of the data set is not as its steps have written it.
    """
    root = profile_root(profile)
    require_unchanged(root, "shared/01_glossary/artefacts/glossary.json", "shared/02_synth/artefacts/*")
    glossary, manifest = (read_manifest(root, "shared", step) for step in ("01_glossary", "02_synth"))
    make = f"Run: ./run_all.py --profile {profile} --steps 01-02"
    if glossary is None or manifest is None:
        params.load_study(profile)  # a misspelt profile is named as such
        raise CommandError(f"{root} holds no finished data set. {make}")
    if changed := _changed_files(manifest):
        raise CommandError(f"{changed[0]} is not as the study has read it. {make}")
    made = step_dir(root, "shared", "02_synth") / "artefacts"
    scenarios = made / "scenarios.parquet"
    written_cards = step_dir(root, "shared", "01_glossary") / "artefacts" / "glossary.json"
    rows = [Scenario(**row) for row in pq.read_table(scenarios).to_pylist()]
    cards = load_cards(written_cards)
    values = glossary["parameters"] | manifest["parameters"]
    return Study(
        manifest,
        made / "conversations.parquet",
        rows,
        cards,
        read_object(made / "dataset_card.json"),
        all(data_path(values.get(name)) == DATA_DIR / folder for name, folder in SHIPPED.items()),
    )


def _changed_files(manifest: Mapping[str, Any]) -> list[str]:
    """The files of noisy exchanges and scores that have changed, come or gone since the study has read them.

    They are read again here, because the record does not hold them.
    """
    values, inputs = manifest["parameters"], manifest["key_parts"].get("inputs", {})
    changed: set[str] = set()
    for place in (values[name] for name in ("noisy_path", "reviews_path") if values[name]):
        read = {name: digest for name, digest in inputs.items() if Path(name).is_relative_to(place)}
        changed |= {name for name, _ in read.items() ^ path_hashes(place).items()}
    return sorted(changed)


def build_tables(study: Study) -> Tables:
    """Return the tables by config and split; a split without rows is left out.

    Raises:
        WrittenFileError: the noisy exchanges or the scores cannot be read.
    """
    reviews = load_reviews(study.path("reviews_path"), study.scenarios)
    scores = {row["scenario_id"]: {point: row[point] for point in POINTS} for row in reviews}
    table = pq.read_table(study.conversations)
    keys = zip(table["scenario_id"].to_pylist(), table["origin"].to_pylist(), strict=True)
    own = pa.array([scores.get(name) if origin == "gold" else None for name, origin in keys], SCORES)
    scored = table.append_column("scores", own)
    noisy = load_noisy(study.path("noisy_path"), study.scenarios)
    tables: Tables = {
        "conversations": {
            name: scored.filter(pc.field("split") == key).drop_columns("split") for key, name in SPLIT_NAMES.items()
        },
        "noisy": {"test": pa.Table.from_pylist(noisy, table.drop_columns("split").schema)},
        "problems": {"train": pa.Table.from_pylist(problem_rows(study.cards), PROBLEM_SCHEMA)},
    }
    filled = {config: {name: rows for name, rows in own.items() if len(rows)} for config, own in tables.items()}
    return {config: own for config, own in filled.items() if own}


def problem_rows(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Return one row per problem, with what its card says about the term."""
    return [
        {
            **card.model_dump(exclude={"id", "facts", "problems"}),
            "term_id": card.id,
            "term_facts": [fact.model_dump() for fact in card.facts],
            **problem.model_dump(exclude={"id", "contexts"}),
            "problem_id": problem.id,
            "contexts": [{"context": name, "changes": text} for name, text in problem.contexts.items()],
        }
        for card in cards
        for problem in card.problems
    ]


# ---------------------------------------------------------------- README.md


def file_name(config: str, split: str) -> str:
    """Where a split lies in the exported folder."""
    return f"{config}/{split}.parquet"


def size_category(n: int) -> str:
    """Return the hub's name for a number of rows."""
    limits = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
    return next((name for limit, name in limits.items() if n < limit), "100K<n<1M")


def readme_head(tables: Tables, licence: str) -> dict[str, Any]:
    """Return the head of README.md: what a data set hub and `datasets.load_dataset` read."""
    configs = [
        {
            "config_name": config,
            **({"default": True} if config == "conversations" else {}),
            "data_files": [{"split": split, "path": file_name(config, split)} for split in own],
        }
        for config, own in tables.items()
    ]
    return {
        "pretty_name": "Telecom customer service, synthetic conversations",
        "language": ["en"],
        "license": licence,
        "size_categories": [size_category(sum(len(rows) for own in tables.values() for rows in own.values()))],
        "task_categories": ["text-generation"],
        "tags": ["telecommunications", "customer-service", "conversational", "multi-turn", "synthetic"],
        "configs": configs,
    }


def render_readme(study: Study, tables: Tables) -> str:
    """Return README.md: the head as YAML, then what the data set is, for whom, and where its limits are."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    head = readme_head(tables, citation["license"].lower() if study.is_shipped else "other")
    points = study.dataset_card["second_reading"]
    return TEMPLATES.get_template("dataset_readme.md.j2").render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        title=head["pretty_name"],
        made=study.dataset_card,
        manifest=study.manifest,
        shipped=study.is_shipped,
        splits=_split_rows(tables),
        n_contexts=len({scenario.context for scenario in study.scenarios}),
        n_terms=len(study.cards),
        n_problems=sum(len(card.problems) for card in study.cards),
        unseen=[card.term for card in study.cards if card.id in study.manifest["parameters"]["unseen_terms"]],
        points=points,
        mean_score=sum(row["mean"] for row in points) / len(points) if _is_scored(tables) else None,
        blind=BLIND_READING,
        citation=citation,
    )


def _is_scored(tables: Tables) -> bool:
    return any(rows["scores"].null_count < len(rows) for rows in tables["conversations"].values())


def _split_rows(tables: Tables) -> list[dict[str, Any]]:
    """One row per split: config, split, rows, and of conversations the gold ones, scenarios and terms."""
    rows = []
    for config, own in tables.items():
        for split, table in own.items():
            row = {"config": config, "split": split, "rows": len(table), "gold": None, "scenarios": None}
            if "origin" in table.column_names:
                row["gold"] = table["origin"].to_pylist().count("gold")
                row["scenarios"] = len(table["scenario_id"].unique())
            rows.append(row | {"terms": len(table["term_id"].unique())})
    return rows


def export(profile: str, folder: Path, replace: bool = False) -> Tables:
    """Write the data set of a study into a folder, whole or not at all.

    Args:
        profile: the study.
        folder: the folder; it must not exist, or be empty.
        replace: replace an earlier export.

    Returns:
        What was written, by config and split.

    Raises:
        CommandError: the folder is in use, or the study has no data set.
        GlossaryError, WrittenFileError: a file that the study names cannot be read.
    """
    folder = params.given_path(folder, "FOLDER")
    refuse_folder(folder, file_name("problems", "train"), replace)  # before the work
    study = open_study(profile)
    tables = build_tables(study)
    with whole_folder(folder, file_name("problems", "train"), replace) as temporary:
        _write(study, tables, temporary)
    return tables


def _write(study: Study, tables: Tables, folder: Path) -> None:
    for config, own in tables.items():
        for split, table in own.items():
            path = folder / file_name(config, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    (folder / "README.md").write_text(render_readme(study, tables), encoding="utf-8")
    for name in LEGAL_FILES if study.is_shipped else ():
        shutil.copyfile(ROOT / name, folder / name)


EPILOG = """
**Example**

- `python -m telco_nb dataset export telco-conversations`: the data set of the laptop study, ready for a data set hub
"""


def main(
    action: ExportAction,
    folder: NewFolder,
    profile: Profile = "laptop",
    replace: Replace = False,
) -> None:
    """Export a study's data set: Parquet files and a README.md, as data set hubs expect them."""
    with errors_as_exit_codes("dataset"):
        for config, own in export(profile, folder, replace).items():
            for split, table in own.items():
                print(f"{folder / file_name(config, split)}: {len(table):,} rows")
