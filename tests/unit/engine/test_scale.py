"""What a run reads grows with the number of its steps, not with its square: counted where steps do nothing."""

import io
import json
import os
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import fake_study
import pytest

from bench import limits
from telco_nb.engine import worker
from telco_nb.study import content_key, imports, input_files, params, record


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Runs phases of a study of n configurations; returns how often each manifest was read, by phase."""
    reads: Counter[Path] = Counter()
    load = record.load_manifest

    def counted(path: Path, *place: str):
        reads[path] += 1
        return load(path, *place)

    def phases(n: int, *names: str) -> dict[str, Counter]:
        limits.write_params(tmp_path / f"params{n}", n)
        monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / f"outputs{n}"))
        found = {}
        for name in names:
            reads.clear()
            with redirect_stdout(io.StringIO()):
                assert limits.phase(name, tmp_path / f"params{n}") == 0
            found[name] = Counter(reads)
        return found

    monkeypatch.setattr(record, "load_manifest", counted)
    monkeypatch.setattr(worker.Runner, "_run_job", worker.Runner._run_job)  # limits.phase replaces it
    monkeypatch.setattr(content_key, "_module_hashes", lambda code, states: {})  # parsing them takes seconds
    record._kept_manifest.cache_clear()
    return phases


def test_no_manifest_is_read_more_often_in_a_larger_study(count):
    small, large = count(3, "run", "again", "status"), count(9, "run", "again", "status")
    for phase, reads in large.items():
        assert len(reads) == 2 * 9 + 5, "of each step, and the answers of the untuned model"
        assert max(reads.values()) <= max(small[phase].values()) <= 3, phase


def test_a_plan_asks_for_the_modules_of_a_notebook_once_until_a_source_changes(monkeypatch):
    asked, code = [], "from telco_nb.study import seal"
    monkeypatch.setattr(imports, "all_files", lambda source, root: asked.append(source) or {})
    first = imports.source_states()
    for _ in range(5):
        content_key.module_hashes(code)
    assert asked == [code]
    changed = ((first[0][0], first[0][1] + 1, first[0][2]), *first[1:])
    monkeypatch.setattr(imports, "source_states", lambda root: changed)
    content_key.module_hashes(code)
    assert asked == [code, code]


def test_a_change_of_any_module_or_data_file_is_seen(tmp_path):
    package = tmp_path / imports.PACKAGE
    for name in ("room/desk.py", "data/words.txt"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("x")
        before = imports.source_states(tmp_path)
        os.utime(package / name, ns=(1, 1))
        assert imports.source_states(tmp_path) != before, name
        (package / name).with_name("new.py").write_text("")
        assert len(imports.source_states(tmp_path)) == len(before) + 1


def test_a_record_that_was_replaced_is_read_again(tmp_path):
    builder = fake_study.Builder(tmp_path)
    for headline in ("first", "second"):
        builder.close(builder.open("01_glossary", "shared"), headline)
        assert record.finished(builder.root, "shared", "01_glossary")["headline"] == headline
    assert record.finished(builder.root, "shared", "02_synth") is None


def test_the_record_of_a_large_study_is_read_though_no_other_file_may_be_so_large(tmp_path):
    """11,000 configurations make a manifest of 06, and 3,700 a seal, of more than the 32 MiB of other files."""
    outputs = [{"path": f"artefacts/{'x' * 9000}{i}", "sha256": "0" * 64, "bytes": 1} for i in range(4_000)]
    builder = fake_study.Builder(tmp_path)
    builder.close(builder.open("06_analysis", "study"), "analysed")
    path = record.step_dir(builder.root, "study", "06_analysis") / "manifest.json"
    record.write_manifest(path, json.loads(path.read_text()) | {"outputs": outputs})
    assert path.stat().st_size > input_files.MOST_BYTES
    assert len(record.finished(builder.root, "study", "06_analysis")["outputs"]) == 4_000
    with pytest.raises(input_files.InputFileError, match="32 MiB"):
        input_files.read_json(path)


def test_the_list_of_configurations_is_not_checked_again_for_each_of_them(tmp_path, monkeypatch):
    limits.write_params(tmp_path / "params", 30)
    checked, validate = [], params.validate
    monkeypatch.setattr(params, "validate", lambda values, where: checked.append(values) or validate(values, where))
    params.load_study(limits.PROFILE, tmp_path / "params")
    assert sum(len(values["configs"]) for values in checked) <= 30 + len(checked)
