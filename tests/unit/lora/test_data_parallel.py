"""A training that several processes share is the training of one, and leaves nothing behind when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from loopback import python_path
from peft import LoraConfig
from safetensors.torch import load_file
from test_kernels import fake_examples
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback, TrainingArguments

from telco_nb import ROOT
from telco_nb.lora import base_model, data_parallel, energy, packing, preflight, step
from telco_nb.lora.errors import PreflightError
from telco_nb.lora.step import TrainingError
from telco_nb.lora.trainer import PackedTrainer, TrainingMonitor, constant_arguments, last_checkpoint, sum_readings

SCRIPT = """
import sys
sys.path.insert(0, "tests/unit/lora")
from pathlib import Path
from test_data_parallel import spec_of, train
found = train(spec_of(Path(sys.argv[1]), Path(sys.argv[2]), epochs=8), 2, Path(sys.argv[2]))
print("windows:", found["meter"]["n_windows"])
"""


pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU cannot serve two processes")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random Qwen2, of the architecture of the paper's model, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(base_model.resolve_model(base_model.PACKAGED_MODEL))
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spec_of(base: Path, work: Path, epochs: int = 4) -> data_parallel.TrainingSpec:
    """Four rows; from one with a single conversation one process of two has nothing to learn."""
    work.mkdir(exist_ok=True)
    rows = packing.PackedRows(fake_examples((9, 12, 14, 17, 20, 23, 40, 62)), 64, 0)
    assert len(rows) == 4 and min(map(len, rows.rows)) == 1 < max(map(len, rows.rows))
    lora = LoraConfig(r=4, target_modules=step.TARGET_MODULES["all"], task_type="CAUSAL_LM")
    arguments = {"output_dir": work / ".checkpoints", "num_train_epochs": epochs, "learning_rate": 0.02}
    arguments |= {"per_device_train_batch_size": 1, "disable_tqdm": True, **constant_arguments()}
    checkpoint = last_checkpoint(work / ".checkpoints", rows.fingerprint)
    watts = (2.0, 5.0, 12.0)
    return data_parallel.TrainingSpec(
        str(base), torch.float32, "none", lora, False, rows, arguments, checkpoint, 60.0, watts, 0.3
    )


def tuned_model(spec: data_parallel.TrainingSpec):
    loaded, _ = base_model.load_model(spec.base_model, spec.dtype)
    torch.manual_seed(1)
    tuned = step.attach_adapters(loaded, spec.lora)
    step.prepare_step(tuned)
    return tuned


def fit(tuned, spec: data_parallel.TrainingSpec, processes: int, work: Path, *callbacks) -> tuple:
    """The training cell of 03_train."""
    meter = energy.Meter(spec.watts, spec.idle_share)
    watch = TrainingMonitor(meter, spec.checkpoint_seconds, spec.rows, log=print)
    with data_parallel.data_parallel(processes, spec, work, print):
        trainer = PackedTrainer(
            tuned, TrainingArguments(**spec.arguments), train_dataset=spec.rows,
            data_collator=packing.only_row, callbacks=[watch, *callbacks],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=spec.checkpoint)
    return trainer, meter.readings()


def train(spec: data_parallel.TrainingSpec, processes: int, work: Path, *callbacks) -> dict:
    """A whole training; the adapter is saved in `work`."""
    tuned = tuned_model(spec)
    trainer, readings = fit(tuned, spec, processes, work, *callbacks)
    tuned.save_pretrained(work / "adapter")
    losses = [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]
    return {"losses": losses, "weights": weights(work), "meter": readings}


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "adapter" / "adapter_model.safetensors")


def peers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "data_parallel.main()" in " ".join(p.cmdline())]


class Signaller(TrainerCallback):
    """Sends a signal to the peer in the middle of the training."""

    def __init__(self, number: int):
        self.number = number

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            peers()[0].send_signal(self.number)


def test_two_processes_take_the_same_steps_as_one(base, tmp_path):
    alone = train(spec_of(base, tmp_path / "1"), 1, tmp_path / "1")
    both = train(spec_of(base, tmp_path / "2"), 2, tmp_path / "2", Signaller(signal.SIGINT))  # which it ignores
    again = train(spec_of(base, tmp_path / "3"), 1, tmp_path / "3")
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(both["losses"]) == 4 * 4
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(both["weights"][name], weight, rtol=1e-2, atol=1e-4)
    assert all(torch.equal(weight, again["weights"][name]) for name, weight in alone["weights"].items())
    assert all(weight.abs().max() > 0.01 for name, weight in both["weights"].items() if "lora_B" in name)  # 0 at first
    assert not peers() and "WORLD_SIZE" not in os.environ


def test_readings_are_those_of_all_processes_and_the_first_one_s_clock(monkeypatch):
    own = {"window_s": 10.0, "cpu_s": 3.0, "rapl_j": 7.0, "gpu_j": 100.0, "tracker_cpu_s": 10.0, "tracker_gpu_j": 90.0}
    other = {
        "window_s": 11.0,
        "cpu_s": 4.0,
        "rapl_j": 8.0,
        "gpu_j": 200.0,
        "tracker_cpu_s": 11.0,
        "tracker_gpu_j": 80.0,
    }
    meter = energy.Meter((2.0, 5.0, 12.0), 0.3)
    own |= {"gpu_half_j": 5.0, "battery_j": None, "battery_half_j": None}
    meter.restore(own | {"n_windows": 2})
    assert sum_readings(meter) == own | {"n_windows": 2}

    def gather(found: list, mine: dict) -> None:
        found[:] = [mine, other | {"gpu_half_j": 10.0, "n_windows": 2}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sums = {"cpu_s": 7.0, "gpu_j": 300.0, "gpu_half_j": 15.0, "tracker_gpu_j": 170.0}
    assert sum_readings(meter) == own | {"n_windows": 2} | sums


def test_the_death_of_a_peer_is_named_and_leaves_nobody_behind(base, tmp_path):
    kept = len(data_parallel._failed_groups)
    with pytest.raises(TrainingError, match="process 2 of this training ended with code -9"):
        train(spec_of(base, tmp_path), 2, tmp_path, Signaller(signal.SIGKILL))
    assert not peers() and not torch.distributed.is_initialized()
    assert len(data_parallel._failed_groups) == kept + 1, "a group whose exchange never ended must not be destroyed"


class BadThere(packing.PackedRows):
    """Rows that cannot be read in another process than this one, but for the first."""

    def __init__(self, rows: packing.PackedRows):
        vars(self).update(vars(rows), home=os.getpid())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if os.getpid() != self.home and index != 0:
            raise ValueError("a bad row")
        return super().__getitem__(index)


@pytest.mark.nightly  # what a peer cannot start with is named in every run
def test_what_a_peer_raises_is_named(base, tmp_path, monkeypatch):
    spec = spec_of(base, tmp_path)
    spec = replace(spec, rows=BadThere(spec.rows))
    monkeypatch.setenv("PYTHONPATH", python_path(Path(__file__).parent))  # where the peer finds this class
    with pytest.raises(TrainingError, match=r"process 2 of this training ended with code 1: ValueError: a bad row"):
        fit(tuned_model(spec), spec, 2, tmp_path)
    assert not peers() and "RANK" not in os.environ


def test_after_an_interrupt_the_training_cell_can_be_run_again(base, tmp_path, monkeypatch):
    spec, calls, plain = spec_of(base, tmp_path), [], step.token_losses

    def interrupted(*given):
        losses = plain(*given)
        calls.append(1)
        if len(calls) == 6:  # behind the forward pass: the exchange of gradients is still to come
            raise KeyboardInterrupt
        return losses

    tuned = tuned_model(spec)
    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it the objects of the failed call, as in IPython
        fit(tuned, spec, 2, tmp_path)
    assert not peers() and not torch.distributed.is_initialized() and spec.rows.share == (0, 1)
    for processes in (2, 1, 2):
        assert fit(tuned, spec, processes, tmp_path)[0].state.global_step == 16
    assert kept.tb


def test_a_peer_that_cannot_start_says_why(base, tmp_path):
    spec = replace(spec_of(base, tmp_path), base_model="gone.gguf")
    expected = pytest.raises(TrainingError, match=r"process 2 of this training ended with code 1: .*there is no file")
    with expected, data_parallel.data_parallel(2, spec, tmp_path, print):
        raise AssertionError("it was not waited for")


@pytest.mark.nightly  # a training of one process is killed in every run
def test_a_shared_training_killed_at_once_goes_on_bit_for_bit(base, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    windows = train(spec_of(base, whole, epochs=8), 2, whole)["meter"]["n_windows"]
    killed = run(base, cut)
    while not any(cut.glob(".checkpoints/*/progress.json")):
        assert killed.poll() is None
        time.sleep(0.002)
    family = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(family, timeout=30)[1]
    assert not (cut / "adapter").exists()
    text, _ = run(base, cut).communicate()
    assert "resumed at step" in text and f"windows: {windows}" in text  # every epoch's, and each once
    assert all(torch.equal(weight, weights(cut)[name]) for name, weight in weights(whole).items())


def run(base: Path, work: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(base), str(work)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_more_processes_than_there_are_cores_or_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(preflight, "device_facts", lambda: {"cores": 2})
    preflight.check_processes(2)
    with pytest.raises(PreflightError, match="processes is 3, and this notebook may use 2 cores"):
        preflight.check_processes(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preflight, "on_gpu", lambda: True)
    with pytest.raises(PreflightError, match=r"may use 1 GPU: one is needed for each\. .* name more with --gpus"):
        preflight.check_processes(2)
