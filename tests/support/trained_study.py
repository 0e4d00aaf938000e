"""A laptop study whose c04 has a real adapter of the packaged model, with random weights: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fake_study import Builder, add_judge
from peft import LoraConfig

from telco_nb.analysis.results import result_columns
from telco_nb.lora import base_model, step
from telco_nb.lora.adapter import save_adapter
from telco_nb.study import params
from telco_nb.study.plan import declared
from telco_nb.study.record import write_json

CONFIG = "c04"
NOT_FIT = "No configuration is fit to answer customers. c04 answers best of 2, but it makes 3% of the points."


def random_adapter(folder: Path) -> None:
    """Save an adapter for the packaged model whose answers differ from the untuned model's."""
    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    checksum = base_model.weights_checksum(base)
    torch.manual_seed(3)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=step.TARGET_MODULES["qv"], task_type="CAUSAL_LM")
    tuned = step.attach_adapters(base, lora)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    save_adapter(tuned, tokenizer, folder, base_model.PACKAGED_MODEL, checksum)


def build(outputs: Path) -> Path:
    """Write the study below `outputs` through the real record; returns the profile's folder."""
    builder, rng = Builder(outputs, "laptop"), np.random.default_rng(1)
    _data(builder)
    _trained(builder)
    _answered(builder)
    add_judge(builder, rng, "checklist", pd.Series({"c01": 0.2, CONFIG: -0.2}))
    row = {"config": CONFIG, "val_loss": 3.1, "val_loss_low": 3.0, "val_loss_high": 3.2, "energy_kind": "estimated"}
    row |= {"checklist_rank": 2, "checklist_rank_low": 1, "checklist_rank_high": 2, "checklist_gate": "passed"}
    rows = [row, row | {"config": "c01", "checklist_rank": 1}]
    builder.close(builder.open("06_analysis", "study", {"judges": ["checklist"], "seed": 1}), "analysed")
    pd.DataFrame(rows).reindex(columns=result_columns(["checklist"])).to_csv(builder.root / "results.csv", index=False)
    write_findings(builder.root, "not fit", NOT_FIT)
    return builder.root


def write_findings(root: Path, verdict: str, statement: str) -> None:
    finding = {"statement": statement, "low": None, "high": None, "n": 2, "verdict": verdict, "blocked_by": []}
    deploy = finding | {"id": "deploy", "value": None if verdict == "not fit" else CONFIG}
    first = finding | {"id": "front_runner", "value": CONFIG, "statement": f"{CONFIG} is the front-runner of 2."}
    write_json(root / "findings.json", [deploy, first])


def _values(step_name: str) -> dict:
    values = params.load_study("laptop").values(CONFIG)
    return {name: values[name] for name in declared(step_name)} | {"dtype": "float32"}


def _data(builder: Builder) -> None:
    run = builder.open("02_synth", "shared")
    card = {"kept": 3084, "written_by": "A language model wrote them.", "conversations_sha256": "0" * 64}
    run.artefact("dataset_card.json").write_text(json.dumps(card | {"generator": {"name": "offline"}}))
    pd.DataFrame({"conversation_id": ["a", "b"]}).to_parquet(run.artefact("train.parquet"))
    builder.close(run, "made")


def _trained(builder: Builder) -> None:
    run = builder.open("03_train", CONFIG, _values("03_train"))
    random_adapter(run.artefact("adapter"))
    energy = {"train_energy_wh": 0.06, "train_energy_low_wh": 0.025, "train_energy_high_wh": 0.15}
    run.metric(**energy, energy_kind="estimated", energy_source="cpu_time_model", val_loss=3.1)
    builder.close(run, "trained")


def _answered(builder: Builder) -> None:
    run = builder.open("04_energy", CONFIG, _values("04_energy"))
    answers = pd.DataFrame({"answer": ["Restart the phone.", ""], "finish_reason": "stop", "n_tokens": 5})
    answers.to_parquet(run.artefact("answers.parquet"))
    energy = {
        f"answer_energy{end}_per_answer_wh": value for end, value in (("", 2e-3), ("_low", 8e-4), ("_high", 5e-3))
    }
    run.metric(**energy, energy_kind="estimated", energy_source="cpu_time_model", dtype="float32")
    builder.close(run, "answered")
