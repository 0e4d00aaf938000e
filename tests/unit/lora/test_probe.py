"""The probe before a study measures the study's own step, and what cannot run here is a fault, not a figure.

These tests run on a processor. What the probe said on a card stands in LOG.md.
"""

import io
import json
import sys
import weakref

import pytest
import torch
from architectures import SIZES
from tiny_chat import tiny_tokenizer
from transformers import Qwen2Config

from telco_nb.lora import base_model, device, packing, probe, step
from telco_nb.study import params

CHAT = [{"role": "user", "content": "No signal."}, {"role": "assistant", "content": "Restart the phone."}]


@pytest.fixture
def folder(tmp_path):
    """A configuration and a tokenizer, and no weights."""
    tokenizer = tiny_tokenizer("chatml")
    config = Qwen2Config(**SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def request(folder, timed=True, **values):
    base = params.load_study("smoke").base | {"batch_tokens": 300, "max_length": 300, "dtype": "float32"} | values
    trainings = [base | {"target_modules": "all", "rank": 4}, base | {"target_modules": "qv", "rank": 2}]
    return {
        "base_model": str(folder), "revision": None, "conversations": [CHAT, CHAT[:1] + CHAT[1:]], "timed": timed,
        "trainings": trainings, "answering": base | {"answer_batch_size": 3},
    }  # fmt: skip


def test_without_a_timing_the_needs_are_told_and_no_speed(folder):
    found = probe.answer(request(folder, timed=False))
    assert found["card"] is found["free_bytes"] is None and "training_speeds" not in found
    shell = base_model.model_shell(str(folder))
    assert found["download_bytes"] == 0 and found["tokens"] > found["supervised"] > 0
    large, small = found["trainings"]
    assert large["adapter_weights"] == sum(
        4 * (m.in_features + m.out_features)
        for n, m in shell.named_modules()
        if n.rpartition(".")[2] in step.TARGET_MODULES["all"]
    )
    assert large["adapter_bytes"] == 4 * large["adapter_weights"] and large["checkpoint_bytes"] > large["adapter_bytes"]
    assert large["flops_per_token"] > small["flops_per_token"] > 0


def test_the_smallest_and_the_largest_training_and_an_answer_are_timed_with_random_weights(folder):
    found = probe.answer(request(folder), seconds=0.05)
    sizes = [speed["adapter_weights"] for speed in found["training_speeds"]]
    assert sizes == sorted(need["adapter_weights"] for need in found["trainings"])
    for speed in (*found["training_speeds"], found["answering_speed"]):
        assert speed["tokens_per_second"] > 0 and speed["mean_w"] is None, (
            "an estimate by CPU time is no energy of a card"
        )


def test_what_03_would_refuse_is_a_fault_and_nothing_is_timed(folder, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda processes=1: 1e6)
    found = probe.answer(request(folder), seconds=0.05)
    assert found["faults"] and "GB are free" in found["faults"][0] and "training_speeds" not in found


def test_each_measurement_has_the_size_of_an_empty_device_and_no_model_of_the_one_before(folder, monkeypatch):
    free, sizes, models = iter([1e12]), [], []
    build, work = probe._random_model, probe.training_work

    def alone(*arguments):
        assert not any(model() for model in models), "the model of the measurement before takes memory"
        made = build(*arguments)
        models.append(weakref.ref(made))
        return made

    monkeypatch.setattr(device, "free_memory", lambda processes=1: next(free, 1e6))  # a card that is filled up
    monkeypatch.setattr(probe, "_random_model", alone)
    monkeypatch.setattr(probe, "training_work", lambda b, v, micro, e: sizes.append(micro) or work(b, v, micro, e))
    found = probe.answer(request(folder), seconds=0.05)
    assert found["faults"] == [] and sizes == [300, 300] and len(models) == 3


def test_the_timed_step_trains_a_full_row_of_the_data(folder):
    torch.manual_seed(0)
    values = request(folder)["trainings"][0]
    tokenizer = base_model.load_tokenizer(str(folder))
    examples = packing.encode_conversations(tokenizer, [("a", CHAT)], 300)
    base = probe._random_model(Qwen2Config.from_pretrained(folder), "float32")
    before = {n: p.clone() for n, p in base.named_parameters()}
    work = probe.training_work(base, values, 200, examples)
    length = len(examples[0].input_ids)
    assert work() == 300 // length * length
    moved = [n for n, p in base.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == 14 and all(
        torch.equal(p, before[n.replace(".base_layer", "")]) for n, p in base.named_parameters() if "lora_" not in n
    )


@pytest.mark.parametrize("record_step", [True, False])
def test_the_timed_step_is_recorded_only_where_a_training_would_be(folder, monkeypatch, record_step):
    asked = []
    monkeypatch.setattr(probe.step_graph, "record_step", lambda *a: (asked.append(a), (None, "on a processor"))[1])
    values = request(folder, record_step=record_step)["trainings"][0]
    base = probe._random_model(Qwen2Config.from_pretrained(folder), "float32")
    probe.training_work(base, values, 200, [packing.Example("0", [5] * 40, [5] * 40)])
    assert len(asked) == record_step


def test_answers_of_the_probe_all_have_the_full_length(folder):
    tokenizer = base_model.load_tokenizer(str(folder))
    examples = packing.encode_conversations(tokenizer, [("a", CHAT)], 300)
    base = probe._random_model(Qwen2Config.from_pretrained(folder), "float32")
    assert probe.answering_work(base, 3, examples)() == 3 * probe.ANSWER_TOKENS


def test_asked_in_json_it_answers_in_json_and_names_a_model_that_cannot_be_read(folder, monkeypatch, capsys):
    def ask(asked):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
        probe.main()
        return json.loads(capsys.readouterr().out)

    assert ask(request(folder, timed=False)) == probe.answer(request(folder, timed=False))
    assert "no-such" in ask(request("no-such", timed=False))["error"]


def test_weights_that_the_hub_cache_holds_are_not_downloaded_again(folder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shell = base_model.model_shell(str(folder))
    published = 2 * sum(p.numel() for p in shell.parameters())
    assert base_model.bytes_to_download("owner/name", shell) == published
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(bytes(1000))
    assert base_model.bytes_to_download("owner/name", shell) == published - 1000
