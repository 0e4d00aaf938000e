"""The LoRA step in few, large operations: projections, attention and output head with their backward written out.

Autograd on top of transformers and peft computes the same, but spends most of a CPU step outside the matrix products:
on casts, on normalisation in many passes, on the slow backward of CPU attention and on a (tokens x vocabulary) array
that is written and read six times. `fuse` replaces the `forward` of single module objects and nothing in transformers
or peft itself. Parameters, their names and saved files stay as they are.

Sources: LoRA, arXiv:2106.09685; RMSNorm, arXiv:1910.07467; rotary embedding, arXiv:2104.09864; cross-entropy with the
gradient computed chunk by chunk in the forward pass, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from telco_nb.lora import pointwise

LONGEST_SEGMENT = 1024  # tokens; the attention matrix kept for the backward pass grows with the square
QUERY_BLOCK = 128  # tokens per block of queries in float32; twice as many in 16 bits
LOGIT_OPTIONS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # Gemma, Granite, Cohere
FUSED = (LlamaAttention, LlamaMLP, LlamaRMSNorm, Qwen2Attention, Qwen2MLP, Qwen2RMSNorm)  # what `fuse` changes
# Positions whose logits are in memory at one time. On a processor more are hardly faster; a GPU wants few launches.
HEAD_CHUNK = {"cpu": 256, "cuda": 2048}


class AdaptedLinears(Function):
    """y_i = x W_i' + s_i (x A_i') B_i' + bias_i for layers that share their input x (tokens, in).

    The A_i are stacked and applied in one product. A frozen W_i gets no gradient. Adapters are float32 and are cast to
    the type of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        layers = _layer_tensors(flat)
        a_parts = [a for _, _, a, _ in layers if a is not None]
        stacked_a: Any = torch.cat(a_parts).to(x.dtype) if a_parts else None
        low_rank: Any = x @ stacked_a.T if a_parts else None
        outputs, position = [], 0
        for (weight, bias, _, b), scale in zip(layers, scales, strict=True):
            y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
            if b is not None:
                y.addmm_(low_rank[:, position : position + b.shape[1]], b.to(x.dtype).T, alpha=scale)
                position += b.shape[1]
            outputs.append(y)
        ctx.scales = scales
        ctx.save_for_backward(x if a_parts else None, low_rank, stacked_a, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, low_rank, stacked_a, *flat = ctx.saved_tensors
        d_low_rank: Any = torch.empty_like(low_rank) if low_rank is not None else None
        dx, position, flat_gradients = None, 0, []
        for (weight, _, a, b), scale, dy in zip(_layer_tensors(flat), ctx.scales, gradients, strict=True):
            if ctx.needs_input_grad[0]:
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            db = None
            if b is not None:
                part = slice(position, position + b.shape[1])
                d_low_rank[:, part] = (dy @ b.to(dy.dtype)).mul_(scale)
                db = (dy.T @ low_rank[:, part]).to(b.dtype).mul_(scale)
                position += b.shape[1]
            flat_gradients.append([None, None, a, db])
        if low_rank is not None:
            d_stacked, position = d_low_rank.T @ x, 0
            for gradient in flat_gradients:
                if (a := gradient[2]) is not None:
                    gradient[2] = d_stacked[position : position + len(a)].to(a.dtype)
                    position += len(a)
            if dx is not None:
                dx.addmm_(d_low_rank, stacked_a)
        return dx, None, *[g for gradient in flat_gradients for g in gradient]


def _layer_tensors(flat: Sequence[Any]) -> list[Sequence[Any]]:
    """(weight, bias, A, B) of each layer, from one flat sequence."""
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _lora_tensors(layer: Any) -> tuple[tuple[Tensor | None, ...], float]:
    """((weight, bias, A, B), scale) of a plain or an adapted linear layer."""
    if isinstance(layer, nn.Linear):
        return (layer.weight, layer.bias, None, None), 0.0
    (name,) = layer.active_adapters
    base = layer.base_layer
    return (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Outputs of plain or adapted linear layers for one input x (tokens, in)."""
    parts = [_lora_tensors(layer) for layer in layers]
    return AdaptedLinears.apply(x, tuple(s for _, s in parts), *[t for tensors, _ in parts for t in tensors])


def _is_fusible(layer: nn.Module) -> bool:
    """True for a frozen linear layer, alone or with plain LoRA: no DoRA, dropout, trained bias, quantisation, merge."""
    from peft.tuners.lora import Linear

    if type(layer) is nn.Linear:
        return not any(p.requires_grad for p in layer.parameters())
    return (
        type(layer) is Linear
        and type(layer.base_layer) is nn.Linear
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and not layer.merged
        and not layer.disable_adapters
        and all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
        and all(b.bias is None for b in layer.lora_B.values())
    )


class RMSNorm(Function):
    """RMSNorm with a frozen weight: w * x / rms(x), computed in float32, returned in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, inverse = pointwise.fast(pointwise.norm_forward, x)(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # ty: ignore[incompatible-method-override]  (stub: *args)
        return pointwise.fast(pointwise.norm_backward, dy)(dy, *ctx.saved_tensors), None, None


@lru_cache(maxsize=8)
def _causal_mask(block: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(block * group, block): 0 where a query sees the key, else -inf; `group` query heads per key head."""
    mask = torch.full((block, block), -torch.inf, dtype=dtype, device=device).triu_(1)
    return mask.repeat_interleave(group, 0)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write the rotary embedding of x (key heads, tokens, group, width) into `out`; -sin inverts it."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class SegmentAttention(Function):
    """Rotary embedding and causal attention within each segment. Queries of one key head are stacked.

    q (tokens, heads * width), k and v (tokens, key_heads * width); cos and sin (tokens, 1, width / 2). A block of
    queries meets only the keys up to its own end, which saves nearly half the work and memory of a long segment.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, segments: list[int], width: int
    ) -> Tensor:
        tokens, heads = len(q), k.shape[1] // width
        group, scale = q.shape[1] // k.shape[1], width**-0.5
        q, k = (
            _apply_rotary(t.view(tokens, heads, -1, width).transpose(0, 1), c, s, t.new_empty(heads, tokens, n, width))
            for t, c, s, n in ((q, cos * scale, sin * scale, group), (k, cos, sin, 1))
        )
        q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.view(tokens, heads, width).transpose(0, 1).contiguous()
        block = QUERY_BLOCK * torch.float32.itemsize // q.element_size()
        mask, out, probs = _causal_mask(block, group, q.dtype, q.device), torch.empty_like(q), []
        for queries, keys, new in _blocks(segments, block, group):
            score = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
            score[..., -new:].add_(mask[: new * group, :new])
            probs.append(torch.softmax(score, -1))
            torch.bmm(probs[-1], v[:, keys], out=out[:, queries])
        ctx.segments, ctx.block, ctx.group, ctx.scale = segments, block, group, scale
        ctx.save_for_backward(q, k, v, out, cos, sin, *probs)
        return out.view(heads, tokens, -1).transpose(0, 1).reshape(tokens, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # ty: ignore[incompatible-method-override]  (stub: *args)
        q, k, v, out, cos, sin, *probs = ctx.saved_tensors
        heads, tokens, width = k.shape
        d_out = gradient.view(tokens, heads, -1).transpose(0, 1).reshape(q.shape)
        means = torch.linalg.vecdot(d_out.float(), out.float()).to(q.dtype).unsqueeze(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        blocks, written = zip([*_blocks(ctx.segments, ctx.block, ctx.group)][::-1], probs[::-1], strict=True), tokens
        for (queries, keys, _), prob in blocks:  # in reverse: a segment's last block writes all of its keys first
            d_score = torch.bmm(d_out[:, queries], v[:, keys].transpose(1, 2)).sub_(means[:, queries]).mul_(prob)
            torch.bmm(d_score, k[:, keys], out=dq[:, queries])
            _accumulate(dv[:, keys], prob.transpose(1, 2), d_out[:, queries], first=keys.start < written)
            _accumulate(dk[:, keys], d_score.transpose(1, 2), q[:, queries], first=keys.start < written)
            written = keys.start
        dq, dk = (
            _apply_rotary(t.view(heads, tokens, -1, width), c, s, t.new_empty(tokens, heads, n, width).transpose(0, 1))
            for t, c, s, n in ((dq, cos * ctx.scale, -sin * ctx.scale, ctx.group), (dk, cos, -sin, 1))
        )
        return *[t.transpose(0, 1).reshape(tokens, -1) for t in (dq, dk, dv)], *[None] * 4


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Write the first product into `total`, add further ones to it."""
    torch.bmm(left, right, out=total) if first else total.baddbmm_(left, right)


def _blocks(segments: list[int], block: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """(stacked queries, keys, tokens) of each block of queries; its keys end at its own last token."""
    start = 0
    for length in segments:
        for first in range(start, start + length, block):
            last = min(first + block, start + length)
            yield slice(first * group, last * group), slice(start, last), last - first
        start += length


class HeadLoss(Function):
    """Cross-entropy (float32, nats) of each position of `hidden` (n, width) with a frozen head (vocabulary, width).

    The gradient with respect to `hidden` is computed chunk by chunk in the same pass, so logits are never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses, gradients, chunk = [], [], HEAD_CHUNK[hidden.device.type]
        # Compiled, the last chunk is as long as the others: one shape. What it holds beyond its end is never read.
        least = chunk if pointwise.is_compiled(hidden.device) else 0
        size = max(least, min(len(hidden), chunk))
        buffer = hidden.new_empty(size, len(weight))  # for all chunks: new arrays took longer
        buffer32 = torch.empty_like(buffer, dtype=torch.float32) if buffer.dtype != torch.float32 else buffer
        for h, target in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            n = len(h)
            product, logits, filled = buffer[:n], buffer32[:n], buffer32[: max(n, least)]
            logits.copy_(torch.mm(h, weight.T, out=product))
            labelled = F.pad(target, (0, len(filled) - n)) if len(filled) > n else target
            loss, total = pointwise.fast(pointwise.chunk_losses, logits)(filled, labelled)
            losses.append(loss[:n])
            if ctx.needs_input_grad[0]:
                gradients.append(torch.mm(product.copy_(logits), weight).float().div_(total[:n]).sub_(weight[target]))
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        ctx.dtype = hidden.dtype
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # ty: ignore[incompatible-method-override]  (stub: *args)
        (gradients,) = ctx.saved_tensors
        return (gradients * gradient[:, None]).to(ctx.dtype), None, None


def has_own_head(causal: Any) -> bool:
    """True if logits are more than the head's product: a bias, a scale or a soft limit. `HeadLoss` has none of them."""
    scales = (getattr(causal.config, name, None) for name in LOGIT_OPTIONS)
    return causal.lm_head.bias is not None or any(value not in (None, 1.0) for value in scales)


@contextmanager
def without_lm_head(causal: Any) -> Generator[None]:
    """Context in which the model returns hidden states instead of logits."""
    head, causal.lm_head = causal.lm_head, nn.Identity()
    try:
        yield
    finally:
        causal.lm_head = head


def has_block_attention(device: torch.device) -> bool:
    """True where SegmentAttention is used: on a CPU. Its many small products would leave a GPU idle."""
    return device.type == "cpu"


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    segments: list[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    blockwise = has_block_attention(hidden_states.device)
    too_long = segments is not None and max(segments) > LONGEST_SEGMENT and blockwise
    if segments is None or past_key_values is not None or too_long:
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, segments=segments, **others
        )
    x = hidden_states[0]
    q, k, v = project(x, module.q_proj, module.k_proj, module.v_proj)
    if blockwise:
        half = module.head_dim // 2  # the second half of cos and sin repeats the first
        cos, sin = (t[0, :, None, :half] for t in position_embeddings)
        mixed = SegmentAttention.apply(q, k, v, cos, sin, segments, module.head_dim)
    else:
        mixed = _attend_at_once(module, (q, k, v), position_embeddings, segments=segments, **others)
    return project(mixed, module.o_proj)[0][None], None


def _attend_at_once(module: Any, projected: tuple[Tensor, ...], position_embeddings: Any, **others: Any) -> Tensor:
    """All conversations by the attention function that `step` has set. `projected` and the result are (T, width)."""
    tokens = len(projected[0])
    q, k, v = (t.view(1, tokens, -1, module.head_dim).transpose(1, 2) for t in projected)
    q, k = pointwise.fast(apply_rotary_pos_emb, q)(q, k, *position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    mixed, _ = attend(module, q, k, v, None, scaling=module.scaling, **others)
    return mixed.reshape(tokens, -1)


def _mlp(module: Any, x: Tensor) -> Tensor:
    gate, up = project(x.flatten(0, -2), module.gate_proj, module.up_proj)
    return project(pointwise.fast(pointwise.swiglu, gate)(gate, up), module.down_proj)[0].view(x.shape)


def _norm(module: Any, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def fuse(model: nn.Module) -> bool:
    """Make all decoder layers of `model` compute with the functions above, or none: False if one of them cannot.

    This needs Llama or Qwen2 layers and plain LoRA. On a GPU attention is that of `step`, and what is no matrix product
    is compiled (`pointwise`), and a training records the whole step (`step_graph`).
    """
    forwards: dict[Any, Any] = {}
    for module in model.modules():
        if isinstance(module, LlamaAttention | Qwen2Attention):
            layers = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
            plain = not module.attention_dropout and getattr(module, "sliding_window", None) is None
            forwards[module] = partial(_attention, module) if plain and all(map(_is_fusible, layers)) else None
        elif isinstance(module, LlamaMLP | Qwen2MLP):
            layers = (module.gate_proj, module.up_proj, module.down_proj)
            plain = isinstance(module.act_fn, nn.SiLU) or module.config.hidden_act == "silu"
            forwards[module] = partial(_mlp, module) if plain and all(map(_is_fusible, layers)) else None
        elif isinstance(module, LlamaRMSNorm | Qwen2RMSNorm):
            forwards[module] = None if module.weight.requires_grad else partial(_norm, module)
    if not forwards or None in forwards.values():
        return False
    for module, forward in forwards.items():
        module.forward = forward
    return True


def can_be_fused(shell: nn.Module) -> bool:
    """Whether `fuse` takes the layers of a model without adapters, once its weights are frozen. Nothing is changed."""
    trained = [p for p in shell.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        return fuse(shell)
    finally:
        unfuse(shell)
        for parameter in trained:
            parameter.requires_grad_(True)


def unfuse(model: nn.Module) -> None:
    """Restore the `forward` of every module."""
    for module in filter(_has_fused_forward, model.modules()):
        del module.forward


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has changed the model: all of FUSED or none, so the first one tells."""
    first = next((module for module in model.modules() if isinstance(module, FUSED)), None)
    return first is not None and _has_fused_forward(first)


def _has_fused_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in (_attention, _mlp, _norm)
