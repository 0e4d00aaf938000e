"""The files of a base model: 03 and 04 run again when one changes, and a plan reads no weights twice."""

import json
import os
from pathlib import Path

import pytest

from telco_nb.study import content_key, model_files
from telco_nb.study.params import ParameterError
from telco_nb.study.plan import Job
from telco_nb.study.record import sha256


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A folder that a hub snapshot may be: with links and with hidden files of its download."""
    monkeypatch.setenv("TELCO_NB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache" / "download.lock").write_text("now")
    (tmp_path / "blob").write_bytes(b"weights" * 999)
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "config.json").write_text("{}")
    return folder


def key_inputs(model: Path | str, step: str = "03_train") -> dict[str, str] | None:
    return content_key.input_hashes(Job(step, "c01", {"base_model": str(model)}, ()), Path("/nowhere"))


@pytest.mark.parametrize("step", ["03_train", "04_energy"])
def test_other_weights_of_the_same_size_and_time_change_the_content_key(model, step):
    before, state = key_inputs(model, step), (model / "model.safetensors").stat()
    assert before == {f"base_model/{name}": sha256(model / name) for name in ("config.json", "model.safetensors")}
    with (model / "model.safetensors").open("r+b") as stream:
        stream.write(b"W")
    os.utime(model / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    after = key_inputs(model, step)
    assert after != before and after["base_model/model.safetensors"] == sha256(model / "model.safetensors")
    reason = content_key.describe_difference({"inputs": before}, {"inputs": after})
    assert reason == "input base_model/model.safetensors changed"


def test_a_file_of_a_model_is_read_once_for_each_state_and_a_damaged_note_is_no_hash(model, monkeypatch):
    read = []
    monkeypatch.setattr(model_files, "sha256", lambda path: read.append(path.name) or sha256(path))
    first = key_inputs(model)
    assert key_inputs(model) == first and sorted(read) == ["config.json", "model.safetensors"]
    (model / "config.json").write_text('{"a": 1}')
    assert key_inputs(model) != first and read[2:] == ["config.json"]
    for note in ("", "[]", '{"a": 1}', json.dumps({str((model / "config.json").resolve()): [1, 2]})):
        (model_files.cache_dir() / model_files.HASHES).write_text(note)
        assert key_inputs(model)["base_model/model.safetensors"] == first["base_model/model.safetensors"]


def test_a_gguf_file_counts_and_the_packaged_model_and_a_hub_id_have_hashes_of_their_own(model, tmp_path):
    assert key_inputs(tmp_path / "blob") == {"base_model/blob": sha256(tmp_path / "blob")}
    assert key_inputs("smollm2-135m-instruct") == key_inputs("owner/name") == key_inputs("~nobody/x") == {}


def test_a_folder_of_everything_is_refused_as_a_base_model(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "MOST_FILES", 2)
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(ParameterError, match="Name the model's folder alone"):
        key_inputs(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(model, monkeypatch):
    monkeypatch.setenv("TELCO_NB_CACHE", str(model / "config.json" / "x"))
    assert len(key_inputs(model)) == 2
