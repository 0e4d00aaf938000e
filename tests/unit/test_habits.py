"""Habits of the repository: what is committed is small, holds no key, and speaks only of the project."""

import ast
import importlib
import subprocess
from collections import Counter

import pytest
from check_files import MAX_BYTES, faults

from telco_nb import ROOT


def committed() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_no_large_file_and_no_private_key_is_committed(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [path for name in committed() if name and (path := (ROOT / name).relative_to(ROOT)).is_file()]
    assert len(files) > 100
    assert [fault for path in files for fault in faults(path)] == []


def test_a_large_file_and_a_private_key_are_refused(tmp_path):
    large, key = tmp_path / "large.bin", tmp_path / "key.pem"
    large.write_bytes(b"x" * (MAX_BYTES + 1))
    key.write_bytes(b"-----BEGIN RSA " + b"PRIVATE KEY-----")
    assert "bytes" in faults(large)[0] and "private key" in faults(key)[0]


def test_no_two_test_files_have_one_name_so_that_one_command_can_collect_all():
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, files in names.items() if files > 1] == []


def test_the_project_has_the_files_that_a_contributor_looks_for():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "LOG.md"):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_every_name_of_the_project_that_a_bench_script_uses_exists(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("telco_nb"):
            for alias in node.names:
                held = importlib.import_module(node.module)
                found = getattr(held, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", sorted((ROOT / "telco_nb").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_defined_below_the_call_of_main(path):
    """Run as a program, a module calls main there: what stands below does not exist yet."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    calls = [i for i, node in enumerate(body) if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert all(i == len(body) - 1 for i in calls)
