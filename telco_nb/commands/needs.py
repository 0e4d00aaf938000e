"""What a study needs of this machine, said before it starts: tokens, memory, disk, and on a card hours and kWh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telco_nb import ROOT
from telco_nb.commands.estimate import SAMPLED, Corpus
from telco_nb.corpus import dataset
from telco_nb.engine.job import common_environment
from telco_nb.engine.machine_checks import FREE_BYTES, PACKAGED_MODEL, Needs, hub_cache
from telco_nb.study.plan import Job
from telco_nb.study.record import RecordError, read_table, step_dir

KEPT_CHECKPOINTS = 3  # of a training: the two newest, and the one that is being written
PROBE_TIMEOUT_S = 900.0


def study_needs(jobs: Sequence[Job], plan: Sequence[Job], root: Path, at_once: int, usable: bool) -> list[Needs]:
    """The needs of the jobs that are to run, one entry for each base model.

    The packaged model has none: its study fits into what `machine_checks` asks for, and its plan tells past durations.

    Args:
        jobs: the jobs that are to run.
        plan: all jobs of the study.
        root: the study's folder.
        at_once: configurations that run at the same time.
        usable: the trainings' device can be used and is a GPU, so it is timed.
    """
    training = [job for job in jobs if job.step == "03_train" and job.parameters["base_model"] != PACKAGED_MODEL]
    models = dict.fromkeys((job.parameters["base_model"], job.parameters["base_model_revision"]) for job in training)
    found = []
    for model in models:
        chosen = [j for j in training if (j.parameters["base_model"], j.parameters["base_model_revision"]) == model]
        answering = [j for j in jobs if j.step == "04_energy" and j.parameters["base_model"] == model[0]]
        work = _work(chosen, answering, plan, root)
        told = _ask_probe(model, chosen, answering, work["sample"], usable)
        unknown = Needs([f"Memory, disk, hours and kWh of {model[0]} are not known."], [], [told.get("error", "")])
        found.append(unknown if "error" in told else _needs(work, told, chosen, root, at_once))
    return found


def _work(training: list[Job], answering: list[Job], plan: Sequence[Job], root: Path) -> dict[str, Any]:
    """Numbers of conversations and prompts, at most or as 02_synth has made them, and a sample of conversations."""
    values = {name: value for job in reversed(plan) for name, value in job.parameters.items()}
    made = step_dir(root, "shared", "02_synth") / "artefacts"
    try:
        train = read_table(made / "train.parquet", ["messages"])["messages"]
        sample = [list(messages) for messages in train.iloc[:: max(1, len(train) // SAMPLED)]]
        n_train, n_prompts, exact = len(train), len(read_table(made / "test_prompts.parquet", ["prompt_id"])), True
    except (FileNotFoundError, RecordError):  # not made yet, or damaged, so that the step runs again
        corpus = Corpus(values)
        written = sum(s.split == "train" for s in corpus.grid) * values["conversations_per_scenario"]
        n_train = min(written, values["train_conversations"] or written)
        drawn = dataset.first_exchanges(corpus.sample(), values["max_exchanges"])
        sample, n_prompts, exact = [row["messages"] for row in drawn], corpus.count_prompts(), False
    new_tokens = n_prompts * sum(job.parameters["answer_max_tokens"] for job in answering)
    return {"conversations": n_train, "exact": exact, "new_tokens": new_tokens, "sample": sample}


def _ask_probe(
    model: tuple[str, str | None], training: list[Job], answering: list[Job], sample: Sequence[Any], timed: bool
) -> dict[str, Any]:
    """The answer of `lora.probe`, or {"error": why there is none}."""
    first = training[0].parameters
    answer = answering[0].parameters if answering else {"dtype": first["dtype"], "answer_batch_size": 1}
    request = {
        "base_model": model[0], "revision": model[1], "conversations": sample, "timed": timed,
        "trainings": [job.parameters for job in training], "answering": answer,
    }  # fmt: skip
    environment = os.environ | common_environment({"base_model": model[0]})  # as a study's, whose memory it measures
    command = [sys.executable, "-m", "telco_nb.lora.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, cwd=ROOT,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"the probe of {model[0]} did not end within {PROBE_TIMEOUT_S:.0f} s."}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": f"the probe of {model[0]} failed: {lines[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _needs(work: Mapping[str, Any], told: Mapping[str, Any], training: list[Job], root: Path, at_once: int) -> Needs:
    tokens = [job.parameters["epochs"] * work["conversations"] * told["tokens"] for job in training]
    operations = sum(n * need["flops_per_token"] for n, need in zip(tokens, told["trainings"], strict=True))
    at_most = "" if work["exact"] else "at most "
    adapters = sum(need["adapter_bytes"] for need in told["trainings"])
    checkpoints = sorted((need["checkpoint_bytes"] for need in told["trainings"]), reverse=True)[:at_once]
    study_bytes = FREE_BYTES + adapters + KEPT_CHECKPOINTS * sum(checkpoints)
    largest = max(told["trainings"], key=lambda need: sum(need["memory"].values()))["memory"]
    lines = [
        f"Training: {len(training)} runs on {at_most}{work['conversations']:,} conversations of about "
        f"{told['tokens']:.0f} tokens: {at_most}{sum(tokens) / 1e6:,.0f} million tokens, {operations / 1e18:,.2f} "
        "EFLOP.",
        f"Memory: {sum(largest.values()) / 1e9:.1f} GB for a whole row ({largest['weights'] / 1e9:.1f} GB of weights)"
        + (f"; {told['free_bytes'] / 1e9:.1f} GB are free on {told['card']}." if told["card"] else "."),
        f"Disk: {(study_bytes + told['download_bytes']) / 1e9:.1f} GB, of which adapters {adapters / 1e9:.1f}, "
        f"checkpoints {KEPT_CHECKPOINTS * sum(checkpoints) / 1e9:.1f}, records at most {FREE_BYTES / 1e9:.1f} and "
        f"weights to download {told['download_bytes'] / 1e9:.1f}.",
        _time_line(work, told, tokens, at_once),
    ]
    disk = [(root, study_bytes)] + ([(hub_cache(), told["download_bytes"])] if told["download_bytes"] else [])
    return Needs(lines, disk, list(told["faults"]))


def _time_line(work: Mapping[str, Any], told: Mapping[str, Any], tokens: list[float], at_once: int) -> str:
    """Hours and kWh by the probe; without one, that they are not known and why."""
    if "training_speeds" not in told:
        why = "the study does not fit here" if told["faults"] else "there is no GPU to time a step on"
        return f"Hours and kWh are not known: {why}."
    speeds, answers = sorted(told["training_speeds"], key=lambda s: s["adapter_weights"]), told["answering_speed"]
    sizes = [speed["adapter_weights"] for speed in speeds]
    asked = [need["adapter_weights"] for need in told["trainings"]]
    token_s = np.interp(asked, sizes, [1 / speed["tokens_per_second"] for speed in speeds])
    hours = [float(np.dot(tokens, token_s)) / 3600, work["new_tokens"] / answers["tokens_per_second"] / 3600]
    watts = [max((speed["mean_w"] or np.nan) for speed in speeds), answers["mean_w"] or np.nan]
    parts = [
        f"{name} {h:.1f} h and {'an unknown energy' if np.isnan(w) else f'{h * w / 1000:.2f} kWh'}"
        for name, h, w in zip(("training", "answers at most"), hours, watts, strict=True)
    ]
    rates = " to ".join(f"{rate:,.0f}" for rate in sorted({speed["tokens_per_second"] for speed in speeds}))
    divided = f", divided by the {at_once} that run at once" if at_once > 1 else ""
    return (
        f"Time and energy on one {told['card']}, by a probe with random weights: {' and '.join(parts)}{divided} "
        f"({rates} tokens a second). Loading, evaluation, judging and analysis come on top."
    )
