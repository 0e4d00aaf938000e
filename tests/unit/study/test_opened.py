"""Which study a notebook opens that is run by hand, and where its results go."""

import json
from pathlib import Path
from typing import Any

import pytest

from telco_nb.study import opened, params, record
from telco_nb.study.manifest import SCHEMA_VERSION
from telco_nb.study.params import declared
from telco_nb.study.plan import STEPS


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    return tmp_path


def finish(
    outputs: Path, profile: str, started: str, configs=("c01", "c02"), judges=("checklist",), executor="papermill"
) -> None:
    """Manifests of a finished study, with a learning rate in which the profiles differ."""
    scopes = [("01_glossary", "shared"), ("02_synth", "shared"), ("05_judge", f"judge-{judges[0]}")]
    scopes += [(step, config) for step in ("03_train", "04_energy") for config in configs]
    scopes += [("04_energy", "untuned"), ("06_analysis", "study")]
    for step, scope in scopes:
        values: dict[str, Any] = declared(step) | {"profile": profile, "scope": scope}
        values |= {name: list(given) for name, given in (("configs", configs), ("judges", judges)) if name in values}
        values |= {"repeats": [f"{configs[0]}-seed1"]} if "repeats" in values else {}
        values |= {"drift_runs": [f"{configs[0]}-drift"]} if "drift_runs" in values else {}
        values |= {"epochs": 7} if "epochs" in values else {}
        content = {
            "schema_version": SCHEMA_VERSION, "step": step, "scope": scope, "key": "0" * 64, "key_parts": {},
            "executor": executor, "status": "ok", "error": None, "headline": "", "parameters": values, "inputs": [],
            "outputs": [], "exports": {}, "environment": {}, "device": {}, "started_at": started, "seconds": 1.0,
            "peak_memory_bytes": 1,
        }  # fmt: skip
        (outputs / profile / scope / step).mkdir(parents=True)
        record.write_manifest(outputs / profile / scope / step / "manifest.json", content)


def open_with(step: str, **changed: Any) -> opened.Opened:
    return opened.open_study(step, {**declared(step), **changed})


def test_without_a_finished_study_the_values_of_the_cell_hold_and_results_enter_the_study(outputs):
    found = open_with("03_train")
    assert found.parameters == declared("03_train")
    assert found.root == found.target == outputs / "smoke"
    assert "No finished study" in found.note


@pytest.mark.parametrize("step", STEPS)
def test_the_newest_finished_study_is_opened_and_its_record_never_replaced(outputs, step):
    finish(outputs, "laptop", "2026-11-26T08:00:00+00:00")
    finish(outputs, "smoke", "2026-11-25T08:00:00+00:00")
    found = open_with(step)
    assert found.parameters["profile"] == "laptop" and found.root == outputs / "laptop"
    assert found.target == outputs / "by-hand" / "laptop"
    assert "laptop of 2026-11-26" in found.note and "record stays" in found.note


def test_values_come_from_the_record_but_for_those_that_were_changed(outputs):
    finish(outputs, "laptop", "2026-11-26T08:00:00+00:00")
    found = open_with("03_train", rank=3)
    assert (found.parameters["epochs"], found.parameters["rank"]) == (7, 3)


@pytest.mark.parametrize("step", STEPS)
def test_the_values_of_a_shipped_notebook_are_those_of_the_smoke_profile(step):
    shipped = opened.default_values(step)
    assert declared(step) == {name: shipped[name] for name in declared(step)}


def test_an_edit_counts_as_changed_after_the_notebook_was_saved_with_it(outputs, monkeypatch):
    finish(outputs, "laptop", "2026-11-26T08:00:00+00:00")
    saved = declared("03_train") | {"rank": 3}
    monkeypatch.setattr(params, "declared", lambda step: saved)
    assert opened.open_study("03_train", saved).parameters["rank"] == 3


def test_a_notebook_that_was_saved_with_colours_in_its_outputs_is_read(tmp_path):
    notebook = json.loads((params.NOTEBOOKS_DIR / "03_train.ipynb").read_text())
    notebook["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "\x1b[31mred\x1b[0m"}]
    (tmp_path / "03_train.ipynb").write_text(json.dumps(notebook))
    assert params.declared.__wrapped__("03_train", tmp_path) == declared("03_train")


def test_a_profile_cannot_be_called_as_the_folder_of_runs_by_hand(outputs):
    with pytest.raises(params.ParameterError, match="by-hand"):
        params.load_study("by-hand")


def test_a_profile_alone_is_a_sufficient_change(outputs):
    finish(outputs, "laptop", "2026-11-25T08:00:00+00:00", configs=("c03", "c04"))
    finish(outputs, "smoke", "2026-11-26T08:00:00+00:00")
    found = open_with("06_analysis", profile="laptop")
    assert found.parameters["configs"] == ["c03", "c04"] and found.root.name == "laptop"
    assert open_with("03_train", profile="laptop").parameters["scope"] == "c03"


def test_a_subset_of_configurations_takes_only_the_runs_that_belong_to_it(outputs):
    finish(outputs, "laptop", "2026-11-25T08:00:00+00:00", configs=("c01", "c02", "c03"))
    for configs, repeats, drift in ((["c02", "c03"], [], []), (["c01", "c03"], ["c01-seed1"], ["c01-drift"])):
        found = open_with("06_analysis", configs=configs).parameters
        assert (found["repeats"], found["drift_runs"]) == (repeats, drift)


def test_a_step_that_was_made_by_hand_is_made_again_in_its_place(outputs):
    finish(outputs, "laptop", "2026-11-26T08:00:00+00:00", executor="jupyter")
    assert open_with("03_train", rank=3).target == outputs / "laptop"


def test_the_note_names_the_folder_that_results_really_go_to(outputs):
    finish(outputs, "smoke", "2026-11-26T08:00:00+00:00")
    (outputs / "smoke" / "study" / "06_analysis" / "manifest.json").unlink()
    found = open_with("03_train")
    assert found.target == outputs / "by-hand" / "smoke" and "Results go to" in found.note
    assert f"{outputs.name}/by-hand/smoke" in found.note


def test_a_new_configuration_starts_from_the_first_one_and_enters_the_study(outputs):
    finish(outputs, "laptop", "2026-11-26T08:00:00+00:00")
    found = open_with("03_train", scope="mine", rank=4)
    assert found.parameters["epochs"] == 7 and found.target == outputs / "laptop"


def test_the_folder_of_runs_by_hand_is_no_study(outputs):
    finish(outputs, "laptop", "2026-11-25T08:00:00+00:00")
    finish(outputs, "by-hand", "2026-11-27T08:00:00+00:00")
    assert open_with("06_analysis").root.name == "laptop"
