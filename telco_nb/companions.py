"""One training by several processes, each with a GPU of its own or a part of the processor's cores.

The notebook's kernel is the first of them; the others, its companions, are `python -m telco_nb.companions`. All of them
go through the same rows, each computes its share of a row's conversations, and torch's DistributedDataParallel, inside
the transformers Trainer, adds the gradients up. So a step is the same step, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from telco_nb import ROOT, energy, model, training
from telco_nb.packing import PackedRows, only_row
from telco_nb.training import TrainingError

START_SECONDS = 600.0  # for a companion to load its model
GRACE_SECONDS = 30.0  # for an exchange of gradients to notice that the other side is gone
POLL_SECONDS = 0.2
READY = "ready"


@dataclass(frozen=True)
class Order:
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
def together(processes: int, order: Order, work: Path) -> Iterator[None]:
    """While this is open, a Trainer made here trains with `processes - 1` companions; with one process nothing changes.

    What companions say goes to `.companion-<n>.log` in `work`. Raises TrainingError if one of them dies.
    """
    if processes == 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [_Companion(order, rank, processes, port, work) for rank in range(1, processes)]
    over, finished = threading.Event(), False
    try:
        for companion in group:
            companion.wait_until_ready()
        threading.Thread(target=_watch_over, args=(group, over), daemon=True).start()
        with _as_first_of(processes, port):
            try:
                yield
            except RuntimeError as error:
                _blame(group, error)
                raise
        finished = True
    finally:
        over.set()
        for companion in group:
            companion.end(patient=finished)


class _Companion:
    """A process that trains along, as the notebook sees it. It ends when its standard input is closed."""

    def __init__(self, order: Order, rank: int, processes: int, port: int, work: Path):
        self.rank, self.log = rank, work / f".companion-{rank}.log"
        environment = os.environ | group_environment(rank, processes, port)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "telco_nb.companions"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT,
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(order, self.process.stdin)
            self.process.stdin.flush()
        self.ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.strip() == READY.encode():
                self.ready.set()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.ready.wait(POLL_SECONDS):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TrainingError(self.last_words())

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"process {self.rank + 1} of this training ended with code {self.process.poll()}{said}"

    def end(self, patient: bool) -> None:
        """Kill it; with `patient`, let it end by itself first."""
        if patient:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        self.process.kill()
        if self.process.wait() == 0:
            self.log.unlink()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def group_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables by which torch's processes find each other, and each one's share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
    }


@contextlib.contextmanager
def _as_first_of(processes: int, port: int) -> Iterator[None]:
    """This process as the first of a group; afterwards it is alone again, with all its cores."""
    variables, threads = group_environment(0, processes, port), torch.get_num_threads()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    _forget_group()
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _forget_group()
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _forget_group() -> None:
    """accelerate notes once and for all how many processes there are; let it look again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _watch_over(group: list[_Companion], over: threading.Event) -> None:
    """End this process if a companion has died and the exchange of gradients waits for it for ever, as NCCL's may."""
    while not over.wait(POLL_SECONDS):
        for companion in group:
            if companion.process.poll() not in (None, 0) and not over.wait(GRACE_SECONDS):
                print(companion.last_words(), file=sys.__stderr__, flush=True)
                os._exit(1)


def _blame(group: list[_Companion], error: RuntimeError) -> None:
    """Raise TrainingError if `error` comes from a companion's death."""
    if isinstance(error, TrainingError):
        return
    time.sleep(1.0)  # the connection may have broken before the process was gone
    for companion in group:
        if companion.process.poll() not in (None, 0):
            raise TrainingError(companion.last_words()) from error


# ---------------------------------------------------------------- the companion's side


def main() -> None:
    """Build what the notebook has built, and train along."""
    order: Order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model.quiet()
    base, _ = model.load(order.base_model, order.dtype, order.quantization)
    training.prepare_step(base)
    tuned = training.with_adapters(base, order.lora, order.gradient_checkpointing)
    training.prepare_step(tuned)
    print(READY, flush=True)
    watch = training.Watch(
        energy.Meter(order.watts, order.idle_share), order.checkpoint_seconds, order.rows, log=lambda _: None
    )
    arguments = TrainingArguments(**order.arguments | {"disable_tqdm": True})
    trainer = training.PackedTrainer(
        tuned, arguments, train_dataset=order.rows, data_collator=only_row, callbacks=[watch]
    )
    trainer.train(resume_from_checkpoint=order.checkpoint)
    torch.distributed.destroy_process_group()


def _end_with_input() -> None:
    """The notebook's process is gone, or wants no more."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
