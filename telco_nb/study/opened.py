"""Which study a notebook opens that is run by hand, and where its results go.

A notebook run by hand opens the newest finished study, so "Run All" works without an edit. It takes every value from
the record of its step, but for those that the parameters cell changes. A step that a batch made is never replaced: the
results of a run by hand then go to `outputs/by-hand`, and the record stays as the batch made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telco_nb.study.params import BY_HAND, config_of, load_study
from telco_nb.study.record import outputs_root, profile_root, read_manifest


@dataclass(frozen=True)
class Opened:
    """What a notebook run by hand works with: its parameters, the study it reads, the folder it writes to."""

    parameters: dict[str, Any]
    root: Path
    target: Path
    note: str  # a sentence for the reader


def open_study(step: str, given: dict[str, Any]) -> Opened:
    """Choose the study, the parameters and the target of a step that is run by hand.

    Args:
        step: the notebook's name without its ending.
        given: the values in its parameters cell. One that differs from the smoke profile counts as changed, because
            the notebook itself may have been saved with it.
    """
    defaults = default_values(step)
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    analysis = newest_finished(changed.get("profile"))
    if analysis is None:
        root = profile_root(given["profile"])
        target = _target(root, given["scope"], step)
        return Opened(given, root, target, _note(None, target))
    root = profile_root(analysis["parameters"]["profile"])
    recorded = _recorded(step, given["scope"], root, analysis["parameters"])
    parameters = {name: recorded.get(name, value) for name, value in given.items()} | changed
    for runs in {"repeats", "drift_runs"} & parameters.keys() - changed.keys() if "configs" in changed else ():
        parameters[runs] = [run for run in parameters[runs] if config_of(run) in changed["configs"]]
    target = _target(root, parameters["scope"], step)
    return Opened(parameters, root, target, _note(analysis, target))


def default_values(step: str) -> dict[str, Any]:
    """The values with which a notebook is shipped: those of the smoke profile in its first scope."""
    smoke = load_study("smoke")
    first = {"05_judge": f"judge-{smoke.base['judges'][0]}", "06_analysis": "study"}
    first |= dict.fromkeys(("03_train", "04_energy"), smoke.configs[0])
    return smoke.values(first.get(step, "shared"))


def newest_finished(profile: str | None = None) -> dict[str, Any] | None:
    """The manifest of the newest finished analysis, of any profile or of one; None if no study has finished."""
    outputs = outputs_root()
    names = [profile] if profile else sorted(p.name for p in outputs.glob("*") if p.is_dir() and p.name != BY_HAND)
    found = [manifest for name in names if (manifest := read_manifest(outputs / name, "study", "06_analysis"))]
    return max(found, key=lambda manifest: manifest["started_at"], default=None)


def _recorded(step: str, scope: str, root: Path, analysis: dict[str, Any]) -> dict[str, Any]:
    """The parameters in the record of a step: in this scope, or in the first one of its kind that the study has."""
    first = {"05_judge": f"judge-{analysis['judges'][0]}"}.get(step, analysis["configs"][0])
    manifest = read_manifest(root, scope, step) or read_manifest(root, first, step)
    return manifest["parameters"] if manifest else {"profile": analysis["profile"]}


def _target(root: Path, scope: str, step: str) -> Path:
    """The study itself, unless a batch has made this step there: its record stays, and the result goes elsewhere."""
    manifest = read_manifest(root, scope, step)
    is_record = manifest is not None and manifest["executor"] == "papermill"
    return root.parent / BY_HAND / root.name if is_record else root


def _note(analysis: dict[str, Any] | None, target: Path) -> str:
    if analysis is None:
        opened = "No finished study was opened: all values are those of the parameters cell."
    else:
        opened = (
            f"Opened the finished study {analysis['parameters']['profile']} of {analysis['started_at'][:10]}. Values "
            "that the parameters cell does not change are those of its record."
        )
    place = "/".join(target.parts[-2 if BY_HAND not in target.parts else -3 :])
    kept = " The record stays as it is." if BY_HAND in target.parts else ""
    return f"{opened} Results go to {place}.{kept}"
