"""The training step on packed rows: adapters, attention within each conversation, and the loss at labelled positions.

The step computes the same loss as a padded loop over full logits. It saves the padding, and it computes logits only
at positions with a label. `kernels` holds its arithmetic.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

try:  # only recent builds of torch with FlashAttention have it
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn: Any = None

from telco_nb.lora import kernels, pointwise
from telco_nb.lora.errors import ModelError
from telco_nb.lora.packing import IGNORE_INDEX, Example

TARGET_MODULES = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
MERGED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
NEUTRAL = {"position_ids"}  # handed to every attention function, of use to none here
SEGMENTED = "segmented_sdpa"  # name under which transformers knows `segmented_attention`
# Tokens of a row are a multiple of this. On a processor bfloat16 matmuls of 1,007 rows ran at 640 GFLOP/s, of 1,008 at
# 800 (oneDNN, AVX512-BF16). On a GPU nearly all rows of a training get one shape: at 8,192 tokens they are 99.9 % full.
ROW_MULTIPLE = {"cpu": 16, "cuda": 256}
# torch 2.13 wants to be told that there are fewer key heads than query heads; 2.11 has no word for it and allows it.
GQA = {"enable_gqa": True} if varlen_attn and "enable_gqa" in signature(varlen_attn).parameters else {}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt in glibc's malloc.h


def resolve_targets(model: Any, group: str) -> list[str]:
    """The model's own names of the layers that a group of TARGET_MODULES means.

    Args:
        model: the base model, with weights or on the meta device.
        group: qv, attention, mlp or all.

    Raises:
        ModelError: a decoder layer lacks a part of the group, which peft would leave out without a word.
    """
    layers = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and module is not model.lm_head
    )
    complete = {name for name, count in layers.items() if count == model.config.num_hidden_layers}
    named = {name: _own_names(wanted, complete) for name, wanted in TARGET_MODULES.items()}
    missing = [name for name in named[group] if name not in complete]
    if missing:
        usable = [name for name, found in named.items() if complete.issuperset(found)]
        raise ModelError(
            f"target_modules: {group} means {', '.join(TARGET_MODULES[group])}, and this model "
            f"({model.config.model_type}) has no {', '.join(missing)} in every layer; it has "
            f"{', '.join(sorted(complete)) or 'no linear layers'}. "
            + (f"Set target_modules to {' or '.join(usable)}." if usable else "Use another base_model.")
        )
    return named[group]


def _own_names(wanted: list[str], complete: set[str]) -> list[str]:
    """A group's names, with a merged layer in the place of its parts where the model has it and the group all parts."""
    for merged, parts in MERGED_MODULES.items():
        if merged in complete and complete.isdisjoint(parts) and set(parts) <= set(wanted):
            wanted = [merged if name == parts[0] else name for name in wanted if name not in parts[1:]]
    return wanted


class TrainingError(RuntimeError):
    """Training cannot start or continue. The message gives the reason and the remedy."""


def segmented_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: list[int] | None = None,
    bounds: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of a packed row, without a (T, T) mask.

    `query` is (1, heads, T, d), `key` and `value` are (1, key heads, T, d); `segments` are the conversations' lengths
    and `bounds` their starts and the last end, int32 on the device.
    """
    if segments is None or attention_mask is not None:
        raise TrainingError("Packed attention needs segment lengths and no attention mask.")
    check_attention_options(max(segments), **options)
    if bounds is not None and attention_kernel(query.device, query.dtype) == "varlen" and not dropout:
        return _varlen_attention(query, key, value, bounds, max(segments), scaling), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def check_attention_options(tokens: int, sliding_window: int | None = None, **options: Any) -> None:
    """Refuse what a model asks of its attention and the functions here would leave out.

    Args:
        tokens: the most that one query may look back on. A window that holds them all changes nothing.
        sliding_window: tokens that a query sees, with itself.
        options: what else the model hands to its attention function.

    Raises:
        ModelError: an option has an effect.
    """
    if sliding_window is not None and sliding_window < tokens:
        raise ModelError(
            f"this model's attention looks back on {sliding_window} tokens, and a conversation or answer may have "
            f"{tokens}: the window is not computed here. Lower max_length or answer_max_tokens, or use another "
            "base_model."
        )
    unknown = [n for n, value in options.items() if n not in NEUTRAL and value is not None and value is not False]
    if unknown:
        raise ModelError(
            f"this model's attention uses {', '.join(sorted(unknown))}, which is not computed here. Use another "
            "base_model; README.md lists the architectures that were tested."
        )


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Attention for packed rows: "varlen" for FlashAttention (CUDA capability 8 or higher, 16 bits), else "loop"."""
    usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None
    usable = usable and torch.cuda.get_device_capability(device) >= (8, 0)
    return "varlen" if usable else "loop"


def _varlen_attention(
    query: Any, key: Any, value: Any, bounds: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:
    """All segments in one call; tensors as in `segmented_attention`, result (1, T, heads, d)."""
    tokens_first = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    causal: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    mixed: Any = varlen_attn(*tokens_first, bounds, bounds, longest, longest, **causal, **GQA)
    return mixed[None]


AttentionInterface.register(SEGMENTED, segmented_attention)


def attach_adapters(base: Any, lora: Any, gradient_checkpointing: bool = False) -> Any:
    """Attach LoRA adapters to a base model. What is trained becomes float32.

    Args:
        base: the transformers model.
        lora: peft's LoraConfig.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Returns:
        The peft model around `base`.

    Raises:
        TrainingError: the model lacks a layer of `layers_to_transform`, which peft would ignore.
    """
    from peft import get_peft_model

    count = base.config.num_hidden_layers
    if wrong := [i for i in lora.layers_to_transform or [] if not 0 <= i < count]:
        raise TrainingError(f"layers_to_transform: {wrong} are not among this model's layers, 0 to {count - 1}.")
    tuned = get_peft_model(base, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        tuned.enable_input_require_grads()
    return tuned


def prepare_step(model: Any, fused: bool = True) -> str:
    """Set `model` up for packed rows. Call it again after adapters were added.

    Args:
        model: with or without adapters.
        fused: False leaves all arithmetic to transformers and peft.

    Returns:
        "fused" if the model computes with the functions of `kernels`, "compiled" if those are compiled too, else
        "plain": with DoRA, dropout, trained biases or quantised weights, and for other architectures.
    """
    causal = causal_model(model)
    set_attention(causal, SEGMENTED)
    _keep_freed_memory()
    _cast_inputs(model, always=False)
    kernels.unfuse(model)
    if not (fused and kernels.fuse(model)):
        return "plain"
    return "compiled" if pointwise.is_compiled(causal.device) else "fused"


def _cast_inputs(model: Any, always: bool) -> None:
    """Let peft's layers cast their inputs to the adapters' float32 always, or only where that changes a value.

    Under autocast, as in `token_losses`, plain LoRA computes the same bit for bit without: the next operation undoes
    the cast. Dropout and DoRA compute in the input's type before that.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            plain = not layer.lora_variant and all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
            layer.cast_input_dtype_enabled = always or not plain


def set_attention(causal: Any, name: str) -> None:
    """Let a model compute with the attention function of this name. Raises ModelError if its code allows none."""
    try:
        causal.set_attn_implementation(name)
    except ValueError as error:
        raise ModelError(
            f"this model ({causal.config.model_type}) computes its attention in a way of its own, which cannot be "
            "replaced here (a soft limit of its scores, for instance). Use another base_model; README.md lists the "
            "architectures that were tested."
        ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: the zeroing of fresh pages took a tenth of a CPU step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def pad_to_multiple(row: dict[str, Any]) -> dict[str, Any]:
    """Lengthen a row to a multiple of ROW_MULTIPLE with conversations without labels, none longer than its longest."""
    ids, segments, bounds = row["input_ids"], row["segments"], row["bounds"]
    missing, longest = -ids.shape[1] % ROW_MULTIPLE[ids.device.type], max(segments)
    if not missing:
        return row
    ends = torch.arange(longest, missing + longest, longest, device=ids.device, dtype=bounds.dtype).clamp(max=missing)
    positions = torch.arange(missing, device=ids.device) % longest
    added = {
        "input_ids": ids[:, -1:].expand(1, missing),
        "position_ids": positions[None],
        "shift_labels": torch.full_like(positions, IGNORE_INDEX)[None],
    }
    return {name: torch.cat([row[name], more], 1) for name, more in added.items()} | {
        "kept": row["kept"],
        "bounds": torch.cat([bounds, bounds[-1:] + ends]),
        "segments": [*segments, *(min(longest, missing - first) for first in range(0, missing, longest))],
    }


def token_losses(model: Any, row: dict[str, Any], own_head: bool = False) -> torch.Tensor:
    """Cross-entropy of each supervised position of a packed row, with gradient.

    Nothing here waits for a GPU: what decides on shapes comes with the row.

    Args:
        model: after `prepare_step`, with or without adapters.
        row: from `packing.collate`, its tensors on the model's device.
        own_head: let the model compute all logits, as it is always done where `HeadLoss` cannot compute them.

    Returns:
        (supervised positions,) float32, nats, in the row's order.
    """
    row = pad_to_multiple(row)
    causal = causal_model(model)
    # Adapters are float32 in every base format: bfloat16's 8 bits are too few for their updates.
    mixed = base_dtype(model) == torch.bfloat16 and not kernels.is_fused(model)
    own_head = own_head or kernels.has_own_head(causal)
    hidden_only = nullcontext() if own_head else kernels.without_lm_head(causal)
    with torch.autocast(causal.device.type, dtype=torch.bfloat16, enabled=mixed), hidden_only:
        hidden = _last_layer(model, row, row["segments"])
    labels = row["shift_labels"][0, row["kept"]]
    if own_head:  # these are logits
        return F.cross_entropy(hidden.float(), labels, reduction="none")
    return kernels.HeadLoss.apply(hidden, causal.lm_head.weight, labels)


def static_losses(model: Any, row: dict[str, Any], longest: int) -> torch.Tensor:
    """`token_losses` of a fused model where nothing decides on a shape but the shapes of the row themselves.

    Args:
        model: after `prepare_step`, which said "fused" or "compiled".
        row: from `step_graph.fill_row`.
        longest: tokens of the longest conversation of all rows.
    """
    causal = causal_model(model)
    with kernels.without_lm_head(causal):
        hidden = _last_layer(model, row, [longest])
    return kernels.HeadLoss.apply(hidden, causal.lm_head.weight, row["labels"])


def _last_layer(model: Any, row: dict[str, Any], segments: list[int]) -> torch.Tensor:
    """What the model's head gives, or without one the hidden state, at the kept positions: (kept, width)."""
    output = model(
        input_ids=row["input_ids"],
        position_ids=row["position_ids"],
        segments=segments,
        bounds=row["bounds"],
        logits_to_keep=row["kept"],
        use_cache=False,
    )
    return output.logits.reshape(-1, output.logits.shape[-1])


def base_dtype(model: Any) -> torch.dtype:
    """Number format of the base model's weights, or of the computation if they are quantised."""
    return next(p.dtype for n, p in model.named_parameters() if "lora_" not in n)


def plain_token_losses(model: Any, example: Example) -> torch.Tensor:
    """The losses of `token_losses` for one conversation as plain transformers computes them: a check of the step.

    The conversation is not packed, its logits are complete, attention is the model's own definition ("eager"), and no
    function of `kernels` is used. Afterwards the model has its attention and its fused functions again.

    Args:
        model: with or without adapters.
        example: one conversation.

    Returns:
        (supervised positions,) float32, nats, in order, with gradient.
    """
    causal = causal_model(model)
    attention, fused = causal.config._attn_implementation, kernels.is_fused(model)
    kernels.unfuse(model)
    _cast_inputs(model, always=True)  # there is no autocast here
    try:
        causal.set_attn_implementation("eager")
        logits = model(input_ids=torch.tensor([example.input_ids], device=causal.device), use_cache=False).logits
    finally:
        causal.set_attn_implementation(attention)
        _cast_inputs(model, always=False)
        if fused:
            kernels.fuse(model)
    labels = torch.tensor(example.labels[1:], device=causal.device)
    losses = F.cross_entropy(logits[0, :-1].float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses[labels != IGNORE_INDEX]


def causal_model(model: Any) -> Any:
    """The transformers model inside the wrappers of peft and of distributed training."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def step_flops(model: Any, tokens: int, supervised: int, segments: list[int]) -> float:
    """Floating-point operations of forward and backward of one LoRA step; frozen weights get no gradient.

    Per token: 4 per body weight, 4 per output-head weight at supervised positions, 6 per adapter weight; causal
    attention costs 2 x 2 x n^2/2 x width forward and twice that backward, per layer and conversation of n tokens.

    Args:
        model: with adapters.
        tokens, supervised: of the row.
        segments: tokens of each conversation of the row.
    """
    config = model.config
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    head = config.vocab_size * config.hidden_size
    tied = sum(_weights(p) for n, p in model.named_parameters() if "lora_" not in n) - head
    body = tied if config.tie_word_embeddings else tied - head
    attention = 6 * config.hidden_size * config.num_hidden_layers * sum(n * n for n in segments)
    return float(4 * body * tokens + 4 * head * supervised + 6 * lora * tokens + attention)


def _weights(parameter: Any) -> int:
    """The number of weights of a parameter, of which nf4 packs two into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed else parameter.numel()
