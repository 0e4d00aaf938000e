"""The profile `paper` through the real runner on a processor: its parameters, the packaged model, few conversations.

What only its card and its model can show is left to them: memory, speed, and whether its learning rates converge.
"""

import json
import re
import shutil
import sys
from os import environ
from pathlib import Path

import pandas as pd
import pytest
from told import run_told

from telco_nb import ROOT
from telco_nb.study import params

pytestmark = [pytest.mark.study, pytest.mark.nightly]
REPLACED = {
    "base_model": "smollm2-135m-instruct", "base_model_revision": "null", "device": "cpu", "configs": "[p01, p16]",
    "repeat_configs": "[]", "repeat_seeds": "[]", "batch_tokens": 2048,
}  # fmt: skip
SMALLER = {  # what the profile leaves at its value in base.yaml
    "conversations_per_scenario": 2, "train_conversations": 12, "val_conversations": 4, "test_prompts": 3,
    "noisy_prompts": 2, "unseen_prompts": 2, "choice_items": 4,
}  # fmt: skip
JOBS = [
    "shared/01_glossary", "shared/02_synth", "untuned/04_energy", "p01/03_train", "p01/04_energy", "p16/03_train",
    "p16/04_energy", "p01-drift/03_train",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The folder of the study after steps 01 to 04."""
    place = tmp_path_factory.mktemp("paper")
    shutil.copytree(params.PARAMS_DIR, place / "params")
    profile = place / "params" / "profiles" / "paper.yaml"
    text = profile.read_text(encoding="utf-8")
    for name, value in REPLACED.items():
        text, count = re.subn(rf"^{name}:.*$", f"{name}: {value}", text, flags=re.M)
        assert count == 1, name
    profile.write_text(text + "".join(f"{name}: {value}\n" for name, value in SMALLER.items()), encoding="utf-8")
    command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "paper", "--params", str(place / "params")]
    command += ["--outputs", str(place / "outputs"), "--steps", "01-04", "--json", str(place / "summary.json")]
    done = run_told(command, environ, logs=place)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    jobs = read(place / "summary.json")["jobs"]
    assert {f"{job['scope']}/{job['step']}": job["status"] for job in jobs} == dict.fromkeys(JOBS, "done")
    return place / "outputs" / "paper"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def trained(study: Path, config: str) -> tuple[dict, dict, pd.DataFrame]:
    """The metrics of a training, peft's settings of its adapter, and its loss by step."""
    folder = study / config / "03_train"
    adapter = read(folder / "artefacts" / "adapter" / "adapter_config.json")
    return read(folder / "metrics.json"), adapter, pd.read_parquet(folder / "tables" / "loss_curve.parquet")


@pytest.mark.parametrize(("config", "rank", "modules", "epochs"), [("p01", 16, 2, 1), ("p16", 32, 7, 3)])
def test_a_configuration_trains_what_its_file_says_and_learns(study, config, rank, modules, epochs):
    metrics, adapter, curve = trained(study, config)
    assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (rank, 2 * rank, modules)
    assert metrics["optimizer_steps"] == len(curve) == 2 * epochs and curve["learning_rate"].max() == 4e-4
    assert metrics["val_loss"] < metrics["val_loss_before"]
    assert metrics["step"] == "fused" and metrics["micro_batch_tokens"] == 2048 and metrics["memory_ran_out"] == 0


def test_the_larger_configuration_learns_more(study):
    small, large = (trained(study, config)[0] for config in ("p01", "p16"))
    assert large["val_loss"] < small["val_loss"] and large["trainable_parameters"] > 10 * small["trainable_parameters"]


def test_the_training_that_shows_the_drift_of_the_machine_is_the_first_one_again(study):
    (first, _, curve), (last, _, again) = trained(study, "p01"), trained(study, "p01-drift")
    assert again.equals(curve) and last["val_loss"] == first["val_loss"]
    assert last["train_started_at"] > trained(study, "p16")[0]["train_started_at"] > first["train_started_at"]


@pytest.mark.parametrize("config", ["untuned", "p01", "p16"])
def test_every_prompt_is_answered_within_the_profile_s_tokens(study, config):
    answers = pd.read_parquet(study / config / "04_energy" / "artefacts" / "answers.parquet")
    assert len(answers) == 3 + 2 + 2 and 96 < answers["n_tokens"].max() <= 192  # 96 is the default of base.yaml
    metrics = read(study / config / "04_energy" / "metrics.json")
    assert metrics["answer_tokens"] == answers["n_tokens"].sum() and metrics["answer_energy_wh"] > 0
