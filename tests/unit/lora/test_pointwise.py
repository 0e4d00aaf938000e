"""What is no matrix product has the textbook's values and gradients, as written and compiled, and needs no compiler."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from telco_nb.lora import kernels, packing, pointwise, step
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
