"""One training by several processes, each with a GPU of its own or a part of the processor's cores.

The notebook's kernel is the first of them and starts the others, its companions, which run `main`. All of them go
through the same rows, each computes its share of a row's conversations, and torch's DistributedDataParallel, inside
the transformers Trainer, adds the gradients up. So a step is the same step, whatever the number of processes, but for
the order of sums and, with lora_dropout, for what is dropped: each process draws by itself. A training that was killed
goes on bit for bit with two processes on a processor; with more, sums may be in another order then.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainingArguments

from telco_nb import ROOT
from telco_nb.lora import energy, step
from telco_nb.lora.base_model import load_model, silence_libraries
from telco_nb.lora.packing import PackedRows, only_row
from telco_nb.lora.step import TrainingError
from telco_nb.lora.trainer import PackedTrainer, TrainingMonitor
from telco_nb.study.machine import device_facts, die_with_parent

START_SECONDS = 600.0  # for a companion to load its model
GRACE_SECONDS = 120.0  # for this process to notice that another is gone, a guess: rows of large models take a while
END_SECONDS = 10.0  # for a process whose connection has broken to be gone
POLL_SECONDS = 0.2
READY = "ready"
# An interrupt in Jupyter reaches the kernel's whole process group: what it means is the notebook's to decide.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from telco_nb.lora import data_parallel; data_parallel.main()"
)


@dataclass(frozen=True)
class TrainingSpec:
    """What a companion needs to build the trainer that the notebook builds; `arguments` are TrainingArguments'."""

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


# ---------------------------------------------------------------- the notebook's side


@contextlib.contextmanager
def data_parallel(processes: int, order: TrainingSpec, work: Path, log: Callable[[str], None]) -> Iterator[None]:
    """While this is open, a Trainer made here trains with `processes - 1` companions; with one process nothing changes.

    What companions say goes to `.companion-<n>.log` in `work`. Raises TrainingError if one of them dies.
    """
    if processes == 1:
        yield
        return
    if torch.distributed.is_initialized():
        raise TrainingError("the processes of a training that failed are still connected: restart the kernel.")
    meeting = Path(tempfile.mkdtemp(prefix="tnb-")) / "store"
    group: list[_PeerProcess] = []
    over = threading.Event()
    try:
        for rank in range(1, processes):
            group.append(_PeerProcess(order, rank, processes, meeting, work))
        for companion in group:
            companion.wait_until_ready()
        threading.Thread(target=_watch_peers, args=(group, over, log), daemon=True).start()
        with _as_rank0(processes, meeting, group):
            yield
    finally:
        over.set()
        for companion in group:
            companion.end()
        order.rows.share = (0, 1)
        shutil.rmtree(meeting.parent, ignore_errors=True)


class _PeerProcess:
    """A process that trains along, as the notebook sees it."""

    def __init__(self, order: TrainingSpec, rank: int, processes: int, meeting: Path, work: Path):
        self.rank, self.log = rank, work / f".companion-{rank}.log"
        environment = os.environ | _group_environment(rank, processes)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(meeting)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT,
            )  # fmt: skip
        self.ready = threading.Event()
        threading.Thread(target=self._talk, args=(order,), daemon=True).start()

    def _talk(self, order: TrainingSpec) -> None:
        with contextlib.suppress(BrokenPipeError):  # it takes the order when it has imported everything
            pickle.dump(order, self.process.stdin)
            self.process.stdin.close()
        for line in self.process.stdout:
            if line.strip() == READY.encode():
                self.ready.set()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.ready.wait(POLL_SECONDS):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TrainingError(self.last_words())

    @property
    def has_died(self) -> bool:
        return self.process.poll() not in (None, 0)

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        code = self.process.poll()
        what = "is not ready in time" if code is None else f"ended with code {code}"
        return f"process {self.rank + 1} of this training {what}{said}"

    def end(self, patience_seconds: float = 0.0) -> None:
        """Let it end by itself for so long, then kill it. Its log stays if it did not end well."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_seconds)
        self.process.kill()
        if self.process.wait() == 0:
            self.log.unlink(missing_ok=True)


def _group_environment(rank: int, processes: int) -> dict[str, str]:
    """What accelerate asks of the environment, each process's share of the cores, and no network outside of this
    machine (they meet in a file)."""
    inside = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo") if sys.platform == "linux" else {}
    return inside | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(max(1, device_facts()["cores"] // processes)),
    }


@contextlib.contextmanager
def _as_rank0(processes: int, meeting: Path, group: list[_PeerProcess]) -> Iterator[None]:
    """This process as the first of a group; afterwards it is alone again, with all its cores."""
    before, threads = dict(os.environ), torch.get_num_threads()
    try:
        os.environ.update(_group_environment(0, processes))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _join_group(0, processes, meeting)
        yield
        torch.distributed.destroy_process_group()
        for companion in group:
            companion.end(END_SECONDS)
    except RuntimeError as error:
        _name_dead_peer(group, error)
        raise
    finally:
        for companion in group:  # before this process leaves: it would wait for those that still compute
            companion.end()
        # NCCL may wait for ever for those that are gone; then the next training asks for a new kernel.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads(threads)
        _forget_group()


def _join_group(rank: int, processes: int, meeting: Path) -> None:
    """Enter the group; returns when all are there. accelerate uses a group that it finds."""
    _forget_group()
    store = torch.distributed.FileStore(str(meeting), processes)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes)


def _forget_group() -> None:
    """accelerate notes once and for all how many processes there are; let it look again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _watch_peers(group: list[_PeerProcess], over: threading.Event, log: Callable[[str], None]) -> None:
    """End this process if a companion has died and it waits for that one for ever, as it may with NCCL."""
    while not over.wait(POLL_SECONDS):
        for companion in group:
            if companion.has_died and not over.wait(GRACE_SECONDS):
                text = companion.last_words()
                log(text)
                # In a kernel, what is written to descriptor 2 goes through a thread that would not be in time.
                os.write(getattr(sys.stderr, "_original_stdstream_copy", 2), f"{text}\n".encode())
                os._exit(1)


def _name_dead_peer(group: list[_PeerProcess], error: RuntimeError) -> None:
    """Raise TrainingError if `error` comes from a companion's death, be it met while a checkpoint is written."""
    if isinstance(error, TrainingError) and error.__cause__ is None:
        return
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and not any(companion.has_died for companion in group):
        time.sleep(POLL_SECONDS)  # its connection breaks before it is gone
    for companion in group:
        if companion.has_died:
            raise TrainingError(companion.last_words()) from error


# ---------------------------------------------------------------- the companion's side


def main() -> None:
    """Train along; the last line on standard error says why not. `sys.argv[1]` names the file to meet in."""
    try:
        order: TrainingSpec = pickle.load(sys.stdin.buffer)
        die_with_parent()
        _train_as_peer(order, Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # to take torch down as Python does at its end would take seconds


def _train_as_peer(order: TrainingSpec, meeting: Path) -> None:
    """Build what the notebook has built, and train."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    silence_libraries()
    base, _ = load_model(order.base_model, order.dtype, order.quantization)
    tuned = step.attach_adapters(base, order.lora, order.gradient_checkpointing)
    step.prepare_step(tuned)
    meter = energy.Meter(order.watts, order.idle_share)
    watch = TrainingMonitor(meter, order.checkpoint_seconds, order.rows, log=lambda _: None)
    print(READY, flush=True)
    _join_group(rank, processes, meeting)
    arguments = TrainingArguments(**order.arguments | {"disable_tqdm": True})
    trainer = PackedTrainer(tuned, arguments, train_dataset=order.rows, data_collator=only_row, callbacks=[watch])
    trainer.train(resume_from_checkpoint=order.checkpoint)
    torch.distributed.destroy_process_group()
