"""Nothing under the GPL or AGPL is needed to run a study, and LICENCES.md says what the packages say."""

import ast
import importlib.util
import json
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.utils import canonicalize_name

from telco_nb import ROOT

spec = importlib.util.spec_from_file_location("licences", ROOT / "tools" / "licences.py")
licences = importlib.util.module_from_spec(spec)
spec.loader.exec_module(licences)


def test_no_package_at_run_time_is_under_the_gpl():
    found = {name: licences.licence_of(name) for name in licences.locked(*licences.RUN, *licences.RAY)}
    assert {name: text for name, text in found.items() if licences.COPYLEFT.search(text)} == {}


def test_the_packages_under_the_gpl_are_known_and_only_for_tests_and_tools():
    found = {n for n in licences.locked(*licences.TESTS) if licences.COPYLEFT.search(licences.licence_of(n))}
    assert found == {"codespell", "krippendorff"}


@pytest.mark.parametrize(
    ("text", "is_copyleft"),
    [
        ("GPL-3.0-or-later", True),
        ("AGPL-3.0-only", True),
        ("GNU General Public License v2 (GPLv2)", True),
        ("GNU Affero General Public License v3", True),
        ("MIT OR GPL-2.0-only", True),
        ("LGPL-2.1-only", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Apache-2.0 WITH LLVM-exception", False),
        ("MPL-2.0 AND MIT", False),
    ],
)
def test_a_copyleft_licence_is_told_by_its_name(text, is_copyleft):
    assert bool(licences.COPYLEFT.search(text)) == is_copyleft


def test_what_only_tests_and_tools_use_is_not_imported_by_the_project():
    only_tests = set(licences.locked(*licences.TESTS))
    packages = metadata.packages_distributions().items()
    modules = {module for module, names in packages if set(map(canonicalize_name, names)) <= only_tests}
    for path in [ROOT / "run_all.py", *(ROOT / "telco_nb").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & modules, path


def test_the_list_of_licences_is_what_the_packages_state():
    assert licences.LICENCES.read_text(encoding="utf-8") == licences.render(), "run: make licences"


def test_make_sbom_writes_valid_cyclonedx_with_hashes_for_all_but_torch(tmp_path):
    (recipe,) = [part for part in (ROOT / "Makefile").read_text().split("\n\n") if part.startswith("sbom:")]
    command = recipe.split("\n", 1)[1].replace("$(BIN)", str(sys.prefix) + "/bin").replace("\\\n", " ")
    file = tmp_path / "sbom.json"
    subprocess.run(command.replace("sbom.cdx.json", str(file)), shell=True, check=True, cwd=ROOT)  # it also validates
    bill = json.loads(file.read_text())
    parts = {part["name"]: part for part in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "telco-nb"
    assert {name: part["version"] for name, part in parts.items()} == licences.locked(*licences.RUN)
    bare = [name for name, part in parts.items() if not any("hashes" in r for r in part["externalReferences"])]
    assert bare == ["torch"]
