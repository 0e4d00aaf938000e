"""The device that computes: chosen by the parameter `device`, its speed as measured and as its data sheet says."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from telco_nb.lora.errors import PreflightError
from telco_nb.study.machine import nvidia_driver
from telco_nb.study.memory import free_main_memory

T = TypeVar("T")
Item = TypeVar("Item")
PROBE_ROUNDS = 4  # measurements of each format; the best counts
PROBE_SECONDS = 0.02  # duration of a measurement of matmul speed on a processor
PROBE_SIDE, PROBE_PRODUCTS, WARM_UP_PRODUCTS = 8192, 10, 3  # of matrix products on a GPU
CLEARLY_FASTER = 1.5  # measured: 4.6 with AVX512-BF16; 0.7 to 1.1, by chance, on a processor without
DRIVERS = {"11": 450, "12": 525, "13": 580}  # major version of CUDA -> oldest driver (NVIDIA, CUDA release notes)
# TFLOP/s of dense bfloat16 products with sums in float32, from NVIDIA's data sheets, by the name that the driver gives.
DATA_SHEET_TFLOPS = {
    "NVIDIA A10": 125.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}

NO_MEMORY = re.compile(  # what stands in the message of a plain RuntimeError
    "out of memory|(can't|cannot|not) allocate|not enough memory|ALLOC_FAILED|ALLOCATION_FAILED"
    "|NOT_INITIALIZED when calling `cublasCreate",  # what cuBLAS says where its workspace finds no room
    re.IGNORECASE,
)
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `repeatable` needs; before cuBLAS starts

_chosen = {"device": "auto"}


def use_device(wanted: str) -> torch.device:
    """Choose the device of this process.

    Args:
        wanted: "cpu", "cuda", or "auto" for a GPU if torch can use one.

    Returns:
        The device, as `torch_device` gives it from now on.

    Raises:
        PreflightError: "cuda" without a GPU that starts, or "auto" beside a GPU that does not: a model of the paper's
            size would train on the processor for weeks.
    """
    _chosen["device"] = wanted
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    expected = wanted == "cuda" or (wanted == "auto" and torch.version.cuda and nvidia_driver() and not hidden)
    if expected and (fault := gpu_fault()):
        raise PreflightError(f"device is {wanted}, and no GPU can be used: {fault} Or set device to cpu.")
    return torch_device()


def gpu_fault() -> str | None:
    """Why torch cannot compute on a GPU here, with the remedy; None if it can."""
    if torch.version.cuda is None:
        return "this torch is a build for processors. Install one with CUDA (https://pytorch.org/get-started)."
    try:
        torch.cuda.init()
        torch.ones(1, device="cuda").add(1).item()
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, no card, or a card that is too old
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        needed = DRIVERS.get(torch.version.cuda.partition(".")[0])
        least = f", which needs driver {needed} or newer" if needed else ""
        driver = nvidia_driver() or "none"
        return f"{reason}. This torch is built for CUDA {torch.version.cuda}{least}; the driver here is {driver}."
    return None


def on_gpu() -> bool:
    """True if this process computes on a GPU."""
    return _chosen["device"] != "cpu" and torch.cuda.is_available()


def torch_device() -> torch.device:
    """This process's GPU, with its number because each of several processes has its own; else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def forget_peak() -> None:
    """Give unused memory of this process's GPU back, and let `peak_gpu_bytes` begin anew."""
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gpu_bytes() -> int | None:
    """The most memory that this process has held on its GPU since `forget_peak`, recorded steps included; None without
    a GPU."""
    return torch.cuda.max_memory_reserved() if on_gpu() else None


def wait_for_gpu() -> None:
    """Wait until this process's GPU has done what was launched, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def free_memory(processes: int = 1) -> float:
    """Free bytes for each of `processes` processes: of this process's GPU, or without one of main memory."""
    if on_gpu():
        return float(torch.cuda.mem_get_info()[0])
    return free_main_memory(processes)


def use_fixed_order(strict: bool) -> None:
    """Let operations on a GPU add in a fixed order: all of them, or an error; not `strict`, those that can."""
    torch.use_deterministic_algorithms(True, warn_only=not strict)


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device, main memory, or a library on the GPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(NO_MEMORY.search(str(error)))


def halving(items: list[Item], work: Callable[[list[Item]], list[T]]) -> list[T]:
    """The results of work on items at once, or where memory runs out on each half of them, and so on.

    Raises:
        RuntimeError or MemoryError: of the work; also if memory runs out with one item.
    """
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    if on_gpu():  # outside of the except block: the error keeps the arrays of the work alive
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return halving(items[:middle], work) + halving(items[middle:], work)


def in_fixed_order(work: Callable[[], T]) -> tuple[T, bool]:
    """Do work so that it gives the same bits each time, or where a part of it knows no fixed order, without.

    Returns:
        (what the work returns, whether all of it has a fixed order).
    """
    try:
        with repeatable():
            return work(), True
    except RuntimeError as error:
        if not knows_no_order(error):
            raise
    with repeatable(strict=False):  # outside of the except block: the error keeps the arrays of the work alive
        return work(), False


def knows_no_order(error: BaseException) -> bool:
    """True if an operation on a GPU refused to compute because it cannot add in a fixed order."""
    return "deterministic" in str(error)


@contextmanager
def repeatable(strict: bool = True) -> Generator[None]:
    """Context in which a GPU computes the same bits each time, so that a resumed training ends like an undisturbed one.

    Without it the backward pass of FlashAttention adds in the order in which its blocks end. An operation that knows no
    fixed order raises RuntimeError. Not `strict`, attention is left as it is, and such operations warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if on_gpu():
        use_fixed_order(strict)
        memory.fill_uninitialized_memory = False  # that would write every new array once more
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def choose_dtype(wanted: str) -> tuple[torch.dtype, dict[str, float]]:
    """Choose the number format of the computation.

    A GPU computes in bfloat16 if it has units for it. bfloat16 is several times as fast on processors with AVX512-BF16
    or AMX and slower on others, so both are timed. It must win clearly: where the two are close, noise would choose
    another format for each configuration, and their losses and answers would differ for that reason alone.

    Args:
        wanted: "float32", "bfloat16", or "auto".

    Returns:
        (format, speed of a matrix product in GFLOP/s by format name).
    """
    gflops: dict[str, float] = {}
    for _ in range(PROBE_ROUNDS):  # in turns: the first products of a process are slow, whatever their format
        for tried in (torch.float32, torch.bfloat16):
            name = str(tried).removeprefix("torch.")
            gflops[name] = max(gflops.get(name, 0.0), matmul_gflops(tried))
    if on_gpu():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = gflops["bfloat16"] >= CLEARLY_FASTER * gflops["float32"]
    chosen = ("bfloat16" if fast else "float32") if wanted == "auto" else wanted
    return getattr(torch, chosen), gflops


def matmul_gflops(dtype: torch.dtype) -> float:
    """Speed in GFLOP/s of a matrix product, the fastest of several; a busy machine slows most, rarely all.

    Measure before and after a training and take the larger value: one measurement may meet a busy moment. On a GPU the
    matrices are large: a small product is over before the next one is started, and says nothing about the card.
    """
    m, k, n = (PROBE_SIDE,) * 3 if on_gpu() else (1024, 576, 1536)
    a, b = torch.ones(m, k, dtype=dtype, device=torch_device()), torch.ones(k, n, dtype=dtype, device=torch_device())
    return 2 * m * k * n / (_gpu_seconds(a, b) if on_gpu() else _cpu_seconds(a, b)) / 1e9


def _cpu_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    best, deadline = math.inf, time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < deadline or best == math.inf:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return best


def _gpu_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """By the GPU's own clock, after products that load the kernels and raise the clock rate."""
    out, best = torch.empty(len(a), b.shape[1], dtype=a.dtype, device=a.device), math.inf
    for i in range(WARM_UP_PRODUCTS + PROBE_PRODUCTS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        if i >= WARM_UP_PRODUCTS:
            best = min(best, start.elapsed_time(end) / 1e3)  # it tells milliseconds
    return best


def data_sheet_gflops(dtype: torch.dtype) -> float | None:
    """What the card's data sheet promises, in GFLOP/s; None for an unknown card, another format, or a processor."""
    if not on_gpu() or dtype != torch.bfloat16:
        return None
    tflops = DATA_SHEET_TFLOPS.get(torch.cuda.get_device_name())
    return None if tflops is None else 1e3 * tflops
