"""Answers of a (tuned) model to the held-out prompts: batched, greedy, ended by the end token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from telco_nb.model import chat_messages, end_token_id
from telco_nb.record import device


def with_adapter(model: Any, adapter: Path | None, dtype: torch.dtype) -> Any:
    """The model that would be deployed: LoRA merged into the (float32) base weights, then cast to `dtype`."""
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.to(dtype).eval()


def batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, so that padding is small."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def answer(model: Any, tokenizer: Any, prompts: pd.DataFrame, max_tokens: int, batch_size: int) -> pd.DataFrame:
    """Greedy answers: columns prompt_id, answer, n_tokens (with the end token), finish_reason, seconds.

    `seconds` is the time of the answer's batch divided by its size. The answer is text as the model wrote it,
    with special tokens removed and nothing else.
    """
    encoded = [
        tokenizer.apply_chat_template(chat_messages(list(m)), add_generation_prompt=True, return_dict=False)
        for m in prompts["messages"]
    ]
    rows: list[dict[str, Any]] = []
    for batch in batches(encoded, batch_size):
        start = time.perf_counter()
        generated = _generate(model, [encoded[i] for i in batch], end_token_id(tokenizer), max_tokens)
        seconds = (time.perf_counter() - start) / len(batch)
        for index, ids in zip(batch, generated, strict=True):
            rows.append(_row(tokenizer, prompts["prompt_id"].iloc[index], ids, seconds))
    return pd.DataFrame(rows).set_index("prompt_id").loc[prompts["prompt_id"]].reset_index()


def warm_up(model: Any, tokenizer: Any, prompts: pd.DataFrame, n_prompts: int = 8) -> float:
    """Answer a few prompts with a few tokens; returns the share of the cores that this used, 0-1."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer(model, tokenizer, prompts.head(n_prompts), max_tokens=8, batch_size=n_prompts)
    return min(1.0, (time.process_time() - cpu) / (time.perf_counter() - wall) / device()["cores"])


@torch.inference_mode()
def _generate(model: Any, prompts: list[list[int]], end: int, max_tokens: int) -> list[list[int]]:
    """New token ids of each prompt, up to and with the end token."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), end)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers start in one column
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_tokens,
        do_sample=False, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    new = output[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in new]


def _row(tokenizer: Any, prompt_id: str, ids: list[int], seconds: float) -> dict[str, Any]:
    stopped = bool(ids) and ids[-1] == end_token_id(tokenizer)
    return {
        "prompt_id": prompt_id,
        "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "n_tokens": len(ids),
        "finish_reason": "stop" if stopped else "length",
        "seconds": seconds,
    }
