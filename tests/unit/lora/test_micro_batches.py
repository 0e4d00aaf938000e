"""A row that does not fit into memory is computed in parts: the same loss, gradient and training."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_trainer import fake_examples, tiny, train

from telco_nb.lora import packing
from telco_nb.lora.device import is_out_of_memory
from telco_nb.lora.step import TrainingError, token_losses
from telco_nb.lora.trainer import loss_curve


def test_a_row_in_parts_has_the_loss_and_gradient_of_the_whole(tmp_path):
    whole, trainer, _, rows = train(tmp_path / "whole")
    halved, again, _, _ = train(tmp_path / "halved", micro_batch_tokens=20)
    assert max(len(packing.micro_batches(row, 20)) for row in rows) >= 2
    losses = [loss_curve(t.state.log_history, rows).train_loss.tolist() for t in (trainer, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(whole[name], halved[name], atol=1e-4) for name in whole)


def test_when_memory_runs_out_the_row_is_halved_and_the_training_is_the_same(tmp_path, monkeypatch):
    wanted, _, _, rows = train(tmp_path / "wanted", micro_batch_tokens=24)
    plain = token_losses

    def scarce(model, row):
        losses = plain(model, row)
        if row["input_ids"].shape[1] > 30:  # behind the forward pass, as the backward pass would run out
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses

    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", scarce)
    found, _, _, rows = train(tmp_path / "found")
    assert rows.shrunk == [max(rows.tokens)] and rows.micro_batch_tokens == max(rows.tokens) // 2
    assert all(torch.allclose(wanted[name], found[name], atol=1e-4) for name in wanted)
    saved = json.loads(next(tmp_path.glob("found/checkpoint-*/progress.json")).read_text())
    assert (saved["micro_batch_tokens"], saved["shrunk"]) == (rows.micro_batch_tokens, rows.shrunk)


class ScarceMemory:
    """Memory for rows of up to `room` tokens in the first `last` calls of the step, later for any row."""

    def __init__(self, room, last):
        self.room, self.last, self.calls, self.sizes = room, last, 0, []

    def __call__(self, model, row):
        losses = token_losses(model, row)
        self.calls += 1
        self.sizes.append(row["input_ids"].shape[1])
        if self.calls <= self.last and self.sizes[-1] > self.room:
            raise MemoryError  # as the host's memory runs out
        return losses


def test_micro_batches_grow_back_when_memory_is_there_again_and_a_resumed_training_does_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("telco_nb.lora.packing.RETRY_ROWS", 3)
    wanted = train(tmp_path / "wanted")[0]
    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", ScarceMemory(room=30, last=6))
    found, _, _, rows = train(tmp_path / "found")
    assert rows.shrunk and rows.micro_batch_tokens == rows.most_at_once == 48
    assert all(torch.allclose(wanted[name], found[name], atol=1e-4) for name in wanted)
    kill_at = len(rows) + 1
    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", ScarceMemory(room=30, last=6))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", kill_at)
    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", token_losses)
    resumed, _, watch, again = train(tmp_path / "cut")
    assert watch.resumed and again.shrunk == rows.shrunk
    assert all(torch.equal(found[name], resumed[name]) for name in found)


def test_a_size_that_never_fits_is_tried_again_ever_more_rarely():
    rows, tries = packing.PackedRows(fake_examples(3), 64, 0), []
    rows.most_at_once = rows.micro_batch_tokens = 64
    for row in range(1000):
        if rows.micro_batch_tokens > 40:
            tries.append(row)
            rows.halve(rows.micro_batch_tokens, 10)
        rows.count_fitted()
    assert rows.shrunk == [64] * len(tries) and tries == [0, 20, 60, 140, 300, 620]


@settings(max_examples=8, deadline=None)
@given(st.integers(5, 60), st.integers(0, 5))
def test_a_row_in_any_parts_has_the_same_sum_of_losses_and_the_same_gradient(tokens, seed):
    """Weights in float64, so that hardly more than the order of sums differs."""
    torch.manual_seed(seed)
    tuned = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).double()
    row = packing.PackedRows(fake_examples(), 60, seed)[0]
    found = []
    for parts in ([row], packing.micro_batches(row, tokens)):
        tuned.zero_grad()
        total = sum(token_losses(tuned, part).sum() for part in parts)
        total.backward()
        gradient = torch.cat([p.grad.flatten() for p in tuned.parameters() if p.grad is not None])
        found.append((total.detach(), gradient))
    (a, x), (b, y) = found
    assert abs(a - b) <= 1e-6 * abs(a)  # the head's losses are float32 always
    assert (x - y).norm() <= 1e-6 * x.norm()


def test_the_message_of_torch_s_own_allocator_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("shapes differ"))


def test_one_conversation_that_does_not_fit_ends_with_the_remedy(tmp_path, monkeypatch):
    def full(model, row):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("telco_nb.lora.trainer.token_losses", full)
    with pytest.raises(
        TrainingError,
        match=r"memory ran out with \d+ tokens at once \(CUDA out of memory\.\): set gradient_checkpointing to true",
    ):
        train(tmp_path)
