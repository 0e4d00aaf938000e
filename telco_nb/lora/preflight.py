"""Checks before a training. Each raises PreflightError, which ends the run with exit code 3.

`packing.encode_conversation` checks the chat template and the tokenizer in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch

from telco_nb.lora.chat_template import end_token_id, tokenizer_hash
from telco_nb.lora.device import on_gpu
from telco_nb.lora.errors import PreflightError
from telco_nb.lora.kernels import is_fused
from telco_nb.lora.packing import (
    IGNORE_INDEX,
    Example,
    collate,
    encode_conversations,
    examples_of,
    examples_table,
    to_device,
)
from telco_nb.lora.step import base_dtype, plain_token_losses, prepare_step, token_losses
from telco_nb.study.machine import device_facts

# Share of the free memory that stays free: the estimate of a row may be 15 % too low, and freed memory leaves gaps.
SPARE = 0.2
OTHER_MODEL = "Use another base_model; README.md lists the architectures that were tested."
PLAIN_STEP = "Set fused_step to false, so that transformers and peft compute, or use another base_model."
# Relative, of losses and gradient. In bfloat16 rounding alone made 0.013 and 0.07 (packaged model), so a part of the
# architecture with less effect than these limits is seen in float32 only.
STEP_TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 0.3)}
# Of losses, gradients, and a gradient's length. Rounding made 2e-6, 4e-5 and 2e-5 in float32, and 0.020, 0.065 and
# 0.021 in bfloat16 (packaged model, all or qv); a factor of 1.1 in one backward made 0.088 or more of the length.
BACKWARD_TOLERANCE = {torch.float32: (1e-4, 1e-3, 1e-3), torch.bfloat16: (0.05, 0.15, 0.05)}
FILLED_B = 0.01  # standard deviation of B in that comparison: at 0, as it starts, A has no gradient
BASE_LOSS = (0.5, 8.0)  # nats per token, wide guesses


def check_labels(tokenizer: Any, example: Example, messages: list[dict[str, str]]) -> None:
    """Check that the labelled tokens decode to exactly the assistant's texts, each with its end token."""
    end = tokenizer.decode([end_token_id(tokenizer)])
    answers = "".join(m["content"] + end for m in messages if m["role"] == "assistant")
    labelled = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    pairs = zip(example.input_ids, example.labels, strict=True)
    if labelled != answers or any(label not in (IGNORE_INDEX, token) for token, label in pairs):
        raise PreflightError(f"{example.conversation_id}: labels cover {labelled!r}, not the answers {answers!r}.")


def encode_once(
    once: Callable[..., pd.DataFrame],
    name: str,
    tokenizer: Any,
    frame: pd.DataFrame,
    max_length: int,
    answers_only: bool,
) -> list[Example]:
    """The conversations of a file as examples, encoded and checked by the first configuration that asks.

    Args:
        once: of the notebook's run.
        name: of the file, as "train".
        tokenizer: of the base model.
        frame: columns conversation_id and messages.
        max_length: tokens of a conversation, at most.
        answers_only: False labels every token but the first.

    Raises:
        PreflightError: as `encode_conversations` and `check_labels`.
    """

    def encode() -> pd.DataFrame:
        pairs = list(zip(frame["conversation_id"], frame["messages"], strict=True))
        examples = encode_conversations(tokenizer, pairs, max_length, answers_only)
        for example, messages in zip(examples if answers_only else (), frame["messages"], strict=False):
            check_labels(tokenizer, example, messages)
        return examples_table(examples)

    decides = {"tokenizer": tokenizer_hash(tokenizer), "max_length": max_length, "answers_only": answers_only}
    return examples_of(once(f"{name}_encoded", encode, **decides))


class StepCheck(NamedTuple):
    """The packed step beside plain transformers: losses of the same tokens (nats), relative differences."""

    packed: torch.Tensor
    plain: torch.Tensor
    loss_difference: float
    gradient_difference: float | None  # of one adapter matrix; None without adapters


def check_step(model: Any, examples: list[Example]) -> StepCheck:
    """Check that the packed step computes what the model's own forward computes, on conversations of the data.

    This notices whatever the step leaves out of an architecture. Differences are norms relative to plain transformers.
    The gradient is that of the first adapted layer's B, to which it comes through all layers above. Nothing is drawn,
    and no gradient is kept.

    Args:
        model: after `step.prepare_step`, with or without adapters; it is set to evaluation mode.
        examples: two are enough. They are one packed row for the step, and one by one for transformers.

    Raises:
        PreflightError: the losses or the gradients differ by more than rounding.
    """
    model.eval()
    matrix = next((p for n, p in model.named_parameters() if "lora_B" in n), None)
    row = to_device(collate(examples), model.device)
    remedy = PLAIN_STEP if is_fused(model) else OTHER_MODEL
    try:
        packed, packed_gradient = _losses_and_gradient([partial(token_losses, model, row)], matrix)
    except (PreflightError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code computes here, and can raise any type
        kind, name = model.config.model_type, type(error).__name__
        reason = f"the training step cannot compute this model ({kind}): {name}: {error}"
        raise PreflightError(f"{reason} {remedy}") from error
    alone = [partial(plain_token_losses, model, example) for example in examples]
    plain, plain_gradient = _losses_and_gradient(alone, matrix)
    gradient = None if matrix is None else _relative(packed_gradient, plain_gradient)
    found = StepCheck(packed, plain, _relative(packed, plain), gradient)
    _refuse_difference(found, STEP_TOLERANCE[base_dtype(model)], model.config.model_type, remedy)
    return found


def _refuse_difference(found: StepCheck, limits: tuple[float, float], kind: str, remedy: str) -> None:
    differences = (found.loss_difference, found.gradient_difference)
    for name, difference, most in zip(("losses", "gradients"), differences, limits, strict=True):
        if difference is not None and not difference <= most:  # a NaN is refused as well
            raise PreflightError(
                f"the training step does not compute what this model computes: loss {found.packed.mean():.5f} in a "
                f"packed row, {found.plain.mean():.5f} by plain transformers, relative difference of {name} "
                f"{difference:.2g} (at most {most:g}). Part of its architecture ({kind}) is missing from the step. "
                f"{remedy}"
            )


class BackwardCheck(NamedTuple):
    """The step beside transformers, peft and autograd: relative differences of losses and of the adapters' gradients.

    `scale_difference`: of the kind of matrix (as B of q_proj, of all layers) where it is largest, how much longer or
    shorter its gradient is along the right one. Rounding points anywhere and adds little to it; a wrong factor does.
    """

    loss_difference: float
    gradient_difference: float
    scale_difference: float


def check_backward(model: Any, examples: list[Example]) -> BackwardCheck:
    """Check the parts that `kernels` writes out against autograd, on the same row and in the same number format.

    `check_step` sees the gradient of one matrix, and in bfloat16 beside the rounding of another way to compute. Nothing
    is drawn from torch's generators, no gradient is kept, and the adapters are as before.

    Args:
        model: with adapters, after `step.prepare_step`; it is set to evaluation mode.
        examples: as of `check_step`; they are one packed row.

    Raises:
        PreflightError: they differ by more than rounding.
    """
    model.eval()
    row, fused = to_device(collate(examples), model.device), is_fused(model)
    trained = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    with _filled(trained):
        losses, gradients = _all_gradients(token_losses(model, row), trained)
        prepare_step(model, fused=False)
        try:
            plain, plain_gradients = _all_gradients(token_losses(model, row, own_head=True), trained)
        finally:
            prepare_step(model, fused)
    kinds = [".".join(name.split(".")[-4:-2]) for name in trained]
    sums = pd.DataFrame([_products(*both) for both in zip(gradients, plain_gradients, strict=True)], kinds)
    by_kind, total = sums.groupby(level=0).sum(), sums.sum()
    scale = (by_kind["along"] / by_kind["plain"] - 1).abs().max(skipna=False)
    found = BackwardCheck(_relative(losses, plain), math.sqrt(total["apart"] / total["plain"]), float(scale))
    _refuse_backward(found, BACKWARD_TOLERANCE[base_dtype(model)], PLAIN_STEP if fused else OTHER_MODEL)
    return found


def _refuse_backward(found: BackwardCheck, limits: tuple[float, ...], remedy: str) -> None:
    for name, difference, most in zip(("losses", "gradients", "gradients' lengths"), found, limits, strict=True):
        if not difference <= most:  # a NaN is refused as well
            raise PreflightError(
                f"the training step does not compute what transformers, peft and autograd do with the same row: "
                f"relative difference of {name} {difference:.2g} (at most {most:g}). {remedy}"
            )


@contextmanager
def _filled(trained: dict[str, torch.Tensor]) -> Generator[None]:
    """Context in which every B holds random numbers."""
    before, generator = {n: p.detach().clone() for n, p in trained.items() if "lora_B" in n}, torch.Generator()
    with torch.no_grad():
        for name in before:
            trained[name].copy_(FILLED_B * torch.randn(before[name].shape, generator=generator.manual_seed(len(name))))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                trained[name].copy_(values)


def _all_gradients(losses: torch.Tensor, trained: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Sequence[Any]]:
    return losses.detach().double(), torch.autograd.grad(losses.sum(), list(trained.values()))


def _products(found: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    """<found, plain>, <plain, plain>, and the squared norm of their difference."""
    found, plain = found.double(), plain.double()
    products = {"along": found * plain, "plain": plain * plain, "apart": (found - plain).square()}
    return {name: product.sum().item() for name, product in products.items()}


def _losses_and_gradient(parts: Sequence[Callable[[], Any]], matrix: Any) -> tuple[torch.Tensor, Any]:
    """Losses of all parts in order, and the gradient of their sum for a matrix; computed one by one."""
    losses, total = [], 0.0
    with torch.set_grad_enabled(matrix is not None):
        for part in parts:
            losses.append(part())
            if matrix is not None:
                total = total + torch.autograd.grad(losses[-1].sum(), matrix)[0].double()
    return torch.cat([part.detach().double().cpu() for part in losses]), total


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


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
    gpus = torch.cuda.device_count() if on_gpu() else 0
    units, name = (gpus, "GPU") if gpus else (device_facts()["cores"], "core")
    if processes > units:
        raise PreflightError(
            f"processes is {processes}, and this notebook may use {units} {name}{'s' * (units > 1)}: one is needed for "
            f"each. Lower processes{', or name more with --gpus' if gpus else ''}."
        )


def check_merging(shell: Any, free_bytes: float) -> None:
    """Check that the weights fit into memory in float32, in which an adapter is merged into them.

    Args:
        shell: the model without its weights, from `base_model.model_shell`.
        free_bytes: from `device.free_memory`.
    """
    needed = 4.0 * sum(p.numel() for p in shell.parameters())
    if needed > (1 - SPARE) * free_bytes:
        raise PreflightError(
            f"the weights need {needed / 1e9:.1f} GB in float32, in which an adapter is merged into them, and "
            f"{free_bytes / 1e9:.1f} GB are free, of which {SPARE:.0%} must stay free. Close other programs, or use a "
            "smaller base_model."
        )


def fitting_tokens(needed: dict[str, float], batch_tokens: int, max_length: int, free_bytes: float) -> int:
    """The number of tokens that can be computed at once in the free memory.

    Args:
        needed: bytes from `base_model.memory_estimate` for a row of `batch_tokens`.
        batch_tokens: tokens of a row, the most that is returned.
        max_length: tokens of the longest conversation.
        free_bytes: from `device.free_memory`.

    Raises:
        PreflightError: one conversation of `max_length` tokens does not fit.
    """
    fixed = sum(size for name, size in needed.items() if name != "row")
    left = (1 - SPARE) * free_bytes - fixed
    tokens = int(min(1.0, max(0.0, left) / needed["row"]) * batch_tokens)
    if tokens < min(max_length, batch_tokens):
        least = fixed + needed["row"] * max_length / batch_tokens
        raise PreflightError(
            f"training needs about {least / 1e9:.1f} GB for a conversation of {max_length} tokens, and "
            f"{free_bytes / 1e9:.1f} GB are free. Close other programs, set gradient_checkpointing to true or "
            "quantization to nf4, lower max_length, or set micro_batch_tokens yourself."
        )
    return tokens
