"""What is no matrix product has the textbook's values and gradients, as written and compiled, and needs no compiler."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import config as dynamo
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounter
from transformers import TrainerCallback, TrainingArguments

from telco_nb.lora import kernels, packing, pointwise, preflight, step, trainer
from telco_nb.lora.packing import Example
from tests.unit.lora.test_gpu_step import by_bounds, losses_and_gradients, row_of, tiny_qwen2

HOW = ["as written", "traced", pytest.param("compiled", marks=pytest.mark.nightly)]


@pytest.fixture(autouse=True)
def nothing_kept():
    pointwise.compiler_fault.cache_clear()
    pointwise._compiled.cache_clear()
    yield
    pointwise.compiler_fault.cache_clear()
    pointwise._compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture(params=HOW)
def how(request, monkeypatch):
    """`traced` goes through all of torch.compile but the compiler, which takes a minute on a processor."""
    if request.param == "compiled" and not any(map(shutil.which, ("gcc", "clang"))):
        pytest.skip("no C compiler")
    if request.param != "as written":
        monkeypatch.setattr(pointwise, "COMPILED_ON", {"cpu"})
    if request.param == "traced":
        monkeypatch.setattr(pointwise, "COMPILER", {"fullgraph": True, "backend": "aot_eager"})
    return request.param


def made(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def test_the_norm_and_its_gradient_are_those_of_autograd(how):
    x, weight, dy = made(7, 12), made(12), made(7, 12) + 1
    exact = x.double().requires_grad_()
    wanted = weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    wanted.backward(dy.double())
    y, inverse = pointwise.fast(pointwise.norm_forward, x)(x, weight, 1e-5)
    dx = pointwise.fast(pointwise.norm_backward, dy)(dy, x, weight, inverse)
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_the_losses_are_the_cross_entropy_and_the_logits_become_exponentials(how):
    logits, labels = 5 * made(6, 31), torch.arange(6)
    wanted, total = F.cross_entropy(logits.double(), labels, reduction="none"), logits.double().exp().sum(-1)
    held = logits.clone()
    losses, sums = pointwise.fast(pointwise.chunk_losses, held)(held, labels)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((held / sums).double(), logits.double().exp() / total[:, None], rtol=1e-4, atol=1e-7)


def test_a_gpus_fused_step_has_the_losses_and_gradients_of_the_plain_one(how, monkeypatch):
    """In float64, but for norms and losses, which are float32 in both steps."""
    monkeypatch.setattr(step, "attention_kernel", lambda device, dtype: "varlen")
    monkeypatch.setattr(step, "varlen_attn", by_bounds)
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    tuned = tiny_qwen2(torch.float64).double()
    rows = [row_of(), *packing.micro_batches(row_of(), 24), row_of((30, 3))]
    step.prepare_step(tuned, fused=False)
    wanted = [losses_and_gradients(tuned, row) for row in rows]
    assert step.prepare_step(tuned) == ("fused" if how == "as written" else "compiled")
    for row, values in zip(rows, wanted, strict=True):
        found = losses_and_gradients(tuned, row)
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(found, values, strict=True))


def test_without_a_compiler_that_works_the_step_computes_as_written(monkeypatch):
    monkeypatch.setattr(pointwise, "COMPILED_ON", {"cpu"})

    def broken(*_, **__):
        raise RuntimeError("nvcc is older than this card\nand more")

    monkeypatch.setattr("torch.compile", broken)
    assert pointwise.compiler_fault("cpu") == "RuntimeError: nvcc is older than this card"
    assert step.prepare_step(tiny_qwen2(torch.float32)) == "fused"
    assert pointwise.fast(pointwise.swiglu, torch.ones(1)) is pointwise.swiglu
    pointwise.compiler_fault.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert pointwise.compiler_fault("cpu") == "no C compiler is found"
    monkeypatch.setattr(pointwise, "find_spec", lambda name: None)
    assert pointwise.compiler_fault("cuda") == "triton is not installed"


def test_a_row_is_filled_to_one_shape_with_conversations_that_nothing_learns_from(monkeypatch):
    monkeypatch.setitem(step.ROW_MULTIPLE, "cpu", 64)
    row = row_of((9, 21, 7))
    filled = step.pad_to_multiple(row)
    assert filled["input_ids"].shape == filled["position_ids"].shape == filled["shift_labels"].shape == (1, 64)
    assert filled["segments"] == [9, 21, 7, 21, 6], "no longer conversation than before: it may be all a model can take"
    assert filled["bounds"].tolist() == [0, 9, 30, 37, 58, 64] and filled["bounds"].dtype == torch.int32
    assert filled["position_ids"][0, 37:].tolist() == [*range(21), *range(6)]
    assert torch.equal(filled["kept"], row["kept"]) and (filled["shift_labels"][0, 37:] == packing.IGNORE_INDEX).all()
    whole = row_of((30, 34))
    assert step.pad_to_multiple(whole) is whole


@pytest.fixture
def gpu_path(monkeypatch):
    """A GPU's step on the processor, and the counting compiler."""
    counter = CompileCounter()
    monkeypatch.setattr(pointwise, "COMPILED_ON", {"cpu"})
    monkeypatch.setattr(pointwise, "COMPILER", {"fullgraph": True, "backend": counter})
    monkeypatch.setattr(trainer, "WARMED_UP_ON", {"cpu"})
    monkeypatch.setattr(step, "attention_kernel", lambda device, dtype: "varlen")
    monkeypatch.setattr(step, "varlen_attn", by_bounds)
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    monkeypatch.setattr(kernels, "HEAD_CHUNK", {"cpu": 16})
    monkeypatch.setitem(step.ROW_MULTIPLE, "cpu", 32)
    return counter


class AtSteps(TrainerCallback):
    def __init__(self, note):
        self.note = note

    def on_step_begin(self, *_, **__):
        self.note()

    on_step_end = on_step_begin


def test_few_variants_are_compiled_and_none_once_the_steps_have_begun(gpu_path, tmp_path):
    """Checks, warm-up, two epochs with a short last row, micro-batches of several sizes, losses of conversations."""
    torch.manual_seed(0)
    lengths = [9, 21, 14, 30, 26, 11, 17, 24, 8, 12, 28, 19, 13, 7]
    examples = [Example(str(i), t, [-100] * 4 + t[4:]) for i, n in enumerate(lengths) if (t := [*range(3, 3 + n)])]
    tuned = tiny_qwen2(torch.float32)
    for model in (tiny_qwen2(torch.float32).unload(), tuned):
        assert step.prepare_step(model) == "compiled"
        preflight.check_step(model, [examples[8], examples[3]])
    rows = packing.PackedRows(examples, 96, 0)
    assert min(rows.tokens) < 64 < max(rows.tokens)
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=2, per_device_train_batch_size=1, disable_tqdm=True,
        **(trainer.constant_arguments() | {"save_strategy": "no"}),
    )  # fmt: skip
    counts = []
    options = {"data_collator": packing.only_row, "callbacks": [AtSteps(lambda: counts.append(gpu_path.frame_count))]}
    trainer.PackedTrainer(tuned, arguments, train_dataset=rows, **options).train()
    assert len(counts) == 4 * len(rows) and len({*counts}) == 1 and counts[0] > 0
    rows.halve(96, 40)
    trainer.PackedTrainer(tuned, arguments, train_dataset=rows, **options).train()
    assert len({*counts}) == 1, "halved rows are compiled anew"
    trainer.answer_losses(tuned, examples, 64)
    functions = (pointwise.norm_forward, pointwise.norm_backward, pointwise.swiglu, pointwise.chunk_losses)
    functions += (kernels.apply_rotary_pos_emb,)
    variants = {f.__name__: len(_debug_get_cache_entry_list(f.__code__)) for f in functions}
    assert max(variants.values()) <= 5 < dynamo.recompile_limit, variants
    assert variants["chunk_losses"] == 2, "all chunks have one shape, with gradients and in inference mode"


@pytest.mark.parametrize("fault", ["limit", "backend"])
def test_a_compiler_that_fails_in_mid_training_ends_nothing(gpu_path, monkeypatch, fault):
    compiled = pointwise.fast(pointwise.swiglu, made(4, 4))
    assert compiled is not pointwise.swiglu
    compiled(made(4, 4), made(4, 4))
    with dynamo.patch(recompile_limit=1), monkeypatch.context() as broken:
        if fault == "backend":
            broken.setattr(dynamo, "recompile_limit", 8)
            broken.setattr(CompileCounter, "__call__", lambda *_: 1 / 0)
        other = made(3, 5, dtype=torch.float64)
        with pytest.warns(RuntimeWarning, match="swiglu is no longer compiled: "):
            found = compiled(other, other)
    assert torch.equal(found, pointwise.swiglu(other, other)) and torch.equal(compiled(other, other), found)
    with pytest.raises(RuntimeError, match="size of tensor"):
        compiled(made(4, 4), made(3, 5))
