"""A study's answers and verdicts as logs of Inspect (https://inspect.aisi.org.uk): one log per configuration.

The form is version 2 of its eval log, as JSON. `inspect view --log-dir FOLDER/inspect` shows the logs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import combinations
from statistics import fmean
from typing import Any

from telco_nb.commands.model_card import DATASET
from telco_nb.judge.anchors import GOLD
from telco_nb.report.answer_explorer import explorer_data
from telco_nb.report.files import StudyFiles

LOG_VERSION = 2
CREDITS = {"t": 0.5, "x": 0.5, "a": 1.0, "b": 0.0}  # of a verdict, from the side of the earlier column of its pair
HALF = "a tie, or a verdict that changed when asked again,"
Data = Mapping[str, Any]  # what answer_explorer.explorer_data returns


def inspect_logs(study: StudyFiles) -> dict[str, dict[str, Any]]:
    """The log of every configuration and anchor with answers, by its file name; empty without questions or answers."""
    data = explorer_data(study)
    if data is None:
        return {}
    logs = (_log(study, data, place) for place in range(len(data["columns"])))
    return {_file_name(log["eval"]): log for log in logs}


def _file_name(head: Data) -> str:
    """The viewer lists a file only if its name starts with a date and ends with the task's id."""
    time, name = head["created"].replace(":", "-"), head["model"].rpartition("/")[2]
    return f"{time}_{name}_{head['task_id']}.json"


def _log(study: StudyFiles, data: Data, place: int) -> dict[str, Any]:
    pairs = list(combinations(range(len(data["columns"])), 2))
    samples = [
        _sample(data, question, place, _scores(data, question, place, pairs))
        for question in data["questions"]
        if question["answers"][place] is not None
    ]
    column = data["columns"][place]
    started, ended = _times(study, column["name"])
    return {
        "version": LOG_VERSION,
        "status": "success",
        "eval": _eval(study, column, [sample["id"] for sample in samples], started),
        "plan": {"name": "plan", "steps": []},
        "results": _results(samples),
        "stats": {"started_at": started, "completed_at": ended},
        "samples": samples,
    }


def _eval(study: StudyFiles, column: Mapping[str, str], ids: Sequence[str], started: str) -> dict[str, Any]:
    """The head of a log: what answered which questions."""
    name, task = column["name"], f"telco_nb/{study.root.name}"
    identity = hashlib.sha256(f"{task}/{name}/{started}".encode()).hexdigest()
    return {
        "eval_id": identity[:22],
        "run_id": identity[22:44],
        "task_id": identity[:22],
        "created": started,
        "task": task,
        "dataset": {"name": DATASET, "samples": len(ids), "sample_ids": list(ids), "shuffled": False},
        "model": f"telco_nb/{name}",
        "config": {"epochs": 1},
        "metadata": {"about": column["about"]} | _settings(study, name),
    }


def _times(study: StudyFiles, name: str) -> tuple[str, str]:
    """When the answers were given: start and end of 04 or, for an anchor, of 02, which wrote the gold answers."""
    manifest = study.manifests.get((name, "04_energy")) or study.manifests["shared", "02_synth"]
    return manifest["started_at"], ended_at(manifest)


def ended_at(manifest: Mapping[str, Any]) -> str:
    """When a step ended, in ISO 8601."""
    return (datetime.fromisoformat(manifest["started_at"]) + timedelta(seconds=manifest["seconds"])).isoformat()


def _settings(study: StudyFiles, name: str) -> dict[str, Any]:
    """What was trained: the configuration's factors; empty for an anchor."""
    factors = ("target_modules", "rank", "lora_alpha", "epochs", "learning_rate")
    values = study.manifests.get((name, "03_train"), {}).get("parameters", {})
    return {factor: values[factor] for factor in factors if factor in values}


def _sample(data: Data, question: Data, place: int, scores: dict[str, Any]) -> dict[str, Any]:
    name, answer = data["columns"][place]["name"], question["answers"][place]
    said = [{"role": role, "content": text} for role, text in question["said"]]
    answered = {"role": "assistant", "content": answer["text"], "source": "generate", "model": f"telco_nb/{name}"}
    gold = [column["name"] for column in data["columns"]].index(GOLD)
    facts = {key: question[key] for key in ("set", "term", "problem", "kind", "context")}
    return {
        "id": question["id"],
        "epoch": 1,
        "input": said,
        "target": (question["answers"][gold] or {}).get("text", ""),
        "messages": [*said, answered],
        "output": {
            "model": f"telco_nb/{name}",
            "choices": [{"message": answered, "stop_reason": "max_tokens" if "cut" in answer["flags"] else "stop"}],
            "completion": answer["text"],
        },
        "scores": scores,
        "metadata": facts | {"flags": answer["flags"]},
    }


def _scores(data: Data, question: Data, place: int, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The scores of an answer. What nobody has measured is no score, never 0."""
    answer = question["answers"][place]
    scores: dict[str, Any] = {}
    if answer["coverage"] is not None:
        made = _points_text(question["points"], answer["credits"], data["credits"])
        scores["points"] = {"value": answer["coverage"], "answer": answer["text"], "explanation": made}
        scores["without_flag"] = {"value": float(not answer["flags"]), "explanation": ", ".join(answer["flags"])}
    for judge, letters in zip(data["judges"], question["verdicts"], strict=True):
        if credits := _credits(letters, pairs, place):
            text = f"{len(credits)} comparisons on this question; {HALF} counts one half"
            scores[f"wins, {judge}"] = {"value": fmean(credits), "explanation": text}
    return scores


def _points_text(points: Sequence[str], credits: Sequence[float] | None, limits: Mapping[str, float]) -> str:
    lines = []
    for point, credit in zip(points, credits or [], strict=False):
        state = "made" if credit >= limits["made"] else "partly" if credit >= limits["partly"] else "missed"
        lines.append(f"{state}: {point}")
    return "\n".join(lines)


def _credits(letters: str, pairs: Sequence[tuple[int, int]], place: int) -> list[float]:
    """1 for every comparison won on this question, 0 for one lost, one half for a tie or a changed verdict."""
    credits = []
    for letter, pair in zip(letters, pairs, strict=True):
        if letter != "." and place in pair:
            credit = CREDITS[letter.lower()]
            credits.append(credit if pair[0] == place else 1 - credit)
    return credits


def _results(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each score over the samples that have it."""
    names = dict.fromkeys(name for sample in samples for name in sample["scores"])
    scores = []
    for name in names:
        values = [sample["scores"][name]["value"] for sample in samples if name in sample["scores"]]
        counts = {"scored_samples": len(values), "unscored_samples": len(samples) - len(values)}
        metrics = {"mean": {"name": "mean", "value": fmean(values)}}
        scores.append({"name": name, "scorer": name, "metrics": metrics} | counts)
    return {"total_samples": len(samples), "completed_samples": len(samples), "scores": scores}
