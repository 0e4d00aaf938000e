"""Answers of a (tuned) model to the held-out prompts: batched, greedy or sampled, ended by the end token.

Decoding is a loop of its own around the transformers model: keys and values are written in place instead of being
copied at every token, no key is repeated for grouped queries, and rows that have ended leave the batch.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AttentionInterface

from telco_nb.lora.base_model import chat_messages, end_token_id, map_weights

CACHED_ATTENTION = "kept_keys"  # name of the attention function below
DROP_SHARE = 0.8  # rows leave the batch when no more than this share of it still writes; a guess, any value is exact


def merge_adapter(model: Any, adapter: Path | None, dtype: torch.dtype, base_model: str | None = None) -> Any:
    """The model that would be deployed: LoRA merged into the (float32) base weights, then cast to `dtype`.

    If there is a file of `base_model` in `dtype`, matrices that no adapter has changed are mapped from it: to cast
    them again would write all of them into fresh memory.
    """
    if adapter is not None:
        config = LoraConfig.from_pretrained(str(adapter))
        if config.use_dora or config.bias != "none":
            tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
            return tuned.merge_and_unload().to(dtype).eval()
        _merge(model, adapter, config, dtype)
    cast = map_weights(base_model, dtype) if base_model and dtype != torch.float32 else None
    for name, weight in cast.named_parameters() if cast else ():
        own = model.get_parameter(name)
        if own.dtype != dtype and own.dim() > 1:  # a bias may have been trained along
            own.data = weight.data.to(own.device)
    return model.to(dtype).eval()


@torch.no_grad()
def _merge(model: Any, adapter: Path, config: LoraConfig, dtype: torch.dtype) -> None:
    """What peft's merge does to the weights, to the last bit, in half the time: it would first make a layer of its own
    around each of ours, and write into the pages of the file that the base weights are mapped from."""
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = load_file(adapter / "adapter_model.safetensors", device=str(model.device))
    for name in filter(lambda name: name.endswith(".lora_A.weight"), weights):
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = (weights[name.replace("lora_A", "lora_B")] @ weights[name]).mul_(scaling)
        layer.weight.data = update.add_(layer.weight).to(dtype)


def length_batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, so that padding is small."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: pd.DataFrame,
    max_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Answers: columns prompt_id, answer, n_tokens (with the end token), finish_reason, seconds.

    Greedy at temperature 0; else sampled with draws that depend on `seed` and the prompt's place only, not on batches.
    `seconds` is the time of the answer's batch divided by its size. The answer is text as the model wrote it, with
    special tokens removed and nothing else.
    """
    encoded = [
        tokenizer.apply_chat_template(chat_messages(list(m)), add_generation_prompt=True, return_dict=False)
        for m in prompts["messages"]
    ]
    end = end_token_id(tokenizer)
    rows: list[dict[str, Any]] = []
    for batch in length_batches(encoded, batch_size):
        start = time.perf_counter()
        draws = np.stack([np.random.default_rng([seed, i]).random(max_tokens) for i in batch]) if temperature else None
        generated = generate(model, [encoded[i] for i in batch], end, max_tokens, temperature, draws)
        seconds = (time.perf_counter() - start) / len(batch)
        for index, ids in zip(batch, generated, strict=True):
            rows.append(_answer_row(tokenizer, prompts["prompt_id"].iloc[index], ids, seconds))
    return pd.DataFrame(rows).set_index("prompt_id").loc[prompts["prompt_id"]].reset_index()


def warm_up(model: Any) -> None:
    """Write two tokens after a prompt of a few: what a device does once only should not be in the window."""
    generate(model, [[0] * 8], end=-1, max_tokens=2)


# ---------------------------------------------------------------- decoding


class KVCache:
    """Keys and values of a batch, (rows, key heads, capacity, width) per layer, and which columns each row may see."""

    def __init__(self, mask: torch.Tensor, capacity: int):
        self.seen = F.pad(mask.bool(), (0, capacity - mask.shape[1]), value=True)  # new columns belong to the answer
        self.length, self.capacity = 0, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns behind the first `length`; returns all columns so far, as views."""
        if layer not in self.layers:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.layers[layer] = key.new_empty(shape), value.new_empty(shape)
        stop = self.length + key.shape[2]
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[:, :, self.length : stop] = new
        return tuple(store[:, :, :stop] for store in self.layers[layer])

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only."""
        self.seen = self.seen[rows]
        self.layers = {layer: tuple(t[rows] for t in kept) for layer, kept in self.layers.items()}


def cached_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    kept: KVCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens, query (rows, heads, new, width), to all kept ones; key heads are never repeated."""
    keys, values = kept.add(module.layer_idx, key, value)
    rows, heads, new, width = query.shape
    visible = kept.seen[:, None, None, : keys.shape[2]]
    if new > 1:  # the prompts
        causal = torch.ones(new, keys.shape[2], dtype=torch.bool, device=query.device).tril(keys.shape[2] - new)
        own = torch.eye(new, keys.shape[2], dtype=torch.bool, device=query.device)  # padding sees itself: no empty row
        mixed = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=(visible & causal) | own, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2), None
    stacked = query.view(-1, heads // key.shape[1], width)
    scores = torch.bmm(stacked, keys.flatten(0, 1).transpose(1, 2)).mul_(scaling)
    scores = scores.view(rows, key.shape[1], -1, keys.shape[2]).masked_fill_(~visible, -torch.inf)
    shares = torch.softmax(scores.float(), -1).to(value.dtype).flatten(0, 1)
    return torch.bmm(shares, values.flatten(0, 1)).view(rows, 1, heads, width), None


AttentionInterface.register(CACHED_ATTENTION, cached_attention)


@torch.inference_mode()
def generate(
    model: Any,
    prompts: list[list[int]],
    end: int,
    max_tokens: int,
    temperature: float = 0.0,
    draws: np.ndarray | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, up to and with the end token; `draws` (prompts, max_tokens) in 0-1 if sampled."""
    before = model.config._attn_implementation
    model.set_attn_implementation(CACHED_ATTENTION)
    try:
        return _decode(model, prompts, end, max_tokens, temperature, draws)
    finally:
        model.set_attn_implementation(before)


def _decode(
    model: Any, prompts: list[list[int]], end: int, max_tokens: int, temperature: float, draws: np.ndarray | None
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), max(end, 0)), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers start in one column
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0).to(model.device)
    kept, alive = KVCache(mask.to(model.device), width + max_tokens), list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    step = ids.to(model.device)
    for count in range(max_tokens):
        output = model(input_ids=step, position_ids=positions, kept=kept, use_cache=False, logits_to_keep=1)
        kept.length += step.shape[1]
        uniform = None if draws is None else torch.tensor(draws[alive, count], device=model.device)
        chosen = _next_token(output.logits[:, -1], temperature, uniform)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            if not written[row] or written[row][-1] != end:
                written[row].append(token)
        going = [i for i, row in enumerate(alive) if written[row][-1] != end]
        if not going:
            break
        step, positions = chosen[:, None], positions[:, -1:] + 1
        if len(going) <= DROP_SHARE * len(alive):
            rows = torch.tensor(going, device=model.device)
            kept.select(rows)
            step, positions, alive = step[rows], positions[rows], [alive[i] for i in going]
    return written


def _next_token(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """The likeliest token of each row, or the one at which the cumulated probability passes `uniform`."""
    if uniform is None:
        return logits.argmax(-1)
    shares = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return torch.searchsorted(shares, uniform[:, None].double()).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _answer_row(tokenizer: Any, prompt_id: str, ids: list[int], seconds: float) -> dict[str, Any]:
    stopped = bool(ids) and ids[-1] == end_token_id(tokenizer)
    return {
        "prompt_id": prompt_id,
        "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "n_tokens": len(ids),
        "finish_reason": "stop" if stopped else "length",
        "seconds": seconds,
    }
