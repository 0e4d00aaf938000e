"""The device is the one that the parameters name, or the run ends with the reason; a GPU's probe is one of a GPU."""

import types

import pytest
import torch

from telco_nb.lora import device
from telco_nb.lora.device import is_out_of_memory
from telco_nb.lora.errors import PreflightError
from telco_nb.lora.trainer import constant_arguments


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    monkeypatch.setattr(device, "_chosen", {"device": "auto"})


@pytest.fixture
def gpu_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(device, "gpu_fault", lambda: None)


def test_cpu_is_used_beside_a_gpu_if_the_parameter_says_so(gpu_here):
    assert device.use_device("cpu") == torch.device("cpu")
    assert not device.on_gpu()
    assert constant_arguments()["use_cpu"] and constant_arguments()["optim"] == "adamw_torch"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_is_used_where_there_is_one_with_the_fused_optimiser(gpu_here, wanted):
    assert device.use_device(wanted) == torch.device("cuda", 0)
    assert constant_arguments()["optim"] == "adamw_torch_fused" and not constant_arguments()["use_cpu"]


def test_a_cuda_that_cannot_start_ends_the_run_with_the_reason_and_the_driver_needed(monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update.")

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.init", too_old)
    monkeypatch.setattr(device, "nvidia_driver", lambda: "535.104.05")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for wanted in ("cuda", "auto"):
        with pytest.raises(PreflightError, match=r"too old.*needs driver 580 or newer; the driver here is 535\."):
            device.use_device(wanted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.use_device("auto").type == "cpu", "whoever hides the cards wants the processor"


def test_cuda_with_a_torch_for_processors_is_refused_and_auto_takes_the_processor(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(device, "nvidia_driver", lambda: "580.65.06")
    with pytest.raises(PreflightError, match="a build for processors"):
        device.use_device("cuda")
    assert device.use_device("auto").type == "cpu"


class FakeEvent:
    """An event of a GPU on which every product takes 2 ms, and the first ones 900 ms."""

    made = 0

    def __init__(self, enable_timing: bool):
        FakeEvent.made += 1
        self.milliseconds = 900.0 if FakeEvent.made <= 2 * device.WARM_UP_PRODUCTS else 2.0

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.milliseconds


def test_the_probe_of_a_gpu_is_timed_by_its_events_after_a_warm_up(monkeypatch):
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    a = torch.ones(8, 8)
    assert device._gpu_seconds(a, a) == pytest.approx(0.002)
    assert device.PROBE_SIDE == 8192


@pytest.mark.parametrize(("native", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_if_it_has_units_for_it(gpu_here, monkeypatch, native, chosen):
    monkeypatch.setattr(device, "matmul_gflops", lambda dtype: 100.0)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert device.choose_dtype("auto")[0] == chosen


def test_the_data_sheet_is_known_by_the_cards_full_name_and_missing_for_others(gpu_here, monkeypatch):
    found = {}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A10G"):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        found[name] = device.data_sheet_gflops(torch.bfloat16)
    assert list(found.values()) == [989_400.0, 756_000.0, None]
    assert device.data_sheet_gflops(torch.float32) is None
    device.use_device("cpu")
    assert device.data_sheet_gflops(torch.bfloat16) is None


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "unable to mmap 8 bytes from file <model.safetensors>: Cannot allocate memory (12)",
    ],
)
def test_memory_that_ran_out_is_seen_by_every_name(text):
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("any text"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
    ],
)
def test_another_failure_is_not_taken_for_a_lack_of_memory(text):
    assert not is_out_of_memory(RuntimeError(text))


def test_the_facts_of_a_machine_name_its_cards_and_driver(monkeypatch):
    import pynvml

    from telco_nb.study import machine

    assert machine.gpu_facts()["gpus"] == [] or torch.cuda.is_available()
    answers = {
        "nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda h: "NVIDIA L4", "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetMemoryInfo": lambda h: types.SimpleNamespace(total=24_000_000_000),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    card = {"name": "NVIDIA L4", "memory_bytes": 24_000_000_000}
    found = machine.gpu_facts()
    assert found == {"gpus": [card], "gpu_driver": "580.65.06", "cuda": "13.0"}
    older = {"cpu": "EPYC", "cores": 8}
    assert machine.device_text(older | found) == "EPYC, 8 cores, NVIDIA L4, driver 580.65.06"
    assert (
        machine.device_text(older) == machine.device_text(older | {"gpus": [], "gpu_driver": None}) == "EPYC, 8 cores"
    )


def test_the_driver_is_read_from_the_kernel(tmp_path):
    from telco_nb.study.machine import nvidia_driver

    file = tmp_path / "version"
    assert nvidia_driver(file) is None
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert nvidia_driver(file) == "535.104.05"


def test_a_gpu_computes_the_same_bits_only_while_it_trains(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    with device.repeatable():
        assert not torch.are_deterministic_algorithms_enabled(), "a processor needs no such mode"
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    with pytest.raises(ZeroDivisionError), device.repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a warning alone would change nothing"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        _ = 1 / 0
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before


def test_work_that_runs_out_of_memory_is_done_in_halves_and_keeps_the_order():
    sizes = []

    def work(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in items]

    assert device.halving(list(range(7)), work) == [2 * i for i in range(7)] and sizes == [7, 3, 1, 2, 4, 2, 2]
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes")):

        def fails(items, error=error):
            raise error

        with pytest.raises(type(error)):
            device.halving([1], fails)
