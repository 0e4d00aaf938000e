"""The recorded step: rows filled to one shape, and a recording whose memory is written anew each time.

A processor records nothing. The stand-in keeps what a CUDA graph keeps: one piece of memory for each result.
"""

import gc
import shutil
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from transformers import TrainingArguments

from telco_nb.lora import device, kernels, packing, step, step_graph, trainer
from telco_nb.lora.energy import Meter
from telco_nb.lora.packing import Example, PackedRows
from tests.unit.lora.test_gpu_step import WaitCounter, tiny_qwen2

LENGTHS = [9, 21, 14, 30, 26, 11, 17, 24, 8, 12, 28, 19, 13, 7]


def examples_of(lengths=LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    return [Example(str(i), t, [packing.IGNORE_INDEX] * 4 + t[4:]) for i, t in enumerate(ids)]


def attend_within_bounds(q, k, v, bounds, key_bounds, longest, key_longest, window_size, scale, enable_gqa=True):
    """What varlen_attn computes, on tensors of (tokens, heads, width); a conversation may be empty."""
    with torch._C._DisableTorchDispatch():  # its own look at the bounds is on the GPU
        ends = bounds.tolist()
    assert longest >= max(b - a for a, b in pairwise(ends)) and len(q) == ends[-1]
    parts = []
    for a, b in pairwise(ends):
        parts_of = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        options = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        parts.append(torch.nn.functional.scaled_dot_product_attention(*parts_of, **options)[0].transpose(0, 1))
    return torch.cat(parts)


def record_as_a_graph_does(work, spare_bytes=0):
    """Results lie where the first ones lay, and nothing in the work may wait for a GPU."""
    first = work()

    def replay():
        with WaitCounter() as counter:
            loss, gradients = work()
        assert not counter.waits
        first[0].copy_(loss)
        for kept, new in zip(first[1], gradients, strict=True):
            kept.copy_(new)
        return first

    return replay


def take_gpu_path(monkeypatch):
    """A GPU's step on the processor: attention by bounds and not by blocks, rows filled to one length."""
    monkeypatch.setattr(step, "attention_kernel", lambda device, dtype: "varlen")
    monkeypatch.setattr(step, "varlen_attn", attend_within_bounds)
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    monkeypatch.setattr(kernels, "HEAD_CHUNK", {"cpu": 16})
    monkeypatch.setitem(step.ROW_MULTIPLE, "cpu", 32)


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch):
    take_gpu_path(monkeypatch)


@pytest.fixture
def tuned():
    model = tiny_qwen2(torch.float64).double()
    assert step.prepare_step(model) == "fused"
    return model


def gradients_of(model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return found


def test_a_filled_row_has_the_shape_of_all_rows_and_only_adds_what_counts_nothing():
    rows = PackedRows(examples_of(), 96, 0)
    shape = step_graph.shape_of(rows, "cpu")
    assert shape.tokens == 96 and shape.longest == 30 and shape.labelled == max(rows.supervised)
    assert min(rows.tokens) < 64, "a short row is among them"
    for i, row in enumerate(rows):
        filled = step_graph.fill_row(row, shape)
        widths = {name: part.shape[-1] for name, part in filled.items()}
        assert widths == dict(input_ids=96, position_ids=96, bounds=shape.segments + 1, labels=shape.labelled,
                              kept=shape.labelled, weights=shape.labelled)  # fmt: skip
        assert filled["bounds"].dtype == torch.int32 and filled["bounds"][-1] == 96
        assert filled["bounds"].diff().min() >= 0 and filled["bounds"].diff().max() <= 30
        assert filled["weights"].sum() == rows.supervised[i] == len(row["kept"])


def test_every_row_of_a_recording_has_the_loss_and_gradient_of_the_step(tuned):
    rows = PackedRows(examples_of(), 96, 0)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    shape = step_graph.shape_of(rows, "cpu")
    graph = step_graph.StepGraph(tuned, trained, shape, rows[0])
    graph.record(record_as_a_graph_does)
    for row in [*rows, rows[0]]:
        divisor = len(row["kept"])
        wanted = step.token_losses(tuned, row).sum() / divisor
        wanted.backward()
        gradient = gradients_of(tuned)
        found = graph.step(row, divisor)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert (gradients_of(tuned) - gradient).norm() < 1e-6 * gradient.norm()


def test_gradients_of_two_rows_of_one_optimiser_step_are_added(tuned):
    rows = PackedRows(examples_of(), 96, 0)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    graph = step_graph.StepGraph(tuned, trained, step_graph.shape_of(rows, "cpu"), rows[0])
    graph.record(record_as_a_graph_does)
    for row in (rows[0], rows[1], rows[2]):
        (step.token_losses(tuned, row).sum() / 7).backward()
    wanted = gradients_of(tuned)
    losses = [graph.step(row, torch.tensor(7)) for row in (rows[0], rows[1], rows[2])]
    assert len({loss.item() for loss in losses}) == 3, "each loss is memory of its own"
    assert (gradients_of(tuned) - wanted).norm() < 1e-6 * wanted.norm()


def train(folder, recorded, monkeypatch, checkpoint=None, rows=None, record=record_as_a_graph_does, **options):
    """The adapter after two epochs, and the trainer."""
    torch.manual_seed(0)
    monkeypatch.setattr(step_graph, "record_cuda", record)
    monkeypatch.setattr(step_graph, "can_record", lambda model, device: recorded)
    model = tiny_qwen2(torch.float32)
    step.prepare_step(model)
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=2, per_device_train_batch_size=1, disable_tqdm=True, learning_rate=1e-2,
        **trainer.constant_arguments(),
    )  # fmt: skip
    rows = rows or PackedRows(examples_of(), 96, 0)
    monitor = trainer.TrainingMonitor(Meter((2.0, 5.0, 12.0), 0.3), 0.0, rows, log=lambda text: None)
    made = trainer.PackedTrainer(
        model, arguments, train_dataset=rows, data_collator=packing.only_row, callbacks=[monitor], **options
    )
    made.train(checkpoint)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), made


@pytest.fixture
def replays(monkeypatch):
    """The rows that recordings have computed, and the recordings themselves, weakly."""
    seen, real = [], step_graph.StepGraph.step

    def counted(self, row, divisor):
        seen.append(weakref.ref(self))
        return real(self, row, divisor)

    monkeypatch.setattr(step_graph.StepGraph, "step", counted)
    return seen


def test_a_training_with_a_recording_ends_with_the_same_adapter(tmp_path, monkeypatch, replays):
    wanted, without = train(tmp_path / "a", False, monkeypatch)
    assert without.rows.graph_fault == "not this kind of step" and replays == []
    found, with_graph = train(tmp_path / "b", True, monkeypatch)
    assert with_graph.rows.graph_fault is None and len(replays) == 2 * len(with_graph.rows)
    assert [p.grad for p in with_graph.trained] == [None] * len(with_graph.trained)
    gc.collect()
    assert replays[0]() is None, "the recording is gone, and its memory with it"
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    losses = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (without, with_graph)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_recording_that_fails_leaves_a_training_without_one(tmp_path, monkeypatch):
    def fails(work, spare_bytes):
        raise RuntimeError("no room to record the step\nand more")

    wanted, _ = train(tmp_path / "a", False, monkeypatch)
    found, made = train(tmp_path / "b", True, monkeypatch, record=fails)
    assert torch.equal(found, wanted) and made.rows.graph_fault == "no room to record the step"


def test_a_recording_that_computes_something_else_is_refused(tuned, monkeypatch):
    """As if a part of the filled row were not copied: every row would have the first one's labels."""
    real = step_graph.fill_row
    rows = PackedRows(examples_of(), 96, 0)
    first = real(rows[0], step_graph.shape_of(rows, "cpu"))
    monkeypatch.setattr(step_graph, "fill_row", lambda row, shape: real(row, shape) | {"labels": first["labels"]})
    monkeypatch.setattr(step_graph, "record_cuda", record_as_a_graph_does)
    graph, fault = step_graph.record_step(tuned, [p for p in tuned.parameters() if p.requires_grad], rows)
    assert graph is None and fault.startswith("a filled row has a loss of")


def recorded_badly(spoil):
    """A recording whose results `spoil` changes, given the number of the replay."""

    def record(work, spare_bytes=0):
        replay, done = record_as_a_graph_does(work), []

        def spoilt():
            found = replay()
            done.append(1)
            spoil(len(done), *found)
            return found

        return spoilt

    return record


def scale_a_gradient(n, loss, gradients):
    gradients[0].mul_(1.5)


def scale_the_loss(n, loss, gradients):
    loss.mul_(1.5)


def lose_a_gradient(n, loss, gradients):
    gradients[-1].fill_(torch.nan)


def change_at_the_third(n, loss, gradients):
    for gradient in gradients:
        gradient.mul_(1.5 if n == 3 else 1.0)


def nudge(n, loss, gradients):
    gradients[0].mul_(1 + 1e-9)


@pytest.mark.parametrize("fixed_order", [True, False])
@pytest.mark.parametrize("spoil", [scale_a_gradient, scale_the_loss, lose_a_gradient, change_at_the_third, nudge])
def test_a_recording_with_another_gradient_is_refused_to_the_last_bit_in_a_fixed_order(
    tuned, monkeypatch, spoil, fixed_order
):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: fixed_order)
    monkeypatch.setattr(step_graph, "record_cuda", recorded_badly(spoil))
    rows = PackedRows(examples_of(), 96, 0)
    graph, fault = step_graph.record_step(tuned, [p for p in tuned.parameters() if p.requires_grad], rows)
    if spoil is nudge and not fixed_order:
        assert fault is None
    else:
        assert graph is None and fault.startswith("the recorded step is not the step")


def test_out_of_memory_frees_the_recording_before_rows_are_cut(tmp_path, monkeypatch, replays):
    wanted, _ = train(tmp_path / "a", False, monkeypatch)
    real = step_graph.StepGraph.step

    def runs_out(self, row, divisor):
        if len(replays) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, row, divisor)

    monkeypatch.setattr(step_graph.StepGraph, "step", runs_out)
    found, made = train(tmp_path / "b", True, monkeypatch)
    assert made.rows.graph_fault.startswith("given up at step 3: CUDA out of memory") and made.rows.shrunk == []
    assert made.rows.recorded is False and (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_training_computes_as_it_began(tmp_path, monkeypatch, replays, recorded):
    wanted, made = train(tmp_path / "a", recorded, monkeypatch)
    shutil.rmtree(trainer.last_checkpoint(tmp_path / "a"))  # that of the last step
    checkpoint = trainer.last_checkpoint(tmp_path / "a")
    at = int(checkpoint.rpartition("-")[2])
    assert 0 < at < made.state.max_steps
    replays.clear()
    found, again = train(tmp_path / "a", True, monkeypatch, checkpoint)
    assert torch.equal(found, wanted)
    assert len(replays) == (made.state.max_steps - at if recorded else 0)
    assert again.rows.graph_fault == (None if recorded else "not this kind of step"), (
        "the reason is that of the beginning"
    )


def test_what_is_told_of_a_training_survives_a_resume(tmp_path, monkeypatch):
    """It gave its recording up at the first row and held 7 GB; the second part of it held 5."""
    held = iter([7e9] + [5e9] * 99)
    monkeypatch.setattr(trainer, "peak_gpu_bytes", lambda: int(next(held)))

    def runs_out(self, row, divisor):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as once:
        once.setattr(step_graph.StepGraph, "step", runs_out)
        _, made = train(tmp_path, True, once)
    shutil.rmtree(trainer.last_checkpoint(tmp_path))  # that of the last step
    _, again = train(tmp_path, True, monkeypatch, trainer.last_checkpoint(tmp_path))
    for rows in (made.rows, again.rows):
        assert rows.graph_fault.startswith("given up at step 0: CUDA out of memory")
        assert rows.recorded is False and rows.repeats is False and rows.peak_bytes == 7e9


def test_a_training_that_begins_anew_knows_nothing_of_an_earlier_one_of_its_rows(tmp_path, monkeypatch):
    rows = PackedRows(examples_of(), 96, 0)
    train(tmp_path / "a", False, monkeypatch, rows=rows)
    rows.repeats, rows.peak_bytes = False, 7
    train(tmp_path / "b", True, monkeypatch, rows=rows)
    assert rows.recorded and rows.repeats and rows.graph_fault is None and rows.peak_bytes is None


def test_nothing_is_recorded_where_record_step_is_false(tmp_path, monkeypatch, replays):
    wanted, _ = train(tmp_path / "a", False, monkeypatch)
    found, made = train(tmp_path / "b", True, monkeypatch, record_step=False)
    assert torch.equal(found, wanted) and replays == [] and made.rows.graph_fault == "record_step is false"


def test_a_training_whose_rows_were_halved_does_not_claim_to_repeat(tmp_path, monkeypatch):
    real = trainer.PackedTrainer._micro_batch_steps

    def runs_out(self, model, parts, divisor):
        if len(parts) == 1 and not self.rows.shrunk:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, parts, divisor)

    monkeypatch.setattr(trainer.PackedTrainer, "_micro_batch_steps", runs_out)
    _, made = train(tmp_path, False, monkeypatch)
    assert made.rows.shrunk and not made.rows.repeats


def test_a_resumed_training_cuts_rows_before_it_records(tmp_path, monkeypatch):
    rows = PackedRows(examples_of(), 96, 0)
    rows.halve(96, 40)
    train(tmp_path, False, monkeypatch, rows=rows)
    _, again = train(tmp_path, True, monkeypatch, trainer.last_checkpoint(tmp_path))
    assert again.rows.micro_batch_tokens == 48
    assert again.rows.graph_fault == "rows are computed in parts", "that of the beginning"


def test_only_a_fused_step_with_bounds_and_without_checkpointing_is_recorded(tuned, monkeypatch):
    here = torch.device("cpu")
    assert step_graph.can_record(tuned, here), "attention_kernel says varlen here"
    causal = step.causal_model(tuned)
    with monkeypatch.context() as other:
        other.setattr(step, "attention_kernel", lambda device, dtype: "loop")
        assert not step_graph.can_record(tuned, here)
    with monkeypatch.context() as other:
        other.setattr(kernels, "has_own_head", lambda model: True)
        assert not step_graph.can_record(tuned, here)
    with monkeypatch.context() as other:
        other.setattr(type(causal), "is_activation_checkpointing", True)
        assert not step_graph.can_record(tuned, here)
    step.prepare_step(tuned, fused=False)
    assert not step_graph.can_record(tuned, here)


def test_rows_that_are_cut_are_not_recorded_and_one_long_conversation_is_no_cut(tuned, monkeypatch):
    monkeypatch.setattr(step_graph, "record_cuda", record_as_a_graph_does)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert step_graph.record_step(tuned, trained, PackedRows(examples_of(), 96, 0, 48)) == (
        None,
        "rows are computed in parts",
    )
    graph, fault = step_graph.record_step(tuned, trained, PackedRows(examples_of([40, 9, 12]), 30, 0))
    assert fault is None and graph.shape.tokens == 64


def test_a_part_that_knows_no_fixed_order_ends_no_training_but_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WARMED_UP_ON", {"cpu"})
    strictness = []

    @contextmanager
    def told(strict=True):
        strictness.append(strict)
        yield

    def warm_up(self):
        if strictness[-1]:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    _, plain = train(tmp_path / "a", False, monkeypatch)
    assert plain.rows.repeats
    monkeypatch.setattr(trainer, "repeatable", told)
    monkeypatch.setattr(device, "repeatable", told)
    monkeypatch.setattr(trainer.PackedTrainer, "warm_up", warm_up)
    _, made = train(tmp_path / "b", False, monkeypatch)
    assert not made.rows.repeats and strictness == [True, False, False]


def test_a_part_without_a_fixed_order_that_only_a_step_meets_is_told_as_well(tmp_path, monkeypatch):
    wanted, _ = train(tmp_path / "a", False, monkeypatch)
    orders, real = [], trainer.PackedTrainer._micro_batch_steps

    def refuses(self, *arguments):
        if not orders:
            raise RuntimeError("index_add_cuda_ does not have a deterministic implementation")
        return real(self, *arguments)

    monkeypatch.setattr(trainer, "use_fixed_order", lambda strict: orders.append(strict))
    monkeypatch.setattr(trainer.PackedTrainer, "_micro_batch_steps", refuses)
    found, made = train(tmp_path / "b", False, monkeypatch)
    assert torch.equal(found, wanted) and not made.rows.repeats and orders == [False]
