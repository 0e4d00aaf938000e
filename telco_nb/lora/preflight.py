"""Checks before a training. Each raises PreflightError, which ends the run with exit code 3.

`packing.encode_conversation` checks the chat template and the tokenizer in the same way.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from telco_nb.lora.base_model import PreflightError, end_token_id
from telco_nb.lora.packing import IGNORE_INDEX, Example
from telco_nb.study.machine import device_facts

SPARE = (
    0.2  # share of the free memory that stays free: the estimate of a row is a guess to 30 %, and rows can be halved
)
BASE_LOSS = (0.5, 8.0)  # nats per token, wide guesses


def check_labels(tokenizer: Any, example: Example, messages: list[dict[str, str]]) -> None:
    """Check that the labelled tokens decode to exactly the assistant's texts, each with its end token."""
    end = tokenizer.decode([end_token_id(tokenizer)])
    answers = "".join(m["content"] + end for m in messages if m["role"] == "assistant")
    labelled = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    pairs = zip(example.input_ids, example.labels, strict=True)
    if labelled != answers or any(label not in (IGNORE_INDEX, token) for token, label in pairs):
        raise PreflightError(f"{example.conversation_id}: labels cover {labelled!r}, not the answers {answers!r}.")


def check_base_loss(loss: float) -> None:
    """Check that the untuned model's loss (nats per token) is plausible."""
    low, high = BASE_LOSS
    if not low < loss < high:
        raise PreflightError(
            f"the base model's validation loss is {loss:.2f} nats, not between {low} and {high}: "
            "check base_model, its chat template and dtype."
        )


def check_end(loss: float, vocabulary: int) -> None:
    """Check that the untuned model knows the token that ends an answer.

    LoRA does not train embeddings, so a model with an untrained embedding of this token never stops on it.

    Args:
        loss: mean at the ends of answers, nats.
        vocabulary: number of tokens. A guess among them costs its logarithm, the limit for `loss`.
    """
    if not loss < math.log(vocabulary):
        raise PreflightError(
            f"the end token costs the base model {loss:.1f} nats, a blind guess {math.log(vocabulary):.1f}: it does "
            "not know this token, and its answers would run on. Use a base_model whose tokenizer ends texts with a "
            "token that it was trained on."
        )


def check_processes(processes: int) -> None:
    """Check that there is a GPU for each process of a training, or a core on a machine without GPUs."""
    gpus = torch.cuda.device_count()
    units, name = (gpus, "GPU") if gpus else (device_facts()["cores"], "core")
    if processes > units:
        raise PreflightError(
            f"processes is {processes}, and this notebook may use {units} {name}{'s' * (units > 1)}: one is needed for "
            f"each. Lower processes{', or name more with --gpus' if gpus else ''}."
        )


def fitting_tokens(needed: dict[str, float], batch_tokens: int, max_length: int, free_bytes: float) -> int:
    """The number of tokens that can be computed at once in the free memory.

    Args:
        needed: bytes from `base_model.memory_estimate` for a row of `batch_tokens`.
        batch_tokens: tokens of a row, the most that is returned.
        max_length: tokens of the longest conversation.
        free_bytes: from `base_model.free_memory`.

    Raises:
        PreflightError: one conversation of `max_length` tokens does not fit.
    """
    left = (1 - SPARE) * free_bytes - needed["weights"] - needed["adapters"]
    tokens = int(min(1.0, max(0.0, left) / needed["row"]) * batch_tokens)
    if tokens < min(max_length, batch_tokens):
        least = needed["weights"] + needed["adapters"] + needed["row"] * max_length / batch_tokens
        raise PreflightError(
            f"training needs about {least / 1e9:.1f} GB for a conversation of {max_length} tokens, and "
            f"{free_bytes / 1e9:.1f} GB are free. Close other programs, set quantization to nf4, lower max_length, or "
            "set micro_batch_tokens yourself."
        )
    return tokens
