"""One training by several processes, each with a GPU of its own or a part of the CPU's cores.

The notebook's kernel is rank 0 and starts its peers, which run `main`. All processes go through the same rows, each
computes its share of a row's conversations, and torch's DistributedDataParallel, inside the transformers Trainer, sums
the gradients. A step is the same for any number of processes, except for the order of sums and, with lora_dropout, for
the random numbers of each process. A training that was killed continues bit for bit with two processes on a CPU; with
more, the order of sums may differ.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainingArguments

from telco_nb import ROOT
from telco_nb.lora import device, energy, step
from telco_nb.lora.base_model import load_model, silence_libraries
from telco_nb.lora.packing import PackedRows, only_row
from telco_nb.lora.step import TrainingError
from telco_nb.lora.trainer import PackedTrainer, TrainingMonitor
from telco_nb.study.machine import device_facts, die_with_parent

START_SECONDS = 600.0  # limit for a peer to load its model
GRACE_SECONDS = 120.0  # limit for this process to notice a dead peer itself, a guess: rows of large models take long
END_SECONDS = 10.0  # limit for a process to end after its connection has broken
POLL_SECONDS = 0.2
READY = "ready"
# The process groups of trainings that failed. Python destroys a group while it holds the interpreter's lock, and joins
# gloo's thread, which needs that lock to let go of the tensors of an exchange that never ended: both would wait.
_failed_groups: list[Any] = []
# An interrupt in Jupyter reaches the kernel's whole process group. Only the notebook reacts to it.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from telco_nb.lora import data_parallel; data_parallel.main()"
)


@dataclass(frozen=True)
class TrainingSpec:
    """All that a peer needs to build the notebook's trainer; `arguments` are those of TrainingArguments."""

    base_model: str
    dtype: torch.dtype
    quantization: str
    lora: Any  # peft.LoraConfig
    gradient_checkpointing: bool
    rows: PackedRows
    arguments: dict[str, Any]
    checkpoint: str | None
    checkpoint_seconds: float
    watts: tuple[float, float, float]
    idle_share: float
    device: str = "auto"
    base_model_revision: str | None = None
    fused_step: bool = True


@contextlib.contextmanager
def data_parallel(processes: int, spec: TrainingSpec, work: Path, log: Callable[[str], object]) -> Generator[None]:
    """Context in which a Trainer made here trains together with `processes - 1` peers; 1 process changes nothing.

    Args:
        processes: of the training, with this one.
        spec: the training.
        work: folder for the peers' output, `.process-<rank>.log`; the file of a peer that ended well is removed.
        log: receives a line before this process ends itself because a peer has died.

    Raises:
        TrainingError: a peer has died or is not ready in time.
    """
    if processes == 1:
        yield
        return
    if torch.distributed.is_initialized():
        raise TrainingError("the processes of a training that failed are still connected: restart the kernel.")
    peers: list[_Peer] = []
    finished = threading.Event()
    with tempfile.TemporaryDirectory(prefix="tnb-", ignore_cleanup_errors=True) as folder:
        rendezvous = Path(folder) / "store"
        try:
            for rank in range(1, processes):
                peers.append(_Peer(spec, rank, processes, rendezvous, work))
            for peer in peers:
                peer.wait_until_ready()
            threading.Thread(target=_watch_peers, args=(peers, finished, log), daemon=True).start()
            with _as_rank0(processes, rendezvous, peers):
                yield
        finally:
            finished.set()
            for peer in peers:
                peer.end()
            spec.rows.share = (0, 1)


class _Peer:
    """Another process of the training, as the notebook's process sees it."""

    def __init__(self, spec: TrainingSpec, rank: int, processes: int, rendezvous: Path, work: Path):
        self.rank, self.log = rank, work / f".process-{rank}.log"
        environment = os.environ | _group_environment(rank, processes)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(rendezvous)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT,
            )  # fmt: skip
        self.ready = threading.Event()
        threading.Thread(target=self._send_spec, args=(spec,), daemon=True).start()

    def _send_spec(self, spec: TrainingSpec) -> None:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # blocks until the peer has imported everything
            pickle.dump(spec, self.process.stdin)
            self.process.stdin.close()
        for line in self.process.stdout:
            if line.strip() == READY.encode():
                self.ready.set()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.ready.wait(POLL_SECONDS):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TrainingError(self.exit_message())

    @property
    def has_died(self) -> bool:
        return self.process.poll() not in (None, 0)

    def exit_message(self) -> str:
        """The exit code and the last line on standard error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = self.process.poll()
        state = "is not ready in time" if code is None else f"ended with code {code}"
        return f"process {self.rank + 1} of this training {state}" + (f": {lines[-1][:300]}" if lines else "")

    def end(self, wait_seconds: float = 0.0) -> None:
        """Kill the process if it does not end by itself in time. Its log stays unless its exit code is 0."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_seconds)
        self.process.kill()
        if self.process.wait() == 0:
            self.log.unlink(missing_ok=True)


def _group_environment(rank: int, processes: int) -> dict[str, str]:
    """Variables that accelerate reads, a share of the cores, and a network that stays inside this machine."""
    network = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo") if sys.platform == "linux" else {}
    return network | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(max(1, device_facts()["cores"] // processes)),
    }


@contextlib.contextmanager
def _as_rank0(processes: int, rendezvous: Path, peers: list[_Peer]) -> Generator[None]:
    """Context in which this process is the first of the group; afterwards it is alone again, with all its cores."""
    before, threads = dict(os.environ), torch.get_num_threads()
    try:
        os.environ.update(_group_environment(0, processes))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _join_group(0, processes, rendezvous)
        yield
        torch.distributed.destroy_process_group()
        for peer in peers:
            peer.end(END_SECONDS)
    except RuntimeError as error:
        _raise_if_peer_died(peers, error)
        raise
    finally:
        for peer in peers:  # first, because leaving the group waits for processes that still compute
            peer.end()
        # With NCCL leaving may wait forever for dead processes. The group stays, and the next training is refused.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            _failed_groups.append(torch.distributed.group.WORLD)
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads(threads)
        _reset_accelerate()


def _join_group(rank: int, processes: int, rendezvous: Path) -> None:
    """Enter the process group that accelerate will use; returns when all processes have entered."""
    _reset_accelerate()
    store = torch.distributed.FileStore(str(rendezvous), processes)
    backend = "nccl" if device.on_gpu() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes)


def _reset_accelerate() -> None:
    """accelerate determines the number of processes once; make it do so again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _watch_peers(peers: list[_Peer], finished: threading.Event, log: Callable[[str], object]) -> None:
    """End this process if a peer has died and this process still waits for it, as it may forever with NCCL."""
    while not finished.wait(POLL_SECONDS):
        for peer in peers:
            if peer.has_died and not finished.wait(GRACE_SECONDS):
                message = peer.exit_message()
                log(message)
                # In a kernel, output to descriptor 2 goes through a thread that would be too late.
                os.write(getattr(sys.stderr, "_original_stdstream_copy", 2), f"{message}\n".encode())
                os._exit(1)


def _raise_if_peer_died(peers: list[_Peer], error: RuntimeError) -> None:
    """Raise TrainingError if a peer's death caused `error`, also while a checkpoint was written."""
    if isinstance(error, TrainingError) and error.__cause__ is None:
        return
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and not any(peer.has_died for peer in peers):
        time.sleep(POLL_SECONDS)  # its connection breaks before the process has ended
    for peer in peers:
        if peer.has_died:
            raise TrainingError(peer.exit_message()) from error


def main() -> None:
    """Train as a peer. `sys.argv[1]` names the rendezvous file; after a failure stderr ends with the reason."""
    try:
        spec: TrainingSpec = pickle.load(sys.stdin.buffer)
        die_with_parent()
        _train_as_peer(spec, Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a normal end of Python would take seconds to shut torch down


def _train_as_peer(spec: TrainingSpec, rendezvous: Path) -> None:
    """Build the same trainer as the notebook, and train."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if spec.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(rank)  # first, or every process would take memory on the first card
    device.use_device(spec.device)
    silence_libraries()
    base, _ = load_model(spec.base_model, spec.dtype, spec.quantization, spec.base_model_revision)
    tuned = step.attach_adapters(base, spec.lora, spec.gradient_checkpointing)
    step.prepare_step(tuned, spec.fused_step)
    meter = energy.Meter(spec.watts, spec.idle_share)
    monitor = TrainingMonitor(meter, spec.checkpoint_seconds, spec.rows, log=lambda _: None)
    print(READY, flush=True)
    _join_group(rank, processes, rendezvous)
    arguments: dict[str, Any] = spec.arguments | {"disable_tqdm": True}
    trainer = PackedTrainer(
        tuned, TrainingArguments(**arguments), spec.rows, data_collator=only_row, callbacks=[monitor]
    )
    trainer.train(resume_from_checkpoint=spec.checkpoint)
    torch.distributed.destroy_process_group()
