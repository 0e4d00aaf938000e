"""One list of pins: pyproject.toml, requirements.txt, environment.yml and what is installed agree."""

import re
import tomllib
from importlib import metadata

import yaml

from telco_nb import ROOT


def pins(lines) -> dict[str, str]:
    found = {}
    for line in lines:
        line = re.sub(
            r"\[.*?\]", "", line.split("#")[0]
        ).strip()  # extras, as in name[extra]==1.0, have no line of their own
        if line:
            name, version = line.split("==")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


LOCK = pins((ROOT / "requirements.txt").read_text().splitlines())
MODEL = pins((ROOT / "requirements-model.txt").read_text().splitlines())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_direct_dependencies_are_pinned_as_in_the_lock():
    direct = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert direct == {name: LOCK[name] for name in direct}


def test_what_the_study_promises_to_use_is_a_direct_dependency():
    promised = "jupyterlab papermill transformers peft torch bitsandbytes datasets carbontracker seaborn anthropic"
    assert set(promised.split()) <= set(pins(PROJECT["dependencies"]))


def test_environment_yml_has_python_and_pip_and_takes_every_pin_from_the_lock():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain = [e for e in entries if isinstance(e, str)]
    (pip,) = [e["pip"] for e in entries if isinstance(e, dict)]
    assert [re.split("[=<>]", e)[0] for e in plain] == ["python", "pip"]
    assert pip == ["-r requirements.txt"]


def test_what_is_installed_is_what_is_pinned():
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version.split("+")[0] for d in metadata.distributions()}
    wrong = {n: (v, installed.get(n)) for n, v in (LOCK | MODEL).items() if installed.get(n) != v}
    assert wrong == {}


def test_torch_is_pinned_exactly():
    assert LOCK["torch"] == "2.13.0"
