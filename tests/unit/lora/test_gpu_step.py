"""The step as a GPU would compute it, as far as a processor can show: shapes, devices, number formats, waits.

A fake tensor has a device and no numbers. Waits are counted in a real step on the processor that takes the GPU's path,
copies to the GPU in a step whose GPU is a fake one. None of them says anything about speed.
"""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from telco_nb.lora import kernels, packing, pointwise, preflight, step, step_graph, trainer
from telco_nb.lora.packing import IGNORE_INDEX, Example
from telco_nb.lora.trainer import PackedTrainer, constant_arguments
from tests.support.fake_gpu import FakeCard, WaitCounter, lend_cuda_guard, put_on_fake_gpu

LENGTHS = (9, 21, 14)


def tiny_qwen2(dtype: torch.dtype, **options):
    """An adapted model with Qwen2.5's parts in small sizes."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    lora = {"r": 4, "init_lora_weights": False, "target_modules": step.TARGET_MODULES["all"]}
    return step.attach_adapters(Qwen2ForCausalLM._from_config(config, dtype=dtype), LoraConfig(**(lora | options)))


def row_of(lengths=LENGTHS) -> dict:
    torch.manual_seed(1)
    ids = [torch.randint(3, 97, (n,)).tolist() for n in lengths]
    return packing.collate([Example(str(i), t, [IGNORE_INDEX] * 4 + t[4:]) for i, t in enumerate(ids)])


def plain_step(tuned) -> None:
    assert step.prepare_step(tuned, fused=False) == "plain"


def by_bounds(query, key, value, bounds, key_bounds, longest, key_longest, window_size, scale, enable_gqa):
    """What varlen_attn computes, on tensors of (tokens, heads, width)."""
    with torch._C._DisableTorchDispatch():  # its own look at the bounds is on the GPU
        ends = bounds.tolist()
    assert bounds is key_bounds and bounds.dtype == torch.int32 and window_size == (-1, 0)
    assert longest == key_longest == max(b - a for a, b in pairwise(ends))
    parts = []
    for a, b in pairwise(ends):
        q, k, v = (t[a:b].transpose(0, 1)[None] for t in (query, key, value))
        options = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def varlen_path(monkeypatch):
    monkeypatch.setattr(step, "attention_kernel", lambda device, dtype: "varlen")
    monkeypatch.setattr(step, "varlen_attn", by_bounds)


def losses_and_gradients(tuned, row) -> list[torch.Tensor]:
    tuned.zero_grad()
    losses = step.token_losses(tuned, row)
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in tuned.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_forward_and_backward_waits_for_a_gpu(varlen_path, dtype):
    tuned, row = tiny_qwen2(dtype), row_of()
    plain_step(tuned)
    with WaitCounter() as counter:
        losses_and_gradients(tuned, row)
        for part in packing.micro_batches(row, 24):
            losses_and_gradients(tuned, part)
    assert dict(counter.waits) == {}


def test_the_counter_of_waits_sees_items_masks_host_data_and_copies_to_another_device():
    elsewhere = torch.empty(4, dtype=torch.int64, device="meta")
    with WaitCounter() as counter:
        values = torch.arange(4)
        assert values[values > 1].sum().item() == 5
        (values == 0).nonzero()
        torch.tensor([1, 2])
        values.to("meta"), elsewhere.copy_(values)
        values.to(torch.int32), values.to("meta", non_blocking=True), elsewhere.copy_(values, non_blocking=True)
    assert counter.waits == {"_local_scalar_dense": 1, "mask": 1, "nonzero": 1, "lift_fresh": 1, "copy": 2}


def test_attention_by_bounds_is_attention_by_lengths_also_in_micro_batches(varlen_path, monkeypatch):
    tuned, row = tiny_qwen2(torch.float32), row_of()
    plain_step(tuned)
    parts = [row, *packing.micro_batches(row, 24)]
    assert [part["segments"] for part in parts] == [[9, 21, 14], [9], [21], [14]]
    found = [losses_and_gradients(tuned, part) for part in parts]
    monkeypatch.undo()
    for got, part in zip(found, parts, strict=True):
        for a, b in zip(got, losses_and_gradients(tuned, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
def test_a_step_without_casts_of_its_inputs_is_the_same_bit_for_bit(options):
    tuned, row = tiny_qwen2(torch.bfloat16, **options).train(), row_of()
    plain_step(tuned)
    layers = [m for m in tuned.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert all(layer.cast_input_dtype_enabled == bool(options) for layer in layers)
    torch.manual_seed(3)
    found = losses_and_gradients(tuned, row)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    torch.manual_seed(3)
    assert all(map(torch.equal, found, losses_and_gradients(tuned, row)))


def test_the_fused_step_of_a_gpu_has_the_losses_and_gradients_of_the_plain_one(varlen_path, monkeypatch):
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    tuned, row = tiny_qwen2(torch.float32), row_of()
    plain_step(tuned)
    wanted = losses_and_gradients(tuned, row)
    assert step.prepare_step(tuned) == "fused"
    with WaitCounter() as counter:
        found = losses_and_gradients(tuned, row)
    assert dict(counter.waits) == {}
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(found, wanted, strict=True))


def test_the_preflight_of_a_step_that_is_not_fused_holds_in_bfloat16():
    tuned = tiny_qwen2(torch.bfloat16)
    plain_step(tuned)
    examples = [Example(str(i), t, [IGNORE_INDEX] * 4 + t[4:]) for i, t in enumerate([[5, 9, 3, 8, 4, 7], [6] * 9])]
    check = preflight.check_step(tuned, examples)
    assert check.loss_difference < 5e-2 and check.gradient_difference is not None
    assert not any(getattr(m, "cast_input_dtype_enabled", False) for m in tuned.modules()), "the step goes on without"


def train(tuned, folder, steps: int, **options) -> None:
    rows = packing.PackedRows([Example(str(i), [*range(9)], [IGNORE_INDEX, *range(1, 9)]) for i in range(20)], 20, 0)
    given = {"save_strategy": "no", "optim": "adamw_torch_fused"}  # as on a GPU
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=1, disable_tqdm=True,
        **(constant_arguments() | given),
    )  # fmt: skip
    PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row, **options).train()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_of_the_trainer_goes_through_all_modules_once_and_waits_twice_beside_copies_of_the_row(
    varlen_path, tmp_path, monkeypatch, fused
):
    """A walk through the modules of a 3B model takes milliseconds, in which a GPU has nothing to do.

    The one walk is the Trainer's zero_grad; it waits for the loss and the gradient's norm, which it logs.
    """
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    tuned, visited, found = tiny_qwen2(torch.float32), [], []
    assert step.prepare_step(tuned, fused) == ("fused" if fused else "plain")
    named_modules = torch.nn.Module.named_modules

    def counted(module, *arguments, **options):
        for name, part in named_modules(module, *arguments, **options):
            visited.extend([name] if module is tuned else [])
            yield name, part

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    for steps in (4, 8):
        visited.clear()
        with WaitCounter() as counter:
            train(tuned, tmp_path, steps, record_step=False)
        found.append((len(visited), counter.waits["_local_scalar_dense"]))
    modules = sum(1 for _ in named_modules(tuned))
    a_step = [(b - a) / 4 for a, b in zip(*found, strict=True)]
    assert modules <= a_step[0] < 1.2 * modules and a_step[1] == 2


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if reason := lend_cuda_guard(tmp_path_factory.mktemp("guard")):
        pytest.skip(reason)


@pytest.fixture
def fake_gpu(guard, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(pointwise, "COMPILED_ON", set())


def without_backward(accelerator, loss: torch.Tensor) -> None:
    """Gradients without a backward pass, which needs CUDA itself; the waits of one are counted on the processor."""
    assert loss.device.type == "cuda"
    for parameter in accelerator._models[-1].parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("kind", ["plain", "fused", "recorded"])
def test_a_step_of_the_trainer_waits_for_six_copies_of_a_row_to_a_gpu_and_for_two_numbers(
    fake_gpu, tmp_path, monkeypatch, kind
):
    """The copies are those that an H100 waited for; the numbers are the loss and the gradient's norm, for the log."""
    for owner in (TrainingArguments, Accelerator):
        monkeypatch.setattr(owner, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)  # it is there
    monkeypatch.setattr(Accelerator, "backward", without_backward)
    monkeypatch.setattr(trainer, "WARMED_UP_ON", set())
    monkeypatch.setattr(step_graph, "record_step", recorded_on_a_fake_gpu)
    tuned, found = tiny_qwen2(torch.bfloat16), []
    with FakeTensorMode() as mode:
        put_on_fake_gpu(tuned)
        assert step.prepare_step(tuned, kind != "plain") == ("plain" if kind == "plain" else "fused")
        for steps in (4, 8):
            with FakeCard(mode) as card:
                train(tuned, tmp_path, steps, record_step=kind == "recorded")
            found.append(card.waits)
    a_step = {name: (found[1][name] - found[0][name]) / 4 for name in found[1]}
    assert a_step == {"copy": 6, "_local_scalar_dense": 2}


def recorded_on_a_fake_gpu(tuned, trained, rows):
    """A recording is one launch: none of its operations is seen again."""
    graph = step_graph.StepGraph(tuned, trained, step_graph.shape_of(rows, "cuda"), rows[0])
    result = torch.ones((), device="cuda"), tuple(map(torch.zeros_like, trained))
    graph.record(lambda work, spare_bytes: lambda: result)
    return graph, None


def test_the_forward_pass_fits_a_gpu_in_shapes_devices_and_number_formats(fake_gpu, monkeypatch):
    used = []
    monkeypatch.setattr(step, "varlen_attn", lambda *a, real=step.varlen_attn, **k: used.append(a) or real(*a, **k))
    tuned, host_row = tiny_qwen2(torch.bfloat16), row_of()
    with FakeTensorMode() as mode:
        put_on_fake_gpu(tuned)
        plain_step(tuned)
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in host_row.items()}
        row = packing.to_device(fake, torch.device("cuda"))
        losses = step.token_losses(tuned, row)
        assert step.prepare_step(tuned) == "fused"
        fused = step.token_losses(tuned, row)
    assert (fused.device, fused.dtype, fused.shape) == (losses.device, losses.dtype, losses.shape)
    assert (losses.device.type, losses.dtype, len(losses)) == ("cuda", torch.float32, sum(row["supervised"]))
    assert len(losses) < row["input_ids"].shape[1] < 256 == used[0][0].shape[0], "filled up to one shape"
    assert len(used) == 2 * 3 and {t.device.type for t in used[0][:4]} == {"cuda"}
    assert [t.dtype for t in used[0][:4]] == [torch.bfloat16] * 3 + [torch.int32]
