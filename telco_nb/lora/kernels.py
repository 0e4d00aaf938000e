"""The LoRA step in few, large operations: projections, attention and output head with their backward written out.

Autograd on top of transformers and peft computes the same, but spends most of a CPU step beside the matrix products: on
casts, on normalisation in many passes, on the slow backward of CPU attention and on a (tokens x vocabulary) array that
is written and read six times. `fuse` replaces the `forward` of single module objects, and nothing in transformers or
peft itself; parameters, their names and what is saved stay as they are.

Sources: LoRA, arXiv:2106.09685; RMSNorm, arXiv:1910.07467; rotary embedding, arXiv:2104.09864; that a cross-entropy can
hand over its gradient chunk by chunk while it is computed, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

LONGEST_SEGMENT = 1024  # tokens; longer conversations would keep too large an attention matrix for the backward pass
QUERY_BLOCK = 128  # tokens whose queries are taken at a time in float32; twice as many in 16 bits
HEAD_CHUNK = 256  # positions whose logits are alive at one time: more are hardly faster


# ---------------------------------------------------------------- frozen linear layers with adapters


class AdaptedLinears(Function):
    """y_i = x W_i' + s_i (x A_i') B_i' + bias_i for layers that share their input x (tokens, in).

    The A_i are applied together. No gradient of a frozen W_i is computed, and adapters are cast to the type of x: they
    are float32 whatever the base computes in.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        layers = _layer_tensors(flat)
        downs = [a for _, _, a, _ in layers if a is not None]
        down = torch.cat(downs).to(x.dtype) if downs else None
        narrow = x @ down.T if downs else None
        outputs, position = [], 0
        for (weight, bias, _, b), scale in zip(layers, scales, strict=True):
            y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
            if b is not None:
                y.addmm_(narrow[:, position : position + b.shape[1]], b.to(x.dtype).T, alpha=scale)
                position += b.shape[1]
            outputs.append(y)
        ctx.scales = scales
        ctx.save_for_backward(x if downs else None, narrow, down, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, narrow, down, *flat = ctx.saved_tensors
        dx, d_narrow, position, flat_gradients = None, torch.empty_like(narrow) if narrow is not None else None, 0, []
        for (weight, _, a, b), scale, dy in zip(_layer_tensors(flat), ctx.scales, gradients, strict=True):
            if ctx.needs_input_grad[0]:
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            db = None
            if b is not None:
                part = slice(position, position + b.shape[1])
                d_narrow[:, part] = (dy @ b.to(dy.dtype)).mul_(scale)
                db = (dy.T @ narrow[:, part]).to(b.dtype).mul_(scale)
                position += b.shape[1]
            flat_gradients.append([None, None, a, db])
        if narrow is not None:
            d_down, position = d_narrow.T @ x, 0
            for gradient in flat_gradients:
                if (a := gradient[2]) is not None:
                    gradient[2] = d_down[position : position + len(a)].to(a.dtype)
                    position += len(a)
            if dx is not None:
                dx.addmm_(d_narrow, down)
        return dx, None, *[g for gradient in flat_gradients for g in gradient]


def _layer_tensors(flat: Sequence[Any]) -> list[Sequence[Any]]:
    """(weight, bias, A, B) of each layer, from all of them in a row."""
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _lora_tensors(layer: nn.Module) -> tuple[tuple[Tensor | None, ...], float]:
    """((weight, bias, A, B), scale) of a plain or an adapted linear layer."""
    if isinstance(layer, nn.Linear):
        return (layer.weight, layer.bias, None, None), 0.0
    (name,) = layer.active_adapters
    base = layer.base_layer
    return (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of linear layers of one input x (tokens, in)."""
    parts = [_lora_tensors(layer) for layer in layers]
    return AdaptedLinears.apply(x, tuple(s for _, s in parts), *[t for tensors, _ in parts for t in tensors])


def _is_fusible(layer: nn.Module) -> bool:
    """Frozen linear, or peft's plain LoRA on one: no DoRA, dropout, trained bias, quantised weight, merged adapter."""
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


# ---------------------------------------------------------------- normalisation


class RMSNorm(Function):
    """RMSNorm with a frozen weight: w * x / rms(x), computed in float32, returned in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        inverse = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        )
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.to(torch.float32, copy=True).mul_(inverse)
        d_unit = (dy * weight).float()
        mean = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1).div_(x.shape[-1])
        return d_unit.sub_(unit.mul_(mean)).mul_(inverse).to(x.dtype), None, None


# ---------------------------------------------------------------- attention


@lru_cache(maxsize=8)
def _causal_mask(block: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(block * group, block): 0 where a query may look, else -inf; `group` query heads per key head."""
    mask = torch.full((block, block), -torch.inf, dtype=dtype, device=device).triu_(1)
    return mask.repeat_interleave(group, 0)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Rotary embedding of x (key heads, tokens, group, width) into `out`; with -sin it is undone."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class SegmentAttention(Function):
    """Rotary embedding and causal attention within each segment; a key head's queries are stacked, no key repeated.

    q (tokens, heads * width), k and v (tokens, key_heads * width); cos and sin (tokens, 1, width / 2). Queries are
    taken in blocks that see the keys up to their own end only: nearly half the work and memory of a long segment.
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
        mask, out, shares = _causal_mask(block, group, q.dtype, q.device), torch.empty_like(q), []
        for queries, keys, new in _blocks(segments, block, group):
            score = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
            score[..., -new:].add_(mask[: new * group, :new])
            shares.append(torch.softmax(score, -1))
            torch.bmm(shares[-1], v[:, keys], out=out[:, queries])
        ctx.segments, ctx.block, ctx.group, ctx.scale = segments, block, group, scale
        ctx.save_for_backward(q, k, v, out, cos, sin, *shares)
        return out.view(heads, tokens, -1).transpose(0, 1).reshape(tokens, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        q, k, v, out, cos, sin, *shares = ctx.saved_tensors
        heads, tokens, width = k.shape
        d_out = gradient.view(tokens, heads, -1).transpose(0, 1).reshape(q.shape)
        means = torch.linalg.vecdot(d_out.float(), out.float()).to(q.dtype).unsqueeze(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        blocks, written = zip([*_blocks(ctx.segments, ctx.block, ctx.group)][::-1], shares[::-1], strict=True), tokens
        for (queries, keys, _), share in blocks:  # from the last on, as a segment's last block sees all of its keys
            d_score = torch.bmm(d_out[:, queries], v[:, keys].transpose(1, 2)).sub_(means[:, queries]).mul_(share)
            torch.bmm(d_score, k[:, keys], out=dq[:, queries])
            _accumulate(dv[:, keys], share.transpose(1, 2), d_out[:, queries], first=keys.start < written)
            _accumulate(dk[:, keys], d_score.transpose(1, 2), q[:, queries], first=keys.start < written)
            written = keys.start
        dq, dk = (
            _apply_rotary(t.view(heads, tokens, -1, width), c, s, t.new_empty(tokens, heads, n, width).transpose(0, 1))
            for t, c, s, n in ((dq, cos * ctx.scale, -sin * ctx.scale, ctx.group), (dk, cos, -sin, 1))
        )
        return *[t.transpose(0, 1).reshape(tokens, -1) for t in (dq, dk, dv)], *[None] * 4


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Write the first product into `total`, add the others to it."""
    torch.bmm(left, right, out=total) if first else total.baddbmm_(left, right)


def _blocks(segments: list[int], block: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """(stacked queries, keys, tokens) of each block of queries, whose keys end where it does itself."""
    start = 0
    for length in segments:
        for first in range(start, start + length, block):
            last = min(first + block, start + length)
            yield slice(first * group, last * group), slice(start, last), last - first
        start += length


# ---------------------------------------------------------------- output head


class HeadLoss(Function):
    """Cross-entropy (float32, nats) of each position of `hidden` (n, width) with a frozen head (vocabulary, width).

    The gradient with respect to `hidden` is made in the same pass, chunk by chunk: logits are never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses, slopes = [], []
        room = hidden.new_empty(min(len(hidden), HEAD_CHUNK), len(weight))  # for every chunk: fresh arrays took longer
        wide = torch.empty_like(room, dtype=torch.float32) if room.dtype != torch.float32 else room
        for h, target in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True):
            narrow, logits = room[: len(h)], wide[: len(h)]
            logits.copy_(torch.mm(h, weight.T, out=narrow))
            highest = logits.amax(-1, keepdim=True)
            wanted = logits.gather(1, target[:, None])
            total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            losses.append((total.log() + highest - wanted).squeeze(1))
            if ctx.needs_input_grad[0]:
                slopes.append(torch.mm(narrow.copy_(logits), weight).float().div_(total).sub_(weight[target]))
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        ctx.dtype = hidden.dtype
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient[:, None]).to(ctx.dtype), None, None


@contextmanager
def without_lm_head(causal: nn.Module) -> Iterator[None]:
    """Within this context the model returns hidden states where it would return logits."""
    head, causal.lm_head = causal.lm_head, nn.Identity()
    try:
        yield
    finally:
        causal.lm_head = head


# ---------------------------------------------------------------- the modules of a decoder


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    segments: list[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if segments is None or past_key_values is not None or max(segments) > LONGEST_SEGMENT:
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, segments=segments, **others
        )
    x = hidden_states[0]
    q, k, v = project(x, module.q_proj, module.k_proj, module.v_proj)
    half = module.head_dim // 2  # the second half of cos and sin repeats the first
    cos, sin = (t[0, :, None, :half] for t in position_embeddings)
    mixed = SegmentAttention.apply(q, k, v, cos, sin, segments, module.head_dim)
    return project(mixed, module.o_proj)[0][None], None


def _mlp(module: Any, x: Tensor) -> Tensor:
    gate, up = project(x.flatten(0, -2), module.gate_proj, module.up_proj)
    return project(F.silu(gate) * up, module.down_proj)[0].view(x.shape)


def _norm(module: Any, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def fuse(model: nn.Module) -> bool:
    """Make the decoder layers of `model` compute with the functions above; False, and nothing done, if one cannot.

    Llama and Qwen2 layers on a CPU, plain LoRA. A GPU keeps peft's layers: there, the waiting is elsewhere.
    """
    forwards = {}
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
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if not on_cpu or not forwards or None in forwards.values():
        return False
    for module, forward in forwards.items():
        module.forward = forward
    return True


def unfuse(model: nn.Module) -> None:
    """Give every module its own `forward` back."""
    for module in filter(_has_fused_forward, model.modules()):
        del module.forward


def is_fused(model: nn.Module) -> bool:
    return any(map(_has_fused_forward, model.modules()))


def _has_fused_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in (_attention, _mlp, _norm)
