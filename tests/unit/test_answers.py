"""Answers: batching changes nothing, and a model that does not stop is not hidden."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from telco_nb import answers, model


@pytest.fixture(scope="module")
def real():
    model.quiet()
    return model.load(model.PACKAGED, torch.float32)


@pytest.fixture
def prompts():
    texts = [
        "Hi",
        "My phone shows no signal since yesterday evening. What should I check first?",
        "What is a PUK?",
    ]
    return pd.DataFrame(
        {"prompt_id": ["a", "b", "c"], "messages": [[{"role": "user", "content": text}] for text in texts]}
    )


def test_batched_answers_equal_one_at_a_time_in_float32(real, prompts):
    base, tokenizer = real
    together = answers.answer(base, tokenizer, prompts, max_tokens=12, batch_size=3)
    alone = answers.answer(base, tokenizer, prompts, max_tokens=12, batch_size=1)
    assert together.answer.tolist() == alone.answer.tolist()
    assert together.prompt_id.tolist() == ["a", "b", "c"]


def test_an_answer_cut_at_the_limit_is_marked_so(real, prompts):
    given = answers.answer(*real, prompts.tail(1), max_tokens=3, batch_size=1)
    assert given.finish_reason.tolist() == ["length"] and given.n_tokens.tolist() == [3]


def test_merging_the_adapter_gives_the_same_logits(real, tmp_path):
    base, tokenizer = real
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    ids = tokenizer("Which router do I have?", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = tuned(ids).logits
    tuned.unload()
    merged = answers.with_adapter(model.load(model.PACKAGED, torch.float32)[0], tmp_path, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-3, atol=2e-3)
    assert [p.name for p in tmp_path.glob("adapter_model*")] == ["adapter_model.safetensors"]


def test_batches_hold_every_prompt_once_shortest_first():
    made = answers.batches([[0] * n for n in (5, 2, 9, 1)], 3)
    assert made == [[3, 1, 0], [2]]
