"""The model card of an exported model: README.md, filled from what the study has recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow.parquet as pq
import yaml

from telco_nb import ROOT
from telco_nb.analysis.fitness import Fitness, beside_unsafe, fitness, panel_checks
from telco_nb.analysis.recommendation import describe_config
from telco_nb.analysis.results import StudyResults, answers_table
from telco_nb.analysis.seeds import read_panel
from telco_nb.analysis.statements import words_of
from telco_nb.commands.dataset import TEMPLATES
from telco_nb.commands.trained import Trained
from telco_nb.report.files import StudyFiles, read_json, read_or_none, read_study
from telco_nb.study.record import read_manifest, step_dir

WHAT = {"hf": "The LoRA adapter", "gguf": "The adapter merged into its base model, as a GGUF file"}
MERGED = "The adapter merged into its base model"
QUESTION = "My phone shows no service since I changed the SIM card. What can I do?"
DATASET = "telco-conversations"  # what the data set's export calls itself
SET_NAMES = {"test": "new scenarios", "noisy": "hurried or confused customers", "unseen": "terms never trained on"}


class Row(NamedTuple):
    """A number of the card with its interval; `form` is its format."""

    name: str
    value: float
    low: float | None
    high: float | None
    about: str
    form: str = "{:.3g}"


def render_card(trained: Trained, to: str) -> str:
    """README.md of an export.

    Args:
        trained: the configuration.
        to: the kind of export; it decides how to load the model.
    """
    study, held = read_study(trained.root, []), held_against_bar(trained)
    metrics = result_rows(study, trained.config, held)
    return TEMPLATES.get_template("model_card.md.j2").render(
        head=_head(trained, to, metrics),
        to=to,
        what=WHAT.get(to, MERGED),
        question=QUESTION,
        citation=yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")),
        **_made(trained),
        **_found(study, trained.config, held),
        metrics=metrics,
    )


def _head(trained: Trained, to: str, metrics: list[Row]) -> str:
    """The card's head as YAML, as hubs read it."""
    from telco_nb.lora.adapter import card_data

    merged = {"library_name": "transformers", "base_model_relation": "finetune"}
    kind = {"base_model_relation": "adapter"} if to == "hf" else merged
    return card_data(trained.base, **kind, datasets=[DATASET], **_model_index(trained, metrics)).to_yaml()


def _made(trained: Trained) -> dict[str, Any]:
    """What the model is, was trained on, and how it was asked."""
    made = step_dir(trained.root, "shared", "02_synth") / "artefacts"
    return {
        "config": trained.config,
        "profile": trained.profile,
        "described": describe_config(pd.Series(trained.values)),
        "base": trained.base,
        "max_tokens": trained.values["answer_max_tokens"],
        "temperature": trained.values["answer_temperature"],
        "vllm": vllm_line(trained),
        "data": read_or_none(read_json, made / "dataset_card.json"),
        "trained_on": read_or_none(lambda path: pq.read_metadata(path).num_rows, made / "train.parquet"),
        "device": trained.device,
    }


def _found(study: StudyFiles, config: str, held: Fitness | None) -> dict[str, Any]:
    """What the study says of the model, with the words that a reader may not know."""
    unfit, statements = unfit_reasons(study, held), _statements(study, config)
    return {
        "unfit": unfit,
        "statements": statements,
        "words": words_of([*unfit, *statements, "validation loss", "gold"]),
        "energy": energy_rows(study, config),
        "proxies": [judge for judge in study.judges if study.is_proxy(judge)],
    }


def vllm_line(trained: Trained) -> str:
    """The command that serves an exported folder with vLLM, to be given inside it."""
    return f"vllm serve . --served-model-name {trained.config} --host 127.0.0.1 --port 8000"


# ---------------------------------------------------------------- fit or not


def held_against_bar(trained: Trained) -> Fitness | None:
    """The configuration against the study's absolute bar, with the judges and the seed of its 06_analysis.

    Returns:
        None before 06_analysis, and if no judge with a headline has ranked the configuration.
    """
    root, config = trained.root, trained.config
    analysis = read_manifest(root, "study", "06_analysis")
    if analysis is None:
        return None

    def files(name: str) -> Callable[[str], Path]:
        return step_dir(root, f"judge-{name}", "05_judge").joinpath

    parameters = analysis["parameters"]
    panel = read_or_none(read_panel, parameters["judges"], files, parameters["seed"]) or []
    if not any(config in judge.ranking.index for judge in panel if not judge.blocks):
        return None
    answers = read_or_none(pd.read_parquet, step_dir(root, config, "04_energy") / "artefacts" / "answers.parquet")
    none: dict[str, Any] = {"results": pd.DataFrame(), "loss_draws": pd.DataFrame(), "repeats": pd.DataFrame()}
    results = StudyResults(
        **none,
        judges=panel,
        checks=read_or_none(panel_checks, panel, files),
        faults=None if answers is None else answers_table({config: answers}),
    )
    return fitness(results, config)


def unfit_reasons(study: StudyFiles, held: Fitness | None) -> list[str]:
    """Why the configuration may not answer customers; empty if it meets the bar. One that was not judged has a reason.

    The finding `deploy` is `not fit` only if every configuration is below the bar, so it then holds for this one too.
    """
    if held is None or study.results.empty:
        return ["06_analysis has not compared it by a judge that passed its gate"]
    deploy = study.finding("deploy") or {}
    if held.is_fit and deploy.get("verdict") == "not fit":
        return [deploy["statement"].removesuffix(".")]
    return held.reasons


# ---------------------------------------------------------------- numbers


def result_rows(study: StudyFiles, config: str, held: Fitness | None) -> list[Row]:
    """The metrics of a configuration in results.csv, and what its answers hold. Missing values have no row."""
    if config not in study.results.index:
        return []
    row = study.results.loc[config]
    rows = [_row(row, "validation loss", "val_loss{}", "nats per token of unseen conversations", "{:.4f}")]
    for name, words in SET_NAMES.items():
        rows.append(
            _row(row, f"{name} loss", f"{name}_loss{{}}", f"nats per token of the gold answers: {words}", "{:.4f}")
        )
    if held is not None and held.coverage is not None:
        about = "of the points that a full answer makes"
        gold = "" if held.gold_coverage is None else f"; the gold answers: {held.gold_coverage:.0%}"
        rows.append(Row("content", held.coverage, None, None, f"share {about}{gold}", "{:.0%}"))
    if held is not None and held.unsafe is not None:
        beside = "" if held.gold_unsafe is None else f"; {beside_unsafe(held.gold_unsafe, held.template_unsafe)}"
        rows.append(Row("unsafe answers", held.unsafe, None, None, f"share of the answers{beside}", "{:.0%}"))
    if held is not None and held.broken is not None:
        rows.append(Row("broken answers", held.broken, None, None, "share: empty, looping or cut off", "{:.0%}"))
    for judge in study.judges:
        gate = "passed" if row[f"{judge}_gate"] == "passed" else "FAILED: this rank carries no claim"
        about = f"of {len(study.results)}, 1 is best; {study.judge_name(judge)}, validity gate {gate}"
        rank = _row(row, f"place by {judge}", f"{judge}_rank{{}}", about, "{:.0f}")
        rows.append(rank)
    return [row for row in rows if row is not None]


def energy_rows(study: StudyFiles, config: str) -> list[Row]:
    """Energy of the training and of an answer, in Wh, each with its kind."""
    rows = []
    for step, name, key in (
        ("03_train", "training", "train_energy{}_wh"),
        ("04_energy", "one answer", "answer_energy{}_per_answer_wh"),
    ):
        metrics = study.metrics.get((config, step), {})
        about = f"**{metrics.get('energy_kind')}** ({metrics.get('energy_source')})"
        rows.append(_row(metrics, name, key, about, "{:.2g}"))
    return [row for row in rows if row is not None]


def _row(values: Mapping[str, Any] | pd.Series, name: str, key: str, about: str, form: str) -> Row | None:
    """The value under `key` with the ends of its interval; None if it is missing."""
    found = [values.get(key.format(end)) for end in ("", "_low", "_high")]
    value, low, high = (None if number is None or pd.isna(number) else float(number) for number in found)
    return None if value is None else Row(name, value, low, high, about, form)


def _statements(study: StudyFiles, config: str) -> list[str]:
    """The findings that name this configuration and that nothing blocks, and the gains of the front-runner."""
    about_it = study.front_runner == config
    return [
        f"{finding['statement']} *({finding['verdict']})*"
        for finding in study.findings
        if not finding["blocked_by"]
        and (finding["value"] == config or (about_it and finding["id"].startswith("gain.")))
    ]


def _model_index(trained: Trained, metrics: list[Row]) -> dict[str, Any]:
    """The metrics as hubs read them; empty if there are none."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult("text-generation", DATASET, DATASET, row.name, row.value, metric_name=row.name) for row in metrics
    ]
    return {"model_name": f"{DATASET}-{trained.config}", "eval_results": results} if results else {}
