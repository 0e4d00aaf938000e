"""The training step on packed rows: adapters, attention within each conversation, and the loss at supervised positions.

The step computes what a padded loop over full logits computes, without the waste: rows of whole conversations and no
padding, and logits only where a label stands. `kernels` holds its arithmetic.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

try:  # added to torch late, and FlashAttention builds only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

from telco_nb.lora import kernels
from telco_nb.lora.packing import IGNORE_INDEX, segment_lengths

TARGET_MODULES = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SEGMENTED = "segmented_sdpa"
ROW_MULTIPLE = 16  # tokens; bfloat16 matmuls of 1,007 rows ran at 640 GFLOP/s, of 1,008 at 800 (oneDNN, AVX512-BF16)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why and what to do."""


def segmented_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: list[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of a packed row: no T x T mask is built or read.

    `query` (1, heads, T, d), `key` and `value` (1, kv_heads, T, d); `segments` are the conversations' lengths.
    """
    if segments is None or attention_mask is not None:
        raise TrainingError("Packed attention needs segment lengths and no attention mask.")
    if attention_kernel(query.device, query.dtype) == "varlen" and not dropout:
        return _varlen(query, key, value, segments, scaling), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Which attention serves packed rows: "varlen" (torch's FlashAttention: CUDA from capability 8 on, 16 bits) or
    "loop"."""
    usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None
    usable = usable and torch.cuda.get_device_capability(device) >= (8, 0)
    return "varlen" if usable else "loop"


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: list[int], scaling: float | None
) -> torch.Tensor:
    """All segments in one call; tensors as in `segmented_attention`, result (1, T, heads, d)."""
    bounds = torch.tensor([0, *np.cumsum(segments)], dtype=torch.int32, device=query.device)
    tokens_first = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    causal = {"window_size": (-1, 0), "scale": scaling, "enable_gqa": True}
    return varlen_attn(*tokens_first, bounds, bounds, max(segments), max(segments), **causal)[None]


AttentionInterface.register(SEGMENTED, segmented_attention)


def attach_adapters(base: Any, lora: Any, gradient_checkpointing: bool = False) -> Any:
    """The base model with adapters as `lora` (peft's LoraConfig) says; what is trained is float32.

    Raises TrainingError for a layer that the model has not: peft would silently leave it out.
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


def prepare_step(model: Any) -> str:
    """Let `model` compute packed rows, by the fused functions where they hold: "fused", else "plain".

    To be called again when adapters were added. Plain is peft's own arithmetic: for DoRA, dropout, trained biases,
    quantised weights, other architectures, and on a GPU.
    """
    causal_model(model).set_attn_implementation(SEGMENTED)
    _keep_memory()
    kernels.unfuse(model)
    return "fused" if kernels.fuse(model) else "plain"


def _keep_memory() -> None:
    """Ask glibc to keep freed memory for the next step: fresh pages are zeroed by the kernel, a tenth of a CPU step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def base_dtype(model: Any) -> torch.dtype:
    """Number format of the frozen weights."""
    return next(p.dtype for n, p in model.named_parameters() if "lora_" not in n)


def pad_to_multiple(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The row with up to 15 tokens more (see ROW_MULTIPLE), at the end of its last conversation and without a label:
    as attention is causal, no other token sees them."""
    missing = -row["input_ids"].shape[1] % ROW_MULTIPLE
    last = row["position_ids"][:, -1:] + 1
    ends = {"input_ids": row["input_ids"][:, -1:], "shift_labels": torch.full_like(last, IGNORE_INDEX)}
    ends = {name: end.expand(1, missing) for name, end in ends.items()}
    ends["position_ids"] = last + torch.arange(missing, device=last.device)
    return {name: torch.cat([row[name], end], 1) for name, end in ends.items()}


def token_losses(model: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy (float32, nats) of each supervised position of a packed row, in order.

    The model returns hidden states of the supervised positions; the frozen output head and the loss are one function.
    """
    row = pad_to_multiple(row)
    supervised = row["shift_labels"] != IGNORE_INDEX
    causal = causal_model(model)
    # Adapters are float32 whatever the base computes in: their updates are too small for bfloat16's 8 bits.
    mixed = base_dtype(model) == torch.bfloat16 and not kernels.is_fused(model)
    with torch.autocast(causal.device.type, dtype=torch.bfloat16, enabled=mixed), kernels.without_lm_head(causal):
        output = model(
            input_ids=row["input_ids"],
            position_ids=row["position_ids"],
            segments=segment_lengths(row["position_ids"]),
            logits_to_keep=supervised,
            use_cache=False,
        )
    hidden = output.logits.reshape(-1, output.logits.shape[-1])
    return kernels.HeadLoss.apply(hidden, causal.lm_head.weight, row["shift_labels"][supervised])


def causal_model(model: Any) -> Any:
    """The transformers model inside the wrappers of peft and of distributed training."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
