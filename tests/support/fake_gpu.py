"""What a build of torch without CUDA lacks to run fake tensors that say they are on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


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
