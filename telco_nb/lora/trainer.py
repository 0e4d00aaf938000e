"""The transformers Trainer around the packed step: checkpoints, resuming, the loss curve, the energy window."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from telco_nb.lora import step_graph
from telco_nb.lora.device import (
    forget_peak,
    halving,
    in_fixed_order,
    is_out_of_memory,
    knows_no_order,
    on_gpu,
    peak_gpu_bytes,
    repeatable,
    use_fixed_order,
    wait_for_gpu,
)  # fmt: skip
from telco_nb.lora.packing import Example, PackedRows, collate, micro_batches, pack_rows, to_device
from telco_nb.lora.step import TrainingError, token_losses
from telco_nb.lora.step_graph import StepGraph
from telco_nb.study.record import write_json

# Writing checkpoints takes this share of a training's time at most, and SAVING_FREE_S: 1.44 GB may take 3 s or 30 s.
SAVING_SHARE, SAVING_FREE_S = 0.02, 1.0
# Of PackedRows, for a resumed training: how it cuts and computes its rows, and what is told of it.
ROWS_STATE = ("micro_batch_tokens", "shrunk", "fitted", "recorded", "graph_fault", "repeats", "peak_bytes")
PROGRESS = "progress.json"  # in a checkpoint: the meter's readings, and how rows are computed
WARM_UP_STEPS = 5
WARMED_UP_ON = {"cuda"}  # types of devices; on a processor nothing is compiled, and 03's checks have warmed it up
STEPS_TO_JUDGE = 20  # whether a training diverges: a quarter of them has to stand for the data
PER_PROCESS_READINGS = (
    "cpu_s",
    "gpu_j",
    "gpu_half_j",
    "tracker_gpu_j",
)  # readings of a meter that cover its own process only


class PackedTrainer(Trainer):
    """The transformers Trainer with the packed step; arguments are the Trainer's, `train_dataset` is a PackedRows.

    The loss is summed over the supervised tokens of an optimiser step and divided by their number. `saving_seconds`
    is the time spent on checkpoints. `graph` holds the recorded step while a GPU trains with one. How rows are computed
    is kept at the rows, which a checkpoint holds: `recorded`, `graph_fault`, `repeats`, `peak_bytes`.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: PackedRows,
        record_step: bool = True,
        **options: Any,
    ):
        # One process drives one GPU. With several GPUs transformers would split a row, which is one sequence.
        args._n_gpu = min(1, args.n_gpu)
        # An earlier training of this model leaves the mark behind; several processes must wrap the model again.
        vars(model).pop("_is_accelerate_prepared", None)
        super().__init__(model, args, train_dataset=train_dataset, **options)
        self.remove_callback(PrinterCallback)  # TrainingMonitor writes the step log
        self.trained = [p for p in model.parameters() if p.requires_grad]  # to walk through all modules takes 5 ms
        self.rows = train_dataset
        self.rows.share = (self.accelerator.process_index, self.accelerator.num_processes)
        self.saving_seconds = 0.0
        self.graph: StepGraph | None = None
        self.may_record, self.strict = record_step, True
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the supervised tokens: num_items_in_batch

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        tuned: Any = self.model
        tuned.train()
        self.rows.forget_training()
        if resume_from_checkpoint:  # before anything is recorded: rows may have to be cut
            _restore_rows(self.rows, Path(resume_from_checkpoint))
        if self.args.device.type in WARMED_UP_ON:
            self.strict = in_fixed_order(self.warm_up)[1]
            self.rows.repeats &= self.strict
        with repeatable(self.strict):
            self._record()
            with suppress(RuntimeError):  # a recording that has failed may hold memory
                forget_peak()
            try:
                return super().train(resume_from_checkpoint, *arguments, **options)
            finally:
                self._drop_graph()
                if isinstance(self.model_wrapped, DistributedDataParallel):
                    # Otherwise the next training of these weights would also exchange gradients with this group.
                    self.model_wrapped._remove_autograd_hooks()
                    self.model_wrapped = self.model

    def _record(self) -> None:
        """Record the step, unless a resumed training went without: then it would end with other bits."""
        before, rows, processes = self.rows.recorded, self.rows, self.accelerator.num_processes
        if processes > 1:
            rows.graph_fault = "several processes"
            rows.repeats &= processes == 2  # more add in an order that may differ each time
        elif not self.may_record:
            rows.graph_fault = "record_step is false"
        elif before is not False:  # else the reason is that of the beginning
            self.graph, rows.graph_fault = step_graph.record_step(self.model, self.trained, rows)
            # Other reasons depend on the free memory. A training that began with a recording ends with other bits.
            rows.repeats &= self.graph is not None or (before is None and rows.graph_fault in step_graph.ALWAYS)
        rows.recorded = self.graph is not None

    def _drop_graph(self) -> None:
        """Free the recording's memory once the card has done what was launched; keep the most that was held."""
        # After a fault of the card each call fails, and the fault is what there is to tell.
        with suppress(RuntimeError):
            wait_for_gpu()
            keep_peak(self.rows)
        self.graph = None
        with suppress(RuntimeError):
            forget_peak()

    def _give_up_graph(self, reason: str) -> None:
        """Free the recording's memory, gradients included. With other free memory the training would go on with it."""
        self.rows.recorded, self.rows.repeats = False, False
        self.rows.graph_fault = f"given up at step {self.state.global_step}: {reason[:150]}"
        for parameter in self.trained:
            parameter.grad = None
        self._drop_graph()

    def warm_up(self) -> None:
        """Forward and backward of a few rows, before the meter starts: a first step compiles, loads and allocates.

        No gradient is kept, no weight and no random number of the training changes. The optimiser is not warmed up.
        """
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                for i in range(WARM_UP_STEPS):
                    row = to_device(self.rows[i % len(self.rows)], self.args.device)
                    for part in micro_batches(row, self.rows.micro_batch_tokens):
                        torch.autograd.grad(token_losses(self.model, part).sum(), self.trained, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # else the first step finds out as well, and halves the micro-batch size

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """One step ahead: the scheduler of transformers begins with a rate of 0, and a first step would do nothing."""
        if self.lr_scheduler is None:
            scheduler: Any = super().create_scheduler(num_training_steps + 1, optimizer)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
                scheduler.step()
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if self.accelerator.num_processes > 1:
            # accelerate would distribute whole rows: fewer and larger steps with more processes. Here every process
            # goes through all rows and computes its share of each.
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = token_losses(model, inputs)
        # The count covers all processes, and their gradients are averaged afterwards.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradient of one row. If memory runs out it starts again: without a recording, then in halves."""
        if num_items_in_batch is None:
            raise TrainingError("the Trainer did not count the supervised tokens of the optimiser step.")
        before = [None if p.grad is None else p.grad.clone() for p in self.trained]  # of earlier rows of this step
        while True:
            try:
                return self._row_step(model, inputs, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                unordered = self.strict and knows_no_order(error)
                if not (unordered or is_out_of_memory(error)):
                    raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)
            # Outside of the except block, because the exception keeps the arrays of the step alive.
            if unordered:
                self.strict = self.rows.repeats = False
                use_fixed_order(strict=False)
            elif self.graph:
                self._give_up_graph(reason)
            else:
                self._halve_micro_batches(max(inputs["segments"]), reason)
            for parameter, gradient in zip(self.trained, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()

    def _row_step(self, model: Any, inputs: dict, num_items_in_batch: Any) -> torch.Tensor:
        parts = micro_batches(inputs, self.rows.micro_batch_tokens)
        if self.graph and len(parts) == 1:
            return self.graph.step(inputs, num_items_in_batch)
        loss = self._micro_batch_steps(model, parts, num_items_in_batch)
        self.rows.count_fitted()
        return loss

    def _micro_batch_steps(self, model: Any, parts: list[dict], num_items_in_batch: Any) -> torch.Tensor:
        """As transformers' own step, without setting every module to training mode each time."""
        total = torch.zeros((), device=self.args.device)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1  # several processes exchange gradients once a row
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    inputs: Any = self._prepare_inputs(part)
                    loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: `step_flops` counts those of a LoRA step, once, without looking at all weights in each step."""
        return 0

    def _halve_micro_batches(self, longest: int, reason: str) -> None:
        """Raises TrainingError if a conversation of `longest` tokens does not fit, or with several processes."""
        size = min(self.rows.micro_batch_tokens, self.rows.largest)
        if self.accelerator.num_processes > 1 or size <= longest:
            remedy = "set gradient_checkpointing to true or quantization to nf4, or use shorter conversations"
            if size > longest:
                remedy = f"set micro_batch_tokens to {size // 2}"
            raise TrainingError(f"memory ran out with {size} tokens at once ({reason[:200]}): {remedy}.")
        self.rows.halve(size, longest)
        self.rows.repeats = False  # with more free memory it would go on with larger ones, which round another way
        if on_gpu():
            torch.cuda.empty_cache()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone. transformers would let peft ask the hub, each time, whether the vocabulary has grown."""
        if self.args.should_save:
            tuned: Any = self.model
            tuned.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, start = Path(str(self.args.output_dir)), time.monotonic()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises another type in each library
            shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            free = shutil.disk_usage(folder).free
            raise TrainingError(
                f"the checkpoint at step {self.state.global_step} could not be written to {folder} ({free / 1e6:.0f} "
                f"MB free): {error}. Make room and run again: training continues from the previous checkpoint."
            ) from error
        self.saving_seconds += time.monotonic() - start


def constant_arguments() -> dict[str, Any]:
    """TrainingArguments that are equal in all configurations: no reports, a log entry at each step, rows loaded in this
    process, and checkpoints from which a training continues bit for bit."""
    return {
        "use_cpu": not on_gpu(),
        "report_to": [],
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # True would log a loss of NaN as 0
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "optim": "adamw_torch_fused" if on_gpu() else "adamw_torch",  # one launch instead of hundreds
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,  # every adapter weight takes part in every step
    }


def loss_curve(log_history: list[dict[str, Any]], rows: PackedRows) -> pd.DataFrame:
    """The training loss by optimiser step.

    Args:
        log_history: of the Trainer's state.
        rows: the training rows.

    Returns:
        Columns step, tokens_seen (exact at the end of an epoch, the average in between), epoch, train_loss (nats per
        supervised token), learning_rate and grad_norm.
    """
    frame = pd.DataFrame([entry for entry in log_history if "loss" in entry]).rename(columns={"loss": "train_loss"})
    frame["tokens_seen"] = [round(step * sum(rows.tokens) / len(rows)) for step in frame["step"].tolist()]
    columns = ["step", "tokens_seen", "epoch", "train_loss", "learning_rate", "grad_norm"]
    return frame[columns].astype({"train_loss": float, "grad_norm": float}).drop_duplicates("step", keep="last")


def diverges(losses: Sequence[float], untuned_loss: float) -> bool | None:
    """Whether a training has lost, in its last quarter, half or more of what it had gained over the untuned model.

    Args:
        losses: the training loss of each step, nats per token.
        untuned_loss: of the model without the adapter, nats per token.

    Returns:
        None if there are fewer than STEPS_TO_JUDGE steps: single rows differ too much in difficulty.
    """
    if len(losses) < STEPS_TO_JUDGE:
        return None
    quarters = [float(part.mean()) for part in np.array_split(np.asarray(losses, float), 4)]
    return bool(quarters[-1] - min(quarters) >= (untuned_loss - min(quarters)) / 2)  # the loss may be numpy's


def answer_losses(model: Any, examples: list[Example], batch_tokens: int) -> dict[str, np.ndarray]:
    """The losses of conversations, packed, without gradient.

    Args:
        model: after `prepare_step`; it is set to evaluation mode.
        examples: the conversations.
        batch_tokens: tokens that are computed at once, at most; fewer where memory runs out.

    Returns:
        Conversation id -> losses (nats, float64) of its supervised tokens in order. The last one is the loss of the
        token that ends the last answer.
    """

    def losses_of(chosen: list[Example]) -> list[tuple[str, np.ndarray]]:
        batch = to_device(collate(chosen), model.device)
        with torch.inference_mode():
            losses = token_losses(model, batch).double().cpu().split([e.n_supervised for e in chosen])
        return [(e.conversation_id, part.numpy()) for e, part in zip(chosen, losses, strict=True)]

    model.eval()
    rows = pack_rows(examples, batch_tokens, seed=0)
    return dict(chain.from_iterable(halving([examples[i] for i in row], losses_of) for row in rows))


class TrainingMonitor(TrainerCallback):
    """Meters and logs the steps, saves checkpoints, and stops on a loss of NaN or infinity.

    The meter pauses while a checkpoint is written, and each checkpoint holds its readings, so the energy of a resumed
    training counts every step of the final adapter once. With several processes the clock of the first one decides on
    checkpoints, and its meter takes over the readings of all. `resumed` tells whether a checkpoint was used.

    A checkpoint is due after `checkpoint_seconds` and at the end of an epoch. It waits while another one that takes as
    long as the last one would bring the time spent on writing above SAVING_SHARE.

    Args:
        meter: an energy.Meter.
        checkpoint_seconds: time between checkpoints, at most, where they are written fast enough.
        rows: the training rows.
        log: receives one line per step.
    """

    def __init__(self, meter: Any, checkpoint_seconds: float, rows: PackedRows, log: Callable[[str], object] = print):
        self.meter, self.checkpoint_seconds, self.rows, self.log = meter, checkpoint_seconds, rows, log
        self.last_save = self.started = self.save_began = time.monotonic()
        self.saving_s = self.last_saving_s = 0.0
        self.resumed, self.first_step, self.saved_step = False, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            saved = json.loads(_progress_file(args, state).read_text())
            if state.is_world_process_zero:
                self.meter.restore(saved["meter"])
            self.resumed, self.first_step, self.saved_step = True, state.global_step, state.global_step
            self.log(f"resumed at step {state.global_step} of {state.max_steps}")
        self.last_save = self.started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._save_if_affordable(control, time.monotonic() - self.last_save > self.checkpoint_seconds)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # After the last step the adapter follows; the last step of another epoch may have been saved already.
        self._save_if_affordable(control, state.global_step not in (state.max_steps, self.saved_step))

    def _save_if_affordable(self, control: Any, due: bool) -> None:
        """Let the Trainer write a checkpoint if one is due and writing has taken little time so far."""
        spent_s = self.saving_s + self.last_saving_s
        affordable = spent_s <= SAVING_FREE_S + SAVING_SHARE * (time.monotonic() - self.started)
        control.should_save = broadcast_from_rank0(due and affordable)
        if control.should_save:
            self.meter.pause()
            self.save_began = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        keep_peak(self.rows)
        sizes = {name: getattr(self.rows, name) for name in ROWS_STATE}
        saved = {"meter": sum_readings(self.meter), "rows": self.rows.fingerprint} | sizes
        if state.is_world_process_zero:  # by now every process has written its part of the checkpoint
            write_json(_progress_file(args, state), saved)
        self.last_save, self.saved_step = time.monotonic(), state.global_step
        self.last_saving_s = self.last_save - self.save_began
        self.saving_s += self.last_saving_s

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        for name, value in (("loss", loss), ("gradient's norm", float(logs.get("grad_norm", 0.0)))):
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {state.global_step}: the {name} is {value}. Lower this configuration's learning_rate."
                )
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        eta = (time.monotonic() - self.started) / max(done, 1) * left
        self.log(f"step {state.global_step}/{state.max_steps} loss {loss:.4f} ETA {eta:.0f} s")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.stop()
        readings = sum_readings(self.meter)
        if state.is_world_process_zero:
            self.meter.restore(readings)


def _restore_rows(rows: PackedRows, checkpoint: Path) -> None:
    """Let rows be cut and computed as they were when a checkpoint was written."""
    saved = json.loads((checkpoint / PROGRESS).read_text())
    for name in ROWS_STATE:
        setattr(rows, name, saved.get(name, getattr(rows, name)))  # an older version's checkpoint knows fewer
    rows.repeats &= not rows.shrunk


def keep_peak(rows: PackedRows) -> None:
    """Note at the rows the most memory that their training has held on the GPU, parts before a resume included."""
    rows.peak_bytes = max((n for n in (rows.peak_bytes, peak_gpu_bytes()) if n is not None), default=None)


def _progress_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / PROGRESS


def sum_readings(meter: Any) -> dict[str, float | None]:
    """The readings of all processes of a training as one: the first one's clock, everybody's CPU time and GPUs."""
    own = meter.readings()
    if not torch.distributed.is_initialized():
        return own
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    per_process = {name: [readings[name] for readings in gathered] for name in PER_PROCESS_READINGS}
    return gathered[0] | {name: None if None in found else sum(found) for name, found in per_process.items()}


def broadcast_from_rank0(value: bool) -> bool:
    """The first process's value, in all processes of a training."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def last_checkpoint(folder: Path, fingerprint: str | None = None, log: Callable[[str], object] = print) -> str | None:
    """Find the newest complete checkpoint of these training rows; others are removed.

    Args:
        folder: of the checkpoints.
        fingerprint: of the training rows.
        log: receives one line per removed checkpoint, with the reason.

    Returns:
        The checkpoint's folder; None if training starts from the beginning.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        if not (fault := _checkpoint_fault(checkpoint, fingerprint)):
            return str(checkpoint)
        log(f"{checkpoint.name} is not used: {fault}")
        shutil.rmtree(checkpoint)
    return None


def _checkpoint_fault(checkpoint: Path, fingerprint: str | None) -> str | None:
    """The reason against resuming from a checkpoint; None if there is none."""
    if not (checkpoint / PROGRESS).is_file():  # written last, after the Trainer's own files
        return "it was being written when the training ended."
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text())
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as weights:
            list(weights.keys())
        states = [path.name for path in checkpoint.glob("rng_state*.pth")] or ["rng_state.pth"]  # one per process
        for name in ("optimizer.pt", "scheduler.pt", *states):
            if zipfile.ZipFile(checkpoint / name).testzip():
                return f"{name} is damaged."
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"a file is damaged ({type(error).__name__})."
    if fingerprint is not None and progress.get("rows") != fingerprint:
        return "it was trained on other rows than there are now."
    return None
