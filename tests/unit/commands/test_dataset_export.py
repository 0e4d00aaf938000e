"""The exported data set: others' tools open it, its README describes all of it, and no other file is overwritten."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import shipped
import yaml
from damage import damage
from fake_study import Builder, flip
from typer.testing import CliRunner

from telco_nb import ROOT
from telco_nb.__main__ import app
from telco_nb.commands import dataset as command
from telco_nb.corpus import dataset, gold, scenarios
from telco_nb.corpus.cards import Card, load_cards, write_cards
from telco_nb.study.content_key import path_hashes
from telco_nb.study.record import sha256, write_manifest

TERMS, UNSEEN = ("dns", "esim", "voicemail"), ["voicemail"]
COUNTS = {
    "conversations": {"train": 16, "validation": 4, "test": 4, "unseen": 12},
    "noisy": {"test": 2},
    "problems": {"train": 6},
}


def small_card(term: str) -> Card:
    """The first two problems of a shipped card, each with half the weight."""
    card = shipped.cut(shipped.by_id()[term], problems=2)
    return card.model_copy(update={"problems": [p.model_copy(update={"weight": 0.5}) for p in card.problems]})


def talk(scenario: scenarios.Scenario, number: int, origin: str) -> dict:
    words = f"{scenario.scenario_id.replace('.', ' ').replace('_', ' ')} {origin}"
    asked, answered = f"Hello, what about {words}?", f"Here is what you can do about {words}. Restart it once."
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return scenarios.conversation_row(scenario, number, origin, messages)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def card_of_dataset(rows: list[dict], reviews: list[dict]) -> dict:
    """What 02_synth writes to dataset_card.json, as far as the README needs it."""
    cells = dataset.self_bleu_per_cell(rows, dataset.PARTS, 3, seed=1)
    return {
        "written_by": dataset.WRITTEN_BY, "generator": {"id": "variants-1", "model": None}, "requested": 40,
        "kept": len(rows), "refused": {"near_duplicate_answer": 4, "language": 0},
        "second_reading": gold.review_table(reviews).to_dict("records"),
        "variety": dataset.variety_table(rows, 1).to_dict("records"), "leaks": dataset.count_leaks(rows),
        "words": dataset.length_stats(dataset.turns_table(rows)),
        "self_bleu_per_cell": dataset.self_bleu_summary(cells), "conversations_sha256": dataset.content_hash(rows),
    }  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A small study in the folder that TELCO_NB_OUTPUTS names: {name of a written file: its path}."""
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("LOGNAME", "made_up_user")
    builder = Builder(tmp_path / "outputs", "smoke")
    run = builder.open("01_glossary", "shared", {"glossary_path": "telco_nb/data/cards"})
    write_cards([small_card(term) for term in TERMS], run.artefact("glossary.json"))
    builder.close(run, "3 terms.")
    cards = load_cards(builder.root / "shared/01_glossary/artefacts/glossary.json")
    grid = scenarios.build_scenarios(cards, shipped.contexts(), UNSEEN)
    rows = [talk(s, number, origin) for s in grid for number, origin in enumerate(("gold", "variant"))]
    noisy = [{"id": s.scenario_id, "messages": talk(s, 0, "noisy")["messages"]} for s in grid if s.split == "test"]
    points = dict.fromkeys(gold.POINTS, 5) | {"right": 4}
    reviews = [{"id": s.scenario_id, **points, "rewritten": False, "remark": "-"} for s in grid]
    files = {
        "noisy_path": write_lines(tmp_path / "noisy.jsonl", noisy),
        "reviews_path": write_lines(tmp_path / "reviews" / "all.jsonl", reviews).parent,
    }
    values = {name: str(path) for name, path in files.items()}
    run = builder.open(
        "02_synth", "shared", values | {"unseen_terms": UNSEEN, "gold_path": "telco_nb/data/conversations"}
    )
    run.key_parts["inputs"] = path_hashes(values["noisy_path"]) | path_hashes(values["reviews_path"])
    monkeypatch.setitem(command.SHIPPED, "reviews_path", str(files["reviews_path"]))  # as if they were the project's
    scenarios.scenarios_table(grid).to_parquet(run.artefact("scenarios.parquet"), index=False)
    dataset.write_parquet(rows, run.artefact("conversations.parquet"))
    run.artefact("dataset_card.json").write_text(json.dumps(card_of_dataset(rows, reviews)))
    builder.close(run, "36 conversations.")
    return files


def export(*words: object):
    return CliRunner().invoke(app, ["dataset", "export", *map(str, words), "--profile", "smoke"])


@pytest.fixture
def folder(study, tmp_path):
    result = export(tmp_path / "export")
    assert result.exit_code == 0, result.output
    return tmp_path / "export"


def readme(folder: Path) -> tuple[dict, str]:
    """(head, text) of README.md."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_datasets_library_opens_every_config_and_split_with_messages_as_a_list(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert set(datasets.get_dataset_config_names(str(folder))) == set(COUNTS)
    for config, counts in COUNTS.items():
        opened = datasets.load_dataset(str(folder), config, cache_dir=str(tmp_path / "cache"))
        assert {split: len(rows) for split, rows in opened.items()} == counts
        for rows in opened.values():
            row = rows[0]
            if config == "problems":
                assert row["steps"][0]["say"] and {c["context"] for c in row["contexts"]} == {
                    c.id for c in shipped.contexts()
                }
            else:
                assert [list(m) for m in row["messages"]] == [["role", "content"]] * 2
                assert [m["role"] for m in row["messages"]] == ["user", "assistant"]


def test_scores_stand_beside_gold_conversations_alone(folder):
    rows = pq.read_table(folder / "conversations/train.parquet").to_pylist()
    assert {row["origin"] for row in rows} == {"gold", "variant"}
    expected = dict.fromkeys(gold.POINTS, 5) | {"right": 4}
    assert all(row["scores"] == (expected if row["origin"] == "gold" else None) for row in rows)


def test_the_head_of_the_readme_is_yaml_and_names_every_file(folder):
    head, _ = readme(folder)
    named = {file["path"] for config in head["configs"] for file in config["data_files"]}
    assert named == {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}
    assert head["language"] == ["en"] and head["size_categories"] == ["n<1K"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert head["license"] == "apache-2.0" and "Apache License" in licence and "Version 2.0" in licence
    assert (folder / "LICENSE").read_text(encoding="utf-8") == licence


def test_the_readme_describes_every_field_and_takes_its_numbers_from_the_files(folder):
    _, text = readme(folder)
    for path in folder.rglob("*.parquet"):
        for name in pq.read_schema(path).names:
            assert f"`{name}`" in text, f"{path.name}: {name} is not described"
    for split, n in COUNTS["conversations"].items():
        assert re.search(rf"\| conversations \| {split} \| {n} \| {n // 2} \|", text)
    assert "Of 40 conversations 36 are kept. Refused: near duplicate answer 4." in text
    assert "| `right` | 4.00 | 4 | 0% |" in text and f"Their mean is {34 / 7:.2f}" in text
    assert "never sees: voicemail." in text


def test_no_file_holds_an_absolute_path_or_a_user_name(folder, tmp_path):
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_bytes().decode(errors="replace")
        if path.suffix == ".parquet":
            assert not pq.read_schema(path).metadata
            text += json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False)
        for secret in (str(tmp_path), str(ROOT), str(Path.home()), "made_up_user"):
            assert not re.search(rf"{re.escape(secret)}(?!\w)", text), f"{path}: {secret}"


@pytest.mark.parametrize("way", ["cut", "a table with other columns"])
@pytest.mark.parametrize("name", ["scenarios.parquet", "conversations.parquet", "dataset_card.json", "glossary.json"])
def test_a_damaged_file_of_the_study_ends_the_export_with_exit_code_3_and_its_name(study, tmp_path, name, way):
    (path,) = (tmp_path / "outputs" / "smoke").glob(f"shared/*/artefacts/{name}")
    damage(path, way)
    result = export(tmp_path / "export")
    assert result.exit_code == 3 and f"{name} was changed" in result.stderr and not (tmp_path / "export").exists()


def test_a_second_export_is_refused_without_replace_and_then_takes_the_place_of_the_first(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = export(folder)
    assert result.exit_code == 2 and "--replace" in result.stderr
    (folder / "noisy" / "test.parquet").unlink()  # what is left is still all of an export
    assert export(folder, "--replace").exit_code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.glob(".export.*")] == []


def test_the_checksums_name_every_file_of_an_export(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    found = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}
    assert dict(line.split("  ")[::-1] for line in lines) == {n: h for n, h in found.items() if n != "SHA256SUMS"}


def plant_nested(folder: Path) -> None:
    (folder / "noisy" / "mine").mkdir()
    (folder / "noisy" / "mine" / "thesis.txt").write_text("years of work")


def edit(folder: Path) -> None:
    (folder / "README.md").write_text("thesis.txt, rewritten by hand")


def link(folder: Path) -> None:
    (folder / "thesis.txt").symlink_to(folder / "noisy", target_is_directory=True)


def forget(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (plant_nested, "'noisy/mine/thesis.txt', which is not from an export"),
        (edit, "README.md was changed after its export"),
        (link, "'thesis.txt', which is not from an export"),
        (forget, "no SHA256SUMS names problems/train.parquet"),
    ],
)
def test_replace_deletes_nothing_but_what_an_export_has_written(folder, change, said):
    change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = export(folder, "--replace")
    assert result.exit_code == 2 and said in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_replace_leaves_folders_of_others_that_have_checksums_too(study, tmp_path):
    (tmp_path / "iso").mkdir()
    (tmp_path / "iso" / "disk.iso").write_text("")
    (tmp_path / "iso" / "SHA256SUMS").write_text(f"{sha256(tmp_path / 'iso' / 'disk.iso')}  disk.iso\n")
    result = export(tmp_path / "iso", "--replace")
    assert result.exit_code == 2 and "no export of this kind" in result.stderr
    assert (tmp_path / "iso" / "disk.iso").is_file()


def test_replace_never_deletes_a_folder_that_holds_other_things(study, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    result = export(tmp_path / "home", "--replace")
    assert result.exit_code == 2 and "no export of this kind" in result.stderr
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(folder, monkeypatch):
    before = sorted(folder.parent.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "render_readme", full)
    assert export(folder, "--replace").exit_code == 3
    assert sorted(folder.parent.iterdir()) == before and (folder / "README.md").is_file()


def test_an_export_of_a_missing_study_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "outputs"))
    result = export(tmp_path / "export")
    assert result.exit_code == 2 and "./run_all.py --profile smoke --steps 01-02" in result.stderr
    assert result.stderr.startswith("dataset: ") and not (tmp_path / "export").exists()


def test_noisy_exchanges_that_changed_since_the_study_are_refused(study, tmp_path):
    study["noisy_path"].write_text("")
    result = export(tmp_path / "export")
    assert result.exit_code == 2 and "noisy.jsonl" in result.stderr and not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["all.jsonl", "more.jsonl"])
def test_scores_that_changed_or_came_since_the_study_are_refused(study, name, tmp_path):
    (study["reviews_path"] / name).write_text("")
    (tmp_path / "reviews_of_another_study").mkdir()
    (tmp_path / "reviews_of_another_study" / "a.jsonl").write_text("")  # begins with the same letters and is not read
    result = export(tmp_path / "export")
    assert result.exit_code == 2 and f"reviews/{name} is not as the study has read it" in result.stderr


def test_scores_of_ones_own_get_no_claims_of_this_project(study, monkeypatch, tmp_path):
    monkeypatch.setitem(command.SHIPPED, "reviews_path", "reviews")
    assert export(tmp_path / "export").exit_code == 0
    assert readme(tmp_path / "export")[0]["license"] == "other" and not (tmp_path / "export" / "LICENSE").exists()


def test_cards_of_ones_own_get_no_licence_and_no_claims_of_this_project(study, tmp_path):
    path = tmp_path / "outputs/smoke/shared/01_glossary/manifest.json"
    manifest = json.loads(path.read_text())
    write_manifest(path, manifest | {"parameters": {"glossary_path": "my/cards"}})
    assert export(tmp_path / "export").exit_code == 0
    head, text = readme(tmp_path / "export")
    assert head["license"] == "other" and not (tmp_path / "export" / "LICENSE").exists()
    assert "apache" not in text.lower() and "blind reading" not in text and "No lawyer" not in text


@pytest.mark.parametrize(
    "name",
    [
        "01_glossary/artefacts/glossary.json", "02_synth/artefacts/scenarios.parquet", "02_synth/manifest.json",
        "02_synth/artefacts/conversations.parquet", "02_synth/artefacts/dataset_card.json", "01_glossary/manifest.json",
    ],
)  # fmt: skip
def test_a_data_set_of_which_a_byte_was_changed_is_not_exported(study, tmp_path, name):
    flip(tmp_path / "outputs" / "smoke" / "shared" / name, 40)
    result = export(tmp_path / "export")
    assert (
        result.exit_code == 3 and f"shared/{name} was changed" in result.output and not (tmp_path / "export").exists()
    )
