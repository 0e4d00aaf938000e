"""The LoRA step on a GPU: variants of it, a padded loop, TRL and Liger, in the shape of Qwen2.5-3B with random weights.

`python bench/gpu.py [variants]` needs no weights, no hub and no packaged model: speed does not depend on the values.
Each variant has a process of its own and at least 25 s of steps behind a warm-up. Real tokens count, not padding.
`--json FILE` writes all figures.
`--tiny` runs the same code in this process with tiny sizes, on a processor as well: that shows that it works.
bench/README.md says what to compare.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from telco_nb import ROOT
from telco_nb.lora import device, packing, pointwise, sensors, step, step_graph
from telco_nb.lora.packing import IGNORE_INDEX, Example, PackedRows

VARIANTS = ("plain", "no-cast", "fused", "compiled", "fused+graph", "compiled+graph", "padded", "TRL", "TRL+Liger")
os.environ.setdefault(*device.CUBLAS_WORKSPACE)
SEED, RANK = 20260605, 16
SECONDS = "TELCO_BENCH_SECONDS"  # variable of the environment, from --seconds
TOLD_LINES = 25  # of a variant's errors
GRADIENT_KEPT = 4_000_000  # entries that are compared: those of the first layers, to which all others lead


@dataclass(frozen=True)
class Sizes:
    """The model, the conversations and the time of one measurement. Defaults: Qwen2.5-3B, the study's paper profile."""

    vocabulary: int = 151_936
    hidden: int = 2048
    inner: int = 11_008
    layers: int = 36
    heads: int = 16
    key_heads: int = 2
    tokens: int = 208  # of a conversation, on average
    labelled: float = 0.54  # share of the tokens
    row: int = 8192
    rows: int = 16
    seconds: float = 25.0  # the energy counter of a card moves every 0.1 s or so
    warm: int = 3
    padded_batch: int = 32  # conversations of a batch of the padded loop and of TRL


TINY = Sizes(97, 32, 64, 2, 4, 2, tokens=12, row=64, rows=3, seconds=0.05, warm=1, padded_batch=4)


def make_model(sizes: Sizes, dtype: torch.dtype) -> Any:
    """The adapted model with random weights, equal in every variant."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_heads,
        max_position_embeddings=32_768, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    with device.torch_device():
        base = Qwen2ForCausalLM._from_config(config, dtype=dtype)
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=step.TARGET_MODULES["all"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return step.attach_adapters(base, lora)


def make_rows(sizes: Sizes) -> PackedRows:
    """Conversations of random tokens and uneven lengths, packed as in a training."""
    generator = torch.Generator().manual_seed(SEED)
    spread = (torch.rand(sizes.rows * sizes.row // sizes.tokens, generator=generator) + 0.5) * sizes.tokens
    examples = []
    for i, tokens in enumerate(spread.round().int().tolist()):
        ids = torch.randint(0, sizes.vocabulary, (tokens,), generator=generator).tolist()
        hidden = round(tokens * (1 - sizes.labelled))
        examples.append(Example(str(i), ids, [IGNORE_INDEX] * hidden + ids[hidden:]))
    return PackedRows(examples, sizes.row, SEED)


def padded_loss(tuned: Any, examples: list[Example], dtype: torch.dtype) -> torch.Tensor:
    """Sum of the losses as a tutorial computes them: padded on the right, logits at every position."""
    width, where = max(len(e.input_ids) for e in examples), device.torch_device()
    pad = [width - len(e.input_ids) for e in examples]
    ids = torch.tensor([e.input_ids + [0] * n for e, n in zip(examples, pad, strict=True)], device=where)
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * n for e, n in zip(examples, pad, strict=True)], device=where)
    labels = [e.labels + [IGNORE_INDEX] * n for e, n in zip(examples, pad, strict=True)]
    with torch.autocast(where.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels, device=where)).loss
    return loss * sum(e.n_supervised for e in examples)


def prepare(tuned: Any, variant: str) -> None:
    """Set the model up for a variant of the packed step."""
    kind = variant.removesuffix("+graph")
    pointwise.COMPILED_ON = {"cuda"} if kind == "compiled" else set()
    found = step.prepare_step(tuned, fused=kind in ("fused", "compiled"))
    if found != (kind if kind in ("fused", "compiled") else "plain"):
        raise SystemExit(f"this model's step is {found}: {pointwise.compiler_fault('cuda')}")
    for module in tuned.modules():
        if variant == "plain" and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True


def step_of(tuned: Any, variant: str, rows: PackedRows, sizes: Sizes, dtype: torch.dtype) -> Callable[[int], None]:
    """Forward and backward of the row of an index in a variant; the gradients are added."""
    if variant == "padded":
        return lambda index: padded_step(tuned, rows.rows[index], rows.supervised[index], sizes.padded_batch, dtype)
    prepare(tuned, variant)
    if variant.endswith("+graph"):
        shape = step_graph.shape_of(rows, device.torch_device().type)
        graph = step_graph.StepGraph(tuned, [p for p in tuned.parameters() if p.requires_grad], shape, rows[-1])
        graph.record()
        return lambda index: graph.step(rows[index], rows.supervised[index])
    return lambda index: packed_step(tuned, rows[index], rows.supervised[index])


def padded_step(tuned: Any, examples: list[Example], supervised: int, batch: int, dtype: torch.dtype) -> None:
    for i in range(0, len(examples), batch):
        (padded_loss(tuned, examples[i : i + batch], dtype) / supervised).backward()


def packed_step(tuned: Any, row: dict[str, Any], supervised: int) -> None:
    (step.token_losses(tuned, packing.to_device(row, device.torch_device())).sum() / supervised).backward()


def first_gradient(tuned: Any) -> torch.Tensor:
    """The gradients of the first layers in one float32 vector on the processor; they are removed from the model."""
    found = [p.grad.float().flatten() for p in tuned.parameters() if p.grad is not None]
    tuned.zero_grad(set_to_none=True)
    return torch.cat(found)[:GRADIENT_KEPT].cpu()


def count_waits(work: Callable[[], None]) -> int | None:
    """How often the host waits for the GPU in `work`, by torch's own count; None on a processor."""
    if not device.on_gpu():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)


class Window:
    """Time, energy and peak memory between its making and `figures`."""

    def __init__(self) -> None:
        if device.on_gpu():
            torch.cuda.synchronize()
            device.forget_peak()
        self.start_j, self.start = self._joules(), time.perf_counter()

    @staticmethod
    def _joules() -> float | None:
        try:
            handle = sensors.nvml_handle()
            return None if handle is None else sensors.read_gpu_j(handle)
        except sensors.SensorError:
            return None  # missing, and shown so

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def figures(self) -> dict[str, float | None]:
        if device.on_gpu():
            torch.cuda.synchronize()
        seconds, end_j = self.seconds, self._joules()
        joules = None if end_j is None or self.start_j is None else end_j - self.start_j
        peak = torch.cuda.max_memory_reserved() / 1e9 if device.on_gpu() else None
        return {"seconds": seconds, "joules": joules, "peak_gb": peak}


def run_steps(tuned: Any, backward: Callable[[int], None], rows: PackedRows, sizes: Sizes) -> dict[str, Any]:
    """Optimiser steps for at least `sizes.seconds`, after the warm-up."""
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.on_gpu())
    done: list[int] = []
    host_s = 0.0

    def one(index: int) -> None:
        backward(index)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for i in range(max(sizes.warm, len(rows))):  # each row once: a short one may be compiled anew
        one(i % len(rows))
    window = Window()
    while window.seconds < sizes.seconds:
        done.append(len(done) % len(rows))
        start = time.perf_counter()
        one(done[-1])
        host_s += time.perf_counter() - start  # until all is launched; a stream's queue holds some 1,000 kernels
        if device.on_gpu():
            torch.cuda.synchronize()  # once a step, as the Trainer's log does
    return window.figures() | {"done": done, "host_s": host_s}


class _Stopwatch(TrainerCallback):
    """Opens the window after the warm-up of a Trainer and stops it when the time is over."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.window, self.found = sizes, None, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.sizes.warm:
            self.window = Window()
        elif self.window and self.window.seconds >= self.sizes.seconds:
            self.found = self.window.figures() | {"steps": state.global_step - self.sizes.warm}
            control.should_training_stop = True


def run_trl(tuned: Any, variant: str, rows: PackedRows, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """TRL's SFTTrainer, padded batches of one row's conversations, without activation checkpointing."""
    from datasets import Dataset
    from huggingface_hub import constants
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL tells a server of each trainer that is made
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    examples = [e for row in rows.rows for e in row]
    data = Dataset.from_list(
        [{"input_ids": e.input_ids, "completion_mask": [int(x >= 0) for x in e.labels]} for e in examples]
    )
    stopwatch = _Stopwatch(sizes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=sizes.padded_batch, max_steps=10**6, max_length=None,
            gradient_accumulation_steps=max(1, len(examples) // len(rows) // sizes.padded_batch), learning_rate=1e-5,
            bf16=dtype == torch.bfloat16, completion_only_loss=True, gradient_checkpointing=False, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=10**6, use_liger_kernel=variant == "TRL+Liger",
            use_cpu=not device.on_gpu(), dataloader_drop_last=True,  # a short batch would count as a whole one
        )  # fmt: skip
        trainer = SFTTrainer(tuned, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[stopwatch])
        trainer.remove_callback(PrinterCallback)  # the table is what is printed
        trainer.train()
    found = stopwatch.found
    share = found.pop("steps") * sizes.padded_batch * arguments.gradient_accumulation_steps / len(examples)
    return found | {"done": None, "share": share}


def measure(variant: str, sizes: Sizes, gradient_file: Path | None = None) -> dict[str, Any]:
    """One variant: rates, energy, memory; the gradient of the first row goes to a file."""
    dtype, gflops = device.choose_dtype("auto" if device.on_gpu() else "float32")
    tuned, rows = make_model(sizes, dtype), make_rows(sizes)
    segments = [[len(e.input_ids) for e in row] for row in rows.rows]
    flops = [step.step_flops(tuned, *one) for one in zip(rows.tokens, rows.supervised, segments, strict=True)]
    if variant.startswith("TRL"):
        found = run_trl(tuned, variant, rows, sizes, dtype)
        tokens, work = (found["share"] * sum(values) for values in (rows.tokens, flops))
    else:
        with device.repeatable():  # as a training does
            found = measure_packed(tuned, variant, rows, sizes, dtype, gradient_file)
        tokens, work = (sum(values[i] for i in found["done"]) for values in (rows.tokens, flops))
    return figures(variant, found, tokens, work, dtype, gflops)


def measure_packed(
    tuned: Any, variant: str, rows: PackedRows, sizes: Sizes, dtype: torch.dtype, gradient_file: Path | None
) -> dict[str, Any]:
    """A variant that is not a Trainer's: its window, and the gradient of the first row to a file."""
    backward = step_of(tuned.train(), variant, rows, sizes, dtype)
    backward(0)
    gradient = first_gradient(tuned)
    if gradient_file:
        torch.save(gradient, gradient_file)
    backward(0)
    repeats = torch.equal(first_gradient(tuned), gradient)
    waits = count_waits(lambda: backward(0))
    return run_steps(tuned, backward, rows, sizes) | {"waits": waits, "repeats": repeats}


def figures(
    variant: str, found: dict[str, Any], tokens: float, work: float, dtype: torch.dtype, gflops: dict[str, float]
) -> dict[str, Any]:
    """The table's columns, from a window's readings, its real tokens and its floating-point operations (`work`)."""
    seconds, joules, sheet = found["seconds"], found["joules"], device.data_sheet_gflops(dtype)
    return {
        "variant": variant,
        "tokens_per_second": tokens / seconds,
        "tflops": work / seconds / 1e12,
        "share_of_matmul": work / seconds / 1e9 / gflops[str(dtype).removeprefix("torch.")],
        "share_of_data_sheet": sheet and work / seconds / 1e9 / sheet,
        "watts": joules and joules / seconds,
        "mj_per_token": joules and 1e3 * joules / tokens,
        "peak_gb": found["peak_gb"],
        "host_share": found["host_s"] / seconds if "host_s" in found else None,
        "waits": found.get("waits"),
        "repeats": found.get("repeats"),
        "seconds": seconds,
        "ended_at": time.time(),
    }


def missing(variant: str) -> str | None:
    """Why a variant cannot be measured here; None if it can."""
    if variant == "TRL+Liger" and not device.on_gpu():
        return "Liger needs a GPU"
    packages = {"TRL": ("trl", "datasets"), "TRL+Liger": ("trl", "datasets", "liger_kernel")}.get(variant, ())
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"{', '.join(absent)} not installed"
    if (variant.startswith("compiled") or variant.endswith("+graph")) and not device.on_gpu():
        return "on a GPU only"
    return pointwise.compiler_fault("cuda") if variant.startswith("compiled") else None


def measure_apart(variant: str, folder: Path) -> dict[str, Any]:
    """`measure` in a process of its own, so that no patch, allocator or peak of one variant touches another."""
    command = [sys.executable, __file__, "--measure", variant, str(folder / f"{variant}.pt")]
    as_a_study = {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = os.environ | as_a_study
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print("\n".join(lines[-TOLD_LINES:]), file=sys.stderr)
        return {"variant": variant, "failed": lines[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def distance(folder: Path, variant: str) -> float | None:
    """Norm of the difference between a variant's gradient and the plain one's, relative to the latter."""
    files = [folder / f"{name}.pt" for name in (variant, "plain")]
    if not all(f.is_file() for f in files):
        return None
    own, plain = (torch.load(f) for f in files)
    return ((own - plain).norm() / plain.norm()).item()


def main(variants: tuple[str, ...] = VARIANTS, tiny: bool = False) -> list[dict[str, Any]]:
    """Measure the variants, print the table, and return its rows."""
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise SystemExit(f"bench/gpu.py knows no {', '.join(unknown)}. Variants: {', '.join(VARIANTS)}.")
    if not tiny and (fault := device.gpu_fault()):
        raise SystemExit(f"bench/gpu.py needs a GPU ({fault}), or --tiny.")
    print(headline(tiny), flush=True)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in variants:
            if reason := missing(variant):
                one: dict[str, Any] = {"variant": variant, "failed": reason}
            elif tiny:
                one = measure(variant, TINY, folder / f"{variant}.pt")
            else:
                one = measure_apart(variant, folder)
            found.append(one | {"gradient_distance": distance(folder, variant)})
            print(line(found[-1]), flush=True)
    return found


def headline(tiny: bool) -> str:
    card = torch.cuda.get_device_name() if device.on_gpu() else "processor"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    shape = "tiny sizes: no figure of this table means anything" if tiny else "Qwen2.5-3B, rank 16, all linear layers"
    columns = "variant           tok/s  TFLOP/s  of 8192^3  of sheet      W  mJ/token  peak GB   host  waits"
    return f"{card}; {versions}; {shape}\n{columns}  gradient to plain  bits"


def line(one: dict[str, Any]) -> str:
    if "failed" in one:
        return f"{one['variant']:14} {one['failed']}"

    def cell(name: str, form: str, width: int) -> str:
        value = one[name]
        return f"{'-' if value is None or math.isnan(value) else format(value, form):>{width}}"

    parts = [
        ("tokens_per_second", ",.0f", 8), ("tflops", ".1f", 8), ("share_of_matmul", ".0%", 10),
        ("share_of_data_sheet", ".0%", 9), ("watts", ".0f", 6), ("mj_per_token", ".1f", 9), ("peak_gb", ".1f", 8),
        ("host_share", ".0%", 6), ("waits", "d", 6), ("gradient_distance", ".1e", 18),
    ]  # fmt: skip
    repeats = {None: "-", True: "same", False: "other"}[one["repeats"]]
    return f"{one['variant']:14} " + " ".join(cell(*part) for part in parts) + f"{repeats:>6}"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(arguments[1], Sizes(seconds=float(os.environ.get(SECONDS, 25))), Path(arguments[2]))))
    else:
        if "--seconds" in arguments:
            os.environ[SECONDS] = arguments.pop(arguments.index("--seconds") + 1)
        file = Path(arguments.pop(arguments.index("--json") + 1)) if "--json" in arguments else None
        chosen = tuple(name for name in arguments if not name.startswith("--"))
        table = main(chosen or VARIANTS, tiny="--tiny" in arguments)
        if file:
            file.write_text(json.dumps(table, indent=1) + "\n")
