"""Options that cannot be meant, and studies that cannot end well, are refused by the plan: exit code 2, one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import papermill.execute
import pytest
from typer.testing import CliRunner

import run_all
from telco_nb import ROOT
from telco_nb.engine.job import _literal
from telco_nb.study import params


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder, with a copy of the parameter files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "outputs"))
    shutil.copytree(params.PARAMS_DIR, tmp_path / "params")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def plan(*words: str):
    """The result of a dry run of the smoke study with the parameter files of the working folder."""
    return CliRunner().invoke(run_all.app, ["--dry-run", "--profile", "smoke", "--params", "params", *words])


def refused(place: Path, *words: str) -> str:
    """What a dry run says that ends with exit code 2 before it has made anything."""
    result = plan(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert isinstance(result.exception, SystemExit) and not (place / "outputs").exists()
    return result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--timeout", "inf"), "--timeout"),
        (("--timeout", "nan"), "--timeout"),
        (("--timeout", "1e308"), "--timeout"),
        (("--max-usd", "nan"), "--max-usd"),
        (("--outputs", "loop"), "--outputs loop: Symlink loop"),
        (("--outputs", "~nosuchuser/x"), "--outputs ~nosuchuser/x: Could not determine home directory"),
        (("--outputs", "a\udcffb"), "--outputs a\\udcffb: the text holds half a character"),
        (("--outputs", "a\x1b[2J"), "--outputs a"),
        (("--json", "folder"), "this is a folder. Name a file"),
        (("--json", "/"), "this is a folder. Name a file"),
        (("--json", "/dev/null"), "this is no plain file. Name a file"),
        (("--json", "file/x.json"), "file is no folder. Name a file"),
        (("--json", "x" * 250), "File name too long. Name a file"),
        (("--json", "~nosuchuser/x"), "--json ~nosuchuser/x"),
        (("--profile", "../base"), "--profile '../base'"),
        (("--profile", "../profiles/smoke"), "--profile '../profiles/smoke'"),
        (("--profile", "reference"), "hold something else"),
        (("--profile", "x" * 300), "--profile 'xxx"),
        (("--params", "folder"), "folder/base.yaml: no such file"),
        (("--configs", "c01"), "a ranking needs two configurations or more, and this study has c01"),
        (("--configs", "c99"), "--configs c99: no such configuration"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_by_its_name(place, words, named):
    assert named in refused(place, *words)


def test_one_configuration_is_enough_where_nothing_is_ranked(place):
    assert plan("--configs", "c01", "--steps", "01-04").exit_code == 0


def test_the_environments_outputs_folder_is_checked_as_the_options_is(place, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(place / "loop"))
    assert "the outputs folder" in refused(place)


def test_verify_refuses_a_link_loop_and_another_folder(place):
    for words in (["--outputs", "loop"], ["--profile", "../smoke"]):
        result = CliRunner().invoke(run_all.app, ["verify", *words])
        assert result.exit_code == 2 and "Traceback" not in result.output


def test_a_summary_is_written_for_a_refused_run_as_well(place):
    refused(place, "--json", "run.json", "--configs", "c99")
    assert json.loads((place / "run.json").read_text())["exit_code"] == 2


def test_a_summary_is_text_whatever_bytes_the_command_line_held(place):
    refused(place, "--profile", "a\udcffb", "--json", "run.json")
    assert json.loads((place / "run.json").read_text())["profile"] == "a?b"


def test_braces_in_a_path_stay_braces_through_papermill():
    path = "/a{b}/{0}/{{x}}/{profile}.ipynb"
    assert papermill.execute.parameterize_path(_literal(Path(path)), {"profile": "smoke"}) == path


# ---------------------------------------------------------------- studies that cannot end well

SERVER = {
    "generator": "openai-compatible", "generator_model": "m", "generator_endpoint": "http://127.0.0.1:8000/v1",
    "generator_input_usd_per_mtok": 0.0, "generator_output_usd_per_mtok": 0.0,
}  # fmt: skip


def set_profile(place: Path, **values) -> None:
    with (place / "params" / "profiles" / "smoke.yaml").open("a") as stream:
        stream.writelines(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


@pytest.mark.parametrize("port", ["0", "65536", "x", "", "-1", "8000000"])
def test_a_hosted_endpoint_with_a_bad_port_is_refused(place, port):
    set_profile(place, **SERVER | {"generator_endpoint": f"http://127.0.0.1:{port}/v1"})
    assert "the port must be a number from 1 to 65535" in refused(place)


def test_a_hosted_judge_with_a_bad_port_is_refused(place):
    file = place / "params" / "judges" / "own-server.yaml"
    file.write_text(file.read_text().replace(":8000/", ":80000/"))
    set_profile(place, judges=["checklist", "own-server"])
    assert "judge_endpoint" in refused(place)


@pytest.mark.parametrize(
    ("key", "name", "text", "named"),
    [
        ("glossary_path", "cards/a.yaml", "id: a\n", "a.yaml: card 'a', term: Field required"),
        ("glossary_path", "cards/a.yaml", "id: [", "a.yaml, line 2: not readable as YAML"),
        ("glossary_path", "cards/a.txt", "", "no YAML file"),
        ("glossary_path", "cards.json", "[NaN]", "cards.json: 0: nan is no finite number"),
        ("contexts_path", "contexts.yaml", "contexts: 5", "contexts.yaml: contexts: "),
        ("contexts_path", "contexts.yaml", "contexts: []", "contexts.yaml: contexts: "),
        ("gold_path", "gold/apn.jsonl", "{", "apn.jsonl, line 1: not JSON"),
        ("unseen_terms", "", "", "unseen_terms: no card has the id telex"),
    ],
)
def test_faulty_data_with_a_hosted_generator_are_refused_and_named(place, key, name, text, named):
    if name:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
        whole = place / name.partition("/")[0]
        set_profile(place, **SERVER | {key: str(whole)})
    else:
        set_profile(place, **SERVER | {key: ["telex"]})
    assert named in refused(place)


@pytest.mark.parametrize("key", ["glossary_path", "gold_path", "noisy_path", "prompts_path", "general_path"])
def test_a_path_to_data_that_are_not_there_is_refused(place, key):
    set_profile(place, **{key: "no/such/data"})
    assert f"{key}: 'no/such/data' does not exist below {ROOT}" in refused(place)


def test_a_base_model_of_an_unknown_user_is_refused_and_no_traceback(place):
    set_profile(place, base_model="~nosuchuser/model")
    result = plan()
    assert result.exit_code == 3 and "~nosuchuser/model" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize("value", [None, 5, True, 1.5, [[]], {}, "c01", [None]])
@pytest.mark.parametrize("key", ["configs", "judges", "repeat_configs", "repeat_seeds", "unseen_terms"])
def test_a_list_of_another_shape_is_refused_with_its_key(place, key, value):
    set_profile(place, **{key: value})
    assert key in refused(place)
