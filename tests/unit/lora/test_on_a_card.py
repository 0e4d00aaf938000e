"""What only a GPU can show of the recorded step: `CUDA_VISIBLE_DEVICES=0 pytest` tries it, else skipped."""

import gc

import pytest
import torch

from telco_nb.lora import device, packing, step, step_graph
from telco_nb.lora.packing import PackedRows
from tests.unit.lora.test_gpu_step import tiny_qwen2
from tests.unit.lora.test_step_graph import examples_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def tuned(monkeypatch):
    device.use_device("cuda")
    monkeypatch.setitem(device._chosen, "device", "cuda")
    model = tiny_qwen2(torch.bfloat16).to("cuda")
    assert step.prepare_step(model) in ("fused", "compiled")
    return model


def trained_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_a_recording_has_the_losses_and_gradients_of_the_step_to_the_last_bit(tuned):
    rows = PackedRows(examples_of([n + 8 for n in range(3, 60)]), 512, 0)
    with device.repeatable():
        graph, fault = step_graph.record_step(tuned, trained_of(tuned), rows)
        assert fault is None
        launched = step_graph.StepGraph(tuned, trained_of(tuned), graph.shape, rows[0])
        for row in [*rows, rows[0]]:
            found, wanted = graph.result(row), launched.result(row)
            assert torch.equal(found[0], wanted[0])
            assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_an_error_that_ends_no_capture_leaves_torch_usable(tuned):
    """Then torch ends the capture itself, and its graph gives the memory back when it goes: once, not twice."""
    weights = torch.ones(1024, 1024, device="cuda")

    def work():
        big = weights @ weights
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("as if memory ran out in the work")
        return big.sum(), (big,)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="as if memory"):
            step_graph.record_cuda(work, 0)
        gc.collect()
        device.forget_peak()
    assert (weights @ weights).sum().item() == pytest.approx(1024.0**3, rel=1e-3)


def test_a_recording_that_really_fails_leaves_the_memory_usable_and_free(tuned):
    weights = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    device.forget_peak()
    before = torch.cuda.memory_reserved()

    def work():
        big = weights @ weights
        if torch.cuda.is_current_stream_capturing():
            big.sum().item()  # waits, which ends a capture
        return big.sum(), (big,)

    with pytest.raises(RuntimeError):
        step_graph.record_cuda(work, 0)
    assert not torch.cuda.is_current_stream_capturing()
    again = weights @ weights
    assert again.sum().item() == pytest.approx(4096.0**3, rel=1e-3)
    del again
    device.forget_peak()
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20, "the failed recording's memory is given back"
    rows = PackedRows(examples_of(), 96, 0)
    step.token_losses(tuned, packing.to_device(rows[0], torch.device("cuda"))).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained_of(tuned))
