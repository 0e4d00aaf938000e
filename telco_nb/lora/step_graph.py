"""Forward and backward of a packed row as one CUDA graph: the card gets thousands of kernels in one launch.

A step of 36 layers launches some 10,000 kernels. A host may need longer for that than an H100 for the work itself, and
the card waits: in the shape of Qwen2.5-3B 20,100 tokens/s became 31,400 with a graph (bench/gpu.py). It is recorded
once and replayed for each row. For that all rows need one shape: `fill_row` lengthens each to the shape of the largest;
loss and gradient stay the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telco_nb.lora import kernels, step
from telco_nb.lora.packing import PackedRows, to_device

ROOM = 1.1  # free memory that a recording needs, as a share of what the same work took before
OPTIMISER_BYTES = 8  # of each trained weight: two moments in float32, which are made after the recording
LIKE_THE_STEP = 1e-2  # relative distance of two losses in bfloat16, which rounds another way in a filled row
LIKE_ITSELF = 5e-2  # the same of gradients that are added in no fixed order; in a fixed order they are equal

IN_PARTS, OTHER_STEP = "rows are computed in parts", "not this kind of step"
ALWAYS = (IN_PARTS, OTHER_STEP)  # reasons for no recording that the same training meets each time

Result = tuple[Tensor, tuple[Tensor, ...]]  # loss and gradients
Work = Callable[[], Result]


@dataclass(frozen=True)
class RowShape:
    """What all rows are filled up to: tokens, conversations, labelled positions; and the longest conversation."""

    tokens: int
    segments: int
    labelled: int
    longest: int


def shape_of(rows: PackedRows, device_type: str) -> RowShape:
    """The shape that every row of a training fits into."""
    multiple = step.ROW_MULTIPLE[device_type]
    tokens = -(-max(rows.tokens) // multiple) * multiple
    longest = max(len(example.input_ids) for row in rows.rows for example in row)
    segments = (len(r) - (n - tokens) // longest for r, n in zip(rows.rows, rows.tokens, strict=True))
    return RowShape(tokens, max(segments), max(rows.supervised), longest)


def fill_row(row: dict[str, Any], shape: RowShape) -> dict[str, Tensor]:
    """A row of `packing.collate` in the shape of all rows of its training.

    Conversations without labels are added, none longer than the shape's longest, then empty ones. `kept` is continued
    with position 0 at a weight of 0.

    Returns:
        Tensors on the row's device: "input_ids", "position_ids" and "labels" (1, tokens), "bounds" (segments + 1,),
        "kept" and "weights" (labelled,), the latter float32.
    """
    ids, bounds, kept = row["input_ids"], row["bounds"], row["kept"]
    missing = shape.tokens - ids.shape[1]
    ends = torch.arange(1, shape.segments - len(row["segments"]) + 1, device=ids.device) * shape.longest
    positions = torch.arange(missing, device=ids.device) % shape.longest
    zeros = kept.new_zeros(shape.labelled - len(kept))
    weights = torch.zeros(shape.labelled, device=ids.device)
    weights[: len(kept)] = 1.0
    return {
        "input_ids": torch.cat([ids, ids[:, -1:].expand(1, missing)], 1),
        "position_ids": torch.cat([row["position_ids"], positions[None]], 1),
        "bounds": torch.cat([bounds, bounds[-1:] + ends.clamp(max=missing).to(bounds.dtype)]),
        "labels": torch.cat([row["shift_labels"][0, kept], zeros]),
        "kept": torch.cat([kept, zeros]),
        "weights": weights,
    }


class StepGraph:
    """The step of a training's rows in one shape. After `record` one launch does it.

    Args:
        model: with adapters, after `step.prepare_step`, on the device that computes.
        trained: the parameters whose gradients are wanted.
        shape: of all rows.
        example: a row.
    """

    def __init__(self, model: Any, trained: list[Tensor], shape: RowShape, example: dict[str, Any]):
        self.model, self.trained, self.shape = model, trained, shape
        self.device = step.causal_model(model).device
        self.row = {name: part.to(self.device) for name, part in fill_row(example, shape).items()}
        self.divisor = torch.ones((), device=self.device)
        self.work: Work = self._compute

    def record(self, record: Callable[[Work, int], Work] | None = None) -> None:
        """Record the work.

        Args:
            record: makes a function of the work that does it again, and leaves so many bytes free; `record_cuda` unless
                it is tested.

        Raises:
            RuntimeError: the work waits for the card, or there is no room to record it.
        """
        spare = OPTIMISER_BYTES * sum(parameter.numel() for parameter in self.trained)
        self.work = (record or record_cuda)(self._compute, spare)

    def _compute(self) -> Result:
        losses = step.static_losses(self.model, self.row, self.shape.longest)
        loss = (losses * self.row["weights"]).sum() / self.divisor
        return loss.detach(), torch.autograd.grad(loss, self.trained)

    def step(self, row: dict[str, Any], divisor: Tensor | float) -> Tensor:
        """Loss of a row, divided by `divisor`; its gradients are added to those of the parameters.

        Args:
            row: of `packing.collate`, on any device.
            divisor: supervised tokens of the optimiser step.
        """
        self._take(row, divisor)
        earlier = [None if p.grad is None else p.grad.clone() for p in self.trained]  # may be the recording's memory
        loss, gradients = self.work()
        for parameter, gradient, before in zip(self.trained, gradients, earlier, strict=True):
            parameter.grad = gradient if before is None else before.add_(gradient)
        return loss.clone()

    def result(self, row: dict[str, Any]) -> Result:
        """Loss and gradients of a row in memory of their own. Nothing is added to those of the parameters."""
        self._take(row, 1.0)
        loss, gradients = self.work()
        return loss.clone(), tuple(gradient.clone() for gradient in gradients)

    def _take(self, row: dict[str, Any], divisor: Tensor | float) -> None:
        for name, part in fill_row(row, self.shape).items():
            self.row[name].copy_(part)
        self.divisor.copy_(divisor) if isinstance(divisor, Tensor) else self.divisor.fill_(divisor)


def record_step(model: Any, trained: list[Tensor], rows: PackedRows) -> tuple[StepGraph | None, str | None]:
    """The recorded step of a training, or the reason why the host launches each kernel.

    Args:
        model, trained: as of StepGraph.
        rows: of the training, all computed by this process.
    """
    device, graph = step.causal_model(model).device, None
    if any(len(row) > 1 and n > rows.micro_batch_tokens for row, n in zip(rows.rows, rows.tokens, strict=True)):
        return None, IN_PARTS
    if not can_record(model, device):
        return None, OTHER_STEP
    try:
        graph = StepGraph(model, trained, shape_of(rows, device.type), rows[0])
        _record_checked(graph, rows[0], rows[-1])
        return graph, None
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    graph = None  # only now: the error kept the arrays of the attempt alive
    with suppress(RuntimeError):
        torch.cuda.empty_cache()
    return None, reason


def _record_checked(graph: StepGraph, first: dict[str, Any], other: dict[str, Any]) -> None:
    """Record a step, and hold the recording against what the host launches: two rows, then the first one again.

    In a fixed order loss and all gradients must be the same to the last bit.

    Raises:
        RuntimeError: they are not, or a loss in the shape of all rows is another than the plain step's.
    """
    with torch.no_grad():
        plain = step.token_losses(graph.model, to_device(other, graph.device)).sum().item()
    launched = [_on_host(graph.result(row)) for row in (first, other)]  # the recording needs the room
    if not abs(launched[1][0].item() - plain) <= LIKE_THE_STEP * abs(plain):
        raise RuntimeError(f"a filled row has a loss of {launched[1][0].item():.5g}, the step {plain:.5g}")
    graph.record()
    for row, wanted in zip((first, other, first), (*launched, launched[0]), strict=True):
        _refuse_other_result(_on_host(graph.result(row)), wanted)


def _on_host(result: Result) -> Result:
    return result[0].cpu(), tuple(gradient.cpu() for gradient in result[1])


def _refuse_other_result(found: Result, wanted: Result) -> None:
    """Raises RuntimeError unless loss and gradients are equal, or alike where they are added in no fixed order."""
    pairs = list(zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True))
    if all(torch.equal(a, b) for a, b in pairs):
        return
    fixed = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    loss = ((found[0] - wanted[0]).abs() / wanted[0].abs()).item()
    gradient = _distance(found[1], wanted[1])
    if fixed or not (loss <= LIKE_THE_STEP and gradient <= LIKE_ITSELF):  # a distance may be NaN
        raise RuntimeError(f"the recorded step is not the step: loss {loss:.1g} of it away, gradients {gradient:.1g}")


def _distance(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Length of what parts them, as a share of the length of what is wanted."""
    apart = torch.stack([(a - b).float().norm() for a, b in zip(found, wanted, strict=True)]).norm()
    return (apart / torch.stack([b.float().norm() for b in wanted]).norm()).item()


def can_record(model: Any, device: torch.device) -> bool:
    """Whether the step of this model can be a graph: fused, on a GPU with attention that takes bounds.

    Activation checkpointing asks for the state of the random numbers, which is not allowed while recording.
    """
    causal = step.causal_model(model)
    varlen = step.attention_kernel(device, step.base_dtype(model)) == "varlen"
    static = kernels.is_fused(model) and not kernels.has_own_head(causal)
    return varlen and static and not causal.is_activation_checkpointing


def record_cuda(work: Work, spare_bytes: int) -> Work:
    """Record the work as a CUDA graph.

    A recording that fails leaves torch in a state of its own, so what would make it fail is looked for before. If it
    fails all the same, its memory is given back: torch would go on to allocate there, or hold it.

    Raises:
        RuntimeError: a part of the work waits for the card, or there is no room for it beside `spare_bytes`.
    """
    needed = _warm_up(work)
    torch.cuda.empty_cache()  # the recording has memory of its own
    free, wanted = torch.cuda.mem_get_info()[0], ROOM * needed + spare_bytes
    if free < wanted:
        raise RuntimeError(f"no room to record the step: {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            found = work()
    except BaseException:
        torch.cuda.set_stream(stream)
        if not _has_ended(graph):  # else the graph gives the pool back itself, and a second time would be an error
            _end_pool(torch.cuda.current_device(), pool)
        raise

    def replay() -> tuple[Tensor, tuple[Tensor, ...]]:
        graph.replay()
        return found

    return replay


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the capture of a graph came to its end, so that it owns its pool. torch raises where it did not."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _end_pool(device: int, pool: Any) -> None:
    """Let the memory of a recording that broke off be freed, and nothing more be put there."""
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):
            end(device, pool)


def _warm_up(work: Work) -> int:
    """Do the work twice on a stream of its own: first all is compiled, then it may not wait. Bytes that it takes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    return torch.cuda.max_memory_allocated() - before
