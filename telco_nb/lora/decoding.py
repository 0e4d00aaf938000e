"""Answers of a base or tuned model to the held-out prompts: batched, greedy or sampled, ended by the end token.

The decoding loop runs around the transformers model. Keys and values are written in place instead of being copied at
every token, no key is repeated for grouped queries, and rows that have ended leave the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface

from telco_nb.lora.adapter_check import check_adapter
from telco_nb.lora.base_model import map_weights
from telco_nb.lora.chat_template import end_token_id, prompt_ids
from telco_nb.lora.device import halving
from telco_nb.lora.energy import SHORTEST_WINDOW_S, Meter
from telco_nb.lora.errors import ModelError
from telco_nb.lora.step import check_attention_options, set_attention

CACHED_ATTENTION = "cached_sdpa"  # name under which transformers knows `cached_attention`
DROP_SHARE = 0.8  # ended rows leave the batch when at most this share of it still writes; a guess, any value is exact


def merge_adapter(
    model: Any, adapter: Path | None, dtype: torch.dtype, base_model: str | None = None, strength: float = 1.0
) -> Any:
    """Build the model that would be deployed: merge LoRA into the base weights, then cast them.

    Args:
        model: the base model in float32; it is changed.
        adapter: folder of the adapter; None for the untuned model.
        dtype: number format of the result.
        base_model: name of the base model. If there is a file of its weights in `dtype`, matrices without an adapter
            are mapped from it: a cast would write all of them into fresh memory.
        strength: factor of the adapter's update; 0 would be the untuned model.

    Returns:
        The merged model in evaluation mode.

    Raises:
        ModelError: the adapter does not fit the model or its configuration, or is not plain LoRA and cannot be scaled;
            nothing was merged.
    """
    if adapter is not None:
        config, weights = _read_adapter(adapter)
        check_adapter(model, adapter, config, weights)
        plain = not config.use_dora and config.bias == "none"
        if strength != 1 and not plain:
            raise ModelError(
                f"the adapter {adapter} is not plain LoRA, so it cannot be scaled. Use adapter_strengths: [1.0]."
            )
        if not plain:
            tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
            return tuned.merge_and_unload().to(dtype).eval()
        _merge_lora(model, weights, config, dtype, strength)
    cast = map_weights(base_model, dtype) if base_model and dtype != torch.float32 else None
    for name, weight in cast.named_parameters() if cast else ():
        own = model.get_parameter(name)
        if own.dtype != dtype and own.dim() > 1:  # matrices only: a bias may have been trained
            own.data = weight.data.to(own.device)
    return model.to(dtype).eval()


def _read_adapter(adapter: Path) -> tuple[Any, dict[str, Tensor]]:
    """Options and weights of an adapter, in safetensors only. Raises ModelError naming what cannot be read."""
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        weights = load_file(adapter / "adapter_model.safetensors")
    except Exception as error:  # these libraries raise whatever a damaged file leads to
        raise ModelError(f"the adapter {adapter} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"the adapter {adapter} is no LoRA adapter but {config.peft_type}.")
    return config, weights


@torch.no_grad()
def _merge_lora(
    model: Any, weights: dict[str, Tensor], config: LoraConfig, dtype: torch.dtype, strength: float
) -> None:
    """The same weights to the last bit as peft's merge, in half the time.

    peft would first wrap every layer and then write into the pages of the file that the base weights are mapped from.
    """
    scaling = strength * config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = {name: weight.to(model.device) for name, weight in weights.items()}
    for name in filter(lambda name: name.endswith(".lora_A.weight"), weights):
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = (weights[name.replace("lora_A", "lora_B")] @ weights[name]).mul_(scaling)
        layer.weight.data = update.add_(layer.weight).to(dtype)


def length_batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, so that little padding is needed."""
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
    """Let the model answer prompts.

    Args:
        model, tokenizer: of `merge_adapter` and `load_model`.
        prompts: columns prompt_id and messages.
        max_tokens: new tokens per answer, at most.
        batch_size: prompts that are answered together, at most; fewer where memory runs out.
        temperature: 0 decodes greedily; above, tokens are sampled.
        seed: of the sampling. Draws depend on it and on the prompt's position, not on the batches.

    Returns:
        One row per prompt, in order: prompt_id, answer (stripped text without special tokens), n_tokens
        (with the end token), finish_reason ("stop" or "length") and seconds (time of the batch over its size).
    """
    encoded = [prompt_ids(tokenizer, list(m)) for m in prompts["messages"]]
    end = end_token_id(tokenizer)

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        draws = np.stack([np.random.default_rng([seed, i]).random(max_tokens) for i in batch]) if temperature else None
        generated = generate(model, [encoded[i] for i in batch], end, max_tokens, temperature, draws)
        seconds = (time.perf_counter() - start) / len(batch)
        answers = (_answer_row(tokenizer, ids, end) | {"seconds": seconds} for ids in generated)
        return [{"prompt_id": prompts["prompt_id"].iloc[i]} | row for i, row in zip(batch, answers, strict=True)]

    rows = chain.from_iterable(halving(batch, answer) for batch in length_batches(encoded, batch_size))
    return pd.DataFrame(rows).set_index("prompt_id").loc[prompts["prompt_id"]].reset_index()


def answer_metered(meter: Meter, answer: Callable[[], pd.DataFrame]) -> tuple[pd.DataFrame, int]:
    """Answer in one window of the meter, and again until it is long enough for the meter's sensors.

    A GPU answers some prompts in a second, and its energy counter needs five. Each pass does the same work, so
    divided by the passes the meter's readings are those of one. Without a sensor a second is enough.

    Args:
        meter: it is stopped at the end.
        answer: answers all prompts, as `answer_prompts` does.

    Returns:
        The answers of the first pass, and the number of passes.
    """
    rows = meter.statement("answer").set_index("component")
    shortest_s = max(SHORTEST_WINDOW_S.get(source, 0.0) for source in rows.loc[["cpu", "gpu"], "source"])
    meter.start()
    start, answers, passes = time.perf_counter(), answer(), 1
    while time.perf_counter() - start < shortest_s:
        answer()
        passes += 1
    meter.stop()
    return answers, passes


def _answer_row(tokenizer: Any, ids: list[int], end: int) -> dict[str, Any]:
    """Text, length and ending of a generated answer."""
    return {
        "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "n_tokens": len(ids),
        "finish_reason": "stop" if ids and ids[-1] == end else "length",
    }


def warm_up(model: Any) -> None:
    """Generate two tokens, so that one-time work of the device happens before the metered window."""
    generate(model, [[0] * 8], end=-1, max_tokens=2)


class KVCache:
    """Keys and values of a batch, (rows, key heads, capacity, width) per layer, and the columns that each row sees."""

    def __init__(self, mask: Tensor, capacity: int):
        self.visible = F.pad(mask.bool(), (0, capacity - mask.shape[1]), value=True)  # new columns hold the answer
        self.length, self.capacity = 0, capacity
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def add(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Write new columns behind the first `length`; returns views of all keys and all values so far."""
        if layer not in self.layers:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.layers[layer] = key.new_empty(shape), value.new_empty(shape)
        stop = self.length + key.shape[2]
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[:, :, self.length : stop] = new
        return [store[:, :, :stop] for store in self.layers[layer]]

    def select(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.visible = self.visible[rows]
        self.layers = {layer: tuple(t[rows] for t in tensors) for layer, tensors in self.layers.items()}


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    kv_cache: KVCache,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens, query (rows, heads, new, width), to all cached ones; key heads are never repeated.

    Models hand over a `dropout` of 0 at evaluation. Another one would have an effect, and is refused by its name.
    """
    check_attention_options(kv_cache.capacity, dropout=dropout or None, **options)
    keys, values = kv_cache.add(module.layer_idx, key, value)
    visible = kv_cache.visible[:, None, None, : keys.shape[2]]
    attend = _attend_prompts if query.shape[2] > 1 else _attend_one_token
    return attend(query, keys, values, visible, scaling), None


def _attend_prompts(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Causal attention of several new tokens a row; result (rows, new, heads, width)."""
    new, seen = query.shape[2], keys.shape[2]
    causal = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)
    own = torch.eye(new, seen, dtype=torch.bool, device=query.device)  # padding sees itself: no empty row
    mask = (visible & causal) | own
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2)


def _attend_one_token(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Attention of one new token a row; result (rows, 1, heads, width)."""
    rows, heads, _, width = query.shape
    key_heads, seen = keys.shape[1:3]
    grouped = query.view(-1, heads // key_heads, width)
    scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).mul_(scaling)
    scores = scores.view(rows, key_heads, -1, seen).masked_fill_(~visible, -torch.inf)
    probabilities = torch.softmax(scores.float(), -1).to(values.dtype).flatten(0, 1)
    return torch.bmm(probabilities, values.flatten(0, 1)).view(rows, 1, heads, width)


AttentionInterface.register(CACHED_ATTENTION, cached_attention)


@torch.inference_mode()
def generate(
    model: Any, prompts: list[list[int]], end: int, max_tokens: int, temperature: float = 0.0, draws: Any = None
) -> list[list[int]]:
    """New token ids of each prompt, up to and with the token `end`, at most `max_tokens`.

    With a `temperature`, the array `draws` (prompts, max_tokens) holds the uniform numbers that choose the tokens.
    """
    attention = model.config._attn_implementation
    set_attention(model, CACHED_ATTENTION)
    try:
        return _decode(model, prompts, end, max_tokens, temperature, draws)
    finally:
        model.set_attn_implementation(attention)


def _decode(
    model: Any, prompts: list[list[int]], end: int, max_tokens: int, temperature: float, draws: np.ndarray | None
) -> list[list[int]]:
    step, mask = (part.to(model.device) for part in _padded(prompts, max(end, 0)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, active = KVCache(mask, mask.shape[1] + max_tokens), list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    for count in range(max_tokens):
        output = model(input_ids=step, position_ids=positions, kv_cache=cache, use_cache=False, logits_to_keep=1)
        cache.length += step.shape[1]
        uniform = None if draws is None else torch.tensor(draws[active, count], device=model.device)
        chosen = _next_token(output.logits[:, -1], temperature, uniform)
        for row, token in zip(active, chosen.tolist(), strict=True):
            if not written[row] or written[row][-1] != end:
                written[row].append(token)
        unfinished = [i for i, row in enumerate(active) if written[row][-1] != end]
        if not unfinished:
            break
        step, positions = chosen[:, None], positions[:, -1:] + 1
        if len(unfinished) <= DROP_SHARE * len(active):
            rows = torch.tensor(unfinished, device=model.device)
            cache.select(rows)
            step, positions, active = step[rows], positions[rows], [active[i] for i in unfinished]
    return written


def _padded(prompts: list[list[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 (rows, longest), padded on the left, so that all answers start in one column."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), filler), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _next_token(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """The most probable token of each row, or the one where the cumulative probability exceeds `uniform`."""
    if uniform is None:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None].double()).squeeze(1).clamp(max=logits.shape[-1] - 1)
