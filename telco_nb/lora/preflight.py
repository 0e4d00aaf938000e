"""Preflight: what can be found out before any hour is spent. Each check raises PreflightError (exit code 3).

`packing.encode` checks the chat template while it tokenises: that turns extend each other, and that what was written
survives the tokenizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from telco_nb.lora.base_model import PreflightError, end_token_id
from telco_nb.lora.packing import IGNORE_INDEX, Example
from telco_nb.study.machine import device_facts

SPARE = 0.2  # share of the free memory left alone: the estimate of a row is a guess to 30 %, and halving is the net


def check_labels(tokenizer: Any, example: Example, messages: list[dict[str, str]]) -> None:
    """The labelled tokens decode to exactly the assistant's texts, each with its end token."""
    end = tokenizer.decode([end_token_id(tokenizer)])
    wanted = "".join(m["content"] + end for m in messages if m["role"] == "assistant")
    found = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    in_place = all(
        label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    if found != wanted or not in_place:
        raise PreflightError(f"{example.conversation_id}: labels cover {found!r}, not the answers {wanted!r}.")


def check_base_loss(loss: float, low: float = 0.5, high: float = 8.0) -> None:
    """The untuned model's loss (nats per token) is plausible; the bounds are wide guesses."""
    if not low < loss < high:
        raise PreflightError(
            f"the base model's validation loss is {loss:.2f} nats, not between {low} and {high}: "
            "check base_model, its chat template and dtype."
        )


def check_end(loss: float, vocabulary: int) -> None:
    """The untuned model's mean loss (nats) at the ends of answers beats guessing among all `vocabulary` tokens.

    A token that the base model never saw has an untrained embedding, which LoRA leaves alone: nobody stops on it.
    """
    if not loss < math.log(vocabulary):
        raise PreflightError(
            f"the end token costs the base model {loss:.1f} nats, a blind guess {math.log(vocabulary):.1f}: it does "
            "not know this token, and its answers would run on. Use a base_model whose tokenizer ends texts with a "
            "token that it was trained on."
        )


def check_processes(processes: int) -> None:
    """There is a GPU for each process of a training or, where there is none, a core."""
    gpus = torch.cuda.device_count()
    units, name = (gpus, "GPU") if gpus else (device_facts()["cores"], "core")
    if processes > units:
        raise PreflightError(
            f"processes is {processes}, and this notebook may use {units} {name}{'s' * (units > 1)}: one is needed for "
            f"each. Lower processes{', or name more with --gpus' if gpus else ''}."
        )


def fitting_tokens(needed: dict[str, float], batch_tokens: int, max_length: int, free_bytes: float) -> int:
    """How many of `batch_tokens` tokens to compute at once, so that training needs no more than what is free.

    `needed` is `model.memory_estimate` for a row of `batch_tokens`. Raises PreflightError if not even one conversation
    of `max_length` tokens fits.
    """
    left = (1 - SPARE) * free_bytes - needed["weights"] - needed["adapters"]
    tokens = int(min(1.0, max(0.0, left) / needed["row"]) * batch_tokens)
    if tokens < min(max_length, batch_tokens):
        wanted = needed["weights"] + needed["adapters"] + needed["row"] * max_length / batch_tokens
        raise PreflightError(
            f"training needs about {wanted / 1e9:.1f} GB for a conversation of {max_length} tokens, and "
            f"{free_bytes / 1e9:.1f} GB are free. Close other programs, set quantization to nf4, lower max_length, or "
            "name micro_batch_tokens yourself."
        )
    return tokens
