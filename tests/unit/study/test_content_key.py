"""Content keys: which change of the code outdates which step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import python_path

from telco_nb import ROOT
from telco_nb.hosted.lines import append_lines
from telco_nb.study import imports
from telco_nb.study.content_key import brought_sha256

KEY_PARTS = """
import json, sys
from telco_nb.study.content_key import module_hashes, notebook_code
print(json.dumps({step: module_hashes(notebook_code(step)) for step in sys.argv[1:]}))
"""


def module_hashes(project: Path, *steps: str) -> dict[str, dict[str, str]]:
    """Hashes of the modules in the content keys of some steps, as the code of a copy of the project computes them."""
    environment = os.environ | {"PYTHONPATH": python_path(project)}
    command = [sys.executable, "-c", KEY_PARTS, *steps]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("telco_nb", "notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def outdated(project: Path, changed: str) -> set[str]:
    """The steps among 03_train and 05_judge whose keys change with a file."""
    before = module_hashes(project, "03_train", "05_judge")
    with (project / changed).open("a") as stream:
        stream.write("\n# changed\n")
    after = module_hashes(project, "03_train", "05_judge")
    return {step for step in after if after[step] != before[step]}


def test_changing_the_store_of_verdicts_outdates_05_and_not_03(project):
    assert outdated(project, "telco_nb/judge/store.py") == {"05_judge"}


def test_changing_the_training_step_outdates_03_and_not_05(project):
    assert outdated(project, "telco_nb/lora/step.py") == {"03_train"}


@pytest.mark.parametrize(
    "line",
    [
        "from telco_nb.room import desk",
        "from telco_nb.room.desk import lamp",
        "from telco_nb.room.desk import *",
        "import telco_nb.room.desk",
        "import telco_nb.room.desk as table",
        "def late():\n    from telco_nb.room import desk",
        "if TYPE_CHECKING:\n    from telco_nb.room.desk import lamp",
    ],
)
def test_every_way_to_import_a_module_of_a_room_is_followed(line, tmp_path):
    desk = tmp_path / "telco_nb" / "room" / "desk.py"
    desk.parent.mkdir(parents=True)
    for path in (desk, desk.with_name("__init__.py"), desk.parents[1] / "__init__.py"):
        path.write_text("")
    (desk.parents[1] / "hall.py").write_text(f"{line}\n")
    found = {path.relative_to(tmp_path).as_posix() for path in imports.all_files("from telco_nb import hall", tmp_path)}
    assert found == {"telco_nb/__init__.py", "telco_nb/hall.py", "telco_nb/room/__init__.py", "telco_nb/room/desk.py"}


def test_a_relative_import_is_refused_since_it_would_drop_out_of_the_key():
    with pytest.raises(ValueError, match="line 1: write a relative import"):
        imports.all_files("from . import desk")


def store_line(**fields) -> bytes:
    return json.dumps({"judgement_id": "q", "source": "judge", "batch_id": None, "raw": ""} | fields).encode() + b"\n"


@pytest.mark.parametrize("fields", [{"source": "votes"}, {"batch_id": "msgbatch_0"}])
def test_votes_and_batches_of_a_store_are_inputs_of_its_step(tmp_path, fields):
    store = tmp_path / "verdicts.jsonl"
    store.write_bytes(store_line() + store_line(**fields))
    brought = brought_sha256(store)
    assert brought is not None
    store.write_bytes(store_line() + store_line(**fields) + store_line(source="rule"))
    assert brought_sha256(store) == brought
    store.write_bytes(store_line() + store_line(**fields) + store_line(**fields, margin=2))
    assert brought_sha256(store) != brought


def test_what_a_step_has_asked_itself_is_no_input_whatever_a_reply_says(tmp_path):
    assert brought_sha256(tmp_path / "none.jsonl") is None
    store = tmp_path / "verdicts.jsonl"
    for raw in ('"source": "votes"', '{"batch_id": "msgbatch_0"}', '\\"source": "votes"'):
        store.write_bytes(store_line(raw=raw))
        assert brought_sha256(store) is None


def test_a_torn_line_is_no_input_and_a_whole_one_is_with_and_without_its_line_feed(tmp_path):
    store, line = tmp_path / "verdicts.jsonl", store_line(source="votes")
    store.write_bytes(line)
    whole = brought_sha256(store)
    store.write_bytes(line[:-1])
    assert brought_sha256(store) == whole is not None, "the reader of a store counts this line"
    append_lines(store, [store_line()])
    assert brought_sha256(store) == whole, "the next writer ends the line, and changes no key"
    for torn in (line[:-2], line[:-2] + b"\n"):
        store.write_bytes(torn)
        assert brought_sha256(store) is None, "nobody can read this line"
