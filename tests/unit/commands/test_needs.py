"""The plan of a study says what it needs, and refuses a machine that has less, before an hour is spent."""

import io
from types import SimpleNamespace

import pandas as pd
import pytest
from damage import DAMAGES, damage
from rich.console import Console
from tiny_chat import tiny_tokenizer
from transformers import Qwen2Config

from telco_nb.commands import estimate, needs
from telco_nb.engine import machine_checks, progress, runner
from telco_nb.engine.job import common_environment
from telco_nb.study import params
from telco_nb.study.plan import plan_jobs

GB = 1e9


@pytest.fixture
def model(tmp_path):
    """Qwen2.5-3B's shape and a tokenizer of bytes, and no weights."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    tiny_tokenizer("chatml").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def paper_jobs(model):
    study = params.load_study("paper")
    study.base.update(base_model=model, base_model_revision=None, max_length=100_000, device="cpu")
    return plan_jobs(study)


def told(**replaced):
    """An answer of the probe for two trainings, as on a card of 80 GB."""
    memory = {"weights": 6 * GB, "adapters": 1 * GB, "head": 1 * GB, "row": 30 * GB}
    need = {"memory": memory, "adapter_bytes": 0.25 * GB, "checkpoint_bytes": 0.75 * GB, "flops_per_token": 1e10}
    trainings = [need | {"adapter_weights": weights} for weights in (1e6, 3e6)]
    speeds = [
        {"adapter_weights": weights, "tokens_per_second": rate, "mean_w": 600.0, "energy_kind": "measured"}
        for weights, rate in ((1e6, 20_000.0), (3e6, 10_000.0))
    ]
    return {
        "tokens": 200.0, "supervised": 100.0, "download_bytes": 6 * GB, "trainings": trainings, "card": "NVIDIA H100",
        "free_bytes": 79 * GB, "faults": [], "training_speeds": speeds, "answering_speed": speeds[0],
    } | replaced  # fmt: skip


WORK = {"conversations": 9000, "exact": True, "new_tokens": 7_200_000, "sample": []}


def two_trainings(epochs=20):
    jobs = [job for job in paper_jobs("any") if job.step == "03_train"][:2]
    for job in jobs:
        job.parameters.update(epochs=epochs)
    return jobs


def test_hours_and_kwh_follow_from_the_probe_for_each_size_of_adapter(tmp_path):
    found = needs._needs(WORK, told(), two_trainings(), tmp_path, 1)
    # 20 x 9000 x 200 tokens at 20,000/s and at 10,000/s are 1800 + 3600 s = 1.5 h, at 600 W 0.9 kWh.
    assert "training 1.5 h and 0.90 kWh" in found.lines[-1]
    assert "answers at most 0.1 h and 0.06 kWh" in found.lines[-1] and "NVIDIA H100" in found.lines[-1]
    assert "72 million tokens, 0.72 EFLOP" in found.lines[0] and "at most" not in found.lines[0]
    assert "79.0 GB are free on NVIDIA H100" in found.lines[1]


def test_without_a_card_the_plan_says_what_it_cannot_know(tmp_path):
    untimed = {k: v for k, v in told(card=None, free_bytes=None).items() if "speed" not in k}
    lines = needs._needs(WORK | {"exact": False}, untimed, two_trainings(), tmp_path, 1).lines
    assert lines[-1] == "Hours and kWh are not known: there is no GPU to time a step on."
    assert "at most 9,000 conversations" in lines[0] and "free" not in lines[1]


def test_an_energy_that_no_sensor_tells_is_unknown_and_the_hours_stay(tmp_path):
    dark = [speed | {"mean_w": None} for speed in told()["training_speeds"]]
    line = needs._needs(WORK, told(training_speeds=dark, answering_speed=dark[0]), two_trainings(), tmp_path, 1).lines[
        -1
    ]
    assert "h and an unknown energy" in line and "kWh" not in line


def test_disk_grows_with_adapters_checkpoints_and_what_runs_at_once(tmp_path):
    def study_bytes(at_once):
        return dict(needs._needs(WORK, told(), two_trainings(), tmp_path, at_once).disk)[tmp_path]

    assert study_bytes(1) == machine_checks.FREE_BYTES + 2 * 0.25 * GB + 3 * 0.75 * GB
    assert study_bytes(2) - study_bytes(1) == pytest.approx(3 * 0.75 * GB)


def test_the_paper_profile_asks_for_the_disk_of_its_own_adapters_and_a_full_disk_is_exit_code_3(
    tmp_path, monkeypatch, model
):
    jobs = paper_jobs(model)
    (found,) = needs.study_needs(jobs, jobs, tmp_path, 1, usable=False)
    size = dict(found.disk)[tmp_path]
    # lora-paper's largest adapter has rank 32 on all seven: 36 layers x 32 x 51,968 weights of 4 bytes.
    largest = 4 * 36 * 32 * 51_968
    assert machine_checks.FREE_BYTES + 9 * largest < size < machine_checks.FREE_BYTES + (21 + 9) * largest
    assert "21 runs on at most 23,040 conversations" in found.lines[0] and "not known" in found.lines[-1]
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": size - 1})())
    states = [progress.State(job, "run", "") for job in jobs if job.step == "03_train"]
    screen = io.StringIO()
    with pytest.raises(runner.UnfitError, match=r"GiB free and 6\.\d GiB are needed"):
        runner.check_machine(Console(file=screen), tmp_path, states, (), lambda *_, **__: [found])
    assert "Disk: " in screen.getvalue(), "what is needed is said before the refusal"
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": size + 1})())
    runner.check_machine(Console(quiet=True), tmp_path, states, (), lambda *_, **__: [found])


def test_a_model_that_cannot_be_read_is_a_problem_and_all_that_depends_on_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_ask_probe", lambda *_: {"error": "base_model: no connection."})
    jobs = paper_jobs("owner/name")
    (found,) = needs.study_needs(jobs, jobs, tmp_path, 1, usable=False)
    assert found.faults == ["base_model: no connection."]
    assert found.lines == ["Memory, disk, hours and kWh of owner/name are not known."]


def test_the_probe_has_the_variables_of_a_study_s_kernels(monkeypatch):
    given = {}

    def run(command, env, **_):
        given.update(env)
        return SimpleNamespace(returncode=0, stdout="{}")

    monkeypatch.setattr(needs.subprocess, "run", run)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    jobs = [job for job in plan_jobs(params.load_study("laptop")) if job.step == "03_train"]
    needs._ask_probe(("owner/name", None), jobs, [], [], timed=False)
    assert given["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and given["HF_HUB_OFFLINE"] == "0"
    assert given.items() >= common_environment({"base_model": "owner/name"}).items() and given["PATH"]


def test_the_packaged_model_starts_no_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_ask_probe", lambda *_: pytest.fail("asked"))
    jobs = plan_jobs(params.load_study("laptop"))
    assert needs.study_needs(jobs, jobs, tmp_path, 1, usable=True) == []


def test_what_02_has_made_is_counted_exactly(tmp_path):
    made = tmp_path / "shared" / "02_synth" / "artefacts"
    made.mkdir(parents=True)
    messages = [[{"role": "user", "content": "Hello"}]] * 7
    pd.DataFrame({"messages": messages}).to_parquet(made / "train.parquet")
    pd.DataFrame({"prompt_id": range(5)}).to_parquet(made / "test_prompts.parquet")
    jobs = paper_jobs("any")
    work = needs._work(jobs, [job for job in jobs if job.step == "04_energy"], jobs, tmp_path)
    assert work["exact"] and work["conversations"] == 7 and work["new_tokens"] == 21 * 5 * 192


@pytest.mark.parametrize("way", DAMAGES)
def test_a_damaged_file_of_02_or_04_is_for_the_plan_as_if_it_were_not_there(tmp_path, way):
    """The plan must not end: it is a run that makes the file again."""
    jobs = paper_jobs("any")
    absent = needs._work(jobs, [], jobs, tmp_path)
    made, answers = tmp_path / "shared" / "02_synth" / "artefacts", tmp_path / "c01" / "04_energy" / "artefacts"
    for folder in (made, answers):
        folder.mkdir(parents=True)
    pd.DataFrame({"messages": [[{"role": "user", "content": "Hello"}]]}).to_parquet(made / "train.parquet")
    for path in (made / "test_prompts.parquet", answers / "answers.parquet"):
        pd.DataFrame({"prompt_id": ["1"], "answer": ["12345"]}).to_parquet(path)
    assert estimate._mean_answer(tmp_path) == 5 and needs._work(jobs, [], jobs, tmp_path)["exact"]
    for name in ("train.parquet", "test_prompts.parquet"):
        damage(made / name, way)
        assert needs._work(jobs, [], jobs, tmp_path) == absent
    damage(answers / "answers.parquet", way)
    assert estimate._mean_answer(tmp_path) is None


def test_two_folders_on_one_disk_need_their_bytes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10 * 1024**3})())
    half = [(tmp_path / "outputs", 6 * 1024**3), (tmp_path / "hub" / "cache", 6 * 1024**3)]
    assert machine_checks.disk_problems(half[:1]) == []
    (problem,) = machine_checks.disk_problems(half)
    assert "10.0 GiB free and 12.0 GiB are needed" in problem
