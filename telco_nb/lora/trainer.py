"""The transformers Trainer around the packed step: epochs, checkpoints, the loss curve, the energy window, resuming."""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from telco_nb.lora.packing import Example, PackedRows, collate, micro_batches, pack_rows, segment_lengths
from telco_nb.lora.step import TrainingError, token_losses
from telco_nb.study.record import write_json

PER_PROCESS_READINGS = ("cpu_s", "gpu_j", "tracker_gpu_j")  # a meter's readings that are its own process's only


class PackedTrainer(Trainer):
    """The transformers Trainer with the packed step: the loss is summed over supervised tokens of the whole
    accumulation window and divided by their number."""

    def __init__(self, model: Any, args: TrainingArguments, **options: Any):
        # One process drives one GPU. Beside several, transformers would split a row, which is one sequence, among them.
        args._n_gpu = min(1, args.n_gpu)
        vars(model).pop("_is_accelerate_prepared", None)  # by a training before: several processes must wrap it anew
        super().__init__(model, args, **options)
        self.remove_callback(PrinterCallback)  # the step log goes to log.txt, through TrainingMonitor
        self.train_dataset.share = (self.accelerator.process_index, self.accelerator.num_processes)
        self.saving_seconds = 0.0  # writing checkpoints
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts and hands over num_items_in_batch

    def train(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().train(*arguments, **options)
        finally:
            if isinstance(self.model_wrapped, DistributedDataParallel):
                # Else a next training of these weights would exchange gradients with this one's group, too.
                self.model_wrapped._remove_autograd_hooks()
                self.model_wrapped = self.model

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.accelerator.num_processes > 1:
            # accelerate would deal the rows out, so that more processes were fewer and larger steps. Here each sees all
            # rows and computes its share of them: its part of the batches is made that of one process alone.
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = token_losses(model, inputs)
        if num_items_in_batch is None:
            raise TrainingError("the Trainer did not count the supervised tokens of the accumulation window.")
        # The count is that of all processes, whose gradients are then averaged: so times their number.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradient of one row, part by part. When memory runs out, its parts are halved and it begins anew."""
        rows: PackedRows = self.train_dataset
        before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}  # of earlier rows of a step
        while True:
            try:
                return self._all_parts(model, micro_batches(inputs, rows.micro_batch_tokens), num_items_in_batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
            # Outside of the except block, as the error holds on to the arrays of the step.
            self._shrink(rows, max(segment_lengths(inputs["position_ids"])))
            for parameter in model.parameters():
                parameter.grad = before[parameter].clone() if parameter in before else None

    def _all_parts(self, model: Any, pieces: list[dict], num_items_in_batch: Any) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1  # several processes exchange gradients once a row
            with nullcontext() if last else self.accelerator.no_sync(model):
                total += super().training_step(model, piece, num_items_in_batch)
        return total

    def _shrink(self, rows: PackedRows, longest: int) -> None:
        tried = min(rows.micro_batch_tokens, rows.largest)
        alone = self.accelerator.num_processes == 1
        if not alone or tried <= longest:
            less = "set gradient_checkpointing to true or quantization to nf4, or use shorter conversations"
            remedy = f"set micro_batch_tokens to {tried // 2}" if tried > longest else less
            raise TrainingError(f"memory ran out with {tried} tokens at once: {remedy}.")
        rows.shrunk.append(tried)
        rows.micro_batch_tokens = max(longest, tried // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, start = Path(self.args.output_dir), time.monotonic()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own way of saying "disk full"
            half = folder / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(half, ignore_errors=True)
            free = shutil.disk_usage(folder).free
            raise TrainingError(
                f"the checkpoint at step {self.state.global_step} could not be written to {folder} "
                f"({free / 1e6:.0f} MB free): {error}. Make room and run again: it goes on from the checkpoint before."
            ) from error
        self.saving_seconds += time.monotonic() - start


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or torch's allocator on a processor, had no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def constant_arguments() -> dict[str, Any]:
    """TrainingArguments that are not under study: nothing is reported anywhere, every step is logged, no shuffling
    worker, and checkpoints that are complete enough to go on from bit for bit."""
    return {
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # else a loss that is no number would be logged as 0
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "optim": "adamw_torch",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,  # every adapter weight takes part in every step
    }


def loss_curve(log_history: list[dict[str, Any]], rows: PackedRows) -> pd.DataFrame:
    """Training loss by optimiser step: columns step, tokens_seen, epoch, train_loss, learning_rate, grad_norm.

    `tokens_seen` is exact at the end of each epoch and the average in between, as rows differ a little in length.
    """
    logged = [entry for entry in log_history if "loss" in entry]
    frame = pd.DataFrame(
        {
            "step": [e["step"] for e in logged],
            "tokens_seen": [round(e["step"] * sum(rows.tokens) / len(rows)) for e in logged],
            "epoch": [e["epoch"] for e in logged],
            "train_loss": [float(e["loss"]) for e in logged],
            "learning_rate": [e["learning_rate"] for e in logged],
            "grad_norm": [float(e["grad_norm"]) for e in logged],
        }
    )
    return frame.drop_duplicates("step", keep="last")


def answer_losses(model: Any, examples: list[Example], batch_tokens: int) -> dict[str, np.ndarray]:
    """Losses (nats, float64) of the supervised tokens of each conversation in order, without gradient.

    The last one is that of the token which ends the last answer.
    """
    result = {}
    model.eval()
    for row in pack_rows(examples, batch_tokens, seed=0):
        chosen = [examples[i] for i in row]
        batch = {name: tensor.to(model.device) for name, tensor in collate(chosen).items()}
        with torch.inference_mode():
            losses = token_losses(model, batch).double().cpu().split([e.n_supervised for e in chosen])
        result |= {e.conversation_id: part.numpy() for e, part in zip(chosen, losses, strict=True)}
    return result


class TrainingMonitor(TrainerCallback):
    """Meters the steps, logs them, saves every `checkpoint_seconds`, and stops on a loss that is no number.

    The meter is paused while a checkpoint is written, and its readings travel with the checkpoint: so the energy of a
    resumed training counts every step that the final adapter contains exactly once. With several processes the first
    one's readings become those of all, and its clock decides on checkpoints.
    """

    def __init__(self, meter: Any, checkpoint_seconds: float, rows: PackedRows, log: Any = print):
        self.meter, self.checkpoint_seconds, self.rows, self.log = meter, checkpoint_seconds, rows, log
        self.last_save = self.started = time.monotonic()
        self.resumed, self.first_step = False, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = json.loads((checkpoint / "progress.json").read_text())
            if state.is_world_process_zero:
                self.meter.restore(saved["meter"])
            self.rows.micro_batch_tokens, self.rows.shrunk = saved["micro_batch_tokens"], saved["shrunk"]
            self.resumed, self.first_step = True, state.global_step
            self.log(f"resumed at step {state.global_step} of {state.max_steps}")
        self.last_save = self.started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.start()  # does nothing while the window is open

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if broadcast_from_rank0(time.monotonic() - self.last_save > self.checkpoint_seconds):
            control.should_save = True
        if control.should_save:
            self.meter.pause()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.pause()  # a checkpoint follows
        if state.global_step >= state.max_steps:  # the adapter does, and at most checkpoint_seconds can be lost
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {"micro_batch_tokens": self.rows.micro_batch_tokens, "shrunk": self.rows.shrunk}
        saved = {"meter": sum_readings(self.meter), "rows": self.rows.fingerprint} | sizes
        if state.is_world_process_zero:  # by now every process has written its part of the checkpoint
            write_json(checkpoint / "progress.json", saved)
        self.last_save = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
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


def sum_readings(meter: Any) -> dict[str, float]:
    """Readings of all processes of a training as one: the first one's clock, everybody's processor time and GPUs."""
    own = meter.readings()
    if not torch.distributed.is_initialized():
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found[0] | {name: sum(one[name] for one in found) for name in PER_PROCESS_READINGS}


def broadcast_from_rank0(answer: bool) -> bool:
    """The first process's answer, in all processes of a training."""
    if not torch.distributed.is_initialized():
        return answer
    told = [answer]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def last_checkpoint(folder: Path, fingerprint: str | None = None, log: Any = print) -> str | None:
    """The newest checkpoint that is whole and of these training rows; others are removed, and `log` says why.

    None if there is none: then the training starts anew. `fingerprint` is that of the rows.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        if not (fault := _checkpoint_fault(checkpoint, fingerprint)):
            return str(checkpoint)
        log(f"{checkpoint.name} is not used: {fault}")
        shutil.rmtree(checkpoint)
    return None


def _checkpoint_fault(checkpoint: Path, fingerprint: str | None) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it can."""
    if not (checkpoint / "progress.json").is_file():  # written last, after the Trainer has finished its own files
        return "it was being written when the training ended."
    try:
        found = json.loads((checkpoint / "progress.json").read_text())
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as weights:
            list(weights.keys())
        states = [path.name for path in checkpoint.glob("rng_state*.pth")] or ["rng_state.pth"]  # one a process
        for name in ("optimizer.pt", "scheduler.pt", *states):
            if zipfile.ZipFile(checkpoint / name).testzip():
                return f"{name} is damaged."
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"a file is damaged ({type(error).__name__})."
    if fingerprint is not None and found.get("rows") != fingerprint:
        return "it was trained on other rows than there are now."
    return None


def step_flops(model: Any, tokens: int, supervised: int, segments: list[int]) -> float:
    """Floating-point operations of forward and backward of one LoRA step (frozen base: no weight gradients for it).

    Per token: 4 per body weight, 4 per output-head weight at supervised positions, 6 per adapter weight; causal
    attention costs 2 x 2 x n^2/2 x width forward and twice that backward, per layer and conversation of n tokens.
    """
    config = model.config
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    head = config.vocab_size * config.hidden_size
    tied = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) - head
    body = tied if config.tie_word_embeddings else tied - head
    attention = 6 * config.hidden_size * config.num_hidden_layers * sum(n * n for n in segments)
    return float(4 * body * tokens + 4 * head * supervised + 6 * lora * tokens + attention)
