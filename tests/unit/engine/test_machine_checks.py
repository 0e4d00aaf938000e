"""What is wrong with this machine is said before the first kernel starts."""

import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from telco_nb.engine import machine_checks, runner
from telco_nb.study.plan import Job

L4 = "NVIDIA L4"


@pytest.mark.parametrize(
    ("memory", "divided", "power", "said"),
    [
        ("3", "Disabled", "61.20", None),
        ("3", "[N/A]", "61.20", None),
        ("9000", "Disabled", "61.20", "GPU 0 already holds 9000 MiB of another process"),
        ("3", "Enabled", "[N/A]", r"GPU 0 is divided \(MIG\).* allocated a share"),
        ("3", "Disabled", "[N/A]", r"GPU 0 does not tell its power \(\[N/A\]\)"),
    ],
)
def test_a_gpu_whose_energy_is_not_that_of_a_job_alone_is_named_before_the_run(
    monkeypatch, memory, divided, power, said
):
    answers = {"index,memory.used": [["0", memory]], "index,mig.mode.current,power.draw": [["0", divided, power]]}
    monkeypatch.setattr(machine_checks, "_nvidia_smi", answers.__getitem__)
    found = machine_checks.find_warnings([Job("03_train", "c01", {"base_model": "m"}, ())])
    assert len(found) == (0 if said is None else 1) and re.match(said or "", "".join(found))
    assert machine_checks.find_warnings([Job("05_judge", "judge-x", {}, ())]) == []


def test_a_container_without_the_sensors_library_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(machine_checks, "_nvidia_smi", lambda names: [])
    parameters = {"base_model": "m", "device": "cuda"}
    (found,) = machine_checks.find_warnings([Job("03_train", "c01", parameters, ())])
    assert "energy of the GPU will be missing" in found and "NVIDIA_DRIVER_CAPABILITIES" in found
    assert machine_checks.find_warnings([Job("03_train", "c01", parameters | {"device": "cpu"}, ())]) == []


def gpu_job(device: str):
    return Job("03_train", "c01", {"device": device}, ())


def test_gpus_named_beside_device_cpu_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "_nvidia_smi", lambda names: [["0", "GPU-1"]])
    (problem,) = machine_checks.find_problems([gpu_job("cpu")], tmp_path, ("0",))
    assert "device is cpu" in problem and "Set device to cuda" in problem
    assert machine_checks.find_problems([gpu_job("cpu")], tmp_path) == []


def test_a_gpu_that_cannot_be_used_is_a_problem_of_the_machine_and_exit_code_3(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "TRY_GPU", "raise SystemExit({device!r} + ': driver too old')")
    monkeypatch.setattr(machine_checks, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine_checks.find_problems([gpu_job("cuda")], tmp_path) == ["cuda: driver too old"]
    monkeypatch.setattr(machine_checks, "nvidia_driver", lambda: None)
    assert machine_checks.find_problems([gpu_job("auto")], tmp_path) == [], "without a driver auto is the processor"
    monkeypatch.setattr(machine_checks, "nvidia_driver", lambda: "535.104.05")
    assert machine_checks.find_problems([gpu_job("auto")], tmp_path) == ["auto: driver too old"]
    state = SimpleNamespace(job=gpu_job("cuda"), decision="run")
    with pytest.raises(runner.UnfitError, match="driver too old"):
        runner.check_machine(Console(quiet=True), tmp_path, [state], ())


@pytest.mark.parametrize(
    ("device", "cards", "hidden", "said"),
    [
        ("cpu", [[L4]], None, f"the processor, because device is cpu (nvidia-smi lists {L4}, driver 535.104.05)"),
        ("cuda", [[L4]], None, f"a GPU, because device is cuda (nvidia-smi lists {L4}, driver 535.104.05)"),
        ("auto", [[L4]], None, f"a GPU, because device is auto and nvidia-smi lists {L4}, driver 535.104.05"),
        ("auto", [[L4]], "", "the processor, because device is auto and nvidia-smi lists "
         f"{L4}, driver 535.104.05, which CUDA_VISIBLE_DEVICES hides"),
        ("auto", [], None, "the processor, because device is auto and nvidia-smi lists no GPU"),
    ],
)  # fmt: skip
def test_the_plan_says_which_device_computes_and_why(monkeypatch, device, cards, hidden, said):
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(machine_checks, "_nvidia_smi", lambda names: cards)
    monkeypatch.setattr(machine_checks, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(machine_checks, "nvidia_driver", lambda: "535.104.05" if cards else None)
    assert machine_checks.device_line([gpu_job(device)]) == f"Training and answering compute on {said}."
    assert machine_checks.device_line([Job("05_judge", "study", {}, ())]) is None
