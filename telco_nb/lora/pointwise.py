"""The parts of a step that are no matrix products, each as one function of tensors without state.

On a GPU `torch.compile` makes one or two kernels of each function, which reads and writes its arrays once instead of
three to ten times. Where no compiler works, and on a processor, they run as they are written: there compiling took 23
to 45 s and made the step 2 to 13 % faster. On an H100 in the shape of Qwen2.5-3B the compiled functions save the card
a quarter of its time, and cost the host so much that the step is slower, unless it is recorded (`step_graph`).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

COMPILED_ON = {"cuda"}  # types of devices
COMPILER: dict[str, Any] = {"fullgraph": True}  # all of a function or an error, never a part of it


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """w * x / rms(x) in the type of x, and 1 / rms(x) in float32, for x of (..., width)."""
    x32 = x.to(torch.float32, copy=True)
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return x32.mul_(inverse).to(x.dtype).mul_(weight), inverse


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x, from that of the result of `norm_forward` and what it was made of."""
    unit = x.to(torch.float32, copy=True).mul_(inverse)
    d_unit = (dy * weight).float()
    mean = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1).div_(x.shape[-1])
    return d_unit.sub_(unit.mul_(mean)).mul_(inverse).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with autograd's gradient."""
    return F.silu(gate) * up


def chunk_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row of float32 `logits` (n, vocabulary), nats, and the sum of its exponentials, (n, 1).

    Afterwards `logits` hold the exponentials, each row's maximum taken off before.
    """
    maximum = logits.amax(-1, keepdim=True)
    target = logits.gather(1, labels[:, None])
    total = logits.sub_(maximum).exp_().sum(-1, keepdim=True)
    return (total.log() + maximum - target).squeeze(1), total


def fast(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """A function of this module, compiled if that is done on the device of the tensor `like`."""
    return _compiled(function) if is_compiled(like.device) else function


def is_compiled(device: torch.device) -> bool:
    """Whether `fast` compiles on this device."""
    return device.type in COMPILED_ON and compiler_fault(device.type) is None


@cache
def compiler_fault(device_type: str) -> str | None:
    """Why nothing can be compiled for this type of device; None if a first function was compiled and has run."""
    if device_type == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        return "no C compiler is found"
    try:
        torch.compile(F.silu, **COMPILER)(torch.ones(3, device=device_type))
    except Exception as error:  # a compiler's errors are of many types, and the step works without one
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled until the compiler fails: torch compiles 8 variants of it at most, then it raises."""
    used = torch.compile(function, **COMPILER)

    def call(*arguments: Any) -> Any:
        nonlocal used
        try:
            return used(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything was computed
            if used is function:
                raise
            used = function
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"{getattr(function, '__name__', function)} is no longer compiled: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*arguments)

    return call
