"""`votes export` and `votes import` on a small study: from blind pairs to a judge that 05_judge ranks."""

import csv
import json
import shutil
from pathlib import Path

import judge_study
import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from damage import DAMAGES, damage
from fake_study import Builder, flip, write_again
from judge_study import command

from telco_nb.commands import votes
from telco_nb.engine import runner
from telco_nb.judge import blind_pairs
from telco_nb.judge.store import VerdictStore
from telco_nb.study import params, seal
from telco_nb.study.content_key import content_key
from telco_nb.study.params import PARAMS_DIR
from telco_nb.study.plan import declared, make_job

matplotlib.use("Agg")
CONFIGS = ["c01", "c02", "c03"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return judge_study.build(tmp_path_factory.mktemp("study"), 24, CONFIGS)


@pytest.fixture
def study(built, tmp_path, monkeypatch):
    """A copy of the study; the profile's configurations are its own."""
    real = params.load_study
    monkeypatch.setattr(params, "load_study", lambda profile, folder=PARAMS_DIR: real(profile, folder, configs=CONFIGS))
    return shutil.copytree(built, tmp_path / "smoke")


@pytest.fixture
def pairs(study, tmp_path, capsys):
    assert command("votes", "export", study, tmp_path / "pairs.jsonl", "--n", "90", "--seed", "3") == 0
    capsys.readouterr()
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def longer(pair, **fields):
    """A vote for the longer answer: in this study the longer of two answers is the better one."""
    gap = np.sign(len(pair["answer_a"]) - len(pair["answer_b"]))
    return {"pair_id": pair["pair_id"], "vote": {1: "a", -1: "b", 0: "tie"}[gap]} | fields


def write(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stored(study, judge):
    return VerdictStore(study / f"judge-{judge}" / "store" / "verdicts.jsonl")


def files_of(study):
    return {path: path.read_bytes() for path in study.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_key_stays_in_the_study_and_the_file_alone_says_nothing(study, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    assert command("votes", "export", study, file) == 0
    said = capsys.readouterr().out
    (key,) = (study / "votes").iterdir()
    assert str(key) in said and "planted controls" in said and "must not see it" in said
    shown = [json.loads(line) for line in file.read_text().splitlines()]
    named = {row["pair_id"] for row in blind_pairs.read_keys(study)[0] if row["pair_id"]}
    assert {pair["pair_id"] for pair in shown} == named


def test_an_export_never_replaces_a_file_and_its_key_folder_takes_none(study, tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", [{"vote": "a"}])
    for path in (file, tmp_path, study / "votes" / "pairs.jsonl"):
        before = files_of(tmp_path)
        assert command("votes", "export", study, path) == 2
        assert "Name a" in capsys.readouterr().err and files_of(tmp_path) == before


def test_the_page_for_people_stands_beside_the_pairs_and_is_never_replaced(study, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    page = write(tmp_path / "pairs.html", [])
    assert command("votes", "export", study, file) == 2
    assert "pairs.html exists" in capsys.readouterr().err and not file.exists() and not (study / "votes").exists()
    page.unlink()
    assert command("votes", "export", study, page) == 2 and not page.exists()
    assert command("votes", "export", study, file) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert all(json.loads(line)["pair_id"] in text for line in file.read_text(encoding="utf-8").split("\n") if line)


def test_an_export_without_room_for_the_controls_says_that_no_gate_can_be_passed(study, tmp_path, capsys):
    assert command("votes", "export", study, tmp_path / "pairs.jsonl", "--n", "20") == 0
    assert "no gate can be passed" in capsys.readouterr().out


def test_an_export_of_all_that_a_study_has_says_so(study, tmp_path, capsys):
    assert command("votes", "export", study, tmp_path / "pairs.jsonl", "--n", "900") == 0
    said = capsys.readouterr().out
    assert "72 comparisons" in said and "900 were asked for" in said  # three pairs of configurations on 24 prompts


def test_the_next_export_asks_first_where_the_rankings_are_unsure(study, tmp_path):
    rng = np.random.default_rng(0)
    draws = pd.DataFrame({"c01": 9 + rng.normal(size=99), "c02": rng.normal(size=99), "c03": rng.normal(size=99)})
    builder = Builder(study.parent, study.name)
    run = builder.open("05_judge", "judge-checklist")
    run.table(
        "score_draws", draws.rename_axis("draw").reset_index().melt("draw", var_name="config", value_name="score")
    )
    builder.close(run, "ranked")
    export, _ = votes.export_pairs(study, tmp_path / "pairs.jsonl", 30)
    first = [row for row in export.key if row["purpose"] == "ranking"][:4]
    assert all({row["config_first"], row["config_second"]} == {"c02", "c03"} for row in first)


READ = [
    "shared/01_glossary/artefacts/glossary.json", "shared/02_synth/artefacts/test_prompts.parquet",
    "shared/02_synth/artefacts/train.parquet", "c02/04_energy/artefacts/answers.parquet",
    "judge-checklist/05_judge/tables/score_draws.parquet",
]  # fmt: skip


@pytest.mark.parametrize(("name", "way"), zip(READ, ["a list", *list(DAMAGES)[2:]], strict=False))
def test_a_damaged_file_of_the_study_ends_a_command_with_exit_code_3_and_its_name(study, tmp_path, capsys, name, way):
    named = name if (study / name).is_file() else "judge-checklist/05_judge/manifest.json"
    (study / name).parent.mkdir(parents=True, exist_ok=True)
    (study / name).touch()
    damage(study / name, way)
    assert command("votes", "export", study, tmp_path / "pairs.jsonl") == 3
    said = capsys.readouterr().err
    assert f"{named} was changed" in said and "run ./run_all.py" in said and said.count("\n") == 1


def test_votes_become_a_judge_that_05_ranks(study, pairs, tmp_path, monkeypatch, capsys):
    with (tmp_path / "ann.CSV").open("w", encoding="utf-8-sig", newline="") as stream:
        rows = [longer(pair, rater="Ann", seconds="4,5") for pair in pairs]
        writer = csv.DictWriter(stream, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert command("votes", "import", study, tmp_path / "ann.CSV") == 0
    assert f"{len(pairs)} new votes of human-ann" in capsys.readouterr().out
    named = {"scope": "judge-human-ann", "judge": "human-ann", "judge_kind": "human"}
    folder, notebook = judge_study.run_judge(study, monkeypatch, configs=CONFIGS, bootstrap_draws=50, **named)
    lines = stored(study, "human-ann").ok.values()
    assert {line["source"] for line in lines} <= {"votes", "rule"} and len(lines) >= len(pairs)
    assert {line["latency_s"] for line in lines if line["source"] == "votes"} == {4.5}
    ranked = pd.read_parquet(folder / "05_judge" / "tables" / "ranking.parquet")
    assert ranked.loc[~ranked["is_anchor"], "config"].tolist() == CONFIGS
    assert {"reference", "template", "nearest"} < set(ranked.loc[ranked["is_anchor"], "config"])
    agreement = pd.read_parquet(folder / "05_judge" / "tables" / "agreement.parquet").set_index("metric")
    assert agreement.loc["swap_consistency", "value"] == 1
    assert "a person: votes on blind pairs" in json.dumps(notebook)
    assert command("rerank", folder) == 0 and "human-ann (human)" in capsys.readouterr().out


def key_of_05(study, judge):
    named = {"scope": f"judge-{judge}", "judge": judge, "judge_kind": "human", "configs": CONFIGS}
    return content_key(make_job("05_judge", declared("05_judge") | named), study)[0]


def test_an_import_puts_05_of_its_judge_out_of_date_and_a_run_of_05_does_not(study, pairs, tmp_path, monkeypatch):
    def key(judge):
        return key_of_05(study, judge)

    before = {judge: key(judge) for judge in ("human-ann", "human-bob")}
    half = write(tmp_path / "half.jsonl", [longer(pair, rater="ann") for pair in pairs[:40]])
    assert command("votes", "import", study, half) == 0
    first = key("human-ann")
    assert first != before["human-ann"] and key("human-bob") == before["human-bob"]
    named = {"scope": "judge-human-ann", "judge": "human-ann", "judge_kind": "human"}
    judge_study.run_judge(study, monkeypatch, configs=CONFIGS, bootstrap_draws=50, **named)
    assert key("human-ann") == first
    rest = write(tmp_path / "rest.jsonl", [longer(pair, rater="ann") for pair in pairs[40:]])
    assert command("votes", "import", study, rest) == 0
    assert key("human-ann") not in (first, before["human-ann"])


def test_an_import_without_a_new_verdict_puts_05_out_of_date_if_it_changes_what_was_shown(study, pairs, tmp_path):
    skips = [{"pair_id": pair["pair_id"], "vote": "skip", "rater": "ann"} for pair in pairs]
    keys = [key_of_05(study, "human-ann")]
    for number in (40, 40, 60):
        file = write(tmp_path / "skips.jsonl", skips[:number])
        assert command("votes", "import", study, file) == 0
        keys.append(key_of_05(study, "human-ann"))
    assert not [line for line in stored(study, "human-ann").ok.values() if line["source"] == "votes"]
    assert keys[1] == keys[2], "the same file again changes nothing"
    assert len(set(keys)) == 3, "more was shown each time, and coverage counts it"


def test_a_file_of_parameters_names_the_judge_whatever_the_rater_is_called(study, pairs, tmp_path, capsys):
    path = write(tmp_path / "votes.jsonl", [pair | longer(pair, rater="reader-1", reason="read") for pair in pairs])
    assert command("votes", "import", study, path, "--judge", "panel") == 0
    (line, *_) = [line for line in stored(study, "panel").ok.values() if line["source"] == "votes"]
    assert line["judge_kind"] == "language_model_panel" and line["rater"] == "reader-1"
    assert "new votes of panel" in capsys.readouterr().out


def test_other_parameter_files_hold_the_judges_of_other_people(study, pairs, tmp_path):
    folder = shutil.copytree(PARAMS_DIR, tmp_path / "params")
    values = yaml.safe_load((folder / "judges" / "panel.yaml").read_text()) | {"judge": "others"}
    (folder / "judges" / "others.yaml").write_text(yaml.safe_dump(values))
    path = write(tmp_path / "votes.jsonl", [pair | longer(pair, reason="read") for pair in pairs])
    assert command("votes", "import", study, path, "--judge", "others", "--params", folder) == 0
    assert len(stored(study, "others").ok) >= len(pairs)


@pytest.mark.parametrize(
    ("judge", "named"),
    [
        ("nobody", "no such file"),
        ("checklist", "takes votes"),
        ("human-../x", "no such file"),
        ("gpt-5-2", "takes votes"),
    ],
)
def test_a_judge_that_takes_no_votes_is_refused(study, pairs, tmp_path, capsys, judge, named):
    path = write(tmp_path / "votes.jsonl", [longer(pairs[0])])
    before = files_of(study)
    assert command("votes", "import", study, path, "--judge", judge) == 2
    assert named in capsys.readouterr().err and files_of(study) == before


def test_several_raters_of_one_file_become_a_judge_each(study, pairs, tmp_path, capsys):
    rows = [longer(pair, rater=rater) for rater in ("ann", "ben") for pair in pairs]
    assert command("votes", "import", study, write(tmp_path / "votes.jsonl", rows)) == 0
    assert len(stored(study, "human-ann").ok) == len(stored(study, "human-ben").ok) >= len(pairs)
    assert capsys.readouterr().out.count("new votes of human-") == 2


BAD = [
    ({"vote": "left"}, ":4: vote: "),
    ({"pair_id": "0123456789ab"}, ":4: pair_id: "),
    ({"seconds": float("inf")}, ":4: seconds: "),
    ({"time": "2026-02-30"}, ":4: time: "),
    ({"rater": None}, ":4: rater: "),
    ("other vote", ":4: vote: "),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_one_bad_line_stops_the_import_of_every_rater_and_is_named(study, pairs, tmp_path, capsys, change, named):
    rows = [
        longer(pair, rater=rater) for pair, rater in zip(pairs[:5], ["ann", "ben", "ann", "ann", "ben"], strict=True)
    ]
    if change == "other vote":
        rows[3] = rows[2] | {"vote": "tie" if rows[2]["vote"] != "tie" else "a"}
    else:
        rows[3] = rows[3] | change
    before = files_of(study)
    assert command("votes", "import", study, write(tmp_path / "votes.jsonl", rows)) == 2
    said = capsys.readouterr().err
    assert said.startswith("votes: ") and named in said and "Nothing was imported" in said
    assert files_of(study) == before


def test_a_disk_that_fails_at_the_second_rater_leaves_nothing_of_the_first(study, pairs, tmp_path, monkeypatch, capsys):
    real, written = votes.write_bytes, []

    def full(path, data):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(path, data)

    monkeypatch.setattr(votes, "write_bytes", full)
    path = write(tmp_path / "votes.jsonl", [longer(pair, rater=rater) for rater in ("ann", "ben") for pair in pairs])
    before = files_of(study)
    assert command("votes", "import", study, path) == 3
    assert "No space left" in capsys.readouterr().err and files_of(study) == before


def test_a_damaged_key_is_named(study, pairs, tmp_path, capsys):
    (key,) = (study / "votes").iterdir()
    key.write_text(key.read_text()[:-40])
    assert command("votes", "import", study, write(tmp_path / "v.jsonl", [longer(pairs[0], rater="ann")])) == 2
    assert f"{key}: this is no key" in capsys.readouterr().err


def test_a_study_that_has_answered_nothing_is_told_what_to_run(study, tmp_path, capsys):
    shutil.rmtree(study / "untuned")
    assert command("votes", "export", study, tmp_path / "pairs.jsonl") == 2
    assert "--profile smoke --steps 01-04" in capsys.readouterr().err
    for config in CONFIGS[1:]:
        shutil.rmtree(study / config)
    assert command("votes", "export", study, tmp_path / "pairs.jsonl") == 2
    assert "answers of 1 configurations, and a pair needs two" in capsys.readouterr().err


def test_answers_that_all_lose_by_rule_leave_nothing_to_vote_on(study, tmp_path, capsys):
    for config in CONFIGS[1:]:
        path = study / config / "04_energy" / "artefacts" / "answers.parquet"
        pd.read_parquet(path).assign(answer="").to_parquet(path)
        write_again(study, config, "04_energy")
    assert command("votes", "export", study, tmp_path / "pairs.jsonl") == 2
    assert "nothing to vote on" in capsys.readouterr().err and not (study / "votes").exists()


@pytest.mark.parametrize(
    "name",
    [
        "shared/01_glossary/artefacts/glossary.json", "shared/02_synth/artefacts/test_prompts.parquet",
        "c02/04_energy/artefacts/answers.parquet", "untuned/04_energy/manifest.json", "votes/*.jsonl",
        "judge-human-ann/store/verdicts.jsonl",
    ],
)  # fmt: skip
def test_votes_on_a_study_of_which_a_byte_was_changed_are_neither_exported_nor_imported(
    study, pairs, tmp_path, capsys, name
):
    path = write(tmp_path / "votes.jsonl", [longer(pair, rater="ann") for pair in pairs])
    assert command("votes", "import", study, path) == 0
    seal.seal_study(study)
    assert command("votes", "import", study, path) == 0, "nothing has changed"
    (changed,) = study.glob(name)
    flip(changed, changed.stat().st_size // 2)
    before, only_imported = files_of(study), name.startswith(("votes", "judge"))
    assert command("votes", "import", study, path) == 3
    assert f"{changed.relative_to(study)} was changed" in capsys.readouterr().err
    if not only_imported:
        assert command("votes", "export", study, tmp_path / "more.jsonl", "--seed", "4") == 3
        assert f"{changed.relative_to(study)} was changed" in capsys.readouterr().err
    assert files_of(study) == before


def test_while_votes_are_imported_nobody_else_adds_to_the_study(study, pairs, tmp_path, capsys, monkeypatch):
    half, real, codes = len(pairs) // 2, votes.replace_all, []
    first, second = (
        write(tmp_path / f"{i}.jsonl", [longer(pair, rater="ann") for pair in part])
        for i, part in enumerate((pairs[:half], pairs[half:]))
    )
    monkeypatch.setattr(runner, "LOCK_SECONDS", 0.0)

    def at_the_same_time(files):
        monkeypatch.setattr(votes, "replace_all", real)
        codes.append(command("votes", "import", study, second))
        real(files)

    monkeypatch.setattr(votes, "replace_all", at_the_same_time)
    assert command("votes", "import", study, first) == 0 and codes == [3]
    assert "is using" in capsys.readouterr().err
    assert command("votes", "import", study, second) == 0
    named = {line["pair_id"] for line in stored(study, "human-ann").ok.values() if line["source"] == "votes"}
    assert named == {pair["pair_id"] for pair in pairs}
