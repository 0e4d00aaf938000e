"""The rooms of the package: each imports only rooms below it, and the README names every module."""

import ast
import re
from pathlib import Path

import pytest

from telco_nb import PACKAGE_DIR, ROOT
from telco_nb.study.imports import imported_files

# From the ground up. notebook.py and __main__.py are modules of the package itself, and stand in the order too.
ORDER = (
    "study",
    "hosted",
    "notebook",
    "corpus",
    "lora",
    "judge",
    "analysis",
    "report",
    "engine",
    "commands",
    "__main__",
)
NEVER = {("lora", "corpus"), ("corpus", "lora")}  # data and training meet in files only
NOTEBOOKS_SEE = {"notebook", "corpus", "lora", "judge", "analysis"}
MODULES = sorted(path for path in PACKAGE_DIR.rglob("*.py") if path.name != "__init__.py")


def room(path: Path, package: Path = PACKAGE_DIR) -> str:
    """The room of a module: the folder it lies in, or its own name directly below the package."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def upward_imports(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of a module that reach a room above its own, or one that it must never know."""
    package = root / "telco_nb"
    mine, found = room(path, package), []
    for other in imported_files(path.read_text(encoding="utf-8"), root):
        if other.name == "__init__.py":
            continue
        theirs = room(other, package)
        if ORDER.index(theirs) > ORDER.index(mine) or (mine, theirs) in NEVER:
            found.append(f"{path.relative_to(root)} imports {other.relative_to(root)}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_a_room_imports_only_rooms_below_it(path):
    assert upward_imports(path) == []


@pytest.mark.parametrize("line", ["from telco_nb.judge import store", "def late():\n    import telco_nb.judge.store"])
def test_a_planted_upward_import_is_found(line, tmp_path):
    for name in ("study/record.py", "judge/store.py"):
        path = tmp_path / "telco_nb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.with_name("__init__.py").write_text("")
    (tmp_path / "telco_nb" / "__init__.py").write_text("")
    planted = tmp_path / "telco_nb" / "study" / "record.py"
    planted.write_text(line + "\n")
    assert upward_imports(planted, tmp_path) == ["telco_nb/study/record.py imports telco_nb/judge/store.py"]


def test_modules_of_one_room_import_each_other_in_one_direction():
    below = {path: {p for p in imported_files(path.read_text(encoding="utf-8")) if p != path} for path in MODULES}
    waiting = set(MODULES)
    while free := {path for path in waiting if not below[path] & waiting}:
        waiting -= free
    assert not waiting, f"these import each other in a circle: {sorted(p.name for p in waiting)}"


def test_at_most_four_modules_lie_directly_in_the_package_and_no_module_is_long():
    assert len(list(PACKAGE_DIR.glob("*.py"))) <= 4
    long = {str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"longer than 500 lines: {long}"


def test_the_readme_tree_names_every_module():
    tree = (ROOT / "README.md").read_text().partition("## Files")[2].partition("```")[2].partition("```")[0]
    named = tree_modules(tree)
    missing = [str(p.relative_to(PACKAGE_DIR)) for p in MODULES if (room(p), p.stem) not in named]
    assert not missing, f"README's tree misses {missing}"


def tree_modules(tree: str) -> set[tuple[str, str]]:
    """(room, module) for each line of the tree that begins with a module's name, below the line of its room."""
    found, above = set(), ""
    for line in tree.splitlines():
        match = re.match(r"( +)([a-z_0-9]+)(/?) {2,}", line)
        if match and match[3]:
            above = match[2]
        elif match:
            found.add((match[2] if len(match[1]) == 2 else above, match[2]))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_see_only_the_rooms_that_are_theirs(path):
    import json

    cells = json.loads(path.read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    seen = {room(p) for p in imported_files(source) if p.name != "__init__.py"}
    assert seen <= NOTEBOOKS_SEE


def test_no_module_is_imported_by_a_name_made_at_run_time():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if isinstance(node, ast.Call) and name in ("import_module", "__import__"):
                assert path.name == "fork_server.py", f"{path}: a content key cannot follow {name}"
