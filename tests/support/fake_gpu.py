"""A GPU without numbers: what a step does on it, copies to it and waits for is counted on any machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "is_nonzero", "item")
COPIES = ("_to_copy", "copy_")


class WaitCounter(TorchDispatchMode):
    """Counts the operations for which the host waits on a GPU.

    These read a number or a shape that only the GPU knows (`.item()`, a boolean mask), make a tensor of host data,
    which is then copied (`torch.tensor`), or copy from one device to another.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        result = self.compute(function, name, args, kwargs)
        if name in WAITS and self.is_waited_for(args):
            self.waits[name] += 1
        elif name.startswith("index") and any(map(_has_mask, args)) and self.is_waited_for(args):
            self.waits["mask"] += 1
        elif name in COPIES and len(devices_of(args, kwargs, result)) > 1 and not _is_left_alone(args, kwargs):
            self.waits["copy"] += 1
        return result

    def compute(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def is_waited_for(self, args: Any) -> bool:
        return True  # as if all tensors were on a GPU


class FakeCard(WaitCounter):
    """A GPU whose tensors have no numbers, beside a host whose tensors have some; waits for the GPU alone are counted.

    Enter a FakeTensorMode first. A number that is read from the GPU is 1.
    """

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def compute(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        device = torch.device(kwargs.get("device") or "cpu")
        if {*devices_of(args, kwargs), device.type} == {"cpu"}:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1.0
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with self.mode:
            return function(*args, **kwargs)

    def is_waited_for(self, args: Any) -> bool:
        return "cuda" in devices_of(args)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)


def devices_of(*parts: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)}


def _has_mask(argument: Any) -> bool:
    parts = argument if isinstance(argument, list | tuple) else ()
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _is_left_alone(args: Any, kwargs: Any) -> bool:
    """Whether a copy was asked for with `non_blocking`."""
    return bool(kwargs.get("non_blocking") or args[2:3] == (True,))


def put_on_fake_gpu(model: torch.nn.Module) -> None:
    """Exchange all weights for fake ones; within a FakeTensorMode."""
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
            setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))
        for name, old in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(old.shape, dtype=old.dtype, device="cuda"))


def lend_cuda_guard(folder: Path) -> str | None:
    """Register a device guard for CUDA that does nothing, as torch does itself in a build with CUDA.

    Args:
        folder: for the library, which a C++ compiler makes in two seconds.

    Returns:
        Why that cannot be done here; None if it is done.
    """
    if torch.version.cuda is not None:
        return None
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        return "this build of torch has no CUDA, and there is no C++ compiler to give it a device guard"
    source, library, parts = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(SOURCE)
    options = ["-std=c++20", "-shared", "-fPIC", "-w", f"-I{parts / 'include'}", f"-L{parts / 'lib'}", "-lc10"]
    made = subprocess.run([compiler, str(source), *options, "-o", str(library)], capture_output=True, text=True)
    if made.returncode:
        return f"the device guard does not compile here: {made.stderr[-200:]}"
    ctypes.CDLL(str(library))
    return None
