"""Operations are counted once for all rows, and a packed weight counts as the weights that it holds."""

from types import SimpleNamespace

import pytest
import torch
from architectures import CASES, tiny_model
from peft import LoraConfig

from telco_nb.lora import step


@pytest.fixture
def tuned():
    lora = LoraConfig(r=4, target_modules=step.TARGET_MODULES["all"], task_type="CAUSAL_LM")
    return step.attach_adapters(tiny_model(CASES[0]), lora)


def test_all_rows_at_once_are_the_sum_of_the_rows(tuned):
    rows = [(30, 20, [10, 20]), (15, 5, [15]), (7, 3, [3, 4])]
    at_once = step.step_flops(tuned, 52, 28, [10, 20, 15, 3, 4])
    assert at_once == pytest.approx(sum(step.step_flops(tuned, *row) for row in rows))


def test_weights_packed_two_in_a_byte_count_as_what_they_hold(tuned):
    whole = step.step_flops(tuned, 52, 28, [52])
    for module in tuned.modules():
        if (base := getattr(module, "base_layer", None)) is not None:
            shape = base.weight.shape
            packed = torch.nn.Parameter(torch.zeros(shape.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
            packed.quant_state = SimpleNamespace(shape=shape)
            base.weight = packed
    assert step.step_flops(tuned, 52, 28, [52]) == whole
