"""The learning rate of every optimiser step, against the formulas of the schedules."""

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from telco_nb.lora import packing
from telco_nb.lora.trainer import PackedTrainer, constant_arguments, loss_curve
from tests.unit.lora.test_trainer import fake_examples, tiny


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (2, 1), (10, 3)])
def test_every_step_learns_the_first_and_the_last_too(tmp_path, schedule, steps, warmup):
    rows = packing.PackedRows(fake_examples(), 48, 3)
    tuned = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-2, warmup_steps=warmup,
        lr_scheduler_type=schedule, disable_tqdm=True, **(constant_arguments() | {"save_strategy": "no"}),
    )  # fmt: skip
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
    trainer.train()
    rates = loss_curve(trainer.state.log_history, rows).learning_rate.to_numpy()
    rising = (np.arange(warmup) + 1) / warmup
    left = (np.arange(steps - warmup) + 1) / (steps + 1 - warmup)
    falling = {"linear": 1 - left, "cosine": (1 + np.cos(np.pi * left)) / 2, "constant_with_warmup": np.ones_like(left)}
    assert rates == pytest.approx(1e-2 * np.concatenate([rising, falling[schedule]]), rel=1e-6)
    assert rates.min() > 0
    assert all(p.abs().max() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
